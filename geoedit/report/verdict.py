"""The diagnosis in plain words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from geoedit.diagnosis.plan import MEAN_DIFFERENCE, REUSED_VECTOR
from geoedit.diagnosis.result import Diagnosis
from geoedit.diagnosis.safe_scale import GRID
from geoedit.report.terminal import overall_and_within

WORKS, FAILS = 0.9, 0.1


@dataclass(frozen=True)
class Verdict:
    """One sentence that answers the question, and a few that say where, how far and how sure."""

    headline: str
    lines: tuple[str, ...]


def verdict(diagnosis: Diagnosis) -> Verdict:
    """Say in plain words whether straight edits move the concept, where, and how well that was foreseen."""
    column = "success" if diagnosis.applied else "probability"
    seen = "arrive" if diagnosis.applied else "are expected to arrive"
    table = diagnosis.table.assign(rate=diagnosis.table[column].astype("float64"))
    kinds = {str(kind): rows for kind, rows in table.groupby("edit", sort=False)}
    best_site, best = _best(kinds[MEAN_DIFFERENCE]) if MEAN_DIFFERENCE in kinds else _best(table)
    name = diagnosis.concept["name"]
    if best >= WORKS:
        headline = f"Yes: at {best_site}, {_share(best)} of the straight edits of {name} {seen}."
    elif best > FAILS:
        headline = (
            f"Partly: at the best site, {best_site}, {_share(best)} of the straight edits of {name} {seen}."
        )
    else:
        headline = (
            f"No: even at the best site, {best_site}, only {_share(best)} of the straight edits "
            f"of {name} {seen}."
        )
    lines = []
    if REUSED_VECTOR in kinds:
        rates = kinds[REUSED_VECTOR].groupby("site", sort=False)["rate"].mean()
        site, rate = _best(kinds[REUSED_VECTOR])
        there = float(rates.get(best_site, float("nan")))
        lines.append(
            f"A vector taken from one pair of values and reused elsewhere: {_share(there)} {seen} at "
            f"{best_site}" + ("." if rate <= there else f"; at best {_share(rate)}, at {site}.")
        )
    straight = kinds.get(MEAN_DIFFERENCE, table).groupby("site", sort=False)["rate"].mean()
    works = [str(site) for site, rate in straight.items() if rate >= WORKS]
    fails = [str(site) for site, rate in straight.items() if rate <= FAILS]
    if works and len(straight) > 1:
        lines.append(f"Mean differences work (at least {_share(WORKS)}) at {_count(works, len(straight))}.")
    if fails and len(straight) > 1:
        lines.append(f"They do next to nothing (at most {_share(FAILS)}) at {_count(fails, len(straight))}.")
    geometry = next(site.geometry for site in diagnosis.sites if site.label == best_site)
    lines.extend(_how_far(geometry, best_site))
    if diagnosis.applied:
        lines.extend(_foresight(diagnosis))
    else:
        lines.append("No edit was run: these are predictions. Run the edits to see them beside what happens.")
    return Verdict(headline, tuple(lines))


def _how_far(geometry: Mapping[str, Any], site: str) -> list[str]:
    """How far an edit may be pushed at a site, and what to do there."""
    lines = []
    known = {kind: high for kind, high in geometry.get("safe_scale", {}).items() if high is not None}
    if known:
        lows = geometry.get("safe_low", {})
        parts = [f"{kind}s {_stretch(lows.get(kind), high)}" for kind, high in known.items()]
        lines.append(f"How far, at {site}: {'; '.join(parts)} (medians over pairs).")
    if geometry.get("advice"):
        reason = geometry.get("advice_reason")
        lines.append(f"Advice there: {geometry['advice']}" + (f" ({reason})." if reason else "."))
    return lines


def _stretch(low: float | None, high: float) -> str:
    if high <= 0:
        return "are expected to arrive at no scale"
    start = f"from {low:.2g} " if low is not None else ""
    more = " or more" if high >= max(GRID) else ""
    return f"are expected to arrive at scales {start or 'up '}to {high:.2g}{more}"


def _foresight(diagnosis: Diagnosis) -> list[str]:
    (value, low, high), within = overall_and_within(diagnosis, diagnosis.predictors[0].column)
    error = diagnosis.calibration().expected_error
    if pd.isna(value):
        return ["All edits that were run ended alike, so that the prediction's ranking can't be judged."]
    inside = (
        "" if pd.isna(within) or len(diagnosis.sites) == 1 else f", {within:.2f} on average within a site"
    )
    points = "1 point" if round(100 * error) == 1 else f"{100 * error:.0f} points"
    return [
        f"Before any edit was run, the prediction ranked successes above failures with AUROC {value:.2f} "
        f"({low:.2f} to {high:.2f}) over all sites{inside}; its probabilities are off by {points} on average."
    ]


def _best(table: pd.DataFrame) -> tuple[str, float]:
    """The site with the highest rate, the deepest of equals, and that rate."""
    rates = table.groupby("site", sort=False)["rate"].mean()
    return str(rates[rates >= rates.max() - 1e-9].index[-1]), float(rates.max())


def _share(rate: float) -> str:
    percent = 100 * rate
    if 0 < percent < 1:
        return "under 1\u00a0%"
    if 99 < percent < 100:
        return "over 99\u00a0%"
    return f"{percent:.0f}\u00a0%"


def _count(sites: list[str], total: int) -> str:
    return f"{len(sites)} of {total} sites: {'; '.join(join_blocks(sites))}"


def join_blocks(sites: list[str]) -> list[str]:
    """Shorten runs of blocks: "block 0 residual_out @ value", "block 1 residual_out @ value" to one entry."""
    found: list[tuple[str, list[int]]] = []
    for site in sites:
        match = re.fullmatch(r"block (\d+) (.*)", site)
        rest, number = (match[2], int(match[1])) if match else (site, -1)
        if match and found and found[-1][0] == rest and found[-1][1] and found[-1][1][-1] == number - 1:
            found[-1][1].append(number)
        else:
            found.append((rest, [number] if match else []))
    return [_run(rest, numbers) for rest, numbers in found]


def _run(rest: str, numbers: list[int]) -> str:
    if not numbers:
        return rest
    if len(numbers) == 1:
        return f"block {numbers[0]} {rest}"
    return f"blocks {numbers[0]}–{numbers[-1]} {rest}"
