"""Tables for a terminal of 80 columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.table import Table

from geoedit.diagnosis.plan import MEAN_DIFFERENCE, REUSED_VECTOR
from geoedit.diagnosis.result import ALL_SITES, Diagnosis, Expectation

SHORT = {MEAN_DIFFERENCE: "means", REUSED_VECTOR: "reused"}


def site_table(diagnosis: Diagnosis) -> Table:
    """Return a line a site: the share of edits of each kind that arrive, and the default's AUROC."""
    table = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD, padding=0)
    table.add_column("site", no_wrap=True)
    kinds = list(dict.fromkeys(diagnosis.table["edit"]))
    for kind in kinds:
        table.add_column(f"{SHORT.get(kind, kind)}\nforeseen", justify="right", no_wrap=True)
        if diagnosis.applied:
            table.add_column("\nseen", justify="right", no_wrap=True)
    if diagnosis.applied:
        table.add_column("AUROC\n95 % interval", justify="right", no_wrap=True)
    summary = diagnosis.summary
    ranks = summary[summary["predictor"] == diagnosis.predictors[0].column].set_index("site")
    for label in ranks.index:
        part = diagnosis.table if label == ALL_SITES else diagnosis.table[diagnosis.table["site"] == label]
        cells = [str(label)]
        for kind in kinds:
            rows = part[part["edit"] == kind]
            cells.append(_percent(rows["probability"].mean()))
            if diagnosis.applied:
                cells.append(_percent(rows["success"].astype("float64").mean()))
        if diagnosis.applied:
            cells.append(_interval(*(float(ranks.loc[label, name]) for name in ("auroc", "low", "high"))))
        table.add_row(*cells)
    return table


def geometry_table(diagnosis: Diagnosis) -> Table:
    """Return a line a site: how the concept's manifold bends, how far vectors may be pushed, and the advice.

    A curvature that is not reliable is not shown; the ranges are those of the scales between which half of
    the edits of a kind are expected to succeed.
    """
    table = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("site", no_wrap=True)
    table.add_column("dim", justify="right", no_wrap=True)
    table.add_column("radius", justify="right", no_wrap=True)
    kinds = list(dict.fromkeys(diagnosis.table["edit"]))
    for kind in kinds:
        table.add_column(f"{SHORT.get(kind, kind)}\nscales", justify="right", no_wrap=True)
    table.add_column("advice", no_wrap=True)
    for site in diagnosis.sites:
        found = site.geometry
        size = (found.get("dimension") or {}).get("value")
        radius = found.get("radius") if found.get("reliable") else None
        cells = [site.label, *("–" if number is None else f"{number:.3g}" for number in (size, radius))]
        lows, highs = found.get("safe_low") or {}, found.get("safe_scale") or {}
        cells += [_range(lows.get(kind), highs.get(kind)) for kind in kinds]
        table.add_row(*cells, str(found.get("advice") or "–").partition(":")[0])
    return table


def predictor_table(diagnosis: Diagnosis) -> Table:
    """Return one line a predictor: its AUROC over all sites, and its mean within the sites that have one."""
    table = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD)
    table.add_column("predictor", no_wrap=True)
    for name in ("AUROC over all sites (95 %)", "within a site, mean"):
        table.add_column(name, justify="right", no_wrap=True)
    for predictor in diagnosis.predictors:
        whole, within = overall_and_within(diagnosis, predictor.column)
        table.add_row(predictor.label, _interval(*whole), _number(within))
    return table


def overall_and_within(diagnosis: Diagnosis, column: str) -> tuple[tuple[float, float, float], float]:
    """Return a predictor's AUROC over all sites with its interval, and the mean of its AUROC at each site.

    Pooling sites rewards knowing which sites work at all; within a site only the edits differ.
    """
    rows = diagnosis.summary[diagnosis.summary["predictor"] == column]
    pooled = rows["site"] == ALL_SITES
    row = rows[pooled].iloc[0] if pooled.any() else rows.iloc[0]
    within = float(rows.loc[~pooled, "auroc"].mean())
    return (float(row["auroc"]), float(row["low"]), float(row["high"])), within


def expectation_table(expectations: Sequence[Expectation]) -> Table:
    """Return a line a site and edit for a single pair of values."""
    table = Table(header_style="bold", pad_edge=False)
    table.add_column("site")
    table.add_column("edit")
    table.add_column("foreseen", justify="right")
    table.add_column("margin", justify="right")
    table.add_column("nearest rival")
    table.add_column("seen", justify="right")
    for entry in expectations:
        seen = "–" if entry.observed is None else _percent(entry.observed)
        numbers = (_percent(entry.probability), f"{entry.margin:+.2f}")
        table.add_row(entry.site, entry.edit, *numbers, entry.nearest, seen)
    return table


def _interval(value: float, low: float, high: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{_number(value)} ({_number(low)}–{_number(high)})"


def _range(low: float | None, high: float | None) -> str:
    if high is None:
        return "–"
    if high <= 0:
        return "none"
    return f"{low:.2g}–{high:.2g}" if low is not None else f"to {high:.2g}"


def _percent(rate: float) -> str:
    return "–" if math.isnan(rate) else f"{100 * rate:.0f} %"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}".removeprefix("0")
