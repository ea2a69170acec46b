"""Read the attributes of drawn shapes from pixels: render, compare, correct, until nothing is gained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geoedit.errors import EditError
from geoedit.testbeds.shapes.render import OUTLINES, SOFTNESS, colour
from geoedit.testbeds.shapes.world import ATTRIBUTES

EXPLAINED = 0.5
"""The largest relative residual of an image that shows one shape, which explains three quarters of it."""
AT_ONCE = 128
"""Images that are fitted together; more would only need more memory."""
FIRST_STEPS = 7
LAST_STEPS = 12
NEGLIGIBLE = 5e-5
"""A step of this share of the longest that is allowed, half of the size or half a radian, is the last."""
CANDIDATES = 2.0
"""Classes whose squared residual is within this factor of the least one are fitted to the end."""


@dataclass(frozen=True)
class Measured:
    """What is drawn in some images.

    Attributes:
        values: each attribute's value in each image, in the units of ``ATTRIBUTES``; NaN where no shape was
            found. The rotation is from −90 to 90 degrees, the hue from −60 to 300.
        residual: the distance of each image from the nearest that ``render`` can draw: root mean square over
            pixels and channels. NaN for images that are not finite.
        relative: the residual over the image's own root mean square: 0 for a rendered image, 1 if the best
            shape explains nothing.
        kinds: the class whose best shape is nearest; −1 where none was found.
        found: whether one shape explains the image.
    """

    values: Mapping[str, Float[Tensor, " n"]]
    residual: Float[Tensor, " n"]
    relative: Float[Tensor, " n"]
    kinds: Int[Tensor, " n"]
    found: Bool[Tensor, " n"]

    @property
    def parameters(self) -> Float[Tensor, "n 7"]:
        """The values as rows that ``render`` takes."""
        return torch.stack(list(self.values.values()), -1)


def measure(images: Float[Tensor, "n 3 size size"]) -> Measured:
    """Find the shape that is nearest to each image, over all classes and all parameters.

    Minimises ‖image − render(parameters, class)‖² for each class from moments of the image, by
    Levenberg–Marquardt steps in (log size, log thickness, rotation, x, y). Brightness and hue are solved
    exactly at every step: the renderer's colours are six flat sectors of a cone. So an image that ``render``
    made gives back its parameters, and any other its distance from the images that ``render`` can make.

    A shape is not found in an image that is black, not finite, filled to its edges, or of which one shape
    explains less than three quarters of the energy, such as two shapes apart.

    Args:
        images: square images, red, green and blue from 0 to 1. Any float type and device; half precision is
            computed in float32.

    Raises:
        EditError: no batch of square colour images, or pixels that are not from 0 to 1.

    >>> from geoedit.testbeds.shapes import render, sample
    >>> parameters, kinds = sample(4, generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(measure(render(parameters, kinds)).parameters, parameters, rtol=1e-3)
    True
    """
    check_images(images)
    if not len(images):
        nothing = images.new_zeros(0)
        none = torch.zeros(0, dtype=torch.long, device=images.device)
        return Measured(dict.fromkeys(ATTRIBUTES, nothing), nothing, nothing, none, none.bool())
    with torch.inference_mode(False), torch.no_grad():
        wide = images.detach().clone()
        wide = wide.to(torch.promote_types(wide.dtype, torch.float32))
        return _joined([_measure(part) for part in wide.split(AT_ONCE)], images.dtype)


class ShapesMeasure:
    """``measure`` in the form that an evaluation asks for: images to a value for each attribute's name."""

    natural_sd: Mapping[str, float] = {name: a.natural_sd for name, a in ATTRIBUTES.items()}
    """What one natural standard deviation is, in each attribute's own unit."""

    def __call__(self, images: Float[Tensor, "n 3 size size"]) -> Mapping[str, Float[Tensor, " n"]]:
        """The attributes of each image; NaN where no shape was found."""
        return measure(images).values


shapes_measure = ShapesMeasure()
"""The measure of the shapes pipelines."""


def check_images(images: Tensor) -> None:
    """Refuse what is no batch of square colour images with pixels from 0 to 1.

    Raises:
        EditError: it is none.
    """
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3] or images.shape[2] < 8:
        raise EditError(
            f"to be measured, images have the shape (n, 3, size, size) with a size of 8 or more, not "
            f"{tuple(images.shape)}; one image needs [None], channels come before rows"
        )
    if not images.is_floating_point():
        raise EditError(
            f"images are floats from 0 to 1 to be measured, not {images.dtype}; divide bytes by 255"
        )
    known = images.detach()[images.detach().isfinite()]
    if known.numel() and (float(known.min()) < -0.05 or float(known.max()) > 1.05):
        raise EditError(
            f"images have pixels from 0 to 1 to be measured, these from {float(known.min()):.3g} to "
            f"{float(known.max()):.3g}; pixels from -1 to 1 become these by x / 2 + 0.5"
        )


