"""One training run by several processes: rows are shared and gradients added, so that n do what one does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoedit.activations.processes import Processes
from geoedit.errors import EditError
from geoedit.sliders.training.task import Batch


@dataclass(frozen=True)
class Workers(Processes):
    """The processes of this launch (`accelerate launch`, torchrun) as they train together, or one alone.

    Every process draws the same whole batch from the same generator and works on its share of the rows. All
    processes call every method in the same order.
    """

    @classmethod
    def current(cls) -> Workers:
        """The processes of this launch; joins their group if nobody has yet."""
        found = Processes.current()
        return cls(found.rank, found.world)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and shows bars."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """This process's own device: its accelerator in a launch, else the best that is there."""
        if self.world > 1:
            kind = self._device
            return torch.device("cuda", torch.cuda.current_device()) if kind.type == "cuda" else kind
        return torch.accelerator.current_accelerator() or torch.device("cpu")

    def index(self, rows: int) -> Int[Tensor, " mine"]:
        """Which of so many rows are this process's: neighbours, in shares that differ by one row at most."""
        bounds = [rows * rank // self.world for rank in (self.rank, self.rank + 1)]
        return torch.arange(*bounds)

    def gather(self, mine: Float[Tensor, "mine *shape"]) -> Float[Tensor, "rows *shape"]:
        """The rows of all processes in the order of `index`, on the device of `mine`."""
        return mine if self.world == 1 else self.concatenated(mine).to(mine.device)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every parameter's gradient by the sum over the processes, all in one message.

        A process without rows has no gradients; they count as zeros.
        """
        if self.world == 1:
            return
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        for parameter in wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in sorted({parameter.dtype for parameter in wanted}, key=str):
            gradients = [p.grad for p in wanted if p.dtype == dtype and p.grad is not None]
            flat = self.total(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def agree(self, value: Any, what: str) -> None:
        """Fail in every process unless all have the same value, such as the step of their checkpoint.

        Raises:
            EditError: they differ.
        """
        values = self.objects(value)
        if any(other != values[0] for other in values):
            raise EditError(f"the processes differ in {what}: {values}; all must see the same output folder")


def gradients(
    loss: Callable[[Batch], Tensor],
    batch: Batch,
    parameters: Iterable[nn.Parameter],
    *,
    workers: Workers | None = None,
    pieces: int = 1,
) -> Float[Tensor, " rows"]:
    """Set the gradients of the mean loss over a batch's rows, and return the loss of every row.

    Each process works on its rows, in so many pieces one after another (gradient accumulation). A piece adds
    ``Σ loss / rows`` with the whole batch's number of rows, so that shares and pieces of unequal length
    still add up to the mean over the joined batch.

    Args:
        loss: gives the loss of each row of a part of the batch.
        batch: the whole batch, the same in every process.
        parameters: those whose gradients are wanted.
        workers: the processes; None: this one alone.
        pieces: how many parts a share is cut into, to save memory.

    Raises:
        EditError: the batch is empty, pieces is no positive number, or another process failed.
    """
    rows = len(batch)
    if rows < 1 or pieces < 1:
        raise EditError(f"a batch of {rows} rows in {pieces} pieces: both must be at least 1")
    workers = workers or Workers()
    wanted = list(parameters)
    for parameter in wanted:
        parameter.grad = None
    mine = workers.index(rows)

    def work() -> list[Tensor]:
        found = []
        for part in mine.tensor_split(min(pieces, max(1, len(mine)))):
            if not len(part):
                continue
            losses = loss(batch.rows(slice(int(part[0]), int(part[-1]) + 1)))
            if losses.shape != part.shape:
                raise EditError(
                    f"the loss of {len(part)} rows has shape {tuple(losses.shape)}: give one number a row"
                )
            (losses.sum() / rows).backward()
            found.append(losses.detach())
        return found

    found = workers.together(work)
    workers.add_gradients(wanted)
    return workers.gather(torch.cat(found) if found else torch.zeros(0))


def check_losses(
    losses: Float[Tensor, " rows"],
    *,
    step: int,
    describe: Callable[[int], str],
    kept: str,
    parameters: Iterable[nn.Parameter] = (),
) -> None:
    """Stop a run whose loss or gradient is no finite number, before the optimizer sees it.

    Args:
        losses: of every row of the joined batch, as `gradients` returns them.
        step: the step's number.
        describe: says what a row is: its timestep and prompt.
        kept: where the last good state is, for the message.
        parameters: those whose gradients are looked at too.

    Raises:
        EditError: a loss or a gradient is infinite or NaN; names step, row, timestep and prompt.
    """
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    mend = "Lower the learning rate, or compute in float32 or bfloat16 rather than float16."
    if bad:
        rows = "; ".join(f"row {row} ({describe(row)}): {float(losses[row])}" for row in bad[:3])
        more = f" and {len(bad) - 3} more rows" if len(bad) > 3 else ""
        raise EditError(f"the loss is no finite number at step {step}: {rows}{more}. {kept} {mend}")
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if found and not all(torch.stack([gradient.isfinite().all() for gradient in found]).tolist()):
        worst = int(losses.argmax())
        raise EditError(
            f"the gradient is no finite number at step {step}, though the losses are; the largest is row "
            f"{worst} ({describe(worst)}): {float(losses[worst])}. {kept} {mend}"
        )
