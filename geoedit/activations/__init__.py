"""States of a model: gathered, summed up, and put back."""

from geoedit.activations.collect import collect
from geoedit.activations.patching import run_with
from geoedit.activations.statistics import Moments, Statistics, statistics
from geoedit.activations.store import Activations

__all__ = ["Activations", "Moments", "Statistics", "collect", "run_with", "statistics"]
