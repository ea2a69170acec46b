"""Tables for a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from geoedit.diagnosis.result import Diagnosis, Expectation


def site_table(diagnosis: Diagnosis) -> Table:
    """Return one line a site: how many edits succeed, foreseen and seen, and the AUROC of each predictor."""
    table = Table(title=None, header_style="bold", pad_edge=False)
    table.add_column("site")
    table.add_column("edits", justify="right")
    table.add_column("foreseen", justify="right")
    if diagnosis.applied:
        table.add_column("seen", justify="right")
        for number, predictor in enumerate(diagnosis.predictors):
            name = f"{predictor.label}\nAUROC" if number == 0 else predictor.label
            table.add_column(name, justify="right", overflow="fold")
    for label, rows in diagnosis.summary.groupby("site", sort=False):
        first = rows.iloc[0]
        cells = [str(label), str(first["edits"]), _percent(first["predicted"])]
        if diagnosis.applied:
            cells.append(_percent(first["observed"]))
            for number, (_, row) in enumerate(rows.iterrows()):
                text = _number(row["auroc"])
                if number == 0 and not math.isnan(row["auroc"]):
                    text += f" ({_number(row['low'])}–{_number(row['high'])})"
                cells.append(text)
        table.add_row(*cells)
    return table


def expectation_table(expectations: Sequence[Expectation]) -> Table:
    """Return one line a site and edit for a single pair of values."""
    table = Table(header_style="bold", pad_edge=False)
    for name, justify in (("site", "left"), ("edit", "left"), ("foreseen", "right"), ("margin", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left")
    table.add_column("nearest rival")
    table.add_column("seen", justify="right")
    for entry in expectations:
        seen = "–" if entry.observed is None else _percent(entry.observed)
        table.add_row(
            entry.site, entry.edit, _percent(entry.probability), f"{entry.margin:+.2f}", entry.nearest, seen
        )
    return table


def _percent(rate: float) -> str:
    return "–" if math.isnan(rate) else f"{100 * rate:.0f} %"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.2f}"
