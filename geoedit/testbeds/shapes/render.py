"""Draw shapes: a differentiable map from parameters to pixels."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.errors import EditError
from geoedit.testbeds.shapes.world import CLASSES

SIZE = 32
"""Pixels along a side of the images that the shapes pipelines draw."""
SATURATION = 0.75
SOFTNESS = 0.5
"""The width of an edge's slope, in pixels."""


def render(
    parameters: Float[Tensor, "*batch 7"], kinds: Int[Tensor, "*batch"], *, size: int = SIZE
) -> Float[Tensor, "*batch 3 size size"]:
    """Draw shapes on black: pixels from 0 to 1, red, green and blue.

    A pixel is colour · σ(−d / s), with d the signed distance of its middle from the outline in pixels (for
    the ellipse its first-order form f / |∇f|) and s = 0.5, so the image is smooth in every parameter.

    Args:
        parameters: size, thickness, brightness, hue, rotation, x, y (see ``ATTRIBUTES`` for the units).
        kinds: numbers of ``CLASSES``.
        size: pixels along a side.

    Raises:
        EditError: a class number that there is not.
    """
    if kinds.numel() and not 0 <= int(kinds.min()) <= int(kinds.max()) < len(CLASSES):
        raise EditError(
            f"there are classes 0 to {len(CLASSES) - 1} ({', '.join(CLASSES)}), not {kinds.tolist()}"
        )
    cover = coverage(parameters, kinds, size=size)
    return cover[..., None, :, :] * colour(parameters[..., 2], parameters[..., 3])[..., None, None]


def coverage(
    parameters: Float[Tensor, "*batch 7"], kinds: Int[Tensor, "*batch"], *, size: int = SIZE
) -> Float[Tensor, "*batch size size"]:
    """How much of each pixel a shape covers, from 0 to 1."""
    middles = (torch.arange(size, device=parameters.device, dtype=parameters.dtype) + 0.5) * 2 / size - 1
    length, width, _, _, rotation, x, y = (value[..., None, None] for value in parameters.unbind(-1))
    across, up = middles - x, -middles[:, None] - y
    angle = torch.deg2rad(rotation)
    u = across * angle.cos() + up * angle.sin()
    v = up * angle.cos() - across * angle.sin()
    kinds = kinds[..., None, None]
    distance = torch.where(
        kinds == 0,
        _ellipse(u, v, length, width),
        torch.where(kinds == 1, _bar(u, v, length, width), _diamond(u, v, length, width)),
    )
    return torch.sigmoid(-distance * (size / 2) / SOFTNESS)


def colour(brightness: Float[Tensor, "*batch"], hue: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch 3"]:
    """Red, green and blue of a hue in degrees, at the world's saturation: HSV to RGB in closed form."""
    offsets = hue.new_tensor([5.0, 3.0, 1.0])
    k = (offsets + hue[..., None] / 60) % 6
    return brightness[..., None] * (1 - SATURATION * torch.minimum(k, 4 - k).clamp(0, 1))


def _ellipse(u: Tensor, v: Tensor, length: Tensor, width: Tensor) -> Tensor:
    tiny = 1e-6
    radius = torch.sqrt((u / length) ** 2 + (v / width) ** 2 + tiny)
    slope = torch.sqrt((u / length**2) ** 2 + (v / width**2) ** 2 + tiny) / radius
    return (radius - 1) / slope


def _bar(u: Tensor, v: Tensor, length: Tensor, width: Tensor) -> Tensor:
    over_u, over_v = u.abs() - length, v.abs() - width
    outside = torch.sqrt(over_u.clamp_min(0) ** 2 + over_v.clamp_min(0) ** 2 + 1e-12)
    return outside + torch.maximum(over_u, over_v).clamp_max(0)


def _diamond(u: Tensor, v: Tensor, length: Tensor, width: Tensor) -> Tensor:
    return (u.abs() / length + v.abs() / width - 1) / torch.sqrt(length**-2 + width**-2)


OUTLINES = (_ellipse, _bar, _diamond)
"""For each class the signed distance from its outline, a function of u, v, half length and half width."""
