"""Run the study with `python -m experiments.low_rank_vs_full_rank [FOLDER]`; `--small` runs a slice of it."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path

import torch

from experiments.low_rank_vs_full_rank.settings import Settings
from experiments.low_rank_vs_full_rank.study import NAME, run

logging.basicConfig(level=logging.INFO, format="%(message)s")
torch.set_num_threads(1)
folders = [Path(argument) for argument in sys.argv[1:] if argument != "--small"]
if "--small" in sys.argv[1:]:
    settings = Settings.small(folders[0] if folders else Path("low-rank-vs-full-rank-out"))
else:
    settings = replace(Settings(), folder=folders[0]) if folders else Settings()
run(settings)
logging.getLogger(__name__).info("the study's page: %s", settings.folder / f"{NAME}.md")
