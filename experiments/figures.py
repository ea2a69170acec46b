"""The picture of the README: a concept's shape at one site, and predicted against observed edits by site.

Run with ``python -m experiments.figures``; it writes docs/images/months.png and takes a few minutes.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import geoedit
from geoedit.diagnosis.result import Diagnosis, SiteSummary

log = logging.getLogger(__name__)
INK, WARM, COOL = "#333333", "#d1495b", "#2e6f95"


@dataclass(frozen=True)
class Settings:
    """What to draw (a built-in model, one of its concepts), the file to write, and its dots an inch."""

    model: str = "almanac-gpt2"
    concept: str = "months"
    path: Path = Path(__file__).parents[1] / "docs" / "images" / "months.png"
    dpi: int = 110


def run(settings: Settings | None = None) -> Path:
    """Diagnose the concept with its edits applied, draw the picture, and return its path."""
    settings = settings or Settings()
    model, tokenizer, world = geoedit.testbeds.load(settings.model)
    diagnosis = geoedit.diagnose(model, tokenizer, world.concepts[settings.concept], apply=True)
    return draw(diagnosis, settings.path, dpi=settings.dpi)


def draw(diagnosis: Diagnosis, path: Path, *, dpi: int = 110) -> Path:
    """Write the picture of an applied diagnosis: class means on the left, success by site on the right."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    shape, success = figure.subplots(1, 2)
    site = max(diagnosis.sites, key=lambda entry: entry.separation)
    draw_shape(shape, site, diagnosis.concept["values"], closed=diagnosis.concept["kind"] == "cycle")
    draw_success(success, diagnosis)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.partial.png")
    figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
    os.replace(temporary, path)
    return path


def draw_shape(axes: Axes, site: SiteSummary, values: list[str], *, closed: bool) -> None:
    """Class means on their first two principal axes, joined in the order of the values."""
    points = np.asarray(site.coordinates)[:, :2]
    path = np.vstack([points, points[:1]]) if closed else points
    axes.plot(*path.T, color=COOL, linewidth=1.2, alpha=0.6)
    hues = "twilight" if closed else "viridis"
    axes.scatter(points[:, 0], points[:, 1], c=np.arange(len(points)), cmap=hues, s=50, zorder=3)
    centre = points.mean(0)
    for value, point in zip(values, points, strict=True):
        away = (point - centre) / max(float(np.linalg.norm(point - centre)), 1e-12)
        side = "left" if away[0] > 0.3 else "right" if away[0] < -0.3 else "center"
        axes.annotate(
            value,
            point,
            xytext=tuple(9 * away),
            textcoords="offset points",
            fontsize=9,
            color=INK,
            ha=side,
            va="center",
        )
    share = sum(site.explained[:2])
    axes.set_title(f"class means at {site.label}\n(two axes hold {share:.0%} of their spread)", fontsize=10)
    reach = 1.3 * float(np.abs(points - centre).max())
    axes.set(xlim=centre[0] + np.array([-reach, reach]), ylim=centre[1] + np.array([-reach, reach]))
    axes.set_aspect("equal")
    axes.axis("off")


def draw_success(axes: Axes, diagnosis: Diagnosis) -> None:
    """Share of edits that succeed by site and kind of edit: predicted (open) and observed (filled)."""
    places: list[tuple[str, int]] = []
    labels: list[tuple[int, str]] = []
    groups: list[tuple[int, int, str]] = []
    for token in dict.fromkeys(site.token for site in diagnosis.sites):
        group = [site for site in diagnosis.sites if site.token == token]
        start = len(labels) + bool(labels)  # a gap between the groups
        places += [(site.label, start + number) for number, site in enumerate(group)]
        labels += [(start + number, short(site)) for number, site in enumerate(group)]
        groups.append((start, start + len(group) - 1, token))
    table = diagnosis.table
    colours = dict(zip(dict.fromkeys(table["edit"]), (COOL, WARM), strict=False))
    for kind, colour in colours.items():
        rates = table[table["edit"] == kind].astype({"success": float}).groupby("site")
        for column, style, fill in (("success", "o-", colour), ("probability", "o--", "white")):
            mean = rates[column].mean()
            name = f"{kind}, {'observed' if column == 'success' else 'predicted'}"
            for low, high, _ in groups:
                inside = [(at, mean[label]) for label, at in places if low <= at <= high]
                axes.plot(
                    *zip(*inside, strict=True),
                    style,
                    color=colour,
                    markerfacecolor=fill,
                    label=name,
                    zorder=3,
                )
                name = "_nolegend_"
    axes.set_xticks(*zip(*labels, strict=True), fontsize=9)
    for low, high, token in groups:
        axes.annotate(
            f"state at the {token} token",
            ((low + high) / 2, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -26),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
        )
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("share of edits that succeed")
    axes.set_title(f"straight edits of {diagnosis.concept['name']} in {diagnosis.model}", fontsize=10)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def short(site: SiteSummary) -> str:
    """The site's place on the axis: its block's number, or "emb"."""
    return str(site.site.get("block", "emb"))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info("wrote %s", run())
