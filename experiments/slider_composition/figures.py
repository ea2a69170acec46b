"""The study's picture: interference, additivity by method, and whose effect a crossing has."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

METHODS = {"exact": "#2e6f95", "truncate": "#7fb3d5", "orthogonalise": "#d1495b", "decoupled": "#66a182"}
GAUGES = {"nearest": "#2e6f95", "spectrum": "#d1495b", "random": "#999999"}
AIM = 0.1


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write the picture: a row for each pipeline."""
    families = found["families"]
    figure = Figure(figsize=(12, 3.6 * len(families)), layout="constrained")
    grid = figure.subplots(len(families), 3, squeeze=False)
    for (name, family), line in zip(families.items(), grid, strict=True):
        _matrix(line[0], pd.DataFrame(family["interference"]["matrix"]).T, name)
        _additivity(line[1], pd.DataFrame(family["composed"]))
        _crossed(line[2], pd.DataFrame(family["crossed"]))
    temporary = path.with_name(f".{path.stem}.part.png")
    figure.savefig(temporary, dpi=90, metadata={"Software": None})
    os.replace(temporary, path)


def _matrix(axes: Axes, matrix: pd.DataFrame, name: str) -> None:
    """First-order effects in natural standard deviations for a unit of scale."""
    values = matrix.to_numpy(float)
    reach = float(np.nanmax(np.abs(values))) or 1.0
    axes.imshow(values, cmap="RdBu_r", vmin=-reach, vmax=reach)
    for (row, column), value in np.ndenumerate(values):
        shade = "white" if abs(value) > 0.6 * reach else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=shade)
    axes.set_xticks(range(values.shape[1]), list(matrix.columns), rotation=35, ha="right", fontsize=7)
    axes.set_yticks(range(values.shape[0]), list(matrix.index), fontsize=7)
    axes.set_title(f"{name}: natural sds for scale 1, to first order", fontsize=8)


def _additivity(axes: Axes, table: pd.DataFrame) -> None:
    """Error against the sum of effects, by how many sliders and by which method."""
    sizes = sorted(table["size"].unique())
    methods = [method for method in METHODS if method in set(table["method"])]
    for place, method in enumerate(methods):
        rows = table[table["method"] == method]
        chosen = [rows[rows["size"] == size]["from_own"].mean() for size in sizes]
        at = np.arange(len(sizes)) + (place - (len(methods) - 1) / 2) * 0.2
        axes.bar(at, chosen, 0.18, color=METHODS[method], label=method)
    axes.axhline(AIM, color="black", linewidth=0.6, linestyle=":")
    axes.set_xticks(range(len(sizes)), [f"{size} sliders" for size in sizes], fontsize=7)
    axes.set_ylabel("away from each slider's own effect,\nshare of its range", fontsize=7)
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(fontsize=6)
    axes.set_title("composed: does each attribute do what its slider does alone?", fontsize=8)


def _crossed(axes: Axes, table: pd.DataFrame) -> None:
    """Likeness of a crossing's effect to that of either parent."""
    for gauge, colour in GAUGES.items():
        rows = table[table["gauge"] == gauge]
        axes.scatter(rows["like_left"], rows["like_right"], s=18, color=colour, label=gauge, alpha=0.8)
    axes.axhline(0, color="black", linewidth=0.5)
    axes.axvline(0, color="black", linewidth=0.5)
    axes.set(xlim=(-1.08, 1.08), ylim=(-1.08, 1.08))
    axes.set_xlabel("cosine with the effect of the slider that writes", fontsize=7)
    axes.set_ylabel("cosine with that of the one that reads", fontsize=7)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=6, loc="lower left")
    axes.set_title("crossed: whose effect is it?", fontsize=8)
