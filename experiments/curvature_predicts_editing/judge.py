"""Judge predictions of edits by concepts, models and shapes that the predictor has not seen."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from sklearn.isotonic import IsotonicRegression

from experiments.curvature_predicts_editing.cells import cells
from experiments.curvature_predicts_editing.learn import Learning, learn, probabilities
from experiments.curvature_predicts_editing.settings import Settings
from experiments.curvature_predicts_editing.statistics import (
    Interval,
    Ranks,
    area,
    as_counts,
    ceiling,
    draws,
    interval,
    spearman,
)
from geoedit.diagnosis.features import FEATURES, LENGTHS
from geoedit.diagnosis.scores import calibration

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Baseline:
    """One number that is to foretell success without learning: its column, its sign, its name for people."""

    column: str
    sign: int
    label: str


BASELINES: dict[str, Baseline] = {
    "landing": Baseline("alone_landing", 1, "landing margin, interpolated in the Fisher metric"),
    "fisher": Baseline("alone_fisher", 1, "margin in Fisher distance"),
    "euclidean": Baseline("alone_euclidean", 1, "margin in Euclidean distance"),
    "norm": Baseline("alone_norm", 1, "length of the vector"),
    "cosine": Baseline("alone_cosine", 1, "cosine with the local chord"),
    "nearest": Baseline("off_plain", -1, "distance to the nearest sample after the edit"),
    "dimension": Baseline("alone_dimension", -1, "intrinsic dimension"),
    "curvature_plain": Baseline("departure", -1, "Euclidean curvature: departure over the chord"),
    "curvature_fisher": Baseline("alone_off_visible", -1, "Fisher curvature: departure seen by the network"),
    "bend_fisher": Baseline("bend_fisher", -1, "Fisher curvature: second- over first-order response"),
}
PLAIN = ("departure", "detour_plain", "alone_off_relative")
SEEN = ("alone_off_visible", "detour_fisher", "bend_fisher", "wander_fisher")
"""Curvature in the metric of the states, and in the metric that the network pulls back."""


@dataclass(frozen=True)
class Score:
    """How well one predictor foretells.

    Attributes:
        name: of the predictor. label: for people. held_out: what it had not seen.
        auroc: over all edits. within_site: mean AUROC within a concept's site.
        rho: Spearman correlation over cells, of the mean prediction with the rate.
        rho_counts: the same with the prediction rounded to what so many edits can show; for a single number
            after it was made a probability (isotonic regression on other concepts).
        rho_edits: the same over single edits.
        error: expected calibration error, and `brier`; NaN for what is no probability.
        known: share of the edits of which the predictor says something.
    """

    name: str
    label: str
    held_out: str
    auroc: Interval
    within_site: float
    rho: Interval
    rho_counts: Interval
    rho_edits: float
    error: float
    brier: float
    known: float


@dataclass(frozen=True)
class Judged:
    """What the judging gives: scores, the highest that could be, and the edits with their predictions."""

    scores: tuple[Score, ...]
    ceilings: dict[str, float]
    edits: pd.DataFrame

    def score(self, name: str) -> Score:
        """The score of one predictor."""
        return next(score for score in self.scores if score.name == name)


def judge(edits: pd.DataFrame, settings: Settings) -> Judged:
    """Predict every edit from others, and compare with what happened."""
    edits = with_departure(edits)
    seen, full = _Judge(edits, settings), list(FEATURES)
    scores = []

    def learned(name: str, label: str, features: Sequence[str], by: str, learning: Learning) -> None:
        log.info("learning %s", name)
        edits[f"p_{name}"] = held_out(edits, features, by, learning, settings.seed)
        scores.append(seen(name, label, f"one {by} at a time", edits[f"p_{name}"].to_numpy(float)))

    whole = settings.learning
    short = replace(whole, trees=min(100, whole.trees), depth=min(3, whole.depth), edits=whole.edits // 2)
    learned("odds", "the odds", full, "concept", whole)
    learned("odds_model", "the odds", full, "model", whole)
    learned("odds_shape", "the odds", full, "shape", whole)
    learned("lengths", "the odds without outputs", list(LENGTHS), "concept", short)
    learned("short", "fewer trees, all features", full, "shape", short)
    bends = {*PLAIN, *SEEN}
    learned("flat", "fewer trees, no curvature", [n for n in full if n not in bends], "shape", short)
    extra = [name for name in (*PLAIN, *SEEN) if name not in full]
    learned("curved", "fewer trees, and distances off the manifold", [*full, *extra], "shape", short)
    learned("plain", "Euclidean curvature, learned", PLAIN, "concept", short)
    learned("seen", "curvature as the network sees it, learned", SEEN, "concept", short)
    for name, baseline in BASELINES.items():
        column = edits[baseline.column].to_numpy(float) * baseline.sign
        known = np.isfinite(column)
        filled = np.where(known, column, np.median(column[known]) if known.any() else 0.0)
        score = seen(name, baseline.label, "nothing is learned", filled, probability=False)
        fitted = calibrated(edits, filled, "concept")
        counts = seen(name, baseline.label, "one concept at a time", fitted).rho_counts
        scores.append(replace(score, known=float(known.mean()), rho_counts=counts))
    rates = seen.cells["rate"].to_numpy(float)
    ceilings = {"edits": ceiling(edits["success"].to_numpy(bool)), "cells": ceiling(rates)}
    return Judged(tuple(scores), ceilings, edits)


def with_departure(edits: pd.DataFrame) -> pd.DataFrame:
    """Add how far off the manifold the edit is expected to end, by curvature, over the chord's length."""
    chord = edits["alone_norm"] / edits["length_plain"]
    departure = (edits["alone_off_manifold"] / chord).replace([np.inf, -np.inf], np.nan)
    return edits.assign(departure=departure)


