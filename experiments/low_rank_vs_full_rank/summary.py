"""Runs put together: means over seeds, comparisons at one loss, and what goes with what."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import spearmanr

LOSS = 0.026  # nats: the loss that the swept rates of most methods enclose
NUMBERS = (
    "loss", "learned", "forgotten", "relative_norm", "effective_rank", "stable_rank", "energy_rank_90",
    "intruders_left", "intruders_right", "rank_slope", "loses_rank",
)  # fmt: skip


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each model and method at the chosen rate: mean, least and largest over the seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in runs:
        if one["chosen"]:
            groups.setdefault((one["model"], one["method"]), []).append(one)
    rows = []
    for (model, method), group in groups.items():
        row: dict[str, Any] = {
            "model": model,
            "method": method,
            "rate": group[0]["rate"],
            "seeds": len(group),
        }
        row |= {name: _spread([one[name] for one in group]) for name in NUMBERS}
        starts = [one["path"][0] for run in group for one in run.get("matrices", ())]
        row["base_rank"] = round(statistics.fmean(starts), 2) if starts else None
        row["rank_path"] = [
            statistics.fmean(at) for at in zip(*(one["rank_path"] for one in group), strict=True)
        ]
        for stored in ("float32", "bfloat16"):
            verdicts = [one["verdicts"][stored] for one in group if "verdicts" in one]
            statements = sum((Counter(one["statements"]) for one in verdicts), Counter())
            row[f"origin_{stored}"] = dict(Counter(one["origin"] for one in verdicts))
            row[f"statements_{stored}"] = dict(statements)
            row[f"rank_{stored}"] = statistics.median(rank[0] for one in verdicts for rank in one["ranks"])
        likes = [one["like_full"] for one in group if "like_full" in one]
        if likes:
            row["like_full"] = {key: statistics.fmean(one[key] for one in likes) for key in likes[0]}
        rows.append(row)
    return rows


def matched(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each method of the sweep has at one loss, between the rates on both sides of it.

    Interpolated in the logarithm of the loss; None where the swept rates do not enclose it.
    """
    first = runs[0]
    swept = [one for one in runs if one["model"] == first["model"] and one["seed"] == first["seed"]]
    rows = []
    for method in dict.fromkeys(one["method"] for one in swept):
        group = sorted((one for one in swept if one["method"] == method), key=lambda one: one["loss"])
        losses = np.log([one["loss"] for one in group])
        inside = len(group) > 1 and losses[0] <= math.log(LOSS) <= losses[-1]
        row: dict[str, Any] = {"model": first["model"], "method": method, "loss": LOSS}
        for name in ("forgotten", "relative_norm", "intruders_left", "intruders_right"):
            values = [one[name] for one in group]
            row[name] = round(float(np.interp(math.log(LOSS), losses, values)), 4) if inside else None
        rows.append(row)
    return rows


def agreement(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rank correlations over all runs, and whether low rank or the size tells what is forgotten.

    `forgotten_by` fits the share forgotten linearly by the logarithms of relative norm and loss, and then by
    whether the run was of low rank as well: that coefficient, with its standard error, is what low rank
    forgets more than full rank of the same size that learned as much.
    """
    columns = {name: np.array([one[name] for one in runs], dtype=float) for name in NUMBERS}
    low = np.array([one["kind"] != "full" for one in runs], dtype=float)
    pairs = (
        ("forgotten", "relative_norm"), ("forgotten", "intruders_left"), ("forgotten", "effective_rank"),
        ("intruders_left", "relative_norm"), ("intruders_left", "effective_rank"),
    )  # fmt: skip
    found: dict[str, Any] = {"runs": len(runs)}
    found["spearman"] = {f"{a} ~ {b}": _correlation(columns[a], columns[b]) for a, b in pairs}
    size, loss = np.log(columns["relative_norm"]), np.log(columns["loss"])
    model = np.array([one["model"] == runs[0]["model"] for one in runs], dtype=float)
    found["forgotten_by"] = _fit(
        columns["forgotten"], {"log norm": size, "log loss": loss, "first model": model, "low rank": low}
    )
    found["intruders_by"] = _fit(
        columns["intruders_left"], {"log norm": size, "log loss": loss, "first model": model, "low rank": low}
    )
    return found


def _fit(y: np.ndarray, by: dict[str, np.ndarray]) -> dict[str, Any]:
    """Least squares: a coefficient and its standard error by name, and the share of variance explained."""
    used = {name: x for name, x in by.items() if np.ptp(x) > 0}
    design = np.column_stack([np.ones(len(y)), *used.values()])
    if len(y) <= design.shape[1] or np.linalg.matrix_rank(design) < design.shape[1]:
        return {"coefficients": {}, "explained": None}
    weights, *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ weights
    variance = float(rest @ rest) / (len(y) - design.shape[1])
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * variance)
    total = float(((y - y.mean()) ** 2).sum())
    return {
        "coefficients": {
            name: [round(float(weights[i]), 4), round(float(errors[i]), 4)]
            for i, name in enumerate(used, start=1)
        },
        "explained": round(1 - float(rest @ rest) / total, 4) if total else None,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "mean": round(statistics.fmean(values), 5),
        "low": round(min(values), 5),
        "high": round(max(values), 5),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Spearman's; None where one of both is constant."""
    return round(float(spearmanr(x, y)[0]), 4) if np.ptp(x) > 0 and np.ptp(y) > 0 else None
