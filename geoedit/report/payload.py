"""What the page draws, boiled down from a diagnosis to plain JSON values (no state, no path of a machine)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from geoedit.diagnosis.result import ALL_SITES, Diagnosis
from geoedit.diagnosis.scores import roc_curve
from geoedit.report.terminal import overall_and_within
from geoedit.report.verdict import verdict

CURVE_POINTS = 120
STRIP_POINTS = 1500


def payload(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return everything that the page's script reads, as JSON values."""
    words = verdict(diagnosis)
    table = diagnosis.table
    overall = table[table["success"].notna()]
    return {
        "model": diagnosis.model,
        "concept": diagnosis.concept,
        "applied": diagnosis.applied,
        "verdict": {"headline": words.headline, "lines": list(words.lines)},
        "predictors": [vars(predictor) for predictor in diagnosis.predictors],
        "kinds": [str(kind) for kind in dict.fromkeys(table["edit"])],
        "scales": sorted({float(scale) for scale in table["scale"]}),
        "sites": [_site(diagnosis, entry.label) | _shape(entry) for entry in diagnosis.sites],
        "within": {
            predictor.column: _number(overall_and_within(diagnosis, predictor.column)[1])
            for predictor in diagnosis.predictors
        },
        "overall": _rankings(diagnosis, ALL_SITES if len(diagnosis.sites) > 1 else diagnosis.sites[0].label),
        "roc": {
            predictor.column: _curve(overall, predictor.column)
            for predictor in diagnosis.predictors
            if len(overall)
        },
        "calibration": _calibration(diagnosis),
        "strip": _strip(overall),
        "pairs": _pairs(table, diagnosis.predictors[0].column),
        "settings": diagnosis.settings,
        "versions": diagnosis.versions,
        "notes": list(diagnosis.notes),
    }


def _shape(site: Any) -> dict[str, Any]:
    return {
        "label": site.label,
        "place": site.place,
        "token": site.token,
        "depth": site.depth,
        "coordinates": [[_number(x) for x in point] for point in site.coordinates],
        "explained": [_number(x) for x in site.explained],
        "separation": _number(site.separation),
    }


def _site(diagnosis: Diagnosis, label: str) -> dict[str, Any]:
    part = diagnosis.table[diagnosis.table["site"] == label]
    rates = {
        str(kind): {
            "edits": len(rows),
            "predicted": _number(rows["probability"].mean()),
            "observed": _number(rows["success"].astype("float64").mean()),
        }
        for kind, rows in part.groupby("edit", sort=False)
    }
    return {"rates": rates, "auroc": _rankings(diagnosis, label)}


def _rankings(diagnosis: Diagnosis, label: str) -> dict[str, Any]:
    summary = diagnosis.summary
    return {
        str(row["predictor"]): [_number(row["auroc"]), _number(row["low"]), _number(row["high"])]
        for _, row in summary[summary["site"] == label].iterrows()
    }


def _curve(run: pd.DataFrame, column: str) -> list[list[float]]:
    kept = run[run[column].notna()]
    success = kept["success"].to_numpy(dtype=bool)
    if not success.any() or success.all():
        return []
    false, true = roc_curve(kept[column].to_numpy(dtype=float), success)
    chosen = np.unique(np.linspace(0, len(false) - 1, CURVE_POINTS).round().astype(int))
    return [[round(float(false[i]), 5), round(float(true[i]), 5)] for i in chosen]


def _calibration(diagnosis: Diagnosis) -> dict[str, Any] | None:
    if not diagnosis.applied:
        return None
    found = diagnosis.calibration()
    return {
        "error": found.expected_error,
        "brier": found.brier,
        "bins": [[entry.predicted, entry.observed, entry.count] for entry in found.bins],
    }


def _strip(run: pd.DataFrame) -> list[list[Any]]:
    if len(run) > STRIP_POINTS:
        run = run.sample(STRIP_POINTS, random_state=0)
    kept = run[run["log_odds_change"].notna()]
    return [
        [
            round(float(probability), 4),
            round(float(change), 3),
            int(bool(success)),
            f"{source} → {target}, {site}",
        ]
        for probability, change, success, source, target, site in zip(
            kept["probability"],
            kept["log_odds_change"],
            kept["success"],
            kept["source"],
            kept["target"],
            kept["site"],
            strict=True,
        )
    ]


def _pairs(table: pd.DataFrame, margin: str) -> dict[str, dict[str, list[list[Any]]]]:
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
                _number(probability),
                _number(mean),
                str(nearest),
                _number(rate),
                _number(change),
            ]
        )
    return found


def _number(value: Any) -> float | None:
    number = float(value)
    return round(number, 5) if np.isfinite(number) else None
