"""Sliders together: `python -m experiments.slider_composition` composes, crosses and commutes all pairs."""

from experiments.slider_composition.settings import Settings
from experiments.slider_composition.study import run

__all__ = ["Settings", "run"]
