"""What the page draws, boiled down from a diagnosis to plain JSON values (no state, no path of a machine)."""

from __future__ import annotations

from typing import Any

from geoedit.diagnosis.result import ALL_SITES, Diagnosis
from geoedit.diagnosis.safe_scale import GRID
from geoedit.report.numbers import number
from geoedit.report.outcomes import calibration, curve, pairs, rankings, rates
from geoedit.report.shapes import shape, swept
from geoedit.report.terminal import overall_and_within
from geoedit.report.verdict import verdict


def payload(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return everything that the page's script reads, as JSON values."""
    words = verdict(diagnosis)
    table = diagnosis.table
    run = table[table["success"].notna()]
    columns = [predictor.column for predictor in diagnosis.predictors]
    return {
        "model": diagnosis.model,
        "concept": diagnosis.concept,
        "applied": diagnosis.applied,
        "verdict": {"headline": words.headline, "lines": list(words.lines)},
        "predictors": [vars(predictor) for predictor in diagnosis.predictors],
        "kinds": [str(kind) for kind in dict.fromkeys(table["edit"])],
        "sites": [
            {"rates": rates(diagnosis, site.label), "auroc": rankings(diagnosis, site.label)} | shape(site)
            for site in diagnosis.sites
        ],
        "safe_limit": max(GRID),
        "sweeps": [swept(entry) for entry in diagnosis.sweeps],
        "within": {column: number(overall_and_within(diagnosis, column)[1]) for column in columns},
        "overall": rankings(diagnosis, ALL_SITES if len(diagnosis.sites) > 1 else diagnosis.sites[0].label),
        "roc": {column: curve(run, column) for column in columns if len(run)},
        "calibration": calibration(diagnosis),
        "pairs": pairs(table, columns[0]),
        "settings": diagnosis.settings,
        "versions": diagnosis.versions,
        "notes": list(diagnosis.notes),
    }
