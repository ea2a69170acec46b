"""Figures of an evaluation for papers and notebooks, by matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from geoedit.errors import EditError
from geoedit.sliders.evaluation.curves import mean_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from geoedit.sliders.evaluation.result import Evaluation

COLOURS = ("#2b5fad", "#c2410c", "#14805e", "#8a5cb8", "#b08900", "#0f8a9d", "#a4508b", "#6b7280")


def draw(evaluation: Evaluation, name: str) -> Figure:
    """One of `FIGURES`; see `Evaluation.figure`."""
    if name not in FIGURES:
        raise EditError(f"there is no figure {name!r}; there are {', '.join(FIGURES)}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FIGURES[name](figure.subplots(), evaluation)
    return figure


def curves(axes: Axes, evaluation: Evaluation) -> None:
    """Mean change of each slider's own attribute against its scale."""
    for number, (label, own) in enumerate(evaluation.claims.items()):
        block = evaluation.block(label)
        zero = int(np.flatnonzero(block.scales == 0)[0])
        moved = own.sign * block.values[own.attribute]
        colour = COLOURS[number % len(COLOURS)]
        mean = mean_curve(moved - moved[:, [zero]])
        axes.plot(block.scales, mean, "o-", markersize=4, color=colour, label=label)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xlabel("scale")
    axes.set_ylabel("change of its attribute, natural sd")
    axes.legend(fontsize=8, frameon=False)


def interference(axes: Axes, evaluation: Evaluation) -> None:
    """Heat map of the mean |change| of every attribute over each slider's range."""
    frame = evaluation.interference
    image = axes.imshow(frame.to_numpy(dtype=float), vmin=0, vmax=1, cmap="magma_r", aspect="auto")
    axes.set_xticks(range(frame.shape[1]), list(frame.columns), rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(frame.shape[0]), list(frame.index), fontsize=8)
    for (row, column), value in np.ndenumerate(frame.to_numpy(dtype=float)):
        if np.isfinite(value):
            tint = "white" if value > 0.5 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=tint)
    axes.figure.colorbar(image, ax=axes, label="mean |change| / range")


def ranges(axes: Axes, evaluation: Evaluation) -> None:
    """Predicted safe ranges with their intervals, and observed ones as rings."""
    shown = [label for label in evaluation.claims if evaluation.ranges.get(label)]
    if not shown:
        raise EditError("no safe range was asked for: evaluate(..., safe_range=True)")
    for place, label in enumerate(shown):
        for which, marker, colour in (("predicted", "o", COLOURS[0]), ("observed", "s", COLOURS[1])):
            found = evaluation.ranges[label].get(which, {})
            for end, bounds in zip(("low", "high"), found.get("interval", ()), strict=False):
                x = place + (0.1 if which == "observed" else -0.1)
                value = found[end]
                if value is not None and np.isfinite(value):
                    fill = colour if which == "predicted" else "none"
                    axes.plot(x, value, marker, color=colour, markerfacecolor=fill)
                    if None not in bounds:
                        axes.vlines(x, *bounds, color=colour, linewidth=1)
    axes.set_xticks(range(len(shown)), shown, rotation=30, ha="right", fontsize=8)
    axes.axhline(0, color="0.8", linewidth=0.8, zorder=0)
    axes.set_ylabel("scale: predicted (dots), observed (squares)")


FIGURES = {"curves": curves, "interference": interference, "ranges": ranges}
