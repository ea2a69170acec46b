"""What the study found, as plain JSON values: scores, cells by site and scale, calibration, failures."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from experiments.curvature_predicts_editing.cells import CELL
from experiments.curvature_predicts_editing.judge import Judged, Score
from experiments.curvature_predicts_editing.statistics import Interval
from geoedit.diagnosis.scores import calibration

DIGITS = 4
WORST = 20
FAR, PARTLY = 3.0, (0.2, 0.8)


def tables(judged: Judged) -> dict[str, Any]:
    """Everything that the page and the pictures are made of."""
    edits = judged.edits
    return {
        "counts": {
            "edits": len(edits),
            "cells": int(edits.groupby(CELL, observed=True).ngroups),
            "successes": int(edits["success"].sum()),
        },
        "ceilings": _rounded(judged.ceilings),
        "scores": [score_values(score) for score in judged.scores],
        "calibration": {
            name: calibration_values(edits, f"p_{name}") for name in ("odds", "odds_model", "odds_shape")
        },
        "groups": groups(edits),
        "by_concept": by(edits, ["model", "concept"]),
        "by_scale": by(edits, ["shape", "kind", "scale"]),
        "failures": failures(edits),
        "lost": lost(edits),
    }


def score_values(score: Score) -> dict[str, Any]:
    """A score as plain values; intervals as lists of value, low, high."""
    found: dict[str, Any] = {}
    for name, value in vars(score).items():
        if isinstance(value, Interval):
            found[name] = [_plain(number) for number in (value.value, value.low, value.high)]
        else:
            found[name] = _plain(value) if isinstance(value, float) else value
    return found


def calibration_values(edits: pd.DataFrame, column: str) -> dict[str, Any]:
    """The bins of a reliability diagram, and the mean error; empty where nothing was predicted."""
    predicted = edits[column].to_numpy(float)
    if np.isnan(predicted).any():
        return {"bins": [], "expected_error": None, "brier": None}
    found = calibration(predicted, edits["success"].to_numpy(bool))
    return {
        "bins": [_rounded(asdict(entry)) for entry in found.bins],
        "expected_error": _plain(found.expected_error),
        "brier": _plain(found.brier),
    }


def groups(edits: pd.DataFrame) -> dict[str, list[Any]]:
    """Predicted and observed rates for each model, concept, site, kind and scale, as columns."""
    keys = ["model", "concept", "site", "kind", "scale"]
    return {name: list(column) for name, column in _rates(edits, keys).to_dict("list").items()}


def by(edits: pd.DataFrame, keys: list[str]) -> list[dict[str, Any]]:
    """Predicted and observed rates for some groups, one entry each."""
    return [dict(row) for row in _rates(edits, keys).to_dict("records")]


def losses(edits: pd.DataFrame) -> Float[np.ndarray, " edits"]:
    """Negative log-likelihood of each edit's outcome under the odds, in nats."""
    p, success = edits["p_odds"].to_numpy(float), edits["success"].to_numpy(bool)
    return -np.log(np.clip(np.where(success, p, 1 - p), 1e-6, None))


def lost(edits: pd.DataFrame) -> dict[str, Any]:
    """How much of the loss lies at far scales, and at sites where a part of the value passes (shares)."""
    loss, share = losses(edits), edits["share"].to_numpy(float)
    parts = {
        "far": edits["scale"].to_numpy(float) >= FAR,
        "partly": (share > PARTLY[0]) & (share < PARTLY[1]),
        "both": (edits["scale"].to_numpy(float) >= FAR) | ((share > PARTLY[0]) & (share < PARTLY[1])),
    }
    return {
        name: {"edits": _plain(float(part.mean())), "loss": _plain(float(loss[part].sum() / loss.sum()))}
        for name, part in parts.items()
    }


def failures(edits: pd.DataFrame) -> list[dict[str, Any]]:
    """Sites of a concept where the odds lose most: mean log-likelihood, and which way they err."""
    if edits["p_odds"].isna().any():
        return []
    table = edits.assign(loss=losses(edits))
    keys = ["model", "concept", "site", "kind"]
    found = _rates(table, keys).merge(
        table.groupby(keys, observed=True, sort=False)["loss"].mean().round(DIGITS).reset_index(), on=keys
    )
    shares = table.groupby(keys, observed=True, sort=False)["share"].mean().round(DIGITS).reset_index()
    worst = found.merge(shares, on=keys).sort_values("loss", ascending=False, kind="stable").head(WORST)
    return [dict(row) for row in worst.to_dict("records")]


def _rates(edits: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    found = edits.groupby(keys, observed=True, sort=False)[["success", "p_odds"]].agg(["mean", "size"])
    flat = pd.DataFrame(
        {
            "edits": found[("success", "size")].astype(int),
            "observed": found[("success", "mean")].round(DIGITS),
            "predicted": found[("p_odds", "mean")].round(DIGITS),
        }
    )
    return flat.reset_index()


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _plain(value) if isinstance(value, float) else value for name, value in values.items()}


def _plain(number: float) -> float | None:
    return None if not np.isfinite(number) else round(float(number), DIGITS)
