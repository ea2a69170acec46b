"""A second set of images: the handwritten digits that come with scikit-learn."""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.testbeds.shapes.render import SIZE
from geoedit.testbeds.shapes.world import DIGIT_WORDS


@cache
def digits(size: int = SIZE) -> tuple[Float[Tensor, "1797 3 size size"], Int[Tensor, " 1797"]]:
    """The 1,797 digits of scikit-learn, white on black, enlarged from 8 × 8 pixels by a bicubic curve.

    Returns:
        Images with pixels from 0 to 1, and the digits 0 to 9. Do not change them in place: they are kept.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 16
    large = torch.nn.functional.interpolate(small, (size, size), mode="bicubic", align_corners=False)
    return large.clamp(0, 1).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(data.target).long()


def digit_caption(digit: int) -> str:
    """What the pipelines were told of a digit: ``"the digit three"``."""
    return f"the digit {DIGIT_WORDS[digit]}"
