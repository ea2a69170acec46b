"""The whole study: make the edits, judge the predictions, run the other parts, write results and page."""

from __future__ import annotations

import importlib.util
import json
import logging
import time
from collections.abc import Callable
from typing import Any

import pandas as pd

from experiments.curvature_predicts_editing.cells import collect_edits
from experiments.curvature_predicts_editing.figures import figures
from experiments.curvature_predicts_editing.fit import record
from experiments.curvature_predicts_editing.judge import judge
from experiments.curvature_predicts_editing.page import page
from experiments.curvature_predicts_editing.results import tables
from experiments.curvature_predicts_editing.settings import Settings
from geoedit.diagnosis.result import write_text

log = logging.getLogger(__name__)
NAME = "curvature_predicts_editing"
PACKAGE = f"experiments.{NAME}"


def run(
    settings: Settings | None = None, *, collect: Callable[[Settings], pd.DataFrame] = collect_edits
) -> dict[str, Any]:
    """Run the study and write its results: a JSON file, a page and pictures; return what is in the JSON.

    Args:
        settings: of the study.
        collect: where the edits come from.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    edits = collect(settings)
    collected = time.perf_counter()
    judged = judge(edits, settings)
    found = {"settings": settings.to_dict(), "record": record(edits, judged, settings), **tables(judged)}
    finished = time.perf_counter()
    found["seconds"] = {
        "edits": round(collected - started),
        "judging": round(finished - collected),
    }
    sections = [section(name, found, settings) for name in settings.parts]
    settings.folder.mkdir(parents=True, exist_ok=True)
    figures(found, settings.folder)
    text = json.dumps(found, allow_nan=False, separators=(",", ":"))
    write_text(settings.folder / f"{NAME}.json", text + "\n")
    write_text(settings.folder / f"{NAME}.md", page(found, [part for part in sections if part]))
    return found


def section(name: str, found: dict[str, Any], settings: Settings) -> str:
    """Run another part of the study and return its section of the page; "" if it is not there.

    A part is a module of this package with `run()`, whose result has `to_dict()`, `section(result)` and,
    where it draws, `figures(result, folder)`.
    """
    if importlib.util.find_spec(f"{PACKAGE}.{name}") is None:
        log.info("%s: not there", name)
        return ""
    module = importlib.import_module(f"{PACKAGE}.{name}")
    started = time.perf_counter()
    result = module.run()
    found["seconds"][name] = round(time.perf_counter() - started)
    found[name] = result.to_dict()
    if hasattr(module, "figures"):
        module.figures(result, settings.folder)
    return str(module.section(result))
