"""Measurements of sliders as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

if TYPE_CHECKING:
    import pandas as pd


def slider_table(rows: pd.DataFrame) -> Table:
    """The figures over all seeds of an evaluation's table, for a terminal."""
    columns = {
        "slider": "slider",
        "method": "by",
        "spearman": "rank correlation",
        "range_sd": "range, sd",
        "both_ends_right": "both ends",
        "interference": "interference",
        "interference_signed": "signed",
        "class_kept": "class kept",
        "safe_low": "safe from",
        "safe_high": "to",
    }
    chosen = {name: title for name, title in columns.items() if name in rows}
    drawn = Table(*chosen.values(), header_style="bold")
    for _, row in rows[rows["seed"] == "all"].iterrows():
        drawn.add_row(*(_cell(row[name]) for name in chosen))
    return drawn


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return "–"
    if value is True or value is False or type(value).__name__ in ("bool_", "bool"):
        return "right" if value else "wrong"
    return f"{float(value):.2f}"
