"""Transformers that attend to latents and words jointly, under flow matching: Stable Diffusion 3 and 3.5."""

from __future__ import annotations

import inspect
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
    """What Stable Diffusion 3 and Flux share: encoded words and pooled ones, shifted autoencoder, shifted times."""

    patch: int
    """Cells along a side of what the transformer sees as one token."""

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
        """(channels, height / cell, width / cell)."""
        side = self.pipe.default_sample_size
        cells = sides(height, width, (side, side), self.autoencoder.cell, self.patch)
        return (self.autoencoder.channels or 0, *cells)

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _shift(self, shape: Sequence[int] | None) -> dict[str, float]:
        """The shift that the pipeline takes from the number of tokens, where its scheduler wants one.

        Linear in the tokens between the config's base and maximum; defaults are the pipeline's own.
        """
        config = self.pipe.scheduler.config
        if not config.get("use_dynamic_shifting"):
            return {}
        compute = inspect.getmodule(type(self.pipe)).calculate_shift
        _, high, wide = self.latent_shape() if shape is None else shape
        tokens = (high // self.patch) * (wide // self.patch)
        names = {
            "base_seq_len": "base_image_seq_len",
            "max_seq_len": "max_image_seq_len",
            "base_shift": "base_shift",
            "max_shift": "max_shift",
        }
        given = {name: config[key] for name, key in names.items() if config.get(key) is not None}
        return {"mu": float(compute(tokens, **given))}


class JointBase(TransformerBase):
    """Stable Diffusion 3."""

    def __init__(self, pipe: Any) -> None:
        config = pipe.transformer.config
        super().__init__(pipe, int(config.patch_size))
        channels = self.autoencoder.channels
        if config.in_channels != channels or config.out_channels != channels:
            raise EditError(
                f"the transformer takes {config.in_channels} channels and gives {config.out_channels} where latents "
                f"have {channels}: the others are a mask or an image (inpainting, control), which sliders do not know"
            )

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

    def _timing(self, steps: int, shape: Sequence[int] | None) -> dict[str, Any]:
        return dict(self._shift(shape))
