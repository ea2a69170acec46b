"""Geometry: sets with tangent spaces, tensors in and tensors out.

This floor knows no model. It imports torch and numerical libraries only, so that everything here can be
checked against closed forms. Floors above it may import it; it imports none of them.
"""

from manifolds import curvature, optim
from manifolds.base import Containment, Manifold, RiemannianSubmanifold
from manifolds.checks import Check, check
from manifolds.cloud.learned import LearnedManifold, Projection
from manifolds.cloud.path_cloud import PathCloud
from manifolds.cloud.point_cloud import PointCloud
from manifolds.cloud.sampled_metric import SampledMetric
from manifolds.entries import Entries
from manifolds.errors import ManifoldError, MissingOperationError
from manifolds.euclidean import Euclidean
from manifolds.fixed_rank import FixedRank
from manifolds.grassmann import Grassmann
from manifolds.hyperbolic import (
    Lorentz,
    PoincareBall,
    PoincareBallExact,
    Stereographic,
    StereographicExact,
    StereographicProductManifold,
)
from manifolds.low_rank import LowRank
from manifolds.oblique import Oblique
from manifolds.operations import unchecked
from manifolds.orthogonal import SpecialOrthogonal
from manifolds.product import Product
from manifolds.pulled_back import Pullback
from manifolds.solvers import NullSpace, Solution, State, Status, TrustBall, minimize
from manifolds.spd import SPD
from manifolds.sphere import Sphere
from manifolds.stiefel import Stiefel

__all__ = [
    "SPD",
    "Check",
    "Containment",
    "Entries",
    "Euclidean",
    "FixedRank",
    "Grassmann",
    "LearnedManifold",
    "Lorentz",
    "LowRank",
    "Manifold",
    "ManifoldError",
    "MissingOperationError",
    "NullSpace",
    "Oblique",
    "PathCloud",
    "PoincareBall",
    "PoincareBallExact",
    "PointCloud",
    "Product",
    "Projection",
    "Pullback",
    "RiemannianSubmanifold",
    "SampledMetric",
    "Solution",
    "SpecialOrthogonal",
    "Sphere",
    "State",
    "Status",
    "Stereographic",
    "StereographicExact",
    "StereographicProductManifold",
    "Stiefel",
    "TrustBall",
    "check",
    "curvature",
    "minimize",
    "optim",
    "unchecked",
]
