"""Pixels to latents and back, as the pipelines scale them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.errors import EditError


@dataclass(frozen=True)
class Autoencoder:
    """A pipeline's autoencoder with its convention: latents are ``(encoded − shift) · scale``.

    Attributes:
        module: an autoencoder of diffusers, or None where the denoiser works on pixels (from −1 to 1).
        scale: a number, or a tensor (channels, 1, 1).
        shift: likewise.
        widen: whether it overflows in half precision and is run in single (SDXL's).
    """

    module: Any
    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    widen: bool = False

    @property
    def channels(self) -> int | None:
        """Channels of its latents, if it says so."""
        return None if self.module is None else self.module.config.get("latent_channels")

    @property
    def cell(self) -> int:
        """Pixels along a side of a latent's cell."""
        return 1 if self.module is None else 2 ** (len(self.module.config.block_out_channels) - 1)

    def decode(
        self, latents: Float[Tensor, "rows channels height width"]
    ) -> Float[Tensor, "rows colours pixels_high pixels_wide"]:
        """Images with pixels from 0 to 1."""
        pixels = latents
        if self.module is not None:
            encoded = latents / _like(self.scale, latents) + _like(self.shift, latents)
            pixels = self._call("decode", encoded)[0].to(latents.dtype)
        return (pixels / 2 + 0.5).clamp(0, 1)

    def encode(
        self, images: Float[Tensor, "rows colours pixels_high pixels_wide"]
    ) -> Float[Tensor, "rows channels height width"]:
        """Latents (the mean) of images with pixels from 0 to 1.

        Raises:
            EditError: pixels outside [0, 1], or NaN.
        """
        if not bool(((images >= -1e-4) & (images <= 1 + 1e-4)).all()):
            raise EditError("images to encode have pixels outside 0 … 1, or NaN: scale them first")
        pixels = images * 2 - 1
        if self.module is None:
            return pixels
        out = self._call("encode", pixels)
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return (latents.to(images.dtype) - _like(self.shift, images)) * _like(self.scale, images)

    def _call(self, name: str, value: Tensor) -> Any:
        """One method of the module, in single precision on copies of its weights if halves overflow."""
        if not (self.widen and self.module.dtype == torch.float16):
            return getattr(self.module, name)(value.to(self.module.dtype))
        called = _Method(self.module, name)
        wide = {key: tensor.float() for key, tensor in called.state_dict().items()}
        return torch.func.functional_call(called, wide, (value.float(),))


class _Method(nn.Module):
    """A module whose forward pass is another module's method, for `functional_call`."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__()
        self.module = module
        self.name = name

    def forward(self, value: Tensor) -> Any:
        return getattr(self.module, self.name)(value)


def _like(factor: Tensor | float, latents: Tensor) -> Tensor | float:
    return factor.to(latents) if isinstance(factor, Tensor) else factor
