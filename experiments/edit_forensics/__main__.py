"""The study: `python -m experiments.edit_forensics`, with `--small FOLDER`, or `--cache FOLDER` to go on."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path

import torch

from experiments.edit_forensics.settings import Settings
from experiments.edit_forensics.study import run

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--small", type=Path, help="run a slice and write into this folder")
parser.add_argument("--cache", type=Path, help="keep finished cases here, and go on from them")
options = parser.parse_args()
logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.set_num_threads(1)
settings = Settings.small(options.small) if options.small else Settings()
run(replace(settings, cache=options.cache))
