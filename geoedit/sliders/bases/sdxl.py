"""SDXL: a U-Net told by two text encoders, their pooled words and the sizes of the image (time ids)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases.autoencoder import Autoencoder
from geoedit.sliders.bases.base import check_prompts
from geoedit.sliders.bases.conditioning import Conditioning
from geoedit.sliders.bases.unet import UNetBase

AESTHETIC, NEGATIVE_AESTHETIC = 6.0, 2.5
"""The scores that the refiner's pipeline tells its U-Net by default, with and without the prompt."""


class SDXLBase(UNetBase):
    """SDXL and its refiner. Time ids: the original's height and width, the crop's corner, the target's size.

    The refiner is told a score instead of the target's size. All are the pipeline's defaults: nothing
    cropped, the original as large as the target.
    """

    @staticmethod
    def _autoencoder(pipe: Any) -> Autoencoder:
        config = pipe.vae.config
        scale: Tensor | float = float(config.scaling_factor)
        shift: Tensor | float = 0.0
        mean, deviation = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and deviation is not None:
            scale = scale / torch.tensor(deviation)[:, None, None]
            shift = torch.tensor(mean)[:, None, None]
        return Autoencoder(pipe.vae, scale, shift, widen=bool(config.get("force_upcast")))

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], *, height: int | None = None, width: int | None = None
    ) -> Conditioning:
        """Words of both encoders side by side, pooled words of the second, and time ids."""
        words, _, pooled, _ = self.pipe.encode_prompt(
            check_prompts(prompts), device=self.device, do_classifier_free_guidance=False
        )
        to = (self.device, self.dtype)
        return Conditioning(
            {
                "words": words.to(*to),
                "pooled": pooled.to(*to),
                "time_ids": self._time_ids(pooled, AESTHETIC, height, width),
            }
        )

    def unconditional(
        self, rows: int = 1, *, height: int | None = None, width: int | None = None
    ) -> Conditioning:
        """The empty prompt, or zeros if the pipeline's config says so (`force_zeros_for_empty_prompt`)."""
        empty = self.encode([""], height=height, width=width).tensors
        words, pooled = empty["words"], empty["pooled"]
        if self.pipe.config.get("force_zeros_for_empty_prompt"):
            words, pooled = torch.zeros_like(words), torch.zeros_like(pooled)
        ids = self._time_ids(pooled, NEGATIVE_AESTHETIC, height, width)
        return Conditioning({"words": words, "pooled": pooled, "time_ids": ids}).repeat(rows)

    def _told(self, conditioning: Conditioning) -> dict[str, Any]:
        tensors = conditioning.tensors
        return {
            "added_cond_kwargs": {
                "text_embeds": tensors["pooled"].to(self.dtype),
                "time_ids": tensors["time_ids"],
            }
        }

    def _time_ids(self, pooled: Tensor, score: float, height: int | None, width: int | None) -> Tensor:
        """(rows, 6), or (rows, 5) for a refiner."""
        _, high, wide = self.latent_shape(height, width)
        size = [high * self.autoencoder.cell, wide * self.autoencoder.cell]
        config = self.config
        room = config.projection_class_embeddings_input_dim - pooled.shape[-1]
        kinds = {6: [*size, 0, 0, *size], 5: [*size, 0, 0, score]}
        if room % config.addition_time_embed_dim or room // config.addition_time_embed_dim not in kinds:
            raise EditError(
                f"the U-Net's added embedding has room for {room / config.addition_time_embed_dim:g} numbers "
                f"beside pooled words of width {pooled.shape[-1]}; SDXL has 6 and its refiner 5: the text "
                "encoder and the U-Net do not belong together"
            )
        ids = kinds[room // config.addition_time_embed_dim]
        return torch.tensor([ids], dtype=self.dtype, device=self.device).repeat(len(pooled), 1)
