"""The processes of one launch (`accelerate launch`, torchrun), and how they put results together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from geoedit.errors import EditError

Part = TypeVar("Part")


@dataclass(frozen=True)
class Processes:
    """This process's rank among `world`; all of them call every method (but `share`) in the same order."""

    rank: int = 0
    world: int = 1

    @classmethod
    def current(cls) -> Processes:
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

    @property
    def _device(self) -> torch.device:
        return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")

    def share(self, parts: Sequence[Part]) -> list[Part]:
        """The parts that this process works on: every `world`-th."""
        return list(parts[self.rank :: self.world])

    def objects(self, mine: Any) -> list[Any]:
        """What every process has, in the order of their ranks."""
        if self.world == 1:
            return [mine]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def total(self, mine: Tensor) -> Tensor:
        """The sum over the processes, on the device that `mine` is on."""
        if self.world == 1:
            return mine
        summed = mine.to(self._device, copy=True).contiguous()
        dist.all_reduce(summed)
        return summed.to(mine.device)

    def concatenated(self, mine: Tensor) -> Tensor:
        """The rows of every process's tensor, one after the other, bit by bit and on the CPU.

        Tensors may differ in their number of rows; a process without rows may hold a tensor of any width or
        dtype.
        """
        if self.world == 1:
            return mine
        shapes = self.objects((tuple(mine.shape), mine.dtype))
        parts = []
        for rank, (shape, dtype) in enumerate(shapes):
            if shape[0] == 0:
                continue
            own = rank == self.rank
            part = mine if own else torch.empty(shape, dtype=dtype)
            flat = part.to(self._device).contiguous().view(-1).view(torch.uint8)
            dist.broadcast(flat, src=rank)
            parts.append(flat.view(dtype).view(shape).cpu())
        return torch.cat(parts) if parts else mine

    def together(self, work: Callable[[], Part]) -> Part:
        """Run `work` in every process; if it fails in one, fail in all, so that none waits for ever.

        Raises:
            EditError: another process failed; an own failure is raised as it is.
        """
        if self.world == 1:
            return work()
        failure: Exception | None = None
        result: Part | None = None
        try:
            result = work()
        except Exception as error:
            failure = error
        said = self.objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        if failure is not None:
            raise failure
        for rank, words in enumerate(said):
            if words is not None:
                raise EditError(f"process {rank} of {self.world} failed: {words}")
        return result  # type: ignore[return-value]
