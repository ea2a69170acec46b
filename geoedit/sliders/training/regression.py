"""Tasks whose targets are computed once and kept: a step is one pass of the student and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases.base import Base
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.training.adapters import adapter_off, row_scales
from geoedit.sliders.training.task import Batch, Task
from geoedit.sliders.training.trajectories import integers

if TYPE_CHECKING:
    from geoedit.sliders.training.settings import TrainSettings

TOGETHER = 128
"""Rows of the frozen model's passes."""
KEPT = "kept."
"""What the kept rows' tensors are called in a task's state."""


class RegressionTask(Task):
    r"""The denoiser at scale s is brought to a known output: the mean square of a row's error.

    Rows come in couples, the two signs of one draw, one after the other; a step draws whole couples. All
    outputs of the frozen model are computed when rows are made, `settings.refresh` steps apart.

    Args:
        base: the pipeline.
        name: what the slider moves.
        prompts: what the denoiser is told; a row has the number of one.
        batch_size: rows of a step: two for each couple.

    Raises:
        EditError: there are no prompts, or no room for a couple in a batch.
    """

    def __init__(self, base: Base, name: str, prompts: Sequence[str], *, batch_size: int = 8) -> None:
        if isinstance(prompts, str) or not prompts:
            raise EditError(
                f"prompts of {name!r} are {prompts!r}; give a list of one or more, [''] for none."
            )
        if batch_size < 2:
            raise EditError(f"batch_size is {batch_size}; a couple of both signs takes 2 rows.")
        self.base, self.name, self.prompts, self.batch_size = base, name, tuple(prompts), batch_size
        self.components = {base.component: base.denoiser}

    @abstractmethod
    def make(self, couples: int, settings: TrainSettings, generator: torch.Generator) -> Batch:
        """Draw couples of rows: "latents", "times", "prompts" (numbers), "scales", "targets", "weights"."""

    def frozen(
        self,
        latents: Float[Tensor, "rows *shape"],
        times: Float[Tensor, " rows"],
        prompts: Int[Tensor, " rows"],
    ) -> Float[Tensor, "rows *shape"]:
        """What the denoiser says without the adapter, so many rows at a time that memory is bounded."""
        parts = zip(latents.split(TOGETHER), times.split(TOGETHER), prompts.split(TOGETHER), strict=True)
        return torch.cat([self._predict(*part) for part in parts])

    def prepare(self, settings: TrainSettings, generator: torch.Generator) -> None:
        """Encode the prompts and make the first rows."""
        self.settings = settings
        self.conditioning = encoded(self.base, self.prompts)
        self.kept = self._made(settings.cache * settings.kept, generator)

    def draw(self, step: int, generator: torch.Generator) -> Batch:
        """Couples drawn from those that are kept; some of these are made anew on schedule."""
        settings, couples = self.settings, len(self.kept) // 2
        if settings.refresh and step and step % settings.refresh == 0:
            fresh = self._made(max(1, round(couples * settings.refresh_share)), generator)
            rows = torch.arange(len(fresh), len(self.kept), device=self.base.device)
            self.kept = Batch.concatenate([self.kept.rows(rows), fresh])
        count = max(1, self.batch_size // 2)
        which = integers(couples, count, generator)
        rows = torch.stack([2 * which, 2 * which + 1], 1).flatten()
        return self.kept.rows(rows.to(self.base.device))

    def loss(self, batch: Batch) -> Float[Tensor, " rows"]:
        """Weighted mean square error of each row, with the adapter at the row's scale."""
        with row_scales(self.components.values(), batch["scales"]):
            output = self._predict(batch["latents"], batch["times"], batch["prompts"])
        error = (output.float() - batch["targets"].float()).square().flatten(1).mean(1)
        return batch["weights"] * error

    def describe(self, batch: Batch, row: int) -> str:
        """Time, scale and prompt of a row."""
        time, scale = float(batch["times"][row]), float(batch["scales"][row])
        return f"time {time:g}, scale {scale:g}, prompt {self.prompts[int(batch['prompts'][row])]!r}"

    def state(self) -> dict[str, Tensor]:
        """The kept rows."""
        return {KEPT + name: tensor for name, tensor in self.kept.tensors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put the kept rows back.

        Raises:
            EditError: the state is one of another task.
        """
        found = {name.removeprefix(KEPT): tensor for name, tensor in state.items() if name.startswith(KEPT)}
        if found.keys() != self.kept.tensors.keys():
            raise EditError(
                f"this task's state has {', '.join(self.kept.tensors)}; it got {', '.join(found) or 'none'}."
            )
        self.kept = Batch(found).to(self.base.device)

    def _predict(self, latents: Tensor, times: Tensor, prompts: Tensor) -> Tensor:
        guidance = self.settings.trajectory_guidance
        return self.base.predict(latents, times, self.conditioning.rows(prompts), guidance=guidance)

    @torch.no_grad()
    def _made(self, couples: int, generator: torch.Generator) -> Batch:
        with adapter_off(self.components.values()):
            batch = self.make(couples, self.settings, generator)
        bad = next(
            (name for name, tensor in batch.tensors.items() if not bool(tensor.isfinite().all())), None
        )
        if bad is not None:
            raise EditError(
                f"the {bad} of {self.name!r} are not all finite: the model gives NaN or infinity."
            )
        return batch


def encoded(base: Base, prompts: Sequence[str]) -> Conditioning:
    """Prompts for the denoiser; if all are empty, what says nothing, which every base has."""
    return base.encode(prompts) if any(prompts) else base.unconditional(len(prompts))


def loss_weights(base: Base, times: Float[Tensor, " rows"], gamma: float) -> Float[Tensor, " rows"]:
    """What the squared error of an output counts at each time, by min-SNR-γ.

    An error of the clean latents counts min(SNR, γ), SNR = signal² / noise²: for noise that is
    min(SNR, γ) / SNR, for v min(SNR, γ) / (SNR + 1). The velocity of flow matching counts alike at all times.

    Source: Hang et al., "Efficient diffusion training via min-SNR weighting strategy" (2023).
    """
    signal, noise = (level.flatten() for level in base.levels(times))
    ratio = (signal / noise).square()
    capped = ratio.clamp_max(gamma)
    match base.prediction:
        case "epsilon":
            return torch.where(ratio > 0, capped / ratio, 1.0)
        case "v_prediction":
            return capped / (ratio + 1)
        case "sample":
            return capped
        case "flow":
            return torch.ones_like(ratio)
