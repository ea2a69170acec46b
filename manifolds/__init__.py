"""Geometry: sets with tangent spaces, tensors in and tensors out.

This floor knows no model. It imports torch and numerical libraries only, so that everything here can be
checked against closed forms. Floors above it may import it; it imports none of them.
"""

from manifolds.base import Containment, Manifold, RiemannianSubmanifold
from manifolds.errors import ManifoldError
from manifolds.operations import unchecked
from manifolds.sphere import Sphere

__all__ = [
    "Containment",
    "Manifold",
    "ManifoldError",
    "RiemannianSubmanifold",
    "Sphere",
    "unchecked",
]
