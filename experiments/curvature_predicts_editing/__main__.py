"""Run the study with `python -m experiments.curvature_predicts_editing`; `--small` runs a slice of it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from experiments.curvature_predicts_editing.settings import Settings
from experiments.curvature_predicts_editing.study import NAME, run

logging.basicConfig(level=logging.INFO, format="%(message)s")
folders = [argument for argument in sys.argv[1:] if argument != "--small"]
if "--small" in sys.argv[1:]:
    settings = Settings.small(Path(folders[0] if folders else "curvature-out"))
else:
    settings = Settings(folder=Path(folders[0])) if folders else Settings()
scores = {score["name"]: score["auroc"][0] for score in run(settings)["scores"]}
log = logging.getLogger(__name__)
log.info("AUROC on concepts left out: odds %.2f, landing margin %.2f", scores["odds"], scores["landing"])
log.info("the study's page: %s", settings.folder / f"{NAME}.md")
