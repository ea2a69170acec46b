"""geoopt's hyperbolic manifolds under our roof: the same classes, with distances worked by hand."""

import math

import geoopt
import pytest
import torch

from manifolds import hyperbolic
from manifolds.checks import check


def test_they_are_geoopts_own() -> None:
    for name in hyperbolic.__all__:
        assert getattr(hyperbolic, name) is getattr(geoopt, name)


def test_the_distance_from_the_centre_of_the_ball() -> None:
    ball = hyperbolic.PoincareBall().double()
    x, y = torch.zeros(2, dtype=torch.float64), torch.tensor([0.5, 0.0], dtype=torch.float64)
    assert float(ball.dist(x, y)) == pytest.approx(2 * math.atanh(0.5))


@pytest.mark.parametrize("manifold", [hyperbolic.PoincareBall(), hyperbolic.PoincareBallExact()])
def test_the_balls_fail_in_nothing_but_the_inner_product_of_a_batch(manifold: geoopt.Manifold) -> None:
    assert {each.property for each in check(manifold, size=(2, 3)).failures} == {
        "inner of a batch is that of each item"
    }
