"""How a manifold known from samples bends, in how many dimensions; and how straight a map is."""

from manifolds.curvature.dimension import Dimension, intrinsic_dimension
from manifolds.curvature.directional import FunctionalCurvature, functional
from manifolds.curvature.second_form import SecondFundamentalForm, second_fundamental_form

__all__ = [
    "Dimension",
    "FunctionalCurvature",
    "SecondFundamentalForm",
    "functional",
    "intrinsic_dimension",
    "second_fundamental_form",
]
