"""How different two images look: distances between features of a frozen network, as LPIPS takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.errors import EditError

MEAN = (0.485, 0.456, 0.406)
SPREAD = (0.229, 0.224, 0.225)
"""What vision transformers subtract and divide by if they say nothing else (ImageNet)."""


class FeatureDistance:
    """A distance between images: squared differences of normalised features, at several depths of a network.

    d(a, b) = Σ_depths mean over places of ‖f(a) / ‖f(a)‖ − f(b) / ‖f(b)‖‖², the distance of Zhang et al. 2018
    ("The unreasonable effectiveness of deep features", LPIPS) with equal weights. It lies between 0 and 4 for
    each depth and is divided by their number.

    No weights of its own are needed: an autoencoder's encoder has features already, and every latent
    diffusion pipeline has one. A vision transformer such as DINO or CLIP may be given instead.

    Args:
        network: a diffusers autoencoder (``pipe.vae``), a transformers vision model (one that takes
            ``pixel_values`` and gives ``hidden_states``), or any function from images (n, 3, h, w) with
            pixels from 0 to 1 to feature maps (n, channels, …).

    Raises:
        EditError: a network of another kind.

    >>> picture = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> distance = FeatureDistance(lambda images: [images])
    >>> distance(picture, picture).tolist(), bool((distance(picture, 1 - picture) > 0).all())
    ([0.0, 0.0], True)
    """

    def __init__(self, network: nn.Module | Callable[[Tensor], Sequence[Tensor]]) -> None:
        if isinstance(network, nn.Module) and hasattr(network, "encoder") and hasattr(network, "decoder"):
            self.features: Callable[[Tensor], Sequence[Tensor]] = _Encoder(network)
        elif isinstance(network, nn.Module) and hasattr(network, "config"):
            self.features = _Vision(network)
        elif callable(network):
            self.features = network
        else:
            raise EditError(
                f"features come from an autoencoder, a vision model or a function of images, not from a "
                f"{type(network).__name__}"
            )

    def __call__(
        self, images: Float[Tensor, "n 3 h w"], others: Float[Tensor, "n 3 h w"]
    ) -> Float[Tensor, " n"]:
        """The distance of each image from its partner; NaN where a pixel is not finite.

        Raises:
            EditError: batches of different shapes, pixels that are not from 0 to 1, or a network that gives
                no feature maps.
        """
        if images.shape != others.shape:
            raise EditError(
                f"images are compared with partners of their own shape; these are {tuple(images.shape)} and "
                f"{tuple(others.shape)}"
            )
        pixels = torch.cat([images, others])
        known = pixels.detach()[pixels.detach().isfinite()]
        if known.numel() and (float(known.min()) < -0.05 or float(known.max()) > 1.05):
            raise EditError(
                f"images have pixels from 0 to 1 to be compared, these from {float(known.min()):.3g} to "
                f"{float(known.max()):.3g}; pixels from -1 to 1 become these by x / 2 + 0.5"
            )
        if not len(images):
            return images.new_zeros(0)
        maps = list(self.features(pixels))
        if not maps or any(m.ndim < 2 or len(m) != 2 * len(images) for m in maps):
            raise EditError(
                f"features of {2 * len(images)} images are maps ({2 * len(images)}, channels, …), not "
                f"{[tuple(m.shape) for m in maps]}"
            )
        total = images.new_zeros(len(images), dtype=torch.promote_types(images.dtype, torch.float32))
        for one in maps:
            places = (one.flatten(2) if one.ndim > 2 else one[..., None]).to(total.dtype)
            ours, theirs = nn.functional.normalize(places, dim=1, eps=1e-10).chunk(2)
            total = total + (ours - theirs).square().sum(1).mean(-1)
        return (total / len(maps)).to(images.dtype)


class _Encoder:
    """Features of an autoencoder: what leaves its first layer, each stage down and its middle."""

    def __init__(self, autoencoder: nn.Module) -> None:
        encoder: Any = autoencoder.encoder
        stages = [getattr(encoder, name, None) for name in ("conv_in", "mid_block")]
        blocks = getattr(encoder, "down_blocks", None)
        if None in stages or not blocks:
            raise EditError(
                f"the encoder of a {type(autoencoder).__name__} has no conv_in, down_blocks and mid_block to "
                "take features from; give a function from images to feature maps instead"
            )
        self.encoder = encoder
        self.stages = [stages[0], *blocks, stages[1]]

    def __call__(self, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = []
        handles = [
            stage.register_forward_hook(lambda _module, _inputs, output: maps.append(output))
            for stage in self.stages
        ]
        weight = next(self.encoder.parameters())
        try:
            self.encoder((images * 2 - 1).to(weight.device, weight.dtype))
        finally:
            for handle in handles:
                handle.remove()
        return [one.to(images.device) for one in maps]


class _Vision:
    """Features of a vision transformer: its hidden states at a few depths, patches as places."""

    def __init__(self, model: nn.Module, depths: int = 4) -> None:
        self.model = getattr(model, "vision_model", model)  # the half of CLIP that sees
        config: Any = getattr(model.config, "vision_config", model.config)
        self.size: int | None = getattr(config, "image_size", None)
        self.depths = depths

    def __call__(self, images: Tensor) -> list[Tensor]:
        weight = next(self.model.parameters())
        seen = images.to(weight.device, weight.dtype)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            seen = nn.functional.interpolate(seen, (self.size, self.size), mode="bicubic", antialias=True)
        centred = (seen - seen.new_tensor(MEAN)[:, None, None]) / seen.new_tensor(SPREAD)[:, None, None]
        states = self.model(pixel_values=centred, output_hidden_states=True).hidden_states[1:]
        few = min(self.depths, len(states))
        chosen = {round(i) for i in torch.linspace(0, len(states) - 1, few).tolist()}
        return [states[i].movedim(-1, 1).to(images.device) for i in sorted(chosen)]
