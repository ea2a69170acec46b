"""How a manifold known from samples bends, in how many dimensions; and how straight a map is."""

from manifolds.curvature.dimension import Dimension, intrinsic_dimension
from manifolds.curvature.directional import FunctionalCurvature, functional
from manifolds.curvature.second_form import SecondFundamentalForm, second_fundamental_form
from manifolds.curvature.sequence import SequenceCurvature, sequence_curvature

__all__ = [
    "Dimension",
    "FunctionalCurvature",
    "SecondFundamentalForm",
    "SequenceCurvature",
    "functional",
    "intrinsic_dimension",
    "second_fundamental_form",
    "sequence_curvature",
]
