"""The processes of one launch (`accelerate launch`, torchrun) share the matrices of an update."""

import heapq
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from peft_analysis.errors import UpdateError

Part = TypeVar("Part")


@dataclass(frozen=True)
class Processes:
    """This process's rank among `world`; all of them call `gather` and `together` in the same order."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> "Processes":
        """The processes of this launch; joins their group if nobody has yet."""
        if not dist.is_available():
            return cls()
        if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import PartialState
            from accelerate.utils import parse_flag_from_env

            # Left to itself where there is no accelerator, it joins the group and yet reports one process.
            alone = not torch.accelerator.is_available()
            PartialState(cpu=alone or parse_flag_from_env("ACCELERATE_USE_CPU"))
        return cls(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else cls()

    def share(self, costs: Mapping[str, float]) -> list[str]:
        """The names that this process works on, in the order given.

        Each name goes to the process with the least work so far, the dearest first.
        """
        loads = [(0.0, rank) for rank in range(self.world)]
        mine = set()
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + costs[name], rank))
            if rank == self.rank:
                mine.add(name)
        return [name for name in costs if name in mine]

    def gather(self, mine: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def together(self, work: Callable[[], Part]) -> Part:
        """Run `work` in every process; if it fails in one, fail in all, so that none waits for ever.

        Raises:
            UpdateError: another process failed; an own failure is raised as it is.
        """
        if self.world == 1:
            return work()
        failure: Exception | None = None
        result: Part | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        said = self.gather(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, words in enumerate(said):
            if words is not None:
                raise UpdateError(f"process {rank} of {self.world} failed: {words}")
        return result  # type: ignore[return-value]
