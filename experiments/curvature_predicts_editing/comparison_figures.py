"""The comparison in two pictures: success against what it costs, and each concept's ratio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from experiments.curvature_predicts_editing.compared import ComparedCell, Result
from experiments.curvature_predicts_editing.measure import KL, NEAR, OFF
from experiments.curvature_predicts_editing.moves import METHODS, STEP, VALUE

STYLES = {
    "linear": ("#333333", "o"),
    "linear, then projected": ("#9a9a9a", "s"),
    "tangent": ("#e0a030", "^"),
    "tangent, 8 steps": ("#b5651d", "v"),
    "geodesic": ("#d1495b", "D"),
    "geodesic, Fisher": ("#2e6f95", "x"),
    "linear, reused": ("#333333", "o"),
    "tangent, reused": ("#e0a030", "^"),
    "geodesic, reused direction": ("#7a9e57", "v"),
    "geodesic, carried step": ("#d1495b", "D"),
}
COSTS = {
    OFF: "distance off the sentence's manifold\n(that of a real state left out = 1)",
    NEAR: "distance to the nearest real state\n(between real states = 1)",
    KL: "disturbance of other prompts (KL, nats)",
}
FARTHEST = 2.5
"""Distances beyond are not drawn: far too large scales."""
RATIOS = (("geodesic", "linear"), ("tangent, 8 steps", "linear"), ("linear, then projected", "linear"))


def figures(result: Result, folder: Path, *, dpi: int = 110) -> list[Path]:
    """Write the pictures into a folder and return their paths.

    `comparison_sweeps.png` shows, for each edit, its path over the scales: the share of successes against
    each cost, both averaged over cells (costs by their median). `comparison_ratios.png` shows for each
    concept the costs at equal success over those of the linear edit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return [
        _write(draw_sweeps(result.cells), folder / "comparison_sweeps.png", dpi),
        _write(draw_ratios(result), folder / "comparison_ratios.png", dpi),
    ]


def draw_sweeps(cells: Sequence[ComparedCell]) -> Figure:
    """One row for edits to a value and one for reused steps; one column a cost."""
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3, sharey=True)
    for row, family in enumerate((VALUE, STEP)):
        for column, (cost, label) in enumerate(COSTS.items()):
            place = axes[row][column]
            for method in METHODS:
                if method.family == family and method.name in STYLES:
                    _draw_path(place, cells, method.name, cost)
            place.set_xlabel(label, fontsize=9)
            place.set_ylim(-0.03, 1.03)
            if cost == KL:
                place.set_xscale("symlog", linthresh=0.1)
                place.set_xlim(left=-0.005)
            else:
                place.set_xlim(-0.05, FARTHEST)
            place.spines[["top", "right"]].set_visible(False)
        axes[row][0].set_ylabel(f"share that succeeds\n({family})")
        axes[row][0].legend(fontsize=8, frameon=False, title="filled: scale 1", title_fontsize=8)
    return figure


def _draw_path(axes: Axes, cells: Sequence[ComparedCell], name: str, cost: str) -> None:
    """The path of one edit over the scales, its scale 1 filled."""
    sweeps = [cell.sweeps[name] for cell in cells if name in cell.sweeps]
    sweeps = [sweep for sweep in sweeps if np.isfinite(sweep.costs[cost]).all()]
    if not sweeps:
        return
    success = np.mean([sweep.success.mean(0) for sweep in sweeps], axis=0)
    paid = np.median([sweep.costs[cost].mean(0) for sweep in sweeps], axis=0)
    colour, marker = STYLES[name]
    axes.plot(paid, success, color=colour, linewidth=1.2, alpha=0.8)
    axes.plot(paid, success, marker, color=colour, markerfacecolor="white", markersize=5, label=name)
    whole = sweeps[0].scales == 1
    axes.plot(paid[whole], success[whole], marker, color=colour, markersize=7)


def draw_ratios(result: Result) -> Figure:
    """One column a cost, one line a concept: the ratio at equal success with its interval."""
    names = sorted({cell.concept for cell in result.cells})
    figure = Figure(figsize=(13, 1.6 + 0.55 * len(names)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for place, (cost, label) in zip(axes, COSTS.items(), strict=True):
        for number, (judged, against) in enumerate(RATIOS):
            colour, marker = STYLES[judged]
            shift = 0.22 * (number - 1)
            for line, name in enumerate(["all", *[f"concept {each}" for each in names]]):
                found = result.line(judged, against, cost, where=name)
                if found is None or not np.isfinite(found.value):
                    continue
                low, high = (
                    np.nan_to_num(x, nan=found.value, posinf=found.value) for x in (found.low, found.high)
                )
                place.plot([low, high], 2 * [line + shift], color=colour, linewidth=1.2)
                place.plot(
                    found.value, line + shift, marker, color=colour, markersize=5,
                    label=judged if line == 0 else "_nolegend_",
                )  # fmt: skip
        place.axvline(1, color="#999999", linewidth=0.8)
        place.axvline(0.2 if cost != KL else 0.5, color="#999999", linewidth=0.8, linestyle=":")
        place.set_xscale("log")
        place.set_xlim(0.1, 10)
        place.set_xticks(
            [0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"], minor=False
        )
        place.xaxis.set_minor_formatter(NullFormatter())
        place.set_xlabel(label.split("\n")[0] + "\nover the linear edit's, at equal success", fontsize=9)
        place.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names) + 1), ["all", *names], fontsize=9)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(RATIOS), fontsize=8, frameon=False)
    return figure


def _write(figure: Figure, path: Path, dpi: int) -> Path:
    temporary = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
    os.replace(temporary, path)
    return path
