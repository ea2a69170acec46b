"""U-Nets: Stable Diffusion 1.x and 2.x, told by cross-attention; and U-Nets that take no prompts."""

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


class UNetBase(Base):
    """A U-Net that denoises latents of an autoencoder, or pixels.

    A U-Net distilled from guidance (LCM: `time_cond_proj_dim`) is told the guidance as its pipeline tells it.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe, "unet", self._autoencoder(pipe))
        config = self.config
        check_unet(config, self.autoencoder)
        self.guidance_distilled = config.get("time_cond_proj_dim") is not None
        self.takes_prompts = any(
            getattr(module, "is_cross_attention", False) for module in self.denoiser.modules()
        )

    @staticmethod
    def _autoencoder(pipe: Any) -> Autoencoder:
        module = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
        if module is None:
            return Autoencoder(None)
        return Autoencoder(module, scale=float(module.config.get("scaling_factor") or 1.0))

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], *, height: int | None = None, width: int | None = None
    ) -> Conditioning:
        """The text encoder's words."""
        prompts = check_prompts(prompts)
        if not self.takes_prompts or not hasattr(self.pipe, "encode_prompt"):
            raise EditError(
                f"this pipeline ({type(self.pipe).__name__}) takes no prompts: its U-Net has no "
                "cross-attention, or it has no text encoder; use a direction or pairs of images instead"
            )
        words = self.pipe.encode_prompt(prompts, self.device, 1, False)[0]
        return Conditioning({"words": words.to(self.device, self.dtype)})

    def unconditional(
        self, rows: int = 1, *, height: int | None = None, width: int | None = None
    ) -> Conditioning:
        """The empty prompt; where there are no prompts, rows that say nothing."""
        if self.takes_prompts:
            return super().unconditional(rows, height=height, width=width)
        return Conditioning({"nothing": torch.empty(rows, 0, device=self.device, dtype=self.dtype)})

    def predict(
        self,
        latents: Float[Tensor, "rows channels height width"],
        times: Float[Tensor, " rows"],
        conditioning: Conditioning,
        *,
        guidance: float | int | None = None,
    ) -> Float[Tensor, "rows channels height width"]:
        """The U-Net's output; see `Base.predict`."""
        check_rows(latents, times, conditioning)
        told: dict[str, Any] = {}
        if self.takes_prompts:
            told = self._told(conditioning)
            told["encoder_hidden_states"] = conditioning.tensors["words"].to(self.dtype)
        elif "cross_attention_dim" in self.config:
            told["encoder_hidden_states"] = None
        if self.guidance_distilled:
            told["timestep_cond"] = self._guidance(1.0 if guidance is None else guidance, len(latents))
        output = self.denoiser(latents.to(self.dtype), times, return_dict=False, **told)[0]
        return output.to(latents.dtype)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        """(channels, cells along the height, cells along the width)."""
        side = self.config.sample_size
        if side is None and None in (height, width):
            raise EditError("the U-Net's config names no size (sample_size): say height and width in pixels")
        default = tuple(side) if isinstance(side, tuple | list) else (side or 0, side or 0)
        cells = sides(height, width, default, self.autoencoder.cell)
        return (self.config.in_channels, *cells)

    def _told(self, conditioning: Conditioning) -> dict[str, Any]:
        """What the family's U-Net is told beside the words."""
        return {}

    def _guidance(self, guidance: float | int, rows: int) -> Tensor:
        """The embedding of a guidance scale, as the pipeline computes it (Meng et al. 2023)."""
        embed = self.pipe.get_guidance_scale_embedding
        scales = torch.full((rows,), guidance - 1.0, device=self.device)
        return embed(scales, embedding_dim=self.config.time_cond_proj_dim).to(self.device, self.dtype)


def sides(
    height: int | None, width: int | None, default: Sequence[int], cell: int, multiple: int = 1
) -> tuple[int, int]:
    """Cells along both sides of an image of so many pixels; the default (in cells) where a side is None.

    Raises:
        EditError: pixels that the cells do not divide, or cells that `multiple` does not.
    """
    counts = []
    for name, pixels, cells in (("height", height, default[0]), ("width", width, default[1])):
        if pixels is not None:
            cells = pixels // cell
            if pixels < 1 or pixels % (cell * multiple):
                raise EditError(f"a {name} of {pixels} pixels: it must be a multiple of {cell * multiple}")
        counts.append(int(cells))
    return counts[0], counts[1]


def check_unet(config: Any, autoencoder: Autoencoder) -> None:
    """Raise if the U-Net wants input beside latents, time and words, or gives more than one prediction."""
    channels = autoencoder.channels or config.out_channels
    if config.in_channels != channels:
        raise EditError(
            f"the U-Net takes {config.in_channels} channels where latents have {channels}: the others are a "
            "mask, an image or a depth (inpainting and the like), which sliders do not know; take the "
            "text-to-image model"
        )
    if config.out_channels != config.in_channels:
        raise EditError(
            f"the U-Net gives {config.out_channels} channels for {config.in_channels} (a learned variance?): "
            "sliders need one prediction of the latents' shape"
        )
    if config.get("class_embed_type") is not None or config.get("num_class_embeds") is not None:
        raise EditError("the U-Net is told a class beside the latents: sliders know of words only")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise EditError(
            f"the U-Net wants addition_embed_type={config.addition_embed_type!r}, which is not known here"
        )
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise EditError(
            f"the U-Net wants encoder_hid_dim_type={config.encoder_hid_dim_type!r} (an image's embedding, as "
            "IP-Adapters give): unload it first"
        )
