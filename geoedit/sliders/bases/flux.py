"""Flux: a transformer over packed latents and words, told its guidance, under flow matching."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases.base import check_rows
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.bases.joint import TransformerBase, check_channels


class FluxBase(TransformerBase):
    """Flux. Latents are (channels, height, width) here; `predict` packs two by two cells into a token.

    Where guidance is no input (`guidance_embeds` is False, as in Flux schnell), `guided` does two passes.
    """

    max_shift = 1.15

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe, 2)
        config = self.config
        check_channels(config.in_channels, config.get("out_channels"), 4 * (self.autoencoder.channels or 0))
        self.guidance_distilled = bool(config.guidance_embeds)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        words, pooled, _ = self.pipe.encode_prompt(prompts, None, device=self.device)
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
        high, wide = latents.shape[-2:]
        if high % 2 or wide % 2:
            raise EditError(f"latents of {high} × {wide} cells: Flux packs two by two, so both must be even")
        words = conditioning.tensors["words"].to(self.dtype)
        told: dict[str, Any] = {}
        if self.guidance_distilled:
            scale = 1.0 if guidance is None else float(guidance)
            told["guidance"] = torch.full((len(latents),), scale, device=latents.device)
        output = self.denoiser(
            hidden_states=rearrange(latents, "n c (h a) (w b) -> n (h w) (c a b)", a=2, b=2).to(self.dtype),
            timestep=times.to(self.dtype) / 1000,
            pooled_projections=conditioning.tensors["pooled"].to(self.dtype),
            encoder_hidden_states=words,
            txt_ids=words.new_zeros(words.shape[1], 3),
            img_ids=_places(high // 2, wide // 2, words),
            return_dict=False,
            **told,
        )[0]
        output = rearrange(output, "n (h w) (c a b) -> n c (h a) (w b)", h=high // 2, a=2, b=2)
        return output.to(latents.dtype)

    def _timing(self, steps: int, shape: Sequence[int] | None) -> dict[str, Any]:
        """The shift, and the levels before it: evenly from 1 to 1 / steps."""
        told = super()._timing(steps, shape)
        if not self.noise_schedule.config.get("use_flow_sigmas"):
            told["sigmas"] = np.linspace(1.0, 1 / steps, steps)
        return told


def _places(high: int, wide: int, like: Tensor) -> Float[Tensor, "tokens 3"]:
    """Each token's place (0, row, column), for the rotary embedding."""
    rows = torch.arange(high, device=like.device).repeat_interleave(wide)
    columns = torch.arange(wide, device=like.device).repeat(high)
    return torch.stack([torch.zeros_like(rows), rows, columns], 1).to(like.dtype)
