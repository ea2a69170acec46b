"""Algebra of changes: composed, crossed, averaged, undone; what they do to each other, and in which order."""

from geoedit.algebra.commutation import Commutator, EditCommutator, commutator
from geoedit.algebra.composition import average, compose, difference, inverse
from geoedit.algebra.crossing import cross
from geoedit.algebra.interference import Interference, interference, overlap

__all__ = [
    "Commutator",
    "EditCommutator",
    "Interference",
    "average",
    "commutator",
    "compose",
    "cross",
    "difference",
    "interference",
    "inverse",
    "overlap",
]
