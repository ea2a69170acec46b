"""Reports and traces of weight updates in a terminal of 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from peft_analysis import Report
    from peft_analysis.forensics import EditTrace


def tell(report: Report, rows: int, console: Console | None = None) -> None:
    """Print a report: the matrices that changed most, then what it comes to in words."""
    from peft_analysis.report import words

    console = console or Console()
    shown = sorted(words.changed(report), key=lambda row: -(row.get("relative_norm") or row["norm"]))
    if shown:
        console.print(spectra_table(shown[:rows]))
    if len(shown) > rows:
        console.print(f"{len(shown) - rows} more on the page.", style="dim", highlight=False)
    console.print()
    console.print(words.headline(report), style="bold", markup=False, highlight=False)
    for line in [*words.lines(report), *(f"Left out: {line}" for line in words.left_out(report))]:
        console.print(line, markup=False, highlight=False)
    console.print()


def spectra_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of a report for a terminal of 80 columns."""
    from peft_analysis.report import words

    table = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("matrix", no_wrap=True, overflow="ellipsis")
    for name in (
        "change",
        "true\nrank",
        "effective\nrank",
        "intruders\nout + in",
        "overlap\nout / in",
        "verdict",
    ):
        table.add_column(name, justify="left" if name == "rank\nis" else "right", no_wrap=True)
    for row in rows:
        changed = row.get("relative_norm")
        table.add_row(
            row["kind"] if row["block"] is None else f"{row['block']} {row['kind']}",
            f"norm {row['norm']:.3g}" if changed is None else words.percent(changed),
            words.rank_of(row),
            f"{row.get('effective_rank_above') or row['effective_rank']:.3g}",
            _pair(row, "intruders", " + ", str),
            _pair(row, "overlap", " / ", lambda share: f"{100 * share:.0f}"),
            row["verdict"].removesuffix(" rank"),
        )
    return table


def _pair(row: dict[str, Any], name: str, between: str, form: Any) -> str:
    sides = [row.get(f"{name}_{side}") for side in ("left", "right")]
    return "–" if None in sides else between.join(form(side) for side in sides)


def tell_trace(found: EditTrace, rows: int, console: Console | None = None) -> None:
    """Print a trace: the places, the subjects with what is now said of them, the method, what it rests on."""
    console = console or Console()
    if len(found.places):
        console.print(place_table(found, rows))
    if len(found.places) > rows:
        console.print(f"{len(found.places) - rows} more changed matrices.", style="dim", highlight=False)
    if len(found.table):
        console.print(subject_table(found, rows))
    if len(found.table) > rows:
        console.print(f"{len(found.table) - rows} more in the JSON.", style="dim", highlight=False)
    console.print()
    count, low, high = found.edits
    edits = f"{count} edits" if count != 1 else "1 edit"
    between = "" if low == high else f" ({low} to {high})"
    console.print(f"{found.method}: {edits}{between}.", style="bold", markup=False, highlight=False)
    for line in found.method.evidence:
        console.print(f"{line[0].upper()}{line[1:]}.", markup=False, highlight=False)
    for answer, needed in found.access.items():
        console.print(f"{answer}: {needed}.", style="dim", markup=False, highlight=False)
    console.print()


def place_table(found: EditTrace, rows: int) -> Table:
    """The changed matrices, the largest change first."""
    table = _table("matrix", "change", "rank", "right vectors")
    for row in found.places.head(rows).to_dict("records"):
        low, high = row["rank_low"], row["rank_high"]
        rank = str(row["rank"]) if low == high else f"{row['rank']} ({low}–{high})"
        known = row["relative_norm"] == row["relative_norm"]
        change = f"{100 * row['relative_norm']:.3g} %" if known else f"norm {row['norm']:.3g}"
        table.add_row(str(row["parameter"]), change, rank, str(row["right_map"] or "–"))
    return table


def subject_table(found: EditTrace, rows: int) -> Table:
    """The subjects found, the surest first."""
    table = _table("subject", "p", "now said", "context")
    for row in found.table.head(rows).to_dict("records"):
        p_value = row["p_value"]
        told = "–" if p_value is None or p_value != p_value else f"{p_value:.1e}"
        cells = [row.get("subject"), told, row.get("object"), row.get("relation") or row.get("context")]
        table.add_row(*("–" if cell is None or cell != cell else str(cell) for cell in cells))
    return table


def _table(*columns: str) -> Table:
    table = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in columns:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    return table