def _joined(parts: list[Measured], dtype: torch.dtype) -> Measured:
    return Measured(
        {name: torch.cat([part.values[name] for part in parts]).to(dtype) for name in ATTRIBUTES},
        torch.cat([part.residual for part in parts]).to(dtype),
        torch.cat([part.relative for part in parts]).to(dtype),
        torch.cat([part.kinds for part in parts]),
        torch.cat([part.found for part in parts]),
    )


def _measure(images: Tensor) -> Measured:
    size = images.shape[-1]
    finite = images.isfinite().flatten(1).all(1)
    pixels = torch.where(finite[:, None, None], images.flatten(2), 0.0)
    energy = pixels.square().sum((1, 2))
    fits = [
        _fit(kind, pixels, _from_moments(kind, pixels, size), FIRST_STEPS) for kind in range(len(OUTLINES))
    ]
    losses = torch.stack([fit.loss for fit in fits])
    hopeful = losses <= CANDIDATES * losses.amin(0) + 1e-5 * energy
    shapes = torch.stack([fit.shape for fit in fits])
    for kind, fit in enumerate(fits):
        rows = (hopeful[kind] & ~fit.done).nonzero()[:, 0]
        if len(rows):
            last = _fit(kind, pixels[rows], shapes[kind, rows], LAST_STEPS)
            losses[kind, rows], shapes[kind, rows] = last.loss, last.shape
    kinds = torch.where(hopeful, losses, torch.inf).argmin(0)
    shape = shapes[kinds, torch.arange(len(images), device=images.device)]
    return _told(images, pixels, kinds, shape, finite)


def _told(images: Tensor, pixels: Tensor, kinds: Tensor, shape: Tensor, finite: Tensor) -> Measured:
    """The nearest shapes in the world's units, with what they leave unexplained."""
    size = images.shape[-1]
    covers = torch.stack([_cover(kind, shape, size).cover for kind in range(len(OUTLINES))])
    cover = covers[kinds, torch.arange(len(shape), device=shape.device)]
    brightness, hue = _nearest_colour(_free_colour(pixels, cover))
    drawn = cover[:, None] * colour(brightness, hue)[:, :, None]
    residual = (pixels - drawn).square().mean((1, 2)).sqrt()
    own = pixels.square().mean((1, 2)).sqrt()
    relative = torch.where(own > 0, residual / own, 1.0)
    length, width, angle, x, y = shape.unbind(-1)
    length, width = length.exp(), width.exp()
    turned = width > length
    length, width = torch.where(turned, width, length), torch.where(turned, length, width)
    angle = torch.rad2deg(angle) + 90 * turned
    angle = 90 - (90 - angle) % 180
    inside = (torch.maximum(x.abs(), y.abs()) <= 1) & (length <= 2) & (width <= 0.9) & (width > 0.25 / size)
    found = finite & inside & (relative <= EXPLAINED) & (own > 0)
    unknown = torch.full_like(residual, torch.nan)
    values = (length, width, brightness, hue, angle, x, y)
    return Measured(
        {name: torch.where(found, value, unknown) for name, value in zip(ATTRIBUTES, values, strict=True)},
        torch.where(finite, residual, unknown),
        torch.where(finite, relative, unknown),
        torch.where(found, kinds, -1),
        found,
    )


