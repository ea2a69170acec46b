"""How well a number that was predicted ranks what was then observed: AUROC, its interval, and calibration."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from geoedit.errors import EditError


@dataclass(frozen=True)
class Ranking:
    """AUROC of one predictor with a bootstrap interval; NaN where only one outcome was seen."""

    auroc: float
    low: float
    high: float
    count: int
    successes: int


@dataclass(frozen=True)
class CalibrationBin:
    """Edits with a predicted probability between `low` and `high`, and the share that succeeded."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """Reliability of predicted probabilities: the bins, their mean gap (by count), the Brier score."""

    bins: tuple[CalibrationBin, ...]
    expected_error: float
    brier: float


def auroc(scores: Float[np.ndarray, " n"], success: Bool[np.ndarray, " n"]) -> float:
    """Return the probability that a random success scores above a random failure, ties counting one half.

    `AUROC = P(s+ > s-) + P(s+ = s-) / 2`. NaN when there are no successes or no failures: then nothing can be
    ranked.

    Raises:
        EditError: a score is NaN.
    """
    return float(_weighted_auroc(scores, success, np.ones((1, len(scores))))[0])


def bootstrap_auroc(
    scores: Float[np.ndarray, " n"],
    success: Bool[np.ndarray, " n"],
    clusters: Sequence[Hashable] | None = None,
    *,
    resamples: int = 400,
    level: float = 0.95,
    seed: int = 0,
) -> Ranking:
    """Return the AUROC with a percentile bootstrap interval that resamples whole clusters.

    Edits that share a source and a target are not independent, so the cluster (for instance the pair) is
    drawn, not the edit. Resamples with a single outcome are dropped; the interval is NaN when fewer than half
    are left. Percentile bootstrap: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.

    Raises:
        EditError: a score is NaN, or `clusters` has another length than `scores`.
    """
    if clusters is None:
        clusters = range(len(scores))
    if len(clusters) != len(scores):
        raise EditError(
            f"{len(clusters)} clusters were given for {len(scores)} scores; give one cluster a score."
        )
    value = auroc(scores, success)
    count, successes = len(scores), int(success.sum())
    if np.isnan(value):
        return Ranking(value, float("nan"), float("nan"), count, successes)
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    member = np.array([numbers[cluster] for cluster in clusters])
    draws = np.random.default_rng(seed).multinomial(
        len(numbers), np.full(len(numbers), 1 / len(numbers)), resamples
    )
    if len(numbers) <= resamples:
        values = _clustered_auroc(scores, success, member, draws.astype(float))
    else:
        values = _weighted_auroc(scores, success, draws[:, member].astype(float))
    values = values[~np.isnan(values)]
    if len(values) < resamples / 2:
        return Ranking(value, float("nan"), float("nan"), count, successes)
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Ranking(value, float(low), float(high), count, successes)


def calibration(
    probability: Float[np.ndarray, " n"], success: Bool[np.ndarray, " n"], *, bins: int = 10
) -> Calibration:
    """Compare predicted probabilities with how often the edits succeeded, in bins of equal width on [0, 1].

    `expected_error = sum_b (n_b / n) |mean predicted_b - mean observed_b|` (the expected calibration error),
    `brier = mean (p - y)^2`. Empty bins are left out.

    Raises:
        EditError: a probability is outside [0, 1] or NaN, or there are none.
    """
    if len(probability) == 0:
        raise EditError("Calibration of no edits was asked for; run the edits first (apply=True).")
    if not bool(np.all((probability >= 0) & (probability <= 1))):
        worst = probability[~((probability >= 0) & (probability <= 1))][0]
        raise EditError(f"A probability is {worst}, outside [0, 1]; give the probabilities, not the margins.")
    index = np.minimum((probability * bins).astype(int), bins - 1)
    found = []
    for number in range(bins):
        inside = index == number
        if inside.any():
            found.append(
                CalibrationBin(
                    number / bins,
                    (number + 1) / bins,
                    int(inside.sum()),
                    float(probability[inside].mean()),
                    float(success[inside].mean()),
                )
            )
    error = sum(entry.count * abs(entry.predicted - entry.observed) for entry in found) / len(probability)
    return Calibration(tuple(found), float(error), float(np.mean((probability - success) ** 2)))


def roc_curve(
    scores: Float[np.ndarray, " n"], success: Bool[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Return false-positive and true-positive rates from (0, 0) to (1, 1), a point a distinct score."""
    order = np.argsort(-scores, kind="stable")
    ordered, hit = scores[order], success[order]
    last = np.append(np.nonzero(np.diff(ordered))[0], len(ordered) - 1)
    true, false = np.cumsum(hit)[last], np.cumsum(~hit)[last]
    return (
        np.concatenate([[0.0], false / max(int((~hit).sum()), 1)]),
        np.concatenate([[0.0], true / max(int(hit.sum()), 1)]),
    )


def _weighted_auroc(
    scores: Float[np.ndarray, " n"],
    success: Bool[np.ndarray, " n"],
    weights: Float[np.ndarray, "resamples n"],
) -> Float[np.ndarray, " resamples"]:
    if np.isnan(scores).any():
        raise EditError(
            f"{int(np.isnan(scores).sum())} of {len(scores)} scores are NaN; leave those edits out first."
        )
    if len(scores) == 0:
        return np.full(len(weights), np.nan)
    order = np.argsort(scores, kind="stable")
    starts = np.concatenate([[0], np.nonzero(np.diff(scores[order]))[0] + 1])
    positive = np.add.reduceat(weights[:, order] * success[order], starts, axis=1)
    negative = np.add.reduceat(weights[:, order] * ~success[order], starts, axis=1)
    below = np.cumsum(negative, axis=1) - negative
    total = positive.sum(1) * negative.sum(1)
    wins = (positive * (below + negative / 2)).sum(1)
    return np.divide(wins, total, out=np.full(len(weights), np.nan), where=total > 0)


def _clustered_auroc(
    scores: Float[np.ndarray, " n"],
    success: Bool[np.ndarray, " n"],
    member: Int[np.ndarray, " n"],
    draws: Float[np.ndarray, "resamples clusters"],
) -> Float[np.ndarray, " resamples"]:
    """The AUROC of each resample of clusters; what successes win over failures is counted once, by pairs."""
    clusters = draws.shape[1]
    levels, level = np.unique(scores, return_inverse=True)
    counts = [
        np.bincount(member[kept] * len(levels) + level[kept], minlength=clusters * len(levels)).reshape(
            clusters, len(levels)
        )
        for kept in (success, ~success)
    ]
    positive, negative = (count.astype(float) for count in counts)
    wins = positive @ (np.cumsum(negative, axis=1) - negative / 2).T
    total = (draws @ positive.sum(1)) * (draws @ negative.sum(1))
    won = ((draws @ wins) * draws).sum(1)
    return np.divide(won, total, out=np.full(len(draws), np.nan), where=total > 0)
