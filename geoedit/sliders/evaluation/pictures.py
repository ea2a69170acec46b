"""What is kept of the images for a page."""

from __future__ import annotations

import base64
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn import functional as F

from geoedit.sliders.evaluation.drawing import png
from geoedit.sliders.evaluation.work import Series

ROWS = 4
"""Rows of images that are kept of each series."""
SIDE = 96
"""The longest side of a kept image, in pixels."""


def strips(series: Series, *, rows: int = ROWS, side: int = SIDE) -> dict[str, Any]:
    """Some rows of a series as pictures in base64, for a page: evenly chosen among prompts and seeds."""
    count = len(series.rows)
    chosen = torch.linspace(0, count - 1, min(rows, count)).round().int().tolist()
    return {
        "slider": series.label,
        "method": series.method,
        "scales": list(series.scales),
        "rows": [
            {
                "prompt": series.rows[row][0],
                "seed": series.rows[row][1],
                "images": [
                    base64.b64encode(png(_small(images[row], side))).decode() for images in series.images
                ],
            }
            for row in chosen
        ],
    }


def _small(image: UInt8[Tensor, "3 height width"], side: int) -> UInt8[Tensor, "3 height width"]:
    longest = max(image.shape[-2:])
    if longest <= side:
        return image
    size = [max(1, round(length * side / longest)) for length in image.shape[-2:]]
    small = F.interpolate(image[None].float(), size, mode="area")
    return small[0].round().clamp(0, 255).to(torch.uint8)
