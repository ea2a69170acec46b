"""Where in the image a slider works: a mask on the grid of the denoiser's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from geoedit.errors import EditError


@dataclass(frozen=True)
class Region:
    """A mask with values from 0 (without the slider) to 1 (with it).

    Attributes:
        mask: (samples, height, width), in any resolution; one sample stands for all.
    """

    mask: Float[Tensor, "samples height width"]

    @classmethod
    def of(cls, region: Any) -> Region:
        """From a tensor, an array or an image, (height, width) or (samples, height, width); bytes run to 255.

        Raises:
            EditError: it has another shape, is empty, or has values outside 0 … 1.
        """
        try:
            mask = region if isinstance(region, Tensor) else torch.from_numpy(np.array(region))
        except (TypeError, ValueError) as wrong:
            raise EditError(f"a {type(region).__name__} is not a region; give a mask ({wrong})") from wrong
        mask = mask.float() / 255 if mask.dtype == torch.uint8 else mask.float()
        if mask.ndim == 2:
            mask = mask.unsqueeze(0)
        if mask.ndim != 3 or mask.numel() == 0:
            raise EditError(
                f"a region of shape {tuple(mask.shape)}; give a mask (height, width) or "
                "(samples, height, width)"
            )
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise EditError(
                f"a region has values from {float(mask.min()):g} to {float(mask.max()):g}; they run from 0 "
                "to 1"
            )
        return cls(mask)

    def like(self, output: Tensor, ids: Tensor | None = None) -> Tensor:
        """The mask averaged over the cells of a denoiser's output, shaped to multiply it.

        Args:
            output: (rows, channels, height, width), or tokens (rows, height · width, channels).
            ids: where each token lies, (…, tokens, 3) with row and column last; needed for tokens.

        Raises:
            EditError: the output is no image and no place of its tokens is known; the rows are no multiple of
                the samples.
        """
        if output.ndim == 4:
            height, width = output.shape[-2:]
        elif output.ndim == 3 and ids is not None:
            height, width = (int(size) + 1 for size in ids.reshape(-1, 3)[:, 1:].amax(0))
        else:
            raise EditError(
                f"the denoiser's output has shape {tuple(output.shape)}, which is no image: a region has no "
                "place in it"
            )
        mask = self.mask.to(device=output.device).unsqueeze(1)
        mask = functional.interpolate(mask, (height, width), mode="area").to(output.dtype)
        if output.ndim == 3:
            mask = mask.flatten(2).mT
        if len(mask) not in (1, output.shape[0]) and output.shape[0] % len(mask):
            raise EditError(
                f"a region for {len(mask)} samples and an output of {output.shape[0]} rows; give one for "
                "each sample"
            )
        return mask if len(mask) == 1 else mask.repeat(output.shape[0] // len(mask), *(1,) * (mask.ndim - 1))
