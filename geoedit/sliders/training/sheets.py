"""Sheets of sample images while a slider is trained: a row for each prompt, a column for each scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases.base import Base
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.adapters import row_scales
from geoedit.sliders.training.settings import TrainSettings
from geoedit.sliders.training.task import Task

ROWS = 4
"""Rows of a sheet whose prompts nobody chose."""


def sample_prompts(task: Task, spec: SliderSpec, chosen: Sequence[str] = ()) -> tuple[str, ...]:
    """The rows of a sheet: those chosen, else the spec's or the task's first; none for a language model."""
    if not isinstance(getattr(task, "base", None), Base):
        return ()
    if chosen:
        return tuple(chosen)
    taught = spec.kind in ("text", "language")
    said = [prompts.target for prompts in spec.contexts()] if taught else getattr(task, "prompts", ())
    return tuple(dict.fromkeys(said))[:ROWS]


@torch.no_grad()
def sheet(
    task: Task,
    prompts: Sequence[str],
    scales: Sequence[float | int],
    settings: TrainSettings,
    *,
    seed: int = 0,
) -> Float[Tensor, "prompts scales 3 height width"]:
    """Images with the adapter as it is, one noise for each prompt, pixels from 0 to 1.

    The noise has a generator of its own, so that a run with sheets has the bits of one without.

    Raises:
        EditError: there are no prompts or scales, or the task has no pipeline to draw with.
    """
    base = getattr(task, "base", None)
    if not isinstance(base, Base) or not prompts or not scales:
        raise EditError(
            f"{type(task).__name__}: sample images of {len(prompts)} prompts at {len(scales)} scales; give "
            "sample_prompts and sample_scales for a pipeline, or sample_every=0"
        )
    own = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(prompts), *base.latent_shape(), generator=own).to(base.device, base.dtype)
    each = torch.arange(len(prompts), device=base.device).repeat_interleave(len(scales))
    columns = torch.tensor([float(scale) for scale in scales], device=base.device)
    with row_scales(base.denoiser, columns.repeat(len(prompts))):
        latents, _ = base.sample(
            base.encode(list(prompts)).rows(each),
            steps=settings.trajectory_steps,
            guidance=settings.trajectory_guidance,
            noise=noise[each],
            unconditional=None if base.guidance_distilled else base.unconditional(len(each)),
        )
    return base.decode(latents).clamp(0, 1).unflatten(0, (len(prompts), len(scales)))
