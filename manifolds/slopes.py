"""Slopes in a log-log plot, fitted where the plot is straight.

The error of an approximation of order k falls as tᵏ. At large t higher terms add to it, at small t rounding
does. Between them lies a straight piece whose slope is k.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

STEPS = 10.0 ** np.linspace(-6, 0, 49)
"""The steps t: eight a decade."""
TINY = (1e-11, 3e-11, 1e-10)
"""Steps at which every error of order one or more is rounding alone, or next to it."""
WINDOW = 9
"""How many neighbouring points one fit takes: a decade."""
STRAIGHT = 0.02
"""The residual below which a piece counts as straight; rounding noise has about 0.5."""


@dataclass(frozen=True)
class Slope:
    """The slope of an error against the step.

    Attributes:
        value: the slope; infinite where the error is nowhere more than rounding.
        residual: the root mean square distance of the fitted points from the line, in natural logarithms.
        interval: the smallest and the largest step of the fit.
    """

    value: float
    residual: float
    interval: tuple[float, float]


def fit_slope(steps: Float[np.ndarray, " k"], errors: Float[np.ndarray, " k"], floor: float) -> Slope:
    """The slope of log(errors) against log(steps) where the plot is straight.

    Every window of nine neighbouring points whose errors all lie above the floor gets a line by least
    squares. The straight window at the smallest steps counts, for there the lowest order rules; if none is
    straight, the straightest. Without a window the error is rounding everywhere and the slope infinite.

    Args:
        steps: increasing steps.
        errors: an error for each step; what is not finite is left out.
        floor: errors below it are rounding.

    Example:
        >>> steps = 10.0 ** np.linspace(-6, 0, 49)
        >>> round(fit_slope(steps, 3 * steps**2 + 1e-15, floor=1e-13).value, 3)
        2.0
    """
    usable = np.isfinite(errors) & (errors > floor)
    best: Slope | None = None
    for start in range(len(steps) - WINDOW + 1):
        piece = slice(start, start + WINDOW)
        if not usable[piece].all():
            continue
        across, up = np.log(steps[piece]), np.log(errors[piece])
        slope, height = np.polyfit(across, up, 1)
        residual = float(np.sqrt(np.mean((up - slope * across - height) ** 2)))
        if best is None or residual < best.residual:
            best = Slope(float(slope), residual, (float(steps[start]), float(steps[start + WINDOW - 1])))
        if best.residual <= STRAIGHT:
            return best
    return best or Slope(math.inf, 0.0, (float(steps[0]), float(steps[-1])))


def measure_slopes(error: Callable[[float], Tensor], scale: Tensor) -> list[Slope]:
    """The slope of an error function for each item of its batch.

    The level of rounding is read off at steps where nothing else is left, and bounded by what the scale
    allows.

    Args:
        error: from a step to errors ≥ 0 (*batch).
        scale: the size (*batch) of the quantities whose difference the error is.
    """
    rounding = torch.finfo(torch.float64).eps * scale.double().flatten().cpu().numpy()
    rows = [error(float(step)).double().flatten().cpu().numpy() for step in (*TINY, *STEPS)]
    table = np.stack(rows)
    seen = np.nanmax(np.where(np.isfinite(table[: len(TINY)]), table[: len(TINY)], 0.0), axis=0)
    floors = np.clip(30 * seen, 30 * rounding, 1e5 * rounding)
    if not np.isfinite(table[len(TINY) :]).any(axis=0).all():
        return [Slope(math.nan, math.nan, (math.nan, math.nan))]
    return [
        fit_slope(STEPS, column, float(floor))
        for column, floor in zip(table[len(TINY) :].T, np.broadcast_to(floors, table.shape[1]), strict=True)
    ]
