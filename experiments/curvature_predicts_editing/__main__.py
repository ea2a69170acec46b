"""Run the study with `python -m experiments.curvature_predicts_editing`; `--small` runs a slice of it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from experiments.curvature_predicts_editing.settings import Settings
from experiments.curvature_predicts_editing.study import run

logging.basicConfig(level=logging.INFO, format="%(message)s")
folders = [argument for argument in sys.argv[1:] if argument != "--small"]
if "--small" in sys.argv[1:]:
    run(Settings.small(Path(folders[0] if folders else "curvature-out")))
else:
    run(Settings(folder=Path(folders[0])) if folders else None)
