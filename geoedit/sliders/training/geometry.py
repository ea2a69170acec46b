"""Geometry in training: steps on the manifold of low-rank updates, effects along the image manifold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from geoedit.errors import EditError
from geoedit.sliders.bases.base import Base
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.training.adapters import adapter_off
from manifolds import ManifoldError
from manifolds.optim import LowRankAdam

LEARNING_RATES: Mapping[str, float] = {"adamw": 2e-3, "low_rank_adam": 1e-3}
"""What each optimizer takes where the caller names no rate. Their units differ: see `make_optimizer`."""

TOGETHER = 64
"""Rows of one pass of the denoiser."""


def make_optimizer(
    modules: Mapping[str, nn.Module],
    *,
    optimizer: str = "adamw",
    learning_rate: float | None = None,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    adapter: str | None = None,
) -> torch.optim.Optimizer:
    """The optimizer of a slider's adapter, over all components that it changes.

    ``"adamw"`` steps the factors B and A of each update ΔW = s·B A as if they were plain numbers.
    ``"low_rank_adam"`` (`manifolds.optim.LowRankAdam`) steps ΔW itself on the matrices of rank at most r, in
    orthonormal frames of its rows and columns; the step does not depend on how ΔW is split, and A keeps
    orthogonal rows. Its rate is a length for entries of ΔW in tangent coordinates, AdamW's one for entries of
    B and A, so that a rate that suits one says nothing of the other.

    Args:
        modules: the components by name, with adapters in them; only what requires gradients is stepped.
        optimizer: which.
        learning_rate: its rate; the one in `LEARNING_RATES` if not given.
        betas: decay of the first and the second moment.
        weight_decay: decoupled; shrinks the update.
        adapter: for ``"low_rank_adam"`` only the pairs of this adapter are stepped as products.

    Raises:
        EditError: an unknown name, a rate that is no number above 0, or no parameter that can be trained.
    """
    if optimizer not in LEARNING_RATES:
        raise EditError(f"optimizer is {optimizer!r}; there are {', '.join(LEARNING_RATES)}.")
    rate = LEARNING_RATES[optimizer] if learning_rate is None else learning_rate
    if not 0 < rate < float("inf"):
        raise EditError(f"the learning rate is {rate}; it is a finite number above 0.")
    together = nn.ModuleList(modules.values())
    trained = [parameter for parameter in together.parameters() if parameter.requires_grad]
    if not trained:
        raise EditError(
            f"nothing can be trained: no parameter of {', '.join(modules) or 'no component'} requires "
            "gradients. Add an adapter first."
        )
    if optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=rate, betas=betas, weight_decay=weight_decay)
    try:
        return LowRankAdam(
            together, lr=rate, betas=betas, weight_decay=weight_decay, plain_lr=rate, adapter=adapter
        )
    except ManifoldError as wrong:
        raise EditError(f"optimizer 'low_rank_adam' does not fit this adapter: {wrong}") from wrong


class DenoiserTangents:
    r"""The tangent spaces of the image manifold that a denoiser itself knows.

    Let \(z = \alpha x + \sigma \varepsilon\) and \(D(z) = \mathrm E[x \mid z]\). Then

    .. math:: \alpha\, \frac{\partial D}{\partial z} = \frac{\alpha^2}{\sigma^2}\, \mathrm{Cov}(x \mid z),

    and where \(\sigma\) is small against the curvature of the images' manifold, and large against the
    model's own errors, that matrix is the orthogonal projection onto the tangent space: one along it, zero
    across. No samples are needed, and no dimension. It is taken at the clean latents themselves, with noise
    neither added nor removed, by one forward-mode derivative.

    A change of what a denoiser predicts (noise, velocity or clean latents) is a multiple of the change of the
    clean latents that it means, one factor for a row; so the map, being linear, serves for all of them.

    Args:
        base: the pipeline.
        time: the noise that counts as small, in the denoiser's time.
        powers: how often the map is applied; more sharpens a spectrum that is not yet zero and one.

    Raises:
        EditError: a time without noise, or fewer than one application.

    Source: Stanczuk et al., "Your diffusion model secretly knows the dimension of the data manifold" (2022);
    Efron, "Tweedie's formula and selection bias" (2011), for the first moment; Manor and Michaeli, "On the
    posterior distribution in denoising" (2024), for the second.
    """

    def __init__(self, base: Base, *, time: float = 150.0, powers: int = 1) -> None:
        if powers < 1:
            raise EditError(f"powers is {powers}; the tangent map is applied once or more.")
        _, noise = base.levels(torch.tensor([float(time)], device=base.device))
        if not float(noise.flatten()[0]) > 0:
            raise EditError(f"time is {time}, where there is no noise; tangents need some: 50 to 300.")
        self.base, self.time, self.powers = base, float(time), powers

    def __call__(
        self,
        clean: Float[Tensor, "rows *shape"],
        change: Float[Tensor, "rows *shape"],
        conditioning: Conditioning,
    ) -> Float[Tensor, "rows *shape"]:
        """The tangent part of each row's change; without gradients."""
        parts = [
            self._along(at, along, conditioning.rows(rows))
            for at, along, rows in zip(
                clean.detach().split(TOGETHER),
                change.detach().split(TOGETHER),
                torch.arange(len(clean), device=clean.device).split(TOGETHER),
                strict=True,
            )
        ]
        return torch.cat(parts)

    def _along(self, clean: Tensor, change: Tensor, conditioning: Conditioning) -> Tensor:
        base = self.base
        times = torch.full((len(clean),), self.time, device=clean.device)
        signal = base.levels(times)[0].to(clean)

        def denoised(latents: Tensor) -> Tensor:
            return base.clean(latents, times, base.predict(latents, times, conditioning))

        # The fused attention kernels know no forward mode.
        with torch.no_grad(), adapter_off(base.denoiser), sdpa_kernel(SDPBackend.MATH):
            for _ in range(self.powers):
                found: Any = jvp(denoised, (signal * clean,), ((signal * change).to(clean),))
                change = found[1]
        return change
