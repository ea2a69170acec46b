"""What training, use and measurement ask of a diffusion pipeline, whatever its family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.sliders.bases.conditioning import Conditioning

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


class Base(ABC):
    """A pipeline seen through its denoiser. Times are the denoiser's own input (0 … 1000 for most).

    Signal and noise: latents at a time are ``signal(t) · clean + noise(t) · noise``; for flow matching
    ``(1 − σ) · clean + σ · noise`` with σ = t / 1000.

    Attributes:
        pipe: the pipeline.
        component: the denoiser's name in the pipeline: "unet" or "transformer".
        denoiser: the module itself.
        prediction: what its output means.
        guidance_distilled: whether guidance is an input of the denoiser (Flux), so that one pass is enough.
    """

    pipe: Any
    component: str
    denoiser: nn.Module
    prediction: Prediction
    guidance_distilled: bool = False

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Encode prompts, a row each, without gradients, as the pipeline itself would."""

    @abstractmethod
    def predict(
        self,
        latents: Float[Tensor, "rows *shape"],
        times: Float[Tensor, " rows"],
        conditioning: Conditioning,
        *,
        guidance: float | None = None,
    ) -> Float[Tensor, "rows *shape"]:
        """One forward pass of the denoiser: its raw output, a time for each row. With gradients if asked for.

        `guidance` is the input of a guidance-distilled denoiser; others ignore it.
        """

    @abstractmethod
    def levels(self, times: Float[Tensor, " rows"]) -> tuple[Tensor, Tensor]:
        """Signal and noise factors at times, shaped to multiply latents."""

    @abstractmethod
    def schedule(self, steps: int) -> Float[Tensor, " steps"]:
        """The times that the pipeline visits in so many steps, the noisiest first."""

    @abstractmethod
    def step(self, output: Tensor, index: int, latents: Tensor, times: Float[Tensor, " steps"]) -> Tensor:
        """One deterministic sampling step (DDIM with η = 0, or Euler) from times[index] to times[index + 1] (or the end)."""

    @abstractmethod
    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """Shape of one image's latents as `predict` takes them (without the rows)."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "rows *shape"]) -> Float[Tensor, "rows 3 height width"]:
        """Images from clean latents, pixels from 0 to 1. Differentiable."""

    @abstractmethod
    def encode_images(self, images: Float[Tensor, "rows 3 height width"]) -> Float[Tensor, "rows *shape"]:
        """Clean latents (the mean) of images with pixels from 0 to 1."""

    def clean(self, latents: Tensor, times: Tensor, output: Tensor) -> Tensor:
        """The clean latents that an output means."""
        raise NotImplementedError  # built in this class from `levels` and `prediction` (engineer B)

    def noise(self, latents: Tensor, times: Tensor, output: Tensor) -> Tensor:
        """The noise that an output means."""
        raise NotImplementedError

    def guided(
        self,
        latents: Tensor,
        times: Tensor,
        conditioning: Conditioning,
        unconditional: Conditioning | None,
        guidance: float,
    ) -> Tensor:
        """Output under guidance: u + g (c − u), both halves in one pass; one half only if g is 1 or unconditional is None."""
        raise NotImplementedError

    def sample(
        self,
        conditioning: Conditioning,
        *,
        steps: int,
        guidance: float,
        noise: Tensor,
        unconditional: Conditioning | None = None,
        keep: Sequence[int] = (),
    ) -> tuple[Tensor, Tensor]:
        """A whole trajectory without gradients: the clean latents, and the noisy latents before the steps in `keep` (rows, kept, *shape)."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type that the denoiser computes in."""
        return next(self.denoiser.parameters()).dtype
