"""The whole study: train, judge, fit, write results, page and pictures."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from experiments.spectral_entropy_predicts_peft.figures import figures
from experiments.spectral_entropy_predicts_peft.fit import fitted
from experiments.spectral_entropy_predicts_peft.fit import ship as ship_fit
from experiments.spectral_entropy_predicts_peft.judge import scores, table
from experiments.spectral_entropy_predicts_peft.page import page
from experiments.spectral_entropy_predicts_peft.settings import Settings
from experiments.spectral_entropy_predicts_peft.training import runs
from geoedit.diagnosis.result import write_text

NAME = "spectral_entropy_predicts_peft"


def run(
    settings: Settings | None = None,
    *,
    rows: Iterable[dict[str, Any]] | None = None,
    ship: bool = False,
) -> dict[str, Any]:
    """Run the study and write its JSON, page and pictures; return what is in the JSON.

    Args:
        settings: of the study.
        rows: of runs that are at hand; they are trained if not given.
        ship: whether to write the coefficients into the package.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    if rows is None:
        with tempfile.TemporaryDirectory() as folder:
            kept = settings if settings.runs else replace(settings, runs=Path(folder))
            rows = list(runs(kept))
    rows = list(rows)
    frame = table(rows, settings)
    judged = scores(frame, settings)
    fit = fitted(frame, judged, settings)
    found = {
        "settings": settings.to_dict(),
        "seconds": round(sum(row["seconds"] for row in rows) + time.perf_counter() - started),
        "runs": len(rows),
        "reliability": reliability(frame, settings),
        "scores": [asdict(score) for score in judged],
        "fit": fit,
        "matrices": frame.round(4).to_dict("list"),
    }
    found = plain(found)
    settings.folder.mkdir(parents=True, exist_ok=True)
    figures(found, settings.folder)
    write_text(settings.folder / f"{NAME}.json", json.dumps(found, separators=(",", ":")) + "\n")
    write_text(settings.folder / f"{NAME}.md", page(found))
    if ship:
        ship_fit(fit)
    return found


def reliability(frame: Any, settings: Settings) -> dict[str, float]:
    """How well the gain on one task ranks matrices by the gain on another (Spearman), for each pair."""
    tasks = settings.tasks
    return {
        f"{a}, {b}": float(frame[f"gain {a}"].corr(frame[f"gain {b}"], method="spearman"))
        for i, a in enumerate(tasks)
        for b in tasks[i + 1 :]
    }


def plain(value: Any) -> Any:
    """The same with None for numbers that are not finite, and floats of four digits."""
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
