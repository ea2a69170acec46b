"""Algebra of changes: composed, crossed, averaged, undone, and whether their order matters."""

from geoedit.algebra.commutation import Commutator, EditCommutator, commutator
from geoedit.algebra.composition import average, compose, difference, inverse
from geoedit.algebra.crossing import cross

__all__ = [
    "Commutator",
    "EditCommutator",
    "average",
    "commutator",
    "compose",
    "cross",
    "difference",
    "inverse",
]
