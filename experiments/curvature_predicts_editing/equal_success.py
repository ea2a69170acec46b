"""What two edits cost at the scale where both succeed equally often.

An edit is run over a sweep of scales. Its success is a curve over the scale, and so is every cost (distance
off the manifold, disturbance). The least scale at which the straight line through the measured successes
reaches a level is the scale that someone would choose who wants that level and no more; the cost is read off
there, again by straight lines. Past its highest point no curve is used.

The level is either given or, for each pair of edits, the highest that both reach. Intervals come from a
bootstrap that draws concepts, and within each cell pairs of values, with replacement; curves, levels and
scales are computed anew in every draw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from geoedit.errors import EditError

Average = Literal["mean", "median"]
"""How a cost is averaged over the pairs of a cell."""
Rule = Literal["first", "least"]
"""Where a cost is read: at the first scale that reaches the level, or where it is least at or above it."""
LEAST_LEVEL = 0.2
"""Where one of two edits succeeds less often than this at every scale, there is nothing to compare."""


@dataclass(frozen=True)
class Sweep:
    """What one edit did at each scale, for every pair of values of a cell.

    Attributes:
        scales: from 0 (not edited) upward.
        success: 1 where the answer was the wanted one, else 0.
        costs: by name; NaN where a cost is not defined.
    """

    scales: Float[np.ndarray, " m"]
    success: Float[np.ndarray, "pairs m"]
    costs: Mapping[str, Float[np.ndarray, "pairs m"]]

    def __post_init__(self) -> None:
        """Refuse scales that do not rise from 0."""
        if len(self.scales) < 2 or self.scales[0] != 0 or not bool((np.diff(self.scales) > 0).all()):
            raise EditError(f"scales are {self.scales.tolist()}; they must rise from 0.")

    @property
    def top(self) -> float:
        """The highest share of successes at any scale."""
        return float(self.success.mean(0).max())

    def rates(self, draws: Draws) -> Float[np.ndarray, "draws m"]:
        """The share of successes at each scale."""
        return draws.weights @ self.success

    def curves(self, cost: str, draws: Draws, average: Average) -> Float[np.ndarray, "draws m"]:
        """A cost averaged over the pairs at each scale."""
        table = self.costs[cost]
        return draws.weights @ table if average == "mean" else np.median(table[draws.indices], axis=1)


@dataclass(frozen=True)
class Draws:
    """Samples of pairs, with replacement; the first is every pair once.

    Attributes:
        indices: which pairs were drawn. weights: how often, over their number.
        weights: see `indices`.
    """

    indices: Int[np.ndarray, "draws pairs"]
    weights: Float[np.ndarray, "draws pairs"]

    @classmethod
    @lru_cache(maxsize=512)  # the same for every edit and every cost
    def of(cls, pairs: int, resamples: int, seed: int, cell: int = 0) -> Draws:
        """Draw as many pairs as there are, `resamples` times; each cell draws its own."""
        drawn = np.random.default_rng([seed, cell]).integers(pairs, size=(resamples, pairs))
        indices = np.concatenate([np.arange(pairs)[None], drawn])
        weights = (indices[:, :, None] == np.arange(pairs)).mean(1)
        return cls(indices, weights)


@dataclass(frozen=True)
class Cell:
    """Two edits of the same sentences: the one that is judged, and the one it is measured against."""

    group: str
    judged: Sweep
    against: Sweep


@dataclass(frozen=True)
class Ratio:
    """A cost of one edit over that of another at equal success: the median over cells, with its interval.

    Attributes:
        value: NaN where no cell reaches the level with both edits.
        low: of the 95 % bootstrap interval; NaN where fewer than half of the draws had a value.
        high: see `low`.
        judged: the cost itself, the median over the cells that count.
        against: that of the other edit.
        cells: how many cells count.
        of: how many there were.
    """

    value: float
    low: float
    high: float
    judged: float
    against: float
    cells: int
    of: int


def first_scale(
    scales: Float[np.ndarray, " m"],
    success: Float[np.ndarray, "draws m"],
    level: Float[np.ndarray, " draws"],
) -> Float[np.ndarray, " draws"]:
    """The least scale at which the straight line through the successes reaches the level; NaN if none does.

    >>> first_scale(np.array([0.0, 1.0, 2.0]), np.array([[0.0, 0.5, 1.0]]), np.array([0.75]))
    array([1.5])
    """
    reached = success >= level[:, None] - 1e-12  # the mean of a draw is rounded
    place = reached.argmax(1)
    before = np.maximum(place - 1, 0)
    rows = np.arange(len(success))
    low, high = success[rows, before], success[rows, place]
    share = np.divide(level - low, high - low, out=np.zeros(len(success)), where=high > low)
    found = scales[before] + share.clip(0, 1) * (scales[place] - scales[before])
    return np.where(reached.any(1), np.where(place == 0, scales[0], found), np.nan)


def at_scale(
    scales: Float[np.ndarray, " m"], values: Float[np.ndarray, "draws m"], scale: Float[np.ndarray, " draws"]
) -> Float[np.ndarray, " draws"]:
    """Values between the measured scales, by straight lines; NaN at scale NaN.

    >>> at_scale(np.array([0.0, 1.0, 2.0]), np.array([[0.0, 4.0, 6.0]]), np.array([1.5]))
    array([5.])
    """
    known = np.where(np.isnan(scale), scales[0], scale)
    place = np.clip(np.searchsorted(scales, known, side="right") - 1, 0, len(scales) - 2)
    share = (known - scales[place]) / (scales[place + 1] - scales[place])
    rows = np.arange(len(values))
    found = (1 - share) * values[rows, place] + share * values[rows, place + 1]
    return np.where(np.isnan(scale), np.nan, found)


def costs_at_equal_success(
    cell: Cell,
    cost: str,
    draws: Draws,
    *,
    level: float | None = None,
    average: Average = "mean",
    rule: Rule = "first",
) -> tuple[Float[np.ndarray, " draws"], Float[np.ndarray, " draws"]]:
    """The cost of both edits where they succeed equally often; NaN where one of them never does.

    Args:
        cell: the two edits.
        cost: its name.
        draws: which pairs count.
        level: the share of successes; None: the highest that both reach, at least `LEAST_LEVEL`.
        average: of the cost over the pairs.
        rule: "first": at the first scale that reaches the level; "least": the least cost there or at any
            measured scale that succeeds as often or more.
    """
    edits = (cell.judged, cell.against)
    rates = [edit.rates(draws) for edit in edits]
    highest = np.minimum(rates[0].max(1), rates[1].max(1))
    if level is None:
        wanted = np.where(highest >= LEAST_LEVEL, highest, np.nan)
    else:
        wanted = np.full_like(highest, level)
    found = []
    for edit, rate in zip(edits, rates, strict=True):
        curve = edit.curves(cost, draws, average)
        value = at_scale(edit.scales, curve, first_scale(edit.scales, rate, wanted))
        if rule == "least":
            allowed = np.where(rate >= wanted[:, None] - 1e-12, curve, np.inf).min(1)
            value = np.minimum(value, allowed)
        found.append(value)
    both = np.isfinite(found[0]) & np.isfinite(found[1])
    return np.where(both, found[0], np.nan), np.where(both, found[1], np.nan)


def ratio_at_equal_success(
    cells: Sequence[Cell],
    cost: str,
    *,
    level: float | None = None,
    average: Average = "mean",
    rule: Rule = "first",
    resamples: int = 300,
    seed: int = 0,
) -> Ratio:
    """The median over cells of one edit's cost over the other's, each pair at equal success.

    A cell in which both cost nothing says nothing and is left out; one in which only the other costs nothing
    counts as infinite.

    Args:
        cells: whose edits are compared.
        cost: its name.
        level: see `costs_at_equal_success`.
        average: see there.
        rule: see there.
        resamples: draws of the bootstrap, of groups of cells and of pairs within cells.
        seed: of the draws.
    """
    unknown = float("nan")
    if not cells:
        return Ratio(unknown, unknown, unknown, unknown, unknown, 0, 0)
    generator = np.random.default_rng(seed)
    columns, judged_costs, against_costs = [], [], []
    for number, cell in enumerate(cells):
        draws = Draws.of(len(cell.judged.success), resamples, seed, number)
        judged, against = costs_at_equal_success(cell, cost, draws, level=level, average=average, rule=rule)
        columns.append(_quotient(judged, against))
        judged_costs.append(judged[0])
        against_costs.append(against[0])
    table = np.stack(columns, 1)
    reached = ~np.isnan(table[0])
    if not reached.any():
        return Ratio(unknown, unknown, unknown, unknown, unknown, 0, len(cells))
    groups = sorted({cell.group for cell in cells})
    member = np.array([groups.index(cell.group) for cell in cells])
    times = generator.multinomial(len(groups), np.full(len(groups), 1 / len(groups)), resamples)
    resampled = np.array(
        [_median(np.repeat(row, time)) for row, time in zip(table[1:], times[:, member], strict=True)]
    )
    known = np.sort(resampled[~np.isnan(resampled)])
    low = high = unknown
    if len(known) >= resamples / 2:
        low, high = (float(known[round(q * (len(known) - 1))]) for q in (0.025, 0.975))
    return Ratio(
        value=_median(table[0]),
        low=low,
        high=high,
        judged=_median(np.array(judged_costs)[reached]),
        against=_median(np.array(against_costs)[reached]),
        cells=int(reached.sum()),
        of=len(cells),
    )


def _quotient(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    found = np.divide(first, second, out=np.full(len(first), np.nan), where=second > 0)
    return np.where((second == 0) & (first > 0), np.inf, found)


def _median(values: Float[np.ndarray, " n"]) -> float:
    """The median of what is known; the lower of two in the middle, so that infinity is never averaged."""
    known = np.sort(values[~np.isnan(values)])
    return float(known[(len(known) - 1) // 2]) if len(known) else float("nan")
