"""Ranks, and how far a predictor could get at all where outcomes are tied."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from geoedit.errors import EditError


class Ranks:
    """Midranks of some numbers under any weights, sorted once.

    With weights w the midrank of x_i is the weight below it and half of the weight tied with it (its own
    included): for whole numbers the midrank among as many copies, less one half.

    Raises:
        EditError: a number is NaN.
    """

    def __init__(self, values: Shaped[np.ndarray, " n"]) -> None:
        values = np.asarray(values, dtype=float)
        if np.isnan(values).any():
            raise EditError(
                f"{int(np.isnan(values).sum())} of {len(values)} numbers are NaN; fill them first."
            )
        self.order = np.argsort(values, kind="stable")
        new = np.diff(values[self.order]) != 0
        self.starts = np.concatenate([[0], np.nonzero(new)[0] + 1]) if len(values) else np.zeros(0, dtype=int)
        self.group = np.empty(len(values), dtype=int)
        self.group[self.order] = np.concatenate([[0], np.cumsum(new)]) if len(values) else []

    def of(self, weights: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """The midranks under these weights."""
        tied = np.add.reduceat(weights[self.order], self.starts)
        return (np.cumsum(tied) - tied / 2)[self.group]


def spearman(x: Ranks, y: Ranks, weights: Float[np.ndarray, " n"]) -> float:
    """Return the correlation of midranks, each item counted by its weight; NaN if one side is constant."""
    a, b, total = x.of(weights), y.of(weights), weights.sum()
    a, b = a - (weights * a).sum() / total, b - (weights * b).sum() / total
    scale = np.sqrt((weights * a * a).sum() * (weights * b * b).sum())
    return float((weights * a * b).sum() / scale) if scale > 1e-12 * total else float("nan")


def area(x: Ranks, success: Bool[np.ndarray, " n"], weights: Float[np.ndarray, " n"]) -> float:
    """Return the AUROC, each item counted by its weight; NaN if only one outcome is there."""
    hit = weights * success
    positive, negative = hit.sum(), weights.sum() - hit.sum()
    if positive <= 0 or negative <= 0:
        return float("nan")
    return float(((hit * x.of(weights)).sum() - positive**2 / 2) / (positive * negative))


def ceiling(outcomes: Shaped[np.ndarray, " n"]) -> float:
    """Return the largest Spearman correlation with these outcomes that a predictor without ties can reach.

    `sqrt(1 - sum_t (t^3 - t) / (n^3 - n))` over groups of t tied outcomes: a perfect order loses what it says
    within ties. For a share q of successes among single edits this is sqrt(3 q (1 - q)), at most 0.87.
    """
    _, tied = np.unique(outcomes, return_counts=True)
    n, tied = float(len(outcomes)), tied.astype(float)
    if n < 2:
        return float("nan")
    return float(np.sqrt(max(0.0, 1 - (tied**3 - tied).sum() / (n**3 - n))))


def as_counts(probability: Float[np.ndarray, " n"], edits: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Round predicted rates to what can be seen in so many edits: the likeliest share of whole successes.

    The mode of a binomial is floor((m + 1) p); predictions that foresee the same count are then tied, as the
    counts themselves are.
    """
    return np.minimum(np.floor((edits + 1) * probability), edits) / edits


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % bootstrap interval; NaN where it is not known."""

    value: float
    low: float
    high: float


def draws(clusters: Sequence[Hashable], resamples: int, seed: int) -> Float[np.ndarray, "resamples n"]:
    """Return how often each item is drawn when whole clusters are, in each resample."""
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    member = np.array([numbers[cluster] for cluster in clusters])
    counts = np.random.default_rng(seed).multinomial(
        len(numbers), np.full(len(numbers), 1 / len(numbers)), resamples
    )
    return counts[:, member].astype(float)


def interval(value: float, resampled: Sequence[float]) -> Interval:
    """Return the percentile interval of the resamples that have a value; NaN if fewer than half do.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    known = np.array([entry for entry in resampled if not np.isnan(entry)])
    if np.isnan(value) or len(known) == 0 or 2 * len(known) < len(resampled):
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(known, [0.025, 0.975])
    return Interval(value, float(low), float(high))
