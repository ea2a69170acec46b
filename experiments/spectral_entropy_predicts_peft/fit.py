"""The coefficients that ship with the package: fitted on all matrices, with their held-out record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import peft
import torch
import transformers

import geoedit
from experiments.spectral_entropy_predicts_peft.judge import PENALTY, TRIVIAL, Score, held_out, ridge
from experiments.spectral_entropy_predicts_peft.settings import Settings
from geoedit.diagnosis.result import write_text
from peft_analysis.predict import COEFFICIENTS, FEATURES

MARGIN = 0.1
"""Of the range of each feature, on either side, that still counts as seen."""


def fitted(frame: pd.DataFrame, judged: Sequence[Score], settings: Settings) -> dict[str, Any]:
    """Fit the spectrum's features to the gains of all matrices; the file's content."""
    x = frame[list(FEATURES)].to_numpy(float)
    y = frame["gain all"].to_numpy(float)
    fit = ridge(np.where(np.isnan(x), np.nanmedian(x, 0), x), y)
    predicted, _ = held_out(frame, FEATURES, "gain all", "model")
    low, high = np.nanmin(x, 0), np.nanmax(x, 0)
    room = MARGIN * (high - low)

    def named(values: Any) -> dict[str, float]:
        return {name: round(float(value), 6) for name, value in zip(FEATURES, values, strict=True)}

    return {
        "coefficients": named(fit["coefficients"]),
        "mean": named(fit["mean"]),
        "scale": named(fit["scale"]),
        "intercept": round(fit["intercept"], 6),
        "error": round(float(np.quantile(np.abs(y - predicted), 0.9)), 6),
        "range": {
            name: [round(float(a), 6), round(float(b), 6)]
            for name, a, b in zip(FEATURES, low - room, high + room, strict=True)
        },
        "record": record(frame, judged, settings),
    }


def record(frame: pd.DataFrame, judged: Sequence[Score], settings: Settings) -> dict[str, Any]:
    """What the fit is from, and how it did on what it had not seen."""
    whole = {(one.predictor, one.left_out): one for one in judged if one.target == "all"}
    name = max(TRIVIAL, key=lambda trivial: whole[trivial, "architecture"].skill)
    return {
        "command": "python -m experiments.spectral_entropy_predicts_peft",
        "matrices": len(frame),
        "models": {name: geoedit.testbeds.card(name)["world"] for name in settings.models},
        "settings": {
            key: value for key, value in settings.to_dict().items() if key not in ("folder", "runs")
        },
        "penalty": PENALTY,
        "skill": {by: round(whole["spectrum", by].skill, 4) for by in ("architecture", "kind")},
        "interval": {
            by: [round(whole["spectrum", by].low, 4), round(whole["spectrum", by].high, 4)]
            for by in ("architecture", "kind")
        },
        "best_baseline": {
            "name": name,
            **{by: round(whole[name, by].skill, 4) for by in ("architecture", "kind")},
        },
        "gradient": {by: round(whole["gradient", by].skill, 4) for by in ("architecture", "kind")},
        "versions": {
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
            "peft": peft.__version__,
        },
    }


def ship(found: dict[str, Any], path: Path = COEFFICIENTS) -> None:
    """Write the file that `peft_analysis.predict` reads."""
    write_text(path, json.dumps(found, indent=1) + "\n")
