"""How strongly a slider works: on which row of a batch, and when between noise and image."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.slider import Slider

MARGIN = 0.25
"""How far beyond the safe range, in widths of that range, a scale may lie before a warning."""
EDGE = 1e-6
"""Rounding of a time in float32: a step that lies on the edge of a window belongs to what follows."""


@dataclass(frozen=True)
class Window:
    """The part of the way from noise (progress 0) to image (progress 1) on which sliders work.

    Attributes:
        start: the progress of the first moment.
        stop: the progress of the end, which belongs to what follows; 1 is the very end.
    """

    start: float = 0.0
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.start < self.stop <= 1.0):
            raise EditError(
                f"start is {self.start} and stop {self.stop}; progress runs from 0 at pure noise to 1 at the "
                "image, and start comes before stop"
            )

    @property
    def whole(self) -> bool:
        """Whether it is all of the way, so that no time has to be looked at."""
        return self.start == 0.0 and self.stop == 1.0

    def holds(self, progress: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """1 where a progress lies in the window, 0 elsewhere."""
        inside = progress >= self.start - EDGE
        if self.stop < 1.0:
            inside = inside & (progress < self.stop - EDGE)
        return inside.to(progress.dtype)


@dataclass(frozen=True)
class Term:
    """A slider and how strongly it works.

    Attributes:
        slider: the slider.
        scale: a number, a tensor () or (samples,), or a function of progress that gives either.
    """

    slider: Slider
    scale: float | Tensor | Callable[[float], Any]

    @classmethod
    def of(cls, slider: Slider, scale: Any) -> Term:
        """A term whose scale was looked at; a scale far outside the slider's safe range warns.

        Raises:
            EditError: the scale is no number, or none for each sample, or not finite.
        """
        if not isinstance(slider, Slider):
            raise EditError(f"a slider is put to work, not a {type(slider).__name__}; give `slider @ scale`")
        if callable(scale) and not isinstance(scale, Tensor):
            return cls(slider, scale)
        plain = _plain(slider, scale)
        _warn(slider, plain)
        return cls(slider, plain)

    @property
    def timed(self) -> bool:
        """Whether the scale depends on the time."""
        return not isinstance(self.scale, float | Tensor)

    @property
    def constant(self) -> float | None:
        """The factor on the changes, if it is one plain number for all rows and times."""
        return float(self.slider.factor(self.scale)) if isinstance(self.scale, float) else None

    @property
    def samples(self) -> int | None:
        """For how many samples there is a scale each; None if all share one or nobody knows yet."""
        return len(self.scale) if isinstance(self.scale, Tensor) and self.scale.ndim == 1 else None

    def factors(self, rows: int, progress: Float[Tensor, " rows"] | None, device: torch.device) -> Tensor:
        """The factor on the changes, for each row or as one number ().

        Rows are samples, once or several times over: a pipeline that guides gives the unconditional rows
        first and the conditional ones after them.

        Raises:
            EditError: the rows are no multiple of the samples; the function gives no scale.
        """
        if not self.timed:
            return self._rows(self.scale, rows, device)
        if progress is None:
            raise EditError(
                f"slider {self.slider.name!r}: its scale depends on a time that is not known here"
            )
        times, place = torch.unique(progress, return_inverse=True)
        found = []
        for time in times.tolist():
            scale = _plain(self.slider, self.scale(min(max(time, 0.0), 1.0)))  # type: ignore[operator]
            found.append(self._rows(scale, rows, device).expand(rows))
        return torch.stack(found)[place, torch.arange(rows, device=place.device)]

    def _rows(self, scale: Any, rows: int, device: torch.device) -> Tensor:
        factor = torch.as_tensor(self.slider.factor(scale))
        factor = (factor if isinstance(scale, Tensor) else factor.float()).to(device)
        if factor.ndim == 0:
            return factor
        if rows % len(factor):
            raise EditError(
                f"slider {self.slider.name!r} has {len(factor)} scales, one for each sample, and the model "
                f"was given {rows} rows; give as many prompts as scales (one again for each of its images)"
            )
        return factor.repeat(rows // len(factor))


def _plain(slider: Slider, scale: Any) -> float | Tensor:
    """A scale as a float or as a tensor of one or no dimension, its values looked at."""
    if isinstance(scale, Tensor | np.ndarray) or (isinstance(scale, Sequence) and not isinstance(scale, str)):
        try:
            values = torch.as_tensor(scale)
        except (TypeError, ValueError, RuntimeError) as wrong:
            raise EditError(
                f"slider {slider.name!r}: {scale!r} is not a scale for each sample ({wrong})"
            ) from wrong
        values = values if values.is_floating_point() else values.float()
        if values.ndim > 1 or values.numel() == 0 or values.is_complex():
            raise EditError(
                f"slider {slider.name!r}: scales of shape {tuple(values.shape)}; give one number, or one for "
                "each sample"
            )
        if not bool(torch.isfinite(value_of(values)).all()):
            raise EditError(
                f"slider {slider.name!r}: the scales {value_of(values).tolist()} are not all finite"
            )
        return values
    if isinstance(scale, bool) or not isinstance(scale, int | float | np.number) or not math.isfinite(scale):
        raise EditError(f"slider {slider.name!r}: {scale!r} is not a scale; give a finite number")
    return float(scale)


def _warn(slider: Slider, scale: float | Tensor) -> None:
    safe = slider.safe_range
    if safe is None:
        return
    low, high = safe
    values = value_of(scale) if isinstance(scale, Tensor) else torch.tensor(scale)
    margin = MARGIN * (high - low)
    least, most = float(values.min()), float(values.max())
    far = most if most > high + margin else least if least < low - margin else None
    if far is not None:
        warnings.warn(
            f"slider {slider.name!r} at scale {far:g} is far outside its safe range [{low:g}, {high:g}]: "
            "images may leave what the model can draw, and the attribute may turn back",
            stacklevel=5,
        )


def value_of(tensor: Tensor) -> Tensor:
    """A tensor's values without what torch.func wraps around it."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor.detach()
