"""The study's pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#333333"
MARKS = {"lora": "o", "dora": "D", "relora": "s", "low rank adam": "^", "full": "*"}
RANKS = (1, 2, 4, 8, 16, 32, 64)
FULL = "#d1495b"
SIZES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)


def draw(found: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Write the pictures beside the results, and give their paths."""
    return [
        _save(_forgetting(found), folder / f"{name}_forgetting.png"),
        _save(_paths(found), folder / f"{name}_rank_path.png"),
    ]


def colour(kind: str, rank: int) -> Any:
    """One scale of colours for the ranks of adapters; red for full fine-tuning."""
    if kind == "full":
        return FULL
    place = RANKS.index(rank) / (len(RANKS) - 1) if rank in RANKS else 0.5
    return matplotlib.colormaps["viridis"](0.9 * place)


def _forgetting(found: dict[str, Any]) -> Figure:
    """What is forgotten, and how many intruders there are, against how far the weights moved."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 3)
    labels = (
        ("loss", "forgotten", "loss on the taught sentences, nats", "share forgotten"),
        ("relative_norm", "forgotten", "‖ΔW‖ / ‖W‖, mean over matrices", "share forgotten"),
        ("relative_norm", "intruders_left", "‖ΔW‖ / ‖W‖, mean over matrices", "intruders a matrix (left)"),
    )
    for axes, (x, y, across, up) in zip(panels, labels, strict=True):
        for one in found["runs"]:
            axes.scatter(
                one[x],
                one[y],
                marker=MARKS[one["kind"]],
                color=colour(one["kind"], one["rank"]),
                s=90 if one["kind"] == "full" else 28,
                alpha=0.85 if one["chosen"] else 0.4,
                linewidths=0,
            )
        axes.set_xscale("log")
        if x == "relative_norm":
            sizes = [one[x] for one in found["runs"]]
            shown = [tick for tick in SIZES if 0.8 * min(sizes) <= tick <= 1.2 * max(sizes)]
            axes.set_xticks(shown, [f"{tick:g}" for tick in shown])
            axes.minorticks_off()
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        _plain(axes)
    seen = {(one["kind"], one["rank"]): one["method"] for one in found["runs"]}
    for (kind, rank), method in seen.items():
        panels[0].scatter([], [], marker=MARKS[kind], color=colour(kind, rank), label=method)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False
    )
    return figure


def _paths(found: dict[str, Any]) -> Figure:
    """How the effective rank of W + tΔW moves, a panel for each model."""
    models = list(dict.fromkeys(row["model"] for row in found["summary"]))
    figure = Figure(figsize=(5 * len(models) + 2, 4), layout="constrained")
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    kinds = {one["method"]: (one["kind"], one["rank"]) for one in found["runs"]}
    for axes, model in zip(panels, models, strict=True):
        for row in found["summary"]:
            if row["model"] == model:
                kind, rank = kinds[row["method"]]
                axes.plot(
                    found["settings"]["path"],
                    row["rank_path"],
                    marker=MARKS[kind],
                    color=colour(kind, rank),
                    label=row["method"],
                    markersize=5,
                    linewidth=1.2,
                )
        axes.axhline(0, color=INK, linewidth=0.6)
        axes.axvline(1, color=INK, linewidth=0.6, linestyle=":")
        axes.set_title(model, fontsize=10)
        axes.set_xlabel("t in W + tΔW")
        axes.set_ylabel("change of the effective rank, mean over matrices")
        _plain(axes)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False
    )
    return figure


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: Path) -> Path:
    temporary = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(temporary, dpi=110, metadata={"Software": None})
    os.replace(temporary, path)
    return path
