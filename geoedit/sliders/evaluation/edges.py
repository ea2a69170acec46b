"""Where a slider's range ends: on curves that were drawn, and on slopes that were only taken near 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import least_squares

from geoedit.sliders.evaluation.curves import FLAT, mean_curve, slope_at_zero

OFF = 2.0
"""The residual, over that of unsteered images, at which images have left the manifold."""
KEPT = 0.9
"""The share of the images measured at scale 0 that must still be measurable."""
FLOOR = 0.05
"""Slopes below this share of the one at 0 count as this share: their logarithm must exist."""
STEEP = (0.02, 10.0)
"""How steep a sigmoid may be, in 1 / scale; below twice the first it counts as straight."""
TOO_FAR = 6.0
"""An end this many times as far as the slopes were taken is no knowledge."""
DRAWS = 100
SHARE = 0.9


@dataclass(frozen=True)
class Edges:
    """Both ends of a range.

    Attributes:
        low: the end below 0; −inf if there is none.
        high: the end above 0; inf if there is none.
        low_reason: what ends it below 0, in words.
        high_reason: what ends it above 0.
    """

    low: float
    high: float
    low_reason: str
    high_reason: str

    @property
    def reason(self) -> str:
        """Both reasons in one sentence."""
        return f"below 0: {self.low_reason}; above 0: {self.high_reason}"


STOPS = "the attribute stops rising"
LOST = "images can no longer be measured"
LEAVES = "images leave the manifold"
NOTHING = "no end was found"
UNKNOWN = Edges(math.nan, math.nan, *("the attribute could not be measured",) * 2)
DEAD = Edges(0.0, 0.0, *("the attribute does not rise at scale 0",) * 2)


def edges(
    scales: Float[np.ndarray, " scales"],
    moved: Float[np.ndarray, "images scales"],
    residual: Float[np.ndarray, "images scales"] | None,
) -> Edges:
    """The ends of the safe range on drawn curves, linear between what was drawn.

    The mean's slope between two scales belongs to their middle. The end is where the slopes, joined linearly
    from 0 outwards, first fall below a fifth of that at 0, or the mean residual first exceeds twice its own.
    A scale at which a tenth of the images can no longer be measured is beyond the end.

    Args:
        scales: rising, with 0 among them.
        moved: the attribute in natural standard deviations, signed so that it should rise.
        residual: distances off the manifold.
    """
    zero = int(np.flatnonzero(scales == 0)[0])
    known = ~np.isnan(moved)
    lost = known.mean(0) < KEPT * known[:, zero].mean()
    mean = np.where(lost, np.nan, mean_curve(moved))
    slope = slope_at_zero(scales, mean)
    if math.isnan(slope):
        return UNKNOWN
    if slope <= 0:
        return DEAD
    middles = (scales[1:] + scales[:-1]) / 2
    left = np.diff(mean) / np.diff(scales) / slope - FLAT
    off = None if residual is None else mean_curve(residual)
    found = []
    for side in (-1, 1):
        outer = _outwards(len(middles), zero, side, between=True)
        beyond = _outwards(len(scales), zero, side)
        ends = [(_crossing(middles[outer], left[outer], 1 - FLAT), STOPS)]
        ends.append((_last_known(scales[beyond], mean[beyond]), LOST))
        if off is not None and off[zero] > 0:
            rest = OFF - off / off[zero]
            ends.append((_crossing(scales[beyond], rest[beyond], OFF - 1), LEAVES))
        found.append(min(ends, key=lambda end: abs(end[0])))
    (low, why_low), (high, why_high) = found
    low = -abs(low)
    return Edges(
        low, high, why_low if math.isfinite(low) else NOTHING, why_high if math.isfinite(high) else NOTHING
    )


def _outwards(count: int, zero: int, side: int, *, between: bool = False) -> list[int]:
    """Places on one side of 0, the nearest first; between two scales the first place above 0 is its own."""
    if side > 0:
        return list(range(zero if between else zero + 1, count))
    return list(range(zero - 1, -1, -1))


def _last_known(places: np.ndarray, values: np.ndarray) -> float:
    """The place before the first value that is not known; inf if all are."""
    before = 0.0
    for place, value in zip(places, values, strict=True):
        if math.isnan(value):
            return before
        before = float(place)
    return math.inf


def _crossing(places: np.ndarray, values: np.ndarray, at_zero: float) -> float:
    """Where values that start above 0 at place 0 first reach 0, linear between places; inf if nowhere."""
    before, value_before = 0.0, at_zero
    for place, value in zip(places, values, strict=True):
        if math.isnan(value):
            return math.inf
        if value <= 0:
            return float(before + (place - before) * value_before / (value_before - value))
        before, value_before = float(place), float(value)
    return math.inf


def edges_of_slopes(
    scales: Float[np.ndarray, " nodes"],
    slopes: Float[np.ndarray, "nodes rows"],
    residual: Float[np.ndarray, "nodes rows"] | None,
) -> Edges:
    """The ends of the range as slopes at a few scales around 0 predict them; see `safe_range`.

    Args:
        scales: rising, the same on both sides of 0, with 0 in the middle: two on either side, or one.
        slopes: of the attribute, signed so that it should rise.
        residual: distances off the manifold at the same scales.
    """
    known = np.isfinite(slopes).all(0)
    if not known.any():
        return UNKNOWN
    middle = len(scales) // 2
    mean = slopes[:, known].mean(1)
    # As the sweep sees the slope at 0: over the neighbours on both sides.
    at_zero = float(mean[middle - 1 : middle + 2] @ [0.25, 0.5, 0.25])
    if not at_zero > 0:
        return DEAD
    share = mean / at_zero
    low, high = _sigmoid(scales, np.log(np.maximum(share, FLOOR)))
    ends = [
        (_met(scales, share - FLAT, -1) or min(low, float(scales[0])), STOPS),
        (_met(scales, share - FLAT, 1) or max(high, float(scales[-1])), STOPS),
    ]
    if residual is not None:
        off = np.square(residual[:, np.isfinite(residual).all(0)])
        if off.size and (first := off.mean(1))[middle] > 0:
            rest = OFF**2 - first / first[middle]
            for place, side in enumerate((-1, 1)):
                end = _met(scales, rest, side) or _continued(scales, rest - OFF**2, -(OFF**2), side)
                ends[place] = min(ends[place], (end, LEAVES), key=lambda pair: abs(pair[0]))
    (low, why_low), (high, why_high) = ends
    return Edges(
        low, high, why_low if math.isfinite(low) else NOTHING, why_high if math.isfinite(high) else NOTHING
    )


def _met(scales: np.ndarray, left: np.ndarray, side: int) -> float | None:
    """Where a margin above 0 at scale 0 is used up between the scales on one side; None if it is not."""
    zero = len(scales) // 2
    beyond = _outwards(len(scales), zero, side)
    end = _crossing(scales[beyond], left[beyond], max(float(left[zero]), 1e-12))
    return end if math.isfinite(end) else None


def _sigmoid(scales: np.ndarray, logs: np.ndarray) -> tuple[float, float]:
    """Where the slope of the nearest sigmoid has fallen to a fifth: ln g(s) = α − 2 ln cosh(k s + c).

    That is the slope of tanh(k s + c): an attribute that goes from one end of what a model can draw to the
    other. Infinite on both sides where the slope does not fall at all.
    """

    def parts(values: np.ndarray) -> tuple[float, float, float]:
        steep = math.exp(min(max(float(values[0]), math.log(STEEP[0])), math.log(STEEP[1])))
        return steep, 3 * math.tanh(float(values[1]) / 3), float(values[2])

    def misfit(values: np.ndarray) -> np.ndarray:
        steep, offset, height = parts(values)
        return height - 2 * np.log(np.cosh(steep * scales + offset)) - logs

    steep, offset, height = parts(least_squares(misfit, np.zeros(3), method="lm").x)
    squared = math.exp(min(height, 50.0)) / FLAT
    if squared <= 1 or steep * scales[-1] < 2 * STEEP[0]:
        return -math.inf, math.inf
    far = math.acosh(math.sqrt(squared))
    low, high = (-far - offset) / steep, (far - offset) / steep
    most = TOO_FAR * float(scales[-1])
    return (low if -most < low < 0 else -math.inf), (high if 0 < high < most else math.inf)


def _continued(scales: np.ndarray, values: np.ndarray, level: float, side: int) -> float:
    """Where the parabola nearest to some values falls to a level beyond the scales; ±inf if nowhere."""
    curve, slope, height = np.polyfit(scales, values, 2)
    largest = max(abs(curve), abs(slope))
    if largest * scales[-1] ** 2 <= 1e-9 * max(1.0, abs(height - level)):
        return side * math.inf
    coefficients = [curve, slope, height - level]
    coefficients = coefficients if abs(curve) > 1e-12 * largest else coefficients[1:]
    roots = [float(root.real) for root in np.roots(coefficients) if abs(root.imag) <= 1e-12 * abs(root)]
    beyond = [root for root in roots if root * side > 0]
    if not beyond:
        return side * math.inf
    nearest = min(beyond, key=abs)
    return side * max(abs(nearest), float(scales[-1]))  # up to there it was seen to hold


def bootstrap(
    ends: Callable[[np.ndarray], Edges], count: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """90 % intervals of both ends over images drawn again with replacement; NaN for fewer than two images."""
    if count < 2:
        return (math.nan, math.nan), (math.nan, math.nan)
    generator = np.random.default_rng(0)
    found = [ends(generator.integers(count, size=count)) for _ in range(DRAWS)]
    return _interval([one.low for one in found]), _interval([one.high for one in found])


def _interval(values: list[float]) -> tuple[float, float]:
    known = np.sort([value for value in values if not math.isnan(value)])
    if not len(known):
        return (math.nan, math.nan)
    places = [(1 - SHARE) / 2, (1 + SHARE) / 2]
    low, high = (float(known[min(len(known) - 1, int(share * len(known)))]) for share in places)
    return low, high
