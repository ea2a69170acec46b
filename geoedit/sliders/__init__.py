"""Concept sliders: LoRAs that move one attribute of what a model draws or says, up and down."""

from geoedit.sliders.apply import together
from geoedit.sliders.calibrate import calibrate
from geoedit.sliders.calibration import Calibration
from geoedit.sliders.discover import discover
from geoedit.sliders.evaluation.evaluate import evaluate
from geoedit.sliders.evaluation.result import Evaluation
from geoedit.sliders.files import load
from geoedit.sliders.safe import SafeRange, observed_range, safe_range
from geoedit.sliders.slider import ModuleChange, Scaled, Slider
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.strips import Strip, strip
from geoedit.sliders.training.run import train
from geoedit.sliders.training.settings import TrainSettings

__all__ = [
    "Calibration",
    "Evaluation",
    "ModuleChange",
    "SafeRange",
    "Scaled",
    "Slider",
    "SliderSpec",
    "Strip",
    "TrainSettings",
    "calibrate",
    "discover",
    "evaluate",
    "load",
    "observed_range",
    "safe_range",
    "strip",
    "together",
    "train",
]
