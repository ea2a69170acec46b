"""What a curve of an attribute over scales tells: order, folds, range, saturation. Plain functions of arrays.

A curve is one image's attribute at rising scales, same noise and prompt throughout. A value that could not be
measured is NaN; it never makes a slider look better: a step beside it counts as a violation.
"""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Bool, Float
from scipy.stats import rankdata

from geoedit.errors import EditError

FLAT = 0.2
"""The share of the slope at scale 0 below which a curve counts as saturated."""


def check_scales(scales: Float[np.ndarray, " scales"]) -> None:
    """Refuse scales that make no curve.

    Raises:
        EditError: fewer than two, not finite, not rising, or without 0.
    """
    if len(scales) < 2 or not np.isfinite(scales).all() or (np.diff(scales) <= 0).any():
        raise EditError(f"scales must be two or more finite numbers that rise, not {scales.tolist()}")
    if not (scales == 0).any():
        raise EditError(f"the scales {scales.tolist()} lack 0, the unchanged model that all is compared with")


def unwrap(
    values: Float[np.ndarray, "*images scales"], period: float, start: int
) -> Float[np.ndarray, "*images scales"]:
    """Follow a periodic attribute (an angle) along the scales, in both directions from one of them.

    Each step is the shortest way round; a NaN is skipped, and the next value is compared with the last known.
    """
    found = values.copy()
    for order in (range(start + 1, values.shape[-1]), range(start - 1, -1, -1)):
        last = values[..., start].copy()
        for index in order:
            here = values[..., index]
            step = (here - last + period / 2) % period - period / 2
            moved = np.where(np.isnan(last), here, last + step)
            found[..., index] = moved
            last = np.where(np.isnan(moved), last, moved)
    return found


def spearman(
    scales: Float[np.ndarray, " scales"], curves: Float[np.ndarray, "images scales"]
) -> Float[np.ndarray, " images"]:
    """Spearman's rank correlation of each curve with its scale, over the values that are known.

    1 is a rising curve, −1 a falling one; ties share their rank. A curve that never moves has no order, which
    counts as 0. NaN for fewer than three known values.
    """
    return np.array([_spearman(scales, curve) for curve in curves])


def _spearman(scales: Float[np.ndarray, " scales"], curve: Float[np.ndarray, " scales"]) -> float:
    known = ~np.isnan(curve)
    if known.sum() < 3:
        return np.nan
    x, y = rankdata(scales[known]), rankdata(curve[known])
    x, y = x - x.mean(), y - y.mean()
    lengths = np.sqrt((x @ x) * (y @ y))
    return float(x @ y / lengths) if lengths > 0 else 0.0


def violations(curves: Float[np.ndarray, "images scales"]) -> Float[np.ndarray, " images"]:
    """The share of each curve's steps to the next scale that do not rise, or cannot be measured."""
    return 1.0 - np.mean(np.diff(curves, axis=-1) > 0, axis=-1)


def foldback(curves: Float[np.ndarray, "images scales"]) -> Float[np.ndarray, " images"]:
    """How much of each curve's way goes back: Σ max(0, −Δ) / Σ |Δ| over its steps.

    0 rises throughout, ½ ends where it began, 1 falls throughout. NaN for a curve that never moves.
    """
    steps = np.diff(curves, axis=-1)
    way = np.nansum(np.abs(steps), -1)
    back = np.nansum(np.maximum(-steps, 0), -1)
    return np.divide(back, way, out=np.full_like(way, np.nan), where=way > 0)


def mean_curve(curves: Float[np.ndarray, "images scales"]) -> Float[np.ndarray, " scales"]:
    """The mean over images, whose steps are means over the images that are known on both sides.

    So an image that drops out at some scale takes nothing of its own level with it. It starts from the scale
    at which most images are known, and is NaN from where no image is known on both sides of a step.
    """
    known = ~np.isnan(curves)
    most = int(known.sum(0).argmax())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, and meant
        steps = np.nanmean(np.diff(curves, axis=1), axis=0)
        start = np.nanmean(curves[:, most])
    after = np.cumsum(steps[most:])
    before = -np.cumsum(steps[:most][::-1])[::-1]
    return start + np.concatenate([before, [0.0], after])


def standard_error(values: Float[np.ndarray, " images"]) -> float:
    """Standard error of the mean of the known values; NaN for fewer than two."""
    known = values[~np.isnan(values)]
    return float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else float("nan")


def ends_right(
    scales: Float[np.ndarray, " scales"], curves: Float[np.ndarray, "images scales"]
) -> Bool[np.ndarray, " images"]:
    """Whether each curve lies below its value at scale 0 at the lowest scale, and above it at the highest.

    An end that is scale 0 itself is not asked.
    """
    zero = int(np.flatnonzero(scales == 0)[0])
    low = np.ones(len(curves), bool) if zero == 0 else curves[:, 0] < curves[:, zero]
    high = np.ones(len(curves), bool) if zero == len(scales) - 1 else curves[:, -1] > curves[:, zero]
    return low & high


def slope_at_zero(scales: Float[np.ndarray, " scales"], curve: Float[np.ndarray, " scales"]) -> float:
    """The slope at scale 0: of the parabola through it and its neighbours, or to its one neighbour."""
    zero = int(np.flatnonzero(scales == 0)[0])
    if 0 < zero < len(scales) - 1:
        return float(np.gradient(curve, scales)[zero])
    other = 1 if zero == 0 else zero - 1
    return float((curve[other] - curve[zero]) / (scales[other] - scales[zero]))


def saturation(
    scales: Float[np.ndarray, " scales"], curve: Float[np.ndarray, " scales"], *, share: float = FLAT
) -> tuple[float, float]:
    """The scales below and above 0 at which a curve stops rising: (low, high).

    That is the first scale, going outwards, whose next step has a slope below `share` of that at scale 0.
    NaN where it rises to the last scale; 0 on both sides if it does not rise at 0.
    """
    slope = slope_at_zero(scales, curve)
    if not slope > 0:
        return (0.0, 0.0)
    zero = int(np.flatnonzero(scales == 0)[0])
    rising = np.diff(curve) / np.diff(scales) >= share * slope
    above = next((float(scales[i]) for i in range(zero, len(rising)) if not rising[i]), float("nan"))
    below = next((float(scales[i + 1]) for i in range(zero - 1, -1, -1) if not rising[i]), float("nan"))
    return below, above


def at_effect(
    effects: Float[np.ndarray, " points"], values: Float[np.ndarray, " points"], effect: float
) -> float:
    """A value where the effect first reaches a size, linear between the points in their order; else NaN.

    Args:
        effects: the attribute's change, in order of rising |scale|; the first is 0 at scale 0.
        values: what is read off.
        effect: the size.
    """
    for index in range(1, len(effects)):
        before, here = effects[index - 1], effects[index]
        if before < effect <= here:
            weight = (effect - before) / (here - before)
            return float(values[index - 1] + weight * (values[index] - values[index - 1]))
    return float("nan")
