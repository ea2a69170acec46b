"""The whole study: sliders, every part on each pipeline, then JSON, pictures and the page."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from datetime import date
from typing import Any

import diffusers
import torch

import geoedit
from experiments.slider_composition.commuting import commutations, foretold
from experiments.slider_composition.composing import alone, composed, first_order
from experiments.slider_composition.crossing import crossings
from experiments.slider_composition.figures import draw
from experiments.slider_composition.lab import Lab
from experiments.slider_composition.page import page
from experiments.slider_composition.settings import Settings
from geoedit.diagnosis.result import write_text

log = logging.getLogger(__name__)
NAME = "slider_composition"


def run(settings: Settings | None = None, *, load: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Run the study and write its JSON, pictures and page; return what is in the JSON.

    Args:
        settings: what to look at.
        load: gives a pipeline by its name; the built-in ones if not given.
    """
    settings, load = settings or Settings(), load or geoedit.testbeds.load
    started = time.perf_counter()
    families = {}
    for name in settings.families:
        since = time.perf_counter()
        lab = Lab.of(load(name), name, settings)
        trained = time.perf_counter()
        log.info("%s: alone", name)
        singles, effects = alone(lab), first_order(lab)
        log.info("%s: composed", name)
        together = composed(lab, effects)
        log.info("%s: crossed", name)
        crossed = crossings(lab)
        log.info("%s: in order", name)
        ordered = commutations(lab, together)
        families[name] = {
            "alone": singles,
            "interference": {
                "matrix": effects.matrix.to_dict("index"),
                "error": effects.error.to_dict("index"),
                "step": effects.step,
            },
            "composed": together,
            "crossed": crossed,
            "commuting": ordered,
            "foretold": foretold(ordered),
            "seconds": {
                "training": round(trained - since),
                "measuring": round(time.perf_counter() - trained),
            },
        }
    found = {
        "settings": settings.to_dict(),
        "families": families,
        "about": {
            "date": str(date.today()),
            "machine": f"{os.cpu_count()}-core CPU, {platform.machine()}, one thread",
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "seconds": round(time.perf_counter() - started),
        },
    }
    settings.folder.mkdir(parents=True, exist_ok=True)
    write_text(settings.folder / f"{NAME}.json", json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    draw(found, settings.folder / f"{NAME}.png")
    write_text(settings.folder / f"{NAME}.md", page(found))
    return found
