"""`python -m experiments.slider_composition`, with `--small FOLDER`, or `--cache FOLDER` to go on."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch

from experiments.slider_composition.settings import Settings
from experiments.slider_composition.study import run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--small", type=Path, metavar="FOLDER", help="run a slice and write into this folder")
parser.add_argument("--cache", type=Path, metavar="FOLDER", help="keep sliders and pictures here, and go on")
parser.add_argument("--family", action="append", help="only this pipeline; may be given twice")
options = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.set_num_threads(1)
settings = Settings.small(options.small) if options.small else Settings()
families = tuple(options.family) if options.family else settings.families
run(replace(settings, cache=options.cache, families=families))