@dataclass(frozen=True)
class _Cover:
    """A coverage and its derivatives in (log length, log width, angle, x, y), pixel by pixel."""

    cover: Tensor  # (n, pixels)
    slopes: Tensor  # (n, 5, pixels)


def _cover(kind: int, shape: Tensor, size: int) -> _Cover:
    """One backward pass through the outline's distance gives all derivatives: each pixel has its own."""
    middles = (torch.arange(size, device=shape.device, dtype=shape.dtype) + 0.5) * 2 / size - 1
    log_length, log_width, angle, x, y = (value[:, None] for value in shape.unbind(-1))
    length, width, cos, sin = log_length.exp(), log_width.exp(), angle.cos(), angle.sin()
    across, up = middles.repeat(size) - x, -middles.repeat_interleave(size) - y
    u, v = across * cos + up * sin, up * cos - across * sin
    distance, backward, *_ = torch.func.vjp(OUTLINES[kind], u, v, length.expand_as(u), width.expand_as(v))
    by_u, by_v, by_length, by_width = backward(torch.ones_like(distance))
    steep = size / 2 / SOFTNESS
    cover = torch.sigmoid(-steep * distance)
    edge = -steep * cover * (1 - cover)
    by_u, by_v = edge * by_u, edge * by_v
    slopes = (
        edge * by_length * length,
        edge * by_width * width,
        by_u * v - by_v * u,
        by_v * sin - by_u * cos,
        -(by_u * sin + by_v * cos),
    )
    return _Cover(cover, torch.stack(slopes, 1))


def _free_colour(pixels: Tensor, cover: Tensor) -> Tensor:
    """The colour (n, 3), any at all, that explains most under a coverage."""
    return (pixels @ cover[..., None])[..., 0] / cover.square().sum(-1, keepdim=True).clamp_min(1e-12)


def _nearest_colour(free: Tensor) -> tuple[Tensor, Tensor]:
    """Brightness and hue of the nearest colour that the world has.

    Between two corners of the hue hexagon colours are α v + β w with α, β ≥ 0: brightness α + β, and the
    hue β / (α + β) of the way from one corner to the other.
    """
    corners = torch.arange(0.0, 360.0, 60.0, device=free.device, dtype=free.dtype)
    first = colour(torch.ones_like(corners), corners)
    second = first.roll(-1, 0)
    basis = torch.stack([first, second], -1)
    pair = free @ torch.linalg.pinv(basis).mT  # (6, n, 2)
    along = free @ (first / first.square().sum(-1, keepdim=True)).mT  # (n, 6): on the corners' own rays
    pair = torch.where(
        (pair >= 0).all(-1, keepdim=True), pair, torch.stack([along.mT, torch.zeros_like(along.mT)], -1)
    ).clamp_min(0)
    best = ((pair @ basis.mT) - free).square().sum(-1).argmin(0)
    chosen = pair[best, torch.arange(len(free), device=free.device)]
    brightness = chosen.sum(-1)
    share = chosen[:, 1] / brightness.clamp_min(torch.finfo(free.dtype).tiny)
    hue = 60 * (best + share)
    return brightness, torch.where(hue > 300, hue - 360, hue)


def _from_moments(kind: int, pixels: Tensor, size: int) -> Tensor:
    """A first guess: middle, axes and angle from the moments of what is brighter than the background."""
    grey = pixels.sum(1)
    grey = (grey - 0.2 * grey.amax(-1, keepdim=True)).clamp_min(0)
    mass = grey.sum(-1, keepdim=True).clamp_min(1e-6)
    middles = (torch.arange(size, device=pixels.device, dtype=pixels.dtype) + 0.5) * 2 / size - 1
    across, up = middles.repeat(size), -middles.repeat_interleave(size)
    x, y = (grey * across).sum(-1, keepdim=True) / mass, (grey * up).sum(-1, keepdim=True) / mass
    xx = (grey * (across - x) ** 2).sum(-1) / mass[:, 0]
    yy = (grey * (up - y) ** 2).sum(-1) / mass[:, 0]
    xy = (grey * (across - x) * (up - y)).sum(-1) / mass[:, 0]
    middle, half = (xx + yy) / 2, torch.hypot((xx - yy) / 2, xy)
    angle = torch.atan2(2 * xy, xx - yy) / 2
    blur = (math.pi * SOFTNESS * 2 / size) ** 2 / 3  # the variance of a logistic edge
    moment = (4.0, 3.0, 6.0)[kind]  # length² over the variance along it, of an ellipse, a bar and a diamond
    length = (moment * (middle + half - blur)).clamp_min((2 / size) ** 2).sqrt()
    width = (moment * (middle - half - blur)).clamp_min((1 / size) ** 2).sqrt()
    return torch.stack([length.log(), width.log(), angle, x[:, 0], y[:, 0]], -1)