def held_out(
    edits: pd.DataFrame, features: Sequence[str], by: str, learning: Learning, seed: int
) -> Float[np.ndarray, " edits"]:
    """Predict each edit by trees learned without its concept, model or shape; NaN if there is no other."""
    columns = {name: edits[name].to_numpy(float) for name in features}
    success, of = edits["success"].to_numpy(bool), edits[by].to_numpy()
    groups = (edits["model"] + " " + edits["concept"]).to_numpy()
    found = np.full(len(edits), np.nan)
    for left_out in dict.fromkeys(of):
        others = of != left_out
        if not others.any():
            continue
        trees = learn(
            {name: column[others] for name, column in columns.items()},
            success[others],
            name=by,
            needs=features[0],
            groups=groups[others].tolist(),
            learning=learning,
            seed=seed,
        )
        found[~others] = probabilities(trees, {name: column[~others] for name, column in columns.items()})
    return found


def calibrated(
    edits: pd.DataFrame, score: Float[np.ndarray, " edits"], by: str
) -> Float[np.ndarray, " edits"]:
    """Turn one number into a probability by isotonic regression on the edits of other groups.

    So that a baseline, too, may say how many successes it foresees. Rising or falling, as the others show.
    """
    success, of = edits["success"].to_numpy(float), edits[by].to_numpy()
    found = np.full(len(edits), success.mean())
    for left_out in dict.fromkeys(of):
        others = of != left_out
        if others.any():
            weights = np.ones(int(others.sum()))
            rising = spearman(Ranks(score[others]), Ranks(success[others]), weights) >= 0
            curve = IsotonicRegression(increasing=rising, out_of_bounds="clip", y_min=0, y_max=1)
            found[~others] = curve.fit(score[others], success[others]).predict(score[~others])
    return found


class _Judge:
    """Scores one column of predictions after another over the same edits, cells and resamples."""

    def __init__(self, edits: pd.DataFrame, settings: Settings) -> None:
        self.edits, self.seed = edits, settings.seed
        self.success = edits["success"].to_numpy(bool)
        self.cells = cells(edits, [])
        self.rates = Ranks(self.cells["rate"].to_numpy(float))
        self.outcomes = Ranks(self.success)
        concepts = edits["concept"].tolist()
        self.of_edits = draws(concepts, settings.resamples, settings.seed).astype(np.uint8)
        self.of_cells = draws(self.cells["concept"].tolist(), settings.resamples, settings.seed)

    def __call__(
        self,
        name: str,
        label: str,
        unseen: str,
        prediction: Float[np.ndarray, " edits"],
        probability: bool = True,
    ) -> Score:
        if np.isnan(prediction).all():
            return Score(name, label, unseen, *_nothing())
        over = cells(self.edits.assign(prediction=prediction), ["prediction"])
        mean, number = over["prediction"].to_numpy(float), over["edits"].to_numpy()
        counts = as_counts(mean, number) if probability else mean
        single, each, counted = Ranks(prediction), Ranks(mean), Ranks(counts)
        equal, cell_equal = np.ones(len(prediction)), np.ones(len(mean))
        judged = calibration(prediction, self.success) if probability else None
        return Score(
            name,
            label,
            unseen,
            interval(
                area(single, self.success, equal),
                [area(single, self.success, row.astype(float)) for row in self.of_edits],
            ),
            within_sites(self.edits, prediction, self.success),
            interval(
                spearman(each, self.rates, cell_equal),
                [spearman(each, self.rates, row) for row in self.of_cells],
            ),
            interval(
                spearman(counted, self.rates, cell_equal),
                [spearman(counted, self.rates, row) for row in self.of_cells],
            ),
            spearman(single, self.outcomes, equal),
            judged.expected_error if judged else float("nan"),
            judged.brier if judged else float("nan"),
            1.0,
        )


def within_sites(
    edits: pd.DataFrame, prediction: Float[np.ndarray, " edits"], success: Bool[np.ndarray, " edits"]
) -> float:
    """Return the mean AUROC over sites (of each concept and model) that see both outcomes ten times."""
    found = []
    groups: Any = edits.groupby(["model", "concept", "site"], sort=False, observed=True).indices.values()
    for inside in groups:
        hits = int(success[inside].sum())
        if min(hits, len(inside) - hits) >= 10:
            found.append(area(Ranks(prediction[inside]), success[inside], np.ones(len(inside))))
    return float(np.mean(found)) if found else float("nan")


def _nothing() -> tuple[Any, ...]:
    nan = float("nan")
    unknown = Interval(nan, nan, nan)
    return unknown, nan, unknown, unknown, nan, nan, nan, 0.0
