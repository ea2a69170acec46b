"""Attributes of handwritten digits, from moments: how much ink, how slanted, how wide the stroke."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.testbeds.shapes.digits import digits
from geoedit.testbeds.shapes.measure import check_images

TOO_FAINT = 1e-3
"""A digit whose mean pixel is below this has no attributes."""


class DigitMeasure:
    """Three attributes of each image of a digit, in the form that an evaluation asks for.

    - ``ink``: the mean over pixels and channels.
    - ``slant``: degrees by which strokes lean to the right: the arc tangent of cov(x, y) / var(y), with y
      upwards and pixels as weights.
    - ``stroke``: the width of a stroke in half image widths: twice the area over the length of the outline,
      2 ∫ g / ∫ ‖∇g‖. It does not change with brightness.

    Images without ink have NaN for slant and stroke, images that are not finite for all three.

    >>> images, _ = digits()
    >>> seen = DigitMeasure()(images[:2])
    >>> [round(float(value), 2) for value in seen["stroke"]]
    [0.35, 0.45]
    """

    @property
    def natural_sd(self) -> Mapping[str, float]:
        """The standard deviation of each attribute over scikit-learn's digits."""
        return _natural_sd()

    def __call__(self, images: Float[Tensor, "n 3 size size"]) -> Mapping[str, Float[Tensor, " n"]]:
        """The attributes of each image, pixels from 0 to 1.

        Raises:
            EditError: no batch of square colour images, or pixels that are not from 0 to 1.
        """
        check_images(images)
        size = images.shape[-1]
        grey = images.to(torch.promote_types(images.dtype, torch.float32)).mean(1)
        finite = grey.isfinite().flatten(1).all(1)
        ink = grey.mean((1, 2))
        mass = grey.sum((1, 2)).clamp_min(torch.finfo(grey.dtype).tiny)
        middles = (torch.arange(size, device=grey.device, dtype=grey.dtype) + 0.5) * 2 / size - 1
        columns, rows = grey.sum(1), grey.sum(2)
        x, y = (columns * middles).sum(1) / mass, (rows * -middles).sum(1) / mass
        up, right = -middles[None, :, None] - y[:, None, None], middles[None, None, :] - x[:, None, None]
        slant = torch.rad2deg(torch.atan2((grey * right * up).sum((1, 2)), (grey * up**2).sum((1, 2))))
        padded = torch.nn.functional.pad(grey, (1, 1, 1, 1))
        down, across = padded.diff(dim=1)[:, :, :-1], padded.diff(dim=2)[:, :-1]
        outline = torch.hypot(down, across).sum((1, 2))
        stroke = 2 * mass / outline.clamp_min(torch.finfo(grey.dtype).tiny) * 2 / size
        unknown = torch.full_like(ink, torch.nan)
        seen = finite & (ink > TOO_FAINT)
        found = {
            "ink": torch.where(finite, ink, unknown),
            "slant": torch.where(seen, slant, unknown),
            "stroke": torch.where(seen, stroke, unknown),
        }
        return {name: value.to(images.dtype) for name, value in found.items()}


@cache
def _natural_sd() -> Mapping[str, float]:
    return {name: float(values.std()) for name, values in digit_measure(digits()[0]).items()}


digit_measure = DigitMeasure()
"""The measure of digits."""
