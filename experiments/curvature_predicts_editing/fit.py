"""Learn the odds that ship with the package, from nothing.

Run with ``python -m experiments.curvature_predicts_editing.fit``: it makes the study's edits, judges odds on
concepts, models and shapes that they were not learned from, learns from all of them, and writes
geoedit/diagnosis/odds.json with the record of all that.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn
import torch
import transformers

from experiments.curvature_predicts_editing.cells import collect_edits
from experiments.curvature_predicts_editing.judge import Judged, Score, judge
from experiments.curvature_predicts_editing.learn import learn
from experiments.curvature_predicts_editing.settings import Settings
from geoedit.diagnosis.features import FEATURES, LENGTHS
from geoedit.diagnosis.odds import ANSWERS, BUILT_IN, Odds
from geoedit.diagnosis.odds import LENGTHS as LENGTHS_SET
from geoedit.testbeds import card

HELD_OUT = {"odds": "concept", "odds_model": "model", "odds_shape": "shape"}


def run(settings: Settings | None = None, path: Path = BUILT_IN) -> Odds:
    """Make the edits, judge, learn, write; return the odds."""
    settings = settings or Settings()
    edits = collect_edits(settings)
    odds = learn_odds(edits, judge(edits, settings), settings)
    odds.save(path)
    return odds


def learn_odds(edits: pd.DataFrame, judged: Judged | None, settings: Settings) -> Odds:
    """Learn both sets of trees from all edits, and write down what they are from and how good they are."""
    success = edits["success"].to_numpy(bool)
    groups = (edits["model"] + " " + edits["concept"]).tolist()
    whole = settings.learning
    short = replace(whole, trees=min(100, whole.trees), depth=min(3, whole.depth), edits=whole.edits // 2)
    sets = tuple(
        learn(
            {feature: edits[feature].to_numpy(float) for feature in features},
            success,
            name=name,
            needs=needs,
            groups=groups,
            learning=learning,
            seed=settings.seed,
        )
        for name, needs, features, learning in (
            (ANSWERS, "landing", FEATURES, whole),
            (LENGTHS_SET, "nearer_plain", LENGTHS, short),
        )
    )
    return Odds(sets, record(edits, judged, settings))


def record(edits: pd.DataFrame, judged: Judged | None, settings: Settings) -> dict[str, Any]:
    """What odds were learned from, with what, and how they did on what they had not seen."""
    found: dict[str, Any] = {
        "command": "python -m experiments.curvature_predicts_editing.fit",
        "models": {name: card(name)["world"] for name in settings.models},
        "concepts": list(settings.concepts),
        "sites": list(dict.fromkeys(edits["site"])),
        "kinds": list(dict.fromkeys(edits["kind"])),
        "scales": list(settings.scales),
        "edits": len(edits),
        "successes": int(edits["success"].sum()),
        "pairs": settings.pairs,
        "sentences": settings.sentences,
        "max_prompts": settings.max_prompts,
        "seed": settings.seed,
        "learning": asdict(settings.learning),
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "scikit-learn": sklearn.__version__,
            "numpy": np.__version__,
        },
        "held_out": {},
    }
    if judged is not None:
        for name, by in HELD_OUT.items():
            found["held_out"][f"one {by} at a time"] = _short(judged.score(name))
        found["held_out"]["lengths, one concept at a time"] = _short(judged.score("lengths"))
    return found


def _short(score: Score) -> dict[str, float | None]:
    numbers = {
        "auroc": score.auroc.value,
        "auroc_within_a_site": score.within_site,
        "rho_cells": score.rho.value,
        "rho_counts": score.rho_counts.value,
        "calibration_error": score.error,
        "brier": score.brier,
    }
    return {name: None if np.isnan(number) else round(number, 4) for name, number in numbers.items()}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run()
