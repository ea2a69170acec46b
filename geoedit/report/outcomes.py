"""How edits went, as the page draws it: rates, rankings, curves, calibration, pairs of values."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from geoedit.diagnosis.result import Diagnosis
from geoedit.diagnosis.scores import roc_curve
from geoedit.report.numbers import number

CURVE_POINTS = 120


def rates(diagnosis: Diagnosis, label: str) -> dict[str, Any]:
    """For each kind of edit at one site: how many there are, how many should arrive and do."""
    part = diagnosis.table[diagnosis.table["site"] == label]
    return {
        str(kind): {
            "edits": len(rows),
            "predicted": number(rows["probability"].mean()),
            "observed": number(rows["success"].astype("float64").mean()),
        }
        for kind, rows in part.groupby("edit", sort=False)
    }


def rankings(diagnosis: Diagnosis, label: str) -> dict[str, Any]:
    """For each predictor its AUROC at one site, and the ends of its interval."""
    summary = diagnosis.summary
    return {
        str(row["predictor"]): [number(row["auroc"]), number(row["low"]), number(row["high"])]
        for _, row in summary[summary["site"] == label].iterrows()
    }


def curve(run: pd.DataFrame, column: str) -> list[list[float]]:
    """Points of a predictor's ROC curve; none if all edits ended alike."""
    kept = run[run[column].notna()]
    success = kept["success"].to_numpy(dtype=bool)
    if not success.any() or success.all():
        return []
    false, true = roc_curve(kept[column].to_numpy(dtype=float), success)
    chosen = np.unique(np.linspace(0, len(false) - 1, CURVE_POINTS).round().astype(int))
    return [[round(float(false[i]), 5), round(float(true[i]), 5)] for i in chosen]


def calibration(diagnosis: Diagnosis) -> dict[str, Any] | None:
    """How well probabilities held, bin by bin; None unless edits were run."""
    if not diagnosis.applied:
        return None
    found = diagnosis.calibration()
    return {
        "error": found.expected_error,
        "brier": found.brier,
        "bins": [[entry.predicted, entry.observed, entry.count] for entry in found.bins],
    }


def pairs(table: pd.DataFrame, margin: str) -> dict[str, dict[str, list[list[Any]]]]:
    """For each site and kind of edit, one list a pair of values: what was expected, what happened."""
    rated = table.assign(rate=table["success"].astype("float64"), margin=table[margin])
    merged = rated.groupby(["site", "edit", "source", "target"], sort=False, as_index=False).agg(
        sentences=("rate", "size"),
        probability=("probability", "mean"),
        margin=("margin", "mean"),
        nearest=("nearest", "first"),
        rate=("rate", "mean"),
        change=("log_odds_change", "mean"),
    )
    found: dict[str, dict[str, list[list[Any]]]] = {}
    for site, kind, source, target, sentences, probability, mean, nearest, rate, change in merged.itertuples(
        index=False
    ):
        found.setdefault(str(site), {}).setdefault(str(kind), []).append(
            [
                str(source),
                str(target),
                int(sentences),
                number(probability),
                number(mean),
                str(nearest),
                number(rate),
                number(change),
            ]
        )
    return found
