"""The whole study: make the edits, judge the predictions, run the other parts, write results and page."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from experiments.curvature_predicts_editing.cells import collect_edits
from experiments.curvature_predicts_editing.figures import figures
from experiments.curvature_predicts_editing.fit import record
from experiments.curvature_predicts_editing.judge import judge
from experiments.curvature_predicts_editing.page import page, titled
from experiments.curvature_predicts_editing.results import tables
from experiments.curvature_predicts_editing.settings import Settings
from geoedit.diagnosis.result import write_text
from geoedit.errors import EditError

log = logging.getLogger(__name__)
NAME = "curvature_predicts_editing"
PACKAGE = f"experiments.{NAME}"


def run(
    settings: Settings | None = None,
    *,
    collect: Callable[[Settings], pd.DataFrame] = collect_edits,
    at_hand: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run the study and write its results: JSON files, a page and pictures; return what is in the first JSON.

    Args:
        settings: of the study.
        collect: where the edits come from.
        at_hand: results of other parts that have been run already, by the part's name.
    """
    settings = settings or Settings()
    started = time.perf_counter()
    edits = collect(settings)
    collected = time.perf_counter()
    making = edits.attrs.get("seconds", collected - started)
    judged = judge(edits, settings)
    found = {"settings": settings.to_dict(), "record": record(edits, judged, settings), **tables(judged)}
    finished = time.perf_counter()
    found["seconds"] = {"edits": round(making), "judging": round(finished - collected)}
    settings.folder.mkdir(parents=True, exist_ok=True)
    sections = [section(name, found, settings, (at_hand or {}).get(name)) for name in settings.parts]
    figures(found, settings.folder)
    write_json(settings, NAME, found)
    write_text(settings.folder / f"{NAME}.md", page(found, [part for part in sections if part]))
    return found


def section(name: str, found: dict[str, Any], settings: Settings, result: Any = None) -> str:
    """Run another part of the study, write its results and return its section; "" if there is no such part.

    A part is a module of this package with `run()`, whose result has `to_dict()`, `section(result)` and,
    where it draws, `figures(result, folder)`. A part that cannot be run here (a model that is not installed)
    is left out, and said so in the results.
    """
    if importlib.util.find_spec(f"{PACKAGE}.{name}") is None:
        return ""
    module = importlib.import_module(f"{PACKAGE}.{name}")
    started = time.perf_counter()
    if result is None:
        try:
            result = module.run()
        except EditError as error:
            log.warning("%s is left out: %s", name, error)
            found.setdefault("left_out", {})[name] = str(error)
            return ""
    found["seconds"][name] = round(getattr(result, "seconds", time.perf_counter() - started))
    write_json(settings, f"{NAME}_{name}", result.to_dict())
    if hasattr(module, "figures"):
        module.figures(result, settings.folder)
    return titled(name, str(module.section(result)))


def write_json(settings: Settings, name: str, values: dict[str, Any]) -> None:
    """Write plain values into the folder of the results; a number that is not finite becomes null."""
    text = json.dumps(without_nan(values), allow_nan=False, separators=(",", ":"))
    write_text(settings.folder / f"{name}.json", text + "\n")


def without_nan(value: Any) -> Any:
    """The same values with None for numbers that are not finite."""
    if isinstance(value, dict):
        return {key: without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
