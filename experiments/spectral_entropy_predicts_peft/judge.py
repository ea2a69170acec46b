"""How well gains are foreseen on what was held out: ridge regressions, all with the same penalty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import spearmanr

import geoedit
from experiments.spectral_entropy_predicts_peft.settings import Settings
from experiments.spectral_entropy_predicts_peft.training import places
from peft_analysis.predict import FEATURES, spectral_features
from peft_analysis.updates import Weights

PENALTY = 3.0
"""Of squared coefficients of standardised features, in units of rows; chosen before anything was seen."""
LEFT_OUT = {"architecture": "model", "kind": "kind"}
KINDS = ("attention in", "attention out", "MLP in", "MLP out")
PREDICTORS: dict[str, tuple[str, ...]] = {
    "spectrum": FEATURES,
    **{f"{name} alone": (name,) for name in FEATURES},
    "kind of matrix": tuple(f"is {kind}" for kind in KINDS),
    "depth": ("depth", "depth squared"),
    "size": ("log entries", "log trained"),
    "kind, depth and size": (
        *(f"is {kind}" for kind in KINDS), "depth", "depth squared", "log entries", "log trained",
    ),
    "kind, depth, size and spectrum": (
        *(f"is {kind}" for kind in KINDS), "depth", "depth squared", "log entries", "log trained", *FEATURES,
    ),
    "gradient": ("log gradient", "log gradient's leading part"),
}  # fmt: skip
TRIVIAL = ("kind of matrix", "depth", "size", "kind, depth and size")


@dataclass(frozen=True)
class Score:
    """One predictor on what was held out.

    Attributes:
        predictor: its name. left_out: "architecture" or "kind".
        target: the task, or "all".
        skill: 1 − the squared error over that of the training set's mean. low: of its 95 % interval over
            matrices. high: of the interval.
        rho: the mean of Spearman's correlation within each held-out group; NaN if it is constant there.
    """

    predictor: str
    left_out: str
    target: str
    skill: float
    low: float
    high: float
    rho: float


def table(rows: Sequence[dict[str, Any]], settings: Settings) -> pd.DataFrame:
    """One row for each matrix: the gain of every task, its mean over tasks, and all that predicts.

    A gain is the share of the loss on held-out wordings that training removed, at the rate that left the
    least loss on the trained ones, averaged over seeds.
    """
    frame = pd.DataFrame(rows)
    best = (
        frame.sort_values("taught", kind="stable")
        .groupby(["model", "path", "task", "seed"], sort=False)
        .head(1)
    )
    best = best.assign(
        gain=1 - best["asked"] / best["asked_before"],
        learned=1 - best["taught"] / best["taught_before"],
        forgotten=best["kept"] - best["kept_before"],
        steep=np.log(best["gradient"]),
        steep_leading=np.log(best["gradient_nuclear"]),
    )
    keys = ["model", "path", "matrix", "kind", "depth"]
    found = best.groupby(keys, sort=False)[["learned", "forgotten", "steep", "steep_leading"]].mean()
    gains = best.pivot_table("gain", keys, "task", sort=False).add_prefix("gain ")
    whole = found.join(gains).reset_index()
    whole["gain all"] = whole[[f"gain {task}" for task in settings.tasks]].mean(axis=1)
    whole = whole.rename(columns={"steep": "log gradient", "steep_leading": "log gradient's leading part"})
    return whole.merge(base_features(settings), on=["model", "path"])


def base_features(settings: Settings) -> pd.DataFrame:
    """What is known of each matrix before anything is trained."""
    rows = []
    for name in settings.models:
        model = geoedit.testbeds.load(name)[0]
        weights = Weights.of(model)
        for place in places(model, settings.blocks):
            weight = weights[f"{place.path}.weight"]
            matrix = weight.mT if weights.layout(f"{place.path}.weight") == "in_out" else weight
            m, n = matrix.shape
            rows.append(
                {
                    "model": name,
                    "path": place.path,
                    **spectral_features(matrix),
                    **{f"is {kind}": float(place.kind == kind) for kind in KINDS},
                    "depth squared": place.depth**2,
                    "log entries": float(np.log(m * n)),
                    "log trained": float(np.log(settings.rank * (m + n))),
                }
            )
    return pd.DataFrame(rows)


def ridge(
    x: Float[np.ndarray, "n f"], y: Float[np.ndarray, " n"], penalty: float = PENALTY
) -> dict[str, Any]:
    """Standardise, fit by least squares with a penalty, return all that predicts with it."""
    mean, scale = x.mean(0), x.std(0)
    scale = np.where(scale > 1e-12, scale, 1.0)
    z = (x - mean) / scale
    found = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ (y - y.mean()))
    return {"mean": mean, "scale": scale, "coefficients": found, "intercept": float(y.mean())}


def applied(fit: dict[str, Any], x: Float[np.ndarray, "n f"]) -> Float[np.ndarray, " n"]:
    """What a fit predicts."""
    return fit["intercept"] + (x - fit["mean"]) / fit["scale"] @ fit["coefficients"]


def held_out(
    frame: pd.DataFrame, features: Sequence[str], target: str, by: str
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Predictions for each group from all others, and the mean of those others."""
    x = frame[list(features)].fillna(frame[list(features)].median()).to_numpy(float)
    y = frame[target].to_numpy(float)
    predicted, mean = np.full(len(y), np.nan), np.full(len(y), np.nan)
    for group in frame[by].unique():
        own = (frame[by] == group).to_numpy()
        if own.all():
            continue
        predicted[own] = applied(ridge(x[~own], y[~own]), x[own])
        mean[own] = y[~own].mean()
    return predicted, mean


def scores(frame: pd.DataFrame, settings: Settings) -> list[Score]:
    """Every predictor on every target, with one architecture and with one kind left out at a time."""
    found = []
    draw = np.random.default_rng(0)
    resamples = draw.integers(0, len(frame), (settings.resamples, len(frame)))
    for left_out, by in LEFT_OUT.items():
        for target in ("all", *settings.tasks):
            y = frame[f"gain {target}"].to_numpy(float)
            for name, features in PREDICTORS.items():
                predicted, mean = held_out(frame, features, f"gain {target}", by)
                error, plain = (y - predicted) ** 2, (y - mean) ** 2
                drawn = 1 - error[resamples].sum(1) / plain[resamples].sum(1)
                low, high = np.quantile(drawn, [0.025, 0.975])
                within = [
                    spearmanr(predicted[own], y[own])[0]
                    for own in ((frame[by] == group).to_numpy() for group in frame[by].unique())
                    if np.std(predicted[own]) > 1e-9
                ]
                rho = float(np.mean(within)) if within else float("nan")
                skill = float(1 - error.sum() / plain.sum())
                found.append(Score(name, left_out, target, skill, float(low), float(high), rho))
    return found
