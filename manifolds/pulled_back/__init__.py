"""The metric that a map pulls back, and what follows from it: singular directions, geodesics, curvature."""

from manifolds.pulled_back.collocation import Exponential, Logarithm
from manifolds.pulled_back.geodesic import Geodesic
from manifolds.pulled_back.output_metrics import Categorical, Custom, Euclidean, Gaussian, OutputMetric
from manifolds.pulled_back.pullback import Pullback
from manifolds.pulled_back.singular import SingularDirections

__all__ = [
    "Categorical",
    "Custom",
    "Euclidean",
    "Exponential",
    "Gaussian",
    "Geodesic",
    "Logarithm",
    "OutputMetric",
    "Pullback",
    "SingularDirections",
]
