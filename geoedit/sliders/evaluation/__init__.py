"""What a slider does, measured on images."""

from geoedit.sliders.evaluation.claims import Claim
from geoedit.sliders.evaluation.evaluate import evaluate
from geoedit.sliders.evaluation.measures import GenericMeasure, Measure, ShapesWithResidual
from geoedit.sliders.evaluation.result import Evaluation
from geoedit.sliders.evaluation.table import COLUMNS

__all__ = [
    "COLUMNS",
    "Claim",
    "Evaluation",
    "GenericMeasure",
    "Measure",
    "ShapesWithResidual",
    "evaluate",
]
