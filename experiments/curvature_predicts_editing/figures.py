"""The study's pictures: predictors side by side, calibration, success against scale, and where odds fail.

Colours are Okabe and Ito's, which differ for colour-blind eyes too; nothing is told by colour alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#222222", "#999999"
HELD_OUT = {
    "odds": ("one concept left out", BLUE, "o"),
    "odds_model": ("one model left out", ORANGE, "s"),
    "odds_shape": ("one shape left out", GREEN, "^"),
}
SHOWN = (
    "odds",
    "odds_model",
    "odds_shape",
    "lengths",
    "landing",
    "fisher",
    "euclidean",
    "norm",
    "cosine",
    "nearest",
    "dimension",
    "curvature_plain",
    "curvature_fisher",
    "bend_fisher",
)


def figures(found: Mapping[str, Any], folder: Path, *, dpi: int = 110) -> list[Path]:
    """Write all pictures and return their paths."""
    drawn = {
        "predictors": draw_predictors(found),
        "calibration": draw_calibration(found),
        "scales": draw_scales(found),
        "sites": draw_sites(found),
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in drawn.items():
        path = folder / f"curvature_predicts_editing_{name}.png"
        temporary = path.with_name(f".{path.stem}.partial.png")
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
        os.replace(temporary, path)
        paths.append(path)
    return paths


def draw_predictors(found: Mapping[str, Any]) -> Figure:
    """AUROC over edits and Spearman's rho over cells for each predictor, with bootstrap intervals."""
    scores = {score["name"]: score for score in found["scores"]}
    names = [name for name in SHOWN if name in scores]
    figure = Figure(figsize=(9.5, 0.36 * len(names) + 1.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))[::-1]
    labels = [
        f"{scores[name]['label']} ({HELD_OUT[name][0]})" if name in HELD_OUT else scores[name]["label"]
        for name in names
    ]
    left.set_yticks(places, labels, fontsize=8)
    for axes, key, title, aim in (
        (left, "auroc", "AUROC over single edits", 0.95),
        (right, "rho_counts", "Spearman's ρ over cells, counts foreseen", 0.9),
    ):
        for place, name in zip(places, names, strict=True):
            value, low, high = (np.nan if number is None else number for number in scores[name][key])
            learned = name in (*HELD_OUT, "lengths")
            colour = BLUE if learned else GREY
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            axes.plot(value, place, "o" if learned else "D", color=colour, markersize=6 if learned else 5)
            if np.isfinite(value):
                axes.annotate(
                    f"{value:.2f}",
                    (value, place),
                    (0, 5),
                    textcoords="offset points",
                    fontsize=7,
                    ha="center",
                )
        axes.axvline(aim, color=INK, linewidth=0.8, linestyle=":")
        axes.text(aim, -0.45, "aim ", fontsize=7, ha="right", va="center")
        axes.set_title(title, fontsize=9)
        axes.grid(axis="x", color="#eeeeee")
        axes.tick_params(axis="x", labelsize=8)
    left.axvline(0.5, color=GREY, linewidth=0.8)
    return figure


def draw_calibration(found: Mapping[str, Any]) -> Figure:
    """Reliability: how often edits succeeded against the predicted probability, for each way to hold out."""
    figure = Figure(figsize=(5.4, 5.6), layout="constrained")
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    curve.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle="--")
    for name, (label, colour, marker) in HELD_OUT.items():
        entry = found["calibration"][name]
        if not entry["bins"]:
            continue
        curve.plot(
            [part["predicted"] for part in entry["bins"]],
            [part["observed"] for part in entry["bins"]],
            color=colour,
            marker=marker,
            linewidth=1.2,
            label=f"{label}: off by {100 * entry['expected_error']:.1f} points",
        )
    for part in found["calibration"]["odds"]["bins"]:
        counts.bar((part["low"] + part["high"]) / 2, part["count"], 0.09, color=BLUE)
    counts.set_yscale("log")
    counts.set_ylabel("edits", fontsize=8)
    counts.set_xlabel("predicted probability", fontsize=9)
    curve.set_ylabel("share that succeeded", fontsize=9)
    curve.legend(fontsize=8, frameon=False)
    for axes in (curve, counts):
        axes.set_xlim(-0.02, 1.02)
        axes.tick_params(labelsize=8)
    return figure


def draw_scales(found: Mapping[str, Any]) -> Figure:
    """Predicted and observed success against the scale, for each shape of concept and kind of edit."""
    shapes = list(dict.fromkeys(entry["shape"] for entry in found["by_scale"]))
    figure = Figure(figsize=(2.5 * len(shapes) + 0.6, 2.9), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for axes, shape in zip(panels, shapes, strict=True):
        for kind, colour, marker in (("mean difference", BLUE, "o"), ("reused vector", ORANGE, "s")):
            part = [e for e in found["by_scale"] if e["shape"] == shape and e["kind"] == kind]
            if not part:
                continue
            scales = [entry["scale"] for entry in part]
            axes.plot(scales, [e["observed"] for e in part], color=colour, marker=marker, linewidth=1.4)
            axes.plot(
                scales,
                [e["predicted"] for e in part],
                color=colour,
                linestyle="--",
                marker=marker,
                markerfacecolor="white",
                linewidth=1,
            )
        axes.set_title(shape, fontsize=9)
        axes.set_xlabel("scale", fontsize=8)
        axes.tick_params(labelsize=8)
    panels[0].set_ylabel("share that succeeds", fontsize=8)
    handles = [
        panels[0].plot([], [], color=BLUE, marker="o", label="mean difference, seen")[0],
        panels[0].plot([], [], color=ORANGE, marker="s", label="reused vector, seen")[0],
        panels[0].plot(
            [], [], color=INK, linestyle="--", marker="o", markerfacecolor="white", label="foreseen"
        )[0],
    ]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_sites(found: Mapping[str, Any]) -> Figure:
    """Predicted against observed rate of every concept's site, a panel a model; the largest misses named."""
    columns = found["groups"]
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(4.6 * len(models) + 0.4, 4.8), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        points: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if row["model"] == model and row["predicted"] is not None:
                points.setdefault((row["concept"], row["site"]), []).append(row)
        placed = []
        for (concept, site), part in points.items():
            weight = np.array([row["edits"] for row in part])
            x = float(weight @ [row["predicted"] for row in part] / weight.sum())
            y = float(weight @ [row["observed"] for row in part] / weight.sum())
            last = site.endswith("last")
            axes.plot(x, y, "^" if last else "o", color=ORANGE if last else BLUE, alpha=0.7, markersize=5)
            placed.append((abs(x - y), x, y, f"{concept}, {site.replace(' residual_out', '')}"))
        for _, x, y, label in sorted(placed, reverse=True)[:4]:
            axes.annotate(label, (x, y), (4, -9), textcoords="offset points", fontsize=6.5)
        axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
        axes.plot([], [], "o", color=BLUE, label="value's token")
        axes.plot([], [], "^", color=ORANGE, label="last token")
        axes.legend(fontsize=8, frameon=False, loc="upper left")
        axes.set_title(model, fontsize=9)
        axes.set_xlabel("share foreseen, concept left out", fontsize=8)
        axes.set_ylabel("share seen", fontsize=8)
        axes.tick_params(labelsize=8)
    return figure
