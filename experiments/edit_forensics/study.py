"""The whole study: every case, kept as it is done; then tables, figures and the page."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers

from experiments.edit_forensics.figures import draw
from experiments.edit_forensics.measure import Subjects, control_cases, edit_cases
from experiments.edit_forensics.page import page
from experiments.edit_forensics.settings import Settings

log = logging.getLogger(__name__)
NAME = "edit_forensics"


def run(settings: Settings | None = None) -> dict[str, Any]:
    """Run the study and write its JSON, picture and page; return what is in the JSON."""
    settings = settings or Settings()
    started = time.perf_counter()
    cases = _kept(settings)
    earlier = sum(case["case_seconds"] for case in cases.values())
    for name in settings.models:
        at = Subjects.load(name, settings)
        for source in (edit_cases, control_cases):
            since = time.perf_counter()
            for key, record in source(at, settings, set(cases)):
                record["case_seconds"] = time.perf_counter() - since
                cases[key] = record
                log.info("%s: %s", key, json.dumps(record))
                _keep(settings, cases)
                since = time.perf_counter()
    found = {
        "settings": settings.to_dict(),
        "edits": [case for case in cases.values() if "control" not in case],
        "controls": [case for case in cases.values() if "control" in case],
        "about": {
            "date": str(date.today()),
            "machine": f"{os.cpu_count()}-core CPU, {platform.machine()}, one thread",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "seconds": round(earlier + time.perf_counter() - started),
        },
    }
    settings.folder.mkdir(parents=True, exist_ok=True)
    write(settings.folder / f"{NAME}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    draw(found, settings.folder / f"{NAME}.png")
    write(settings.folder / f"{NAME}.md", page(found))
    return found


def write(path: Path, text: str) -> None:
    """Write a text whole or not at all."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _kept(settings: Settings) -> dict[str, Any]:
    if settings.cache is None or not (settings.cache / "cases.json").is_file():
        return {}
    return dict(json.loads((settings.cache / "cases.json").read_text(encoding="utf-8")))


def _keep(settings: Settings, cases: dict[str, Any]) -> None:
    if settings.cache is not None:
        settings.cache.mkdir(parents=True, exist_ok=True)
        write(settings.cache / "cases.json", json.dumps(cases))