@dataclass(frozen=True)
class _Fit:
    shape: Tensor  # (n, 5)
    loss: Tensor  # (n,), squared distance
    done: Tensor  # (n,), whether the steps have become negligible


def _fit(kind: int, pixels: Tensor, shape: Tensor, steps: int) -> _Fit:
    """Levenberg–Marquardt with the colour projected out (Golub & Pereyra 1973, Kaufman's form).

    With w the unit vector of the nearest colour, g the image along w and C the coverage, the colour's
    strength is ⟨C, g⟩ / ⟨C, C⟩ and the derivative of what remains is that of C less its part along C. Rows
    whose step has become negligible are left out of the steps that follow.
    """
    size = math.isqrt(pixels.shape[-1])
    energy = pixels.square().sum((1, 2))
    limit = shape.new_tensor([0.5, 0.5, 0.5, 0.25, 0.25])
    shape, damping = shape.clone(), torch.full_like(energy, 1e-3)
    loss, gradient, hessian = _normal_equations(kind, pixels, shape, energy)
    rows = torch.arange(len(shape), device=shape.device)
    for _ in range(steps):
        now = hessian[rows]
        scale = now.diagonal(dim1=-2, dim2=-1)
        scale = damping[rows, None] * scale + 1e-9 * scale.amax(-1, keepdim=True) + 1e-12
        step = torch.linalg.solve(now + torch.diag_embed(scale), gradient[rows])
        tried = shape[rows] + step.clamp(-limit, limit)
        tried[:, :2] = tried[:, :2].clamp(math.log(0.1 / size), math.log(4.0))
        new_loss, new_gradient, new_hessian = _normal_equations(kind, pixels[rows], tried, energy[rows])
        better = new_loss <= loss[rows] + 1e-6 * energy[rows]
        damping[rows] = torch.where(better, damping[rows] / 5, damping[rows] * 8).clamp(1e-9, 1e6)
        taken = rows[better]
        loss[taken], shape[taken] = new_loss[better], tried[better]
        gradient[taken], hessian[taken] = new_gradient[better], new_hessian[better]
        rows = rows[(step / limit).abs().amax(-1) > NEGLIGIBLE]
        if not len(rows):
            break
    done = torch.ones_like(loss, dtype=torch.bool)
    done[rows] = False
    return _Fit(shape, loss, done)


def _normal_equations(
    kind: int, pixels: Tensor, shape: Tensor, energy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distance, −half its gradient (n, 5) and half its Gauss–Newton Hessian (n, 5, 5)."""
    at = _cover(kind, shape, math.isqrt(pixels.shape[-1]))
    brightness, hue = _nearest_colour(_free_colour(pixels, at.cover))
    nearest = colour(brightness, hue)
    strength = nearest.norm(dim=-1, keepdim=True)
    grey = (nearest[:, None] @ pixels)[:, 0] / strength.clamp_min(1e-12)
    own = at.cover.square().sum(-1).clamp_min(1e-12)
    rest = grey - strength * at.cover  # at right angles to the coverage, as the colour is the best one
    along = (at.slopes @ at.cover[..., None])[..., 0]
    gradient = strength * (at.slopes @ rest[..., None])[..., 0]
    flat = at.slopes @ at.slopes.mT - along[:, :, None] * (along / own[:, None])[:, None]
    return energy - own * strength[:, 0] ** 2, gradient, strength[..., None] ** 2 * flat
