"""Transformers that attend to latents and words jointly, under flow matching: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases.autoencoder import Autoencoder
from geoedit.sliders.bases.base import Base, check_prompts, check_rows
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.bases.unet import sides


class TransformerBase(Base):
    """What Stable Diffusion 3 and Flux share: words and pooled words, shifted latents, shifted times."""

    patch: int
    """Cells along a side of what the transformer sees as one token."""
    max_shift = 1.16
    """Where the scheduler's config has none: the pipeline's default."""

    def __init__(self, pipe: Any, patch: int) -> None:
        config = pipe.vae.config
        autoencoder = Autoencoder(
            pipe.vae,
            scale=float(config.get("scaling_factor") or 1.0),
            shift=float(config.get("shift_factor") or 0.0),
        )
        super().__init__(pipe, "transformer", autoencoder)
        self.patch = patch

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], *, height: int | None = None, width: int | None = None
    ) -> Conditioning:
        """The words of all text encoders and their pooled ones."""
        prompts = check_prompts(prompts)
        words, pooled = self._encode(prompts)
        to = (self.device, self.dtype)
        return Conditioning({"words": words.to(*to), "pooled": pooled.to(*to)})

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(channels, cells along the height, cells along the width)."""
        side = self.pipe.default_sample_size
        cells = sides(height, width, (side, side), self.autoencoder.cell, self.patch)
        return (self.autoencoder.channels or 0, *cells)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _timing(self, steps: int, shape: Sequence[int] | None) -> dict[str, Any]:
        """The shift μ of the times, linear in the number of tokens, where the scheduler wants one.

        ``μ = base + (max − base) (tokens − base tokens) / (max tokens − base tokens)`` (Esser et al. 2024).
        """
        config = self.noise_schedule.config
        if not config.get("use_dynamic_shifting"):
            return {}
        _, high, wide = self.latent_shape() if shape is None else shape
        tokens = (high // self.patch) * (wide // self.patch)
        fewest = config.get("base_image_seq_len", 256)
        most = config.get("max_image_seq_len", 4096)
        least = config.get("base_shift", 0.5)
        slope = (config.get("max_shift", self.max_shift) - least) / (most - fewest)
        return {"mu": least + slope * (tokens - fewest)}


class JointBase(TransformerBase):
    """Stable Diffusion 3."""

    def __init__(self, pipe: Any) -> None:
        config = pipe.transformer.config
        super().__init__(pipe, int(config.patch_size))
        check_channels(config.in_channels, config.out_channels, self.autoencoder.channels or 0)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        words, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False
        )
        return words, pooled

    def predict(
        self,
        latents: Float[Tensor, "rows channels height width"],
        times: Float[Tensor, " rows"],
        conditioning: Conditioning,
        *,
        guidance: float | int | None = None,
    ) -> Float[Tensor, "rows channels height width"]:
        """The velocity, noise − clean; see `Base.predict`."""
        check_rows(latents, times, conditioning)
        output = self.denoiser(
            hidden_states=latents.to(self.dtype),
            timestep=times,
            encoder_hidden_states=conditioning.tensors["words"].to(self.dtype),
            pooled_projections=conditioning.tensors["pooled"].to(self.dtype),
            return_dict=False,
        )[0]
        return output.to(latents.dtype)


def check_channels(taken: int, given: int | None, expected: int) -> None:
    """Raise if the transformer takes more channels than latents have, or gives others."""
    if taken != expected or given not in (None, expected):
        raise EditError(
            f"the transformer takes {taken} channels and gives {given or taken} where latents have "
            f"{expected}: the others are a mask or an image (inpainting, control), which sliders do not know"
        )
