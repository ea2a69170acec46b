"""A report in words: the sentence on top, the lines below it, the few numbers that matter most."""

from collections.abc import Iterable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_analysis.report.result import Report


def headline(report: "Report") -> str:
    """The answer in one sentence."""
    rows = changed(report)
    if not report.rows:
        return "No matrix is part of this update."
    if not rows:
        return "No matrix was changed, but for rounding."
    return f"{_what(report, rows)}{_how_much(report)}."


def lines(report: "Report") -> list[str]:
    """What else is to be known, a sentence each."""
    rows = changed(report)
    if not rows:
        return []
    found = [_largest(rows)]
    evidence = [str(line) for line in (report.verdict or {}).get("evidence", ())]
    found += [f"{line[0].upper()}{line[1:]}." for line in evidence if line]
    found += _alignment(rows)
    return found


def tiles(report: "Report") -> list[dict[str, str]]:
    """Numbers for the top of the page: {"value": …, "text": …}."""
    rows = changed(report)
    found = []
    if rows:
        total = total_change(report)
        if total is not None:
            found.append(_tile(percent(total), "of the norm of the base’s matrices that were tuned"))
        ranks = [row["rank"] for row in rows if row.get("rank") is not None]
        if ranks:
            found.append(_tile(_range(ranks), "true rank, from the least to the largest matrix"))
        carried = [row["effective_rank_above"] for row in rows if row.get("effective_rank_above")]
        if carried:
            found.append(_tile(f"{median(carried):.3g}", "median effective rank, noise left out"))
        found.append(_tile(f"{len(rows)} of {len(report.rows)}", "matrices changed"))
        counted = [row for row in rows if row.get("intruders_left") is not None]
        if counted:
            both = sum(row["intruders_left"] + row["intruders_right"] for row in counted)
            found.append(
                _tile(str(both), f"intruder dimensions, in {_count(len(counted), 'matrix', 'matrices')}")
            )
    return found


def left_out(report: "Report") -> list[str]:
    """What was not computed and why, a sentence each."""
    return [
        f"{one['what']} of {_count(one['matrices'], 'matrix', 'matrices')}: {one['why']}."
        for one in report.left_out
    ]


def changed(report: "Report") -> list[dict[str, Any]]:
    """The rows whose difference is more than rounding."""
    return [row for row in report.rows if row["verdict"] != "none"]


def total_change(report: "Report") -> float | None:
    """‖ΔW‖ / ‖W‖ over all matrices that changed; None where a base's norm is not known."""
    above = below = 0.0
    for row in changed(report):
        if not row.get("relative_norm"):
            return None
        above += row["norm"] ** 2
        below += (row["norm"] / row["relative_norm"]) ** 2
    return (above / below) ** 0.5 if below else None


def name_of(row: dict[str, Any]) -> str:
    """A matrix's name in a sentence."""
    return row["kind"] if row["block"] is None else f"block {row['block']} {row['kind']}"


def rank_of(row: dict[str, Any]) -> str:
    """The true rank, with its interval where that is wider than one number."""
    rank, low, high = row.get("rank"), row.get("rank_low"), row.get("rank_high")
    if rank is None:
        return "–"
    return str(rank) if low is None or low == high else f"{rank} ({low}–{high})"


def percent(share: float) -> str:
    """A share in per cent, three digits."""
    return f"{100 * share:.3g}\u00a0%"


def _what(report: "Report", rows: Sequence[dict[str, Any]]) -> str:
    told = report.verdict or {}
    rank, stages = told.get("rank"), told.get("stages")
    of_rank = f" of rank {rank}" if rank else ""
    statement = told.get("statement")
    words = {
        "adapter": f"An adapter{of_rank or (f', {statement}' if statement != 'unknown' else '')}",
        "merged LoRA": f"Most likely a merged LoRA{of_rank}",
        "ReLoRA": f"Most likely a ReLoRA run{f' of {stages} merges' if stages else ''}"
        + (f", rank {rank} in all" if rank else ""),
        "edit": f"Most likely an edit{of_rank}",
        "full fine-tune": "Most likely a full fine-tune, of full rank",
        "unknown": "What made it cannot be told",
    }.get(told.get("origin", ""), "An update")
    return f"{words}: {_count(len(rows), 'matrix', 'matrices')} changed"


def _how_much(report: "Report") -> str:
    total = total_change(report)
    return "" if total is None else f" by {percent(total)} of their norm"


def _largest(rows: Sequence[dict[str, Any]]) -> str:
    sized = "relative_norm" if all(row.get("relative_norm") for row in rows) else "norm"
    order = sorted(rows, key=lambda row: -row[sized])[:3]
    told = [
        f"{name_of(row)} ({percent(row[sized]) if sized == 'relative_norm' else f'norm {row[sized]:.3g}'})"
        for row in order
    ]
    return f"Changed most: {'; '.join(told)}."


def _alignment(rows: Sequence[dict[str, Any]]) -> Iterable[str]:
    known = [row for row in rows if row.get("overlap_left") is not None]
    if known:
        parts = []
        for side, name in (("left", "output"), ("right", "input")):
            seen = median(row[f"overlap_{side}"] for row in known)
            chance = median(row[f"chance_{side}"] for row in known)
            parts.append(f"{percent(seen)} on the {name} side ({percent(chance)} by chance)")
        yield f"Overlap with the base's strongest directions, medians: {', '.join(parts)}."
    counted = [row for row in rows if row.get("intruders_left") is not None]
    having = [row for row in counted if row["intruders_left"] + row["intruders_right"]]
    if counted:
        most = max(counted, key=lambda row: row["intruders_left"] + row["intruders_right"])
        where = f"{_count(most['intruders_left'], 'output')}, {_count(most['intruders_right'], 'input')}"
        told = f"Intruder dimensions in {len(having)} of {_count(len(counted), 'matrix', 'matrices')}"
        yield told + (f", most in {name_of(most)} ({where})." if having else ".")


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def _count(number: int, one: str, many: str | None = None) -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _tile(value: str, text: str) -> dict[str, str]:
    return {"value": value, "text": text}
