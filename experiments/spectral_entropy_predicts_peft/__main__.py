"""Run the study: `python -m experiments.spectral_entropy_predicts_peft [FOLDER] [--small] [--runs FOLDER]`.

`--runs` keeps every finished run there, and takes up those that are there.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch

from experiments.spectral_entropy_predicts_peft.settings import RESULTS, Settings
from experiments.spectral_entropy_predicts_peft.study import NAME, run

logging.basicConfig(level=logging.INFO, format="%(message)s")
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("folder", nargs="?", type=Path, default=None, help="where the results go")
parser.add_argument("--small", action="store_true", help="a slice of a few seconds")
parser.add_argument("--runs", type=Path, default=None, help="a folder that keeps finished runs")
given = parser.parse_args()
torch.set_num_threads(1)
settings = Settings.small(given.folder or Path("spectral-out")) if given.small else Settings()
settings = replace(settings, runs=given.runs, folder=given.folder or settings.folder or RESULTS)
found = run(settings, ship=not given.small and given.folder is None)
logging.getLogger(__name__).info("the study's page: %s", settings.folder / f"{NAME}.md")
