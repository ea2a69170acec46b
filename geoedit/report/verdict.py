"""The diagnosis in plain words."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from geoedit.diagnosis.plan import MEAN_DIFFERENCE, REUSED_VECTOR
from geoedit.diagnosis.result import ALL_SITES, Diagnosis

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
            f"{best_site}" + ("." if site == best_site else f"; at best {_share(rate)}, at {site}.")
        )
    straight = kinds.get(MEAN_DIFFERENCE, table).groupby("site", sort=False)["rate"].mean()
    works = [str(site) for site, rate in straight.items() if rate >= WORKS]
    fails = [str(site) for site, rate in straight.items() if rate <= FAILS]
    if works and len(straight) > 1:
        lines.append(f"Mean differences work (at least {WORKS:.0%}) at {_count(works, len(straight))}.")
    if fails and len(straight) > 1:
        lines.append(f"They do next to nothing (at most {FAILS:.0%}) at {_count(fails, len(straight))}.")
    if diagnosis.applied:
        lines.extend(_foresight(diagnosis))
    else:
        lines.append("No edit was run: these are predictions. Run the edits to see them beside what happens.")
    return Verdict(headline, tuple(lines))


def _foresight(diagnosis: Diagnosis) -> list[str]:
    default = diagnosis.predictors[0]
    summary = diagnosis.summary
    rows = summary[summary["predictor"] == default.column]
    overall = rows[rows["site"] == ALL_SITES] if (rows["site"] == ALL_SITES).any() else rows
    row = overall.iloc[0]
    error = diagnosis.calibration().expected_error
    if pd.isna(row["auroc"]):
        return ["All edits that were run ended alike, so that the prediction's ranking can't be judged."]
    return [
        "Before any edit was run, the prediction ranked successes above failures with AUROC "
        f"{row['auroc']:.2f} ({row['low']:.2f} to {row['high']:.2f}); its probabilities are off by "
        f"{100 * error:.0f} points on average."
    ]


def _best(table: pd.DataFrame) -> tuple[str, float]:
    rates = table.groupby("site", sort=False)["rate"].mean()
    return str(rates.idxmax()), float(rates.max())


def _share(rate: float) -> str:
    percent = 100 * rate
    if 0 < percent < 1:
        return "under 1 %"
    if 99 < percent < 100:
        return "over 99 %"
    return f"{percent:.0f} %"


def _count(sites: list[str], total: int) -> str:
    return f"{len(sites)} of {total} sites: " + "; ".join(sites)
