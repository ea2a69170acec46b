"""One self-contained HTML page: plotly inline, no request to anywhere, for laptop and phone."""

from __future__ import annotations

import html
import json
import re
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from geoedit.diagnosis.result import Diagnosis
from geoedit.report.payload import payload

SCRIPTS = ("common", "plots", "tables", "geometry", "space", "explorer", "page")
"""The parts of the page's script, in the order in which each uses those before it."""


def page(diagnosis: Diagnosis) -> str:
    """Return the page of a diagnosis as HTML text.

    Every name from outside (model, values, templates) reaches the page as JSON data and is set as text, never
    as markup.
    """
    title = f"Can a straight edit move {diagnosis.concept['name']}? · {diagnosis.model}"
    parts = {
        "TITLE": html.escape(title),
        "STYLE": _asset("page.css"),
        "PLOTLY": get_plotlyjs(),
        "DATA": embed(payload(diagnosis)),
        "SCRIPT": _script(),
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def embed(data: Any) -> str:
    """Return JSON that can stand inside a script element: no `<`, so that no tag can close or open there."""
    text = json.dumps(data, allow_nan=False, ensure_ascii=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _script() -> str:
    parts = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    return f'"use strict";\n(() => {{\n{parts}}})();\n'


def _asset(name: str) -> str:
    return (files("geoedit.report") / "assets" / name).read_text(encoding="utf-8")
