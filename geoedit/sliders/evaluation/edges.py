"""Where a slider's range ends: on curves that were drawn, and on slopes that were only taken near 0."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from geoedit.sliders.evaluation.curves import FLAT, mean_curve, slope_at_zero

OFF = 2.0
"""The residual, over that of unsteered images, at which images have left the manifold."""
KEPT = 0.9
"""The share of the images measured at scale 0 that must still be measurable."""
FLOOR = 1e-3
"""Slopes below this share of the one at 0 count as this share: their logarithm must exist."""
DRAWS = 200
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
    reach: float,
    slopes: Float[np.ndarray, "three rows"],
    residual: Float[np.ndarray, "three rows"] | None,
) -> Edges:
    """The ends of the range as slopes at −reach, 0 and reach predict them; see `safe_range`.

    Args:
        reach: the scale of the outer two.
        slopes: of the attribute, signed so that it should rise.
        residual: distances off the manifold at the same scales.
    """
    known = np.isfinite(slopes).all(0)
    if not known.any():
        return UNKNOWN
    below, middle, above = slopes[:, known].mean(1)
    if not middle > 0:
        return DEAD
    logs = np.log(np.maximum(np.array([below, middle, above]) / middle, FLOOR))
    low, high = _parabola(reach, logs[0], logs[2], math.log(FLAT))
    ends = [(low, STOPS), (high, STOPS)]
    if residual is not None:
        known = np.isfinite(residual).all(0)
        if known.any():
            squares = np.square(residual[:, known]).mean(1)
            if squares[1] > 0:
                rises = squares / squares[1] - 1
                off = _parabola(reach, -rises[0], -rises[2], 1 - OFF**2)
                ends = [
                    min((abs(own), own, why), (abs(other), other, LEAVES))[1:]
                    for (own, why), other in zip(ends, off, strict=True)
                ]
    (low, why_low), (high, why_high) = ends
    return Edges(
        low, high, why_low if math.isfinite(low) else NOTHING, why_high if math.isfinite(high) else NOTHING
    )


def _parabola(reach: float, below: float, above: float, level: float) -> tuple[float, float]:
    """Where the parabola through (−reach, below), (0, 0) and (reach, above) falls to a level below 0."""
    curve = (below + above) / (2 * reach**2)
    slope = (above - below) / (2 * reach)
    roots = np.roots([curve, slope, -level]) if curve or slope else np.array([])
    real = sorted(float(root.real) for root in roots if abs(root.imag) <= 1e-12 * abs(root))
    low = max((root for root in real if root < 0), default=-math.inf)
    high = min((root for root in real if root > 0), default=math.inf)
    return low, high


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
