"""Does curvature predict where straight edits fail? `python -m experiments.curvature_predicts_editing` asks.

`run(Settings())` is the whole study, `run(Settings.small(folder))` a slice of it.
"""

from experiments.curvature_predicts_editing.settings import Settings
from experiments.curvature_predicts_editing.study import run

__all__ = ["Settings", "run"]
