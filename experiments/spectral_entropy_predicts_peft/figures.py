"""The study's pictures: skill of every predictor, and gain against entropy.

Colours are Okabe and Ito's; nothing is told by colour alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.spectral_entropy_predicts_peft.judge import KINDS, PREDICTORS, TRIVIAL

BLUE, ORANGE, GREEN, PURPLE, INK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#222222", "#999999"
MARKS = dict(zip(KINDS, (("o", BLUE), ("s", ORANGE), ("^", GREEN), ("D", PURPLE)), strict=True))


def figures(found: Mapping[str, Any], folder: Path, *, dpi: int = 110) -> list[Path]:
    """Write both pictures and return their paths."""
    paths = []
    for name, figure in {"skill": draw_skill(found), "entropy": draw_entropy(found)}.items():
        suffix = "" if name == "skill" else f"_{name}"
        path = folder / f"spectral_entropy_predicts_peft{suffix}.png"
        temporary = path.with_name(f".{path.stem}.partial.png")
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
        os.replace(temporary, path)
        paths.append(path)
    return paths


def draw_skill(found: Mapping[str, Any]) -> Figure:
    """Share of variance explained beyond the mean, held out by architecture and by kind."""
    scores = {(one["predictor"], one["left_out"]): one for one in found["scores"] if one["target"] == "all"}
    names = list(PREDICTORS)
    figure = Figure(figsize=(9.5, 0.36 * len(names) + 1.4), layout="constrained")
    places = np.arange(len(names))[::-1]
    for axes, by in zip(figure.subplots(1, 2, sharey=True), ("architecture", "kind"), strict=True):
        for place, name in zip(places, names, strict=True):
            one = scores[name, by]
            low, high = max(one["low"] or -9.0, -1.0), min(one["high"] or 9.0, 1.0)
            colour = GREY if name in TRIVIAL else ORANGE if name == "gradient" else BLUE
            axes.plot([low, high], [place, place], color=colour, linewidth=2)
            shown = max(one["skill"], -1.0)
            axes.plot(shown, place, "s" if name in TRIVIAL else "o", color=colour)
            axes.annotate(
                f"{one['skill']:.2f}",
                (shown, place),
                (0, 5),
                textcoords="offset points",
                fontsize=7,
                ha="center",
            )
        axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlim(-1.05, 1.05)
        axes.set_title(f"skill with one {by} left out", fontsize=9)
        axes.grid(axis="x", color="#eeeeee")
        axes.tick_params(labelsize=8)
        axes.set_yticks(places, names, fontsize=8)
    return figure


def draw_entropy(found: Mapping[str, Any]) -> Figure:
    """The mean gain of each matrix against its spectral entropy, a panel for each architecture."""
    matrices = found["matrices"]
    models = found["settings"]["models"]
    figure = Figure(figsize=(9.5, 3.9), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(models), sharey=True))
    for axes, model in zip(panels, models, strict=True):
        _draw_model(axes, matrices, model)
    panels[0].set_ylabel("share of the loss on new wordings removed", fontsize=8)
    panels[-1].legend(fontsize=7, frameon=False, loc="lower right")
    return figure


def _draw_model(axes: Axes, matrices: Mapping[str, list[Any]], model: str) -> None:
    own = [i for i, name in enumerate(matrices["model"]) if name == model]
    for kind, (marker, colour) in MARKS.items():
        chosen = [i for i in own if matrices["kind"][i] == kind]
        axes.scatter(
            [matrices["entropy"][i] for i in chosen],
            [matrices["gain all"][i] for i in chosen],
            s=[20 + 50 * matrices["depth"][i] for i in chosen],
            marker=marker,
            color=colour,
            alpha=0.8,
            label=kind,
        )
    axes.set_title(f"{model} (larger: later blocks)", fontsize=9)
    axes.set_xlabel("spectral entropy of the base matrix", fontsize=8)
    axes.grid(color="#eeeeee")
    axes.tick_params(labelsize=8)
