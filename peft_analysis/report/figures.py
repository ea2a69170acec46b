"""Figures of a report for papers and notebooks, by matplotlib."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_analysis.errors import UpdateError
from peft_analysis.report.words import name_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from peft_analysis.report.result import Report

COLOURS = ("#2b5fad", "#c2410c", "#14805e", "#8a5cb8", "#b08900", "#0f8a9d", "#a4508b", "#6b7280")
SHOWN = 6  # spectra in one figure

Rows = Sequence[dict[str, Any]]


def draw(report: "Report", name: str) -> "Figure":
    """One of `FIGURES`; see `Report.figure`."""
    if name not in FIGURES:
        raise UpdateError(f"there is no figure {name!r}; there are {', '.join(FIGURES)}")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FIGURES[name](figure.subplots(), report)
    return figure


def change(axes: "Axes", report: "Report") -> None:
    """Heat map of the relative norm (the norm where there is no base) over blocks and kinds."""
    relative = any(row.get("relative_norm") is not None for row in report.rows)
    column = "relative_norm" if relative else "norm"
    _heat(axes, report.rows, lambda row: row.get(column), "‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖")


def intruders(axes: "Axes", report: "Report") -> None:
    """Heat map of the number of intruder dimensions, both sides together."""

    def both(row: dict[str, Any]) -> int | None:
        left, right = row.get("intruders_left"), row.get("intruders_right")
        return None if left is None or right is None else left + right

    _heat(axes, report.rows, both, "intruder dimensions")


def ranks(axes: "Axes", report: "Report") -> None:
    """True rank with its interval against depth; hollow where only the effective rank is known."""
    rows = report.rows
    if not rows:
        raise UpdateError("the update has no matrices; there is nothing to draw")
    places, kinds = _places(rows), _kinds(rows)
    for row in rows:
        number = kinds.index(row["kind"])
        x = places.index(_place(row)) + 0.6 * (number / max(len(kinds) - 1, 1) - 0.5)
        colour, exact = COLOURS[min(number, len(COLOURS) - 1)], row.get("rank") is not None
        y = row["rank"] if exact else row["effective_rank"]
        axes.plot(x, y, "o", color=colour, markerfacecolor=colour if exact else "none", markersize=4)
        if exact and row.get("rank_low") is not None:
            axes.vlines(x, row["rank_low"], row["rank_high"], color=colour, linewidth=1)
    for number, kind in enumerate(kinds[: len(COLOURS)]):
        axes.plot([], [], "o", color=COLOURS[number], label=kind, markersize=4)
    axes.legend(fontsize=7, ncols=2, frameon=False)
    _ticks(axes, places)
    axes.set_ylabel("true rank" if any(row.get("rank") is not None for row in rows) else "effective rank")
    axes.set_ylim(bottom=0)


def spectra(axes: "Axes", report: "Report") -> None:
    """Singular values of the matrices that changed most; dashed lines are noise edges."""
    known = [row for row in report.rows if row["norm"] and row.get("curves", {}).get("singular")]
    if not known:
        raise UpdateError("every difference is zero; there is no spectrum to draw")
    key = "relative_norm" if all(row.get("relative_norm") for row in known) else "norm"
    for number, row in enumerate(sorted(known, key=lambda row: -row[key])[:SHOWN]):
        curve, colour = row["curves"]["singular"], COLOURS[number]
        pairs = [
            (x, y)
            for x, y in zip(curve["index"], curve["value"], strict=True)
            if y > 1e-9 * curve["value"][0]
        ]
        style = ".-" if len(pairs) < 40 else "-"
        axes.plot(*zip(*pairs, strict=True), style, color=colour, label=name_of(row), linewidth=1.4)
        if row.get("noise_edge"):
            axes.axhline(row["noise_edge"], color=colour, linestyle="--", linewidth=0.9)
    axes.set(xscale="log", yscale="log", xlabel="number, from the largest", ylabel="singular value of ΔW")
    axes.legend(fontsize=7, frameon=False)


def angles(axes: "Axes", report: "Report") -> None:
    """Overlap with the base's strongest directions, over what a random space has, against depth."""
    places = _places(report.rows)
    drawn = 0
    for side, name, colour, face in (
        ("left", "output side", COLOURS[0], COLOURS[0]),
        ("right", "input side", COLOURS[1], "none"),
    ):
        known = [row for row in report.rows if row.get(f"overlap_{side}")]
        x = [places.index(_place(row)) + (-0.13 if side == "left" else 0.13) for row in known]
        y = [row[f"overlap_{side}"] / row[f"chance_{side}"] for row in known]
        axes.plot(x, y, "o", color=colour, markerfacecolor=face, markersize=4, label=name)
        drawn += len(known)
    if not drawn:
        raise UpdateError("no overlap with the base was measured; give the base: analyse(base, tuned)")
    axes.axhline(1, color="black", linestyle="--", linewidth=0.9, label="by chance")
    axes.set(yscale="log", ylabel="overlap φ over chance")
    axes.legend(fontsize=7, frameon=False)
    _ticks(axes, places)


FIGURES: dict[str, Callable[["Axes", "Report"], None]] = {
    "change": change,
    "ranks": ranks,
    "intruders": intruders,
    "spectra": spectra,
    "angles": angles,
}


def _heat(axes: "Axes", rows: Rows, value: Callable[[dict[str, Any]], float | None], title: str) -> None:
    """The largest value of each block and kind."""
    places, kinds = _places(rows), _kinds(rows)
    grid = np.full((len(kinds), len(places)), np.nan)
    for row in rows:
        found = value(row)
        at = kinds.index(row["kind"]), places.index(_place(row))
        if found is not None and not grid[at] >= found:
            grid[at] = found
    if not np.isfinite(grid).any():
        raise UpdateError(f"nothing is known of: {title}; give the base: analyse(base, tuned)")
    image = axes.imshow(grid, aspect="auto", cmap="Greens", vmin=min(0.0, float(np.nanmin(grid))))
    axes.figure.colorbar(image, ax=axes, label=title)
    axes.set_yticks(range(len(kinds)), kinds, fontsize=7)
    _ticks(axes, places)


def _ticks(axes: "Axes", places: list[tuple[str, int | None]]) -> None:
    step = max(1, len(places) // 16)
    stacks = {stack for stack, _ in places if stack}
    shown = range(0, len(places), step)
    names = []
    for stack, block in (places[at] for at in shown):
        names.append(
            "–" if block is None else f"{stack.split('.')[-1]} {block}" if len(stacks) > 1 else str(block)
        )
    axes.set_xticks(list(shown), names, fontsize=7, rotation=45 if len(stacks) > 1 else 0)
    axes.set_xlabel(f"block ({next(iter(stacks))})" if len(stacks) == 1 else "block")


def _place(row: dict[str, Any]) -> tuple[str, int | None]:
    return row["stack"], row["block"]


def _places(rows: Rows) -> list[tuple[str, int | None]]:
    """Blocks in order within their stack, stacks as they come; what stands in no block is last."""
    stacks = list(dict.fromkeys(row["stack"] for row in rows))
    found = dict.fromkeys(_place(row) for row in rows)
    return sorted(
        found,
        key=lambda place: (place[1] is None, stacks.index(place[0]), -1 if place[1] is None else place[1]),
    )


def _kinds(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["kind"] for row in rows))
