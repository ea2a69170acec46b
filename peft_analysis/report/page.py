"""One self-contained HTML page: plain SVG and script, no request to anywhere, for laptop and phone."""

import html
import json
import math
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from peft_analysis.report import words
from peft_analysis.report.columns import COLUMNS

if TYPE_CHECKING:
    from peft_analysis.report.result import Report

SCRIPTS = ("common", "charts", "maps", "figures", "matrix", "tables", "page")
"""The parts of the page's script, in the order in which each uses those before it."""
DIGITS = 6
MANY = 1500  # more matrices than this, and the page holds the curves of the largest only


def page(report: "Report") -> str:
    """The page of a report as HTML text.

    Every name from outside reaches the page as JSON data and is set as text, never as markup.
    """
    data = payload(report)
    parts = {
        "TITLE": html.escape(data["title"]),
        "STYLE": _asset("page.css"),
        "DATA": embed(data),
        "SCRIPT": _script(),
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def payload(report: "Report") -> dict[str, Any]:
    """Everything that the page's script reads, as JSON values; numbers with six digits."""
    size = sum(row["rows"] * row["columns"] for row in report.rows)
    asked = report.source
    if report.base is None:
        asked += ", without its base"
    elif report.base not in report.source:
        asked += f", beside {report.base}"
    columns = [
        {"name": one.name, "title": one.title, "group": one.group, "form": one.form, "meaning": one.meaning}
        for one in COLUMNS
    ]
    found: dict[str, Any] = _short(
        {
            "title": f"What {report.name} changed",
            "asked": f"Read from {asked}: {len(report.rows)} matrices of {size:,} numbers.",
            "stem": re.sub(r"[^A-Za-z0-9_.-]+", "-", report.name).strip("-.") or "report",
            "headline": words.headline(report),
            "lines": words.lines(report),
            "tiles": words.tiles(report),
            "columns": columns,
            "rows": _rows(report),
            "vectors": list(report.vectors),
            "left_out": words.left_out(report),
            "why_no_base": _why_no_base(report),
            "notes": list(report.notes),
            "settings": dict(report.settings),
            "versions": dict(report.versions),
        }
    )
    return found


def embed(data: Any) -> str:
    """JSON that can stand inside a script element: no `<`, so that no tag can close or open there."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _rows(report: "Report") -> list[dict[str, Any]]:
    rows = [{key: value for key, value in row.items() if key != "judged"} for row in report.rows]
    for row, whole in zip(rows, report.rows, strict=True):
        reason = whole.get("judged", {}).get("reason")
        row["notes"] = [*row.get("notes", ()), *([f"Verdict: {row['verdict']}; {reason}."] if reason else [])]
    if len(rows) <= MANY:
        return rows
    sizes = sorted((row["norm"] for row in rows), reverse=True)
    least = sizes[MANY - 1]
    return [row if row["norm"] >= least else {**row, "curves": {}} for row in rows]


def _why_no_base(report: "Report") -> str:
    if report.base is None:
        return (
            "The base's weights were not given, so that nothing can be said of them: "
            "peft_analysis.analyse(base, tuned)."
        )
    told = words.left_out(report)
    return " ".join(told) if told else "No difference is other than zero."


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _script() -> str:
    parts = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def _asset(name: str) -> str:
    return (files("peft_analysis.report") / "assets" / name).read_text(encoding="utf-8")
