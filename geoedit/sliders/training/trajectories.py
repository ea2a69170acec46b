"""Noised latents as sampling visits them, drawn with or without the slider at work."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.sliders.bases.base import Base
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.training.adapters import adapter_off, row_scales


def normal(shape: Iterable[int], generator: torch.Generator, like: Tensor) -> Tensor:
    """Standard normal numbers, drawn where the generator is, on the device and in the type of a tensor."""
    drawn = torch.randn(tuple(shape), generator=generator, device=generator.device)
    return drawn.to(like.device, like.dtype)


def uniform(count: int, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Numbers from 0 to 1, on the CPU."""
    return torch.rand(count, generator=generator, device=generator.device).cpu()


def integers(below: int, count: int, generator: torch.Generator) -> Int[Tensor, " count"]:
    """Whole numbers from 0 to below − 1, on the CPU."""
    return torch.randint(below, (count,), generator=generator, device=generator.device).cpu()


@torch.no_grad()
def visit(
    base: Base,
    conditioning: Conditioning,
    scales: Float[Tensor, " rows"] | None,
    *,
    noise: Float[Tensor, "rows *shape"],
    steps: int,
    guidance: float,
    unconditional: Conditioning | None,
    keep: int,
) -> tuple[Float[Tensor, "rows kept *shape"], Float[Tensor, " kept"]]:
    """Latents that trajectories pass through, evenly over the steps, and their times.

    Args:
        base: the pipeline.
        conditioning: a prompt for each trajectory.
        scales: the slider's scale in each; None switches it off.
        noise: where each begins.
        steps: sampling steps.
        guidance: of the sampling.
        unconditional: the other half of guidance.
        keep: how many latents of each are kept.
    """
    kept = torch.linspace(0, steps - 1, min(keep, steps)).round().long().tolist()
    context = adapter_off(base.denoiser) if scales is None else row_scales(base.denoiser, scales)
    with context:
        _, latents = base.sample(
            conditioning,
            steps=steps,
            guidance=guidance,
            noise=noise,
            unconditional=unconditional,
            keep=kept,
        )
    return latents, base.schedule(steps, noise.shape[1:])[kept]


@torch.no_grad()
def frozen(
    base: Base,
    latents: Float[Tensor, "rows *shape"],
    times: Float[Tensor, " rows"],
    conditioning: Conditioning,
    rows: Int[Tensor, " rows"],
    *,
    guidance: float,
    together: int = 64,
) -> Float[Tensor, "rows *shape"]:
    """The base's own predictions, without the adapter and without guidance, so many rows at a time.

    Args:
        base: the pipeline.
        latents: noised latents.
        times: of each.
        conditioning: prompts.
        rows: which prompt each row has.
        guidance: what a guidance-distilled denoiser is told.
        together: rows of one pass.
    """
    parts = zip(latents.split(together), times.split(together), rows.split(together), strict=True)
    with adapter_off(base.denoiser):
        found = [
            base.predict(part, when, conditioning.rows(which), guidance=guidance)
            for part, when, which in parts
        ]
    return torch.cat(found)
