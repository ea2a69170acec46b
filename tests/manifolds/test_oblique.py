"""Matrices with unit columns against pymanopt and the sphere."""

import numpy as np
import pymanopt
import pytest
import torch

from manifolds.base import plain
from manifolds.checks import check
from manifolds.oblique import Oblique

F64 = torch.float64


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 3), (5, 1), (2, 4)])
def test_every_property_holds(shape: tuple[int, ...]) -> None:
    result = check(Oblique(), size=shape)
    assert result.passed, str(result)


@pytest.mark.parametrize(("n", "p"), [(4, 3), (3, 3), (5, 1)])
def test_against_pymanopt(n: int, p: int) -> None:
    peer = pymanopt.manifolds.Oblique(n, p)
    seeded = torch.Generator().manual_seed(0)
    x, y = (plain(Oblique().random(n, p, dtype=F64, generator=seeded)) for _ in range(2))
    u, v = (Oblique().random_tangent(x, generator=seeded) for _ in range(2))
    g, h = (torch.randn(n, p, dtype=F64, generator=seeded) for _ in range(2))
    a, b, c, d = (each.numpy() for each in (x, y, u, v))
    np.testing.assert_allclose(Oblique().inner(x, u, v).item(), peer.inner_product(a, c, d))
    np.testing.assert_allclose(Oblique().dist(x, y).item(), peer.dist(a, b), rtol=1e-8)
    np.testing.assert_allclose(Oblique().expmap(x, u).numpy(), peer.exp(a, c), atol=1e-12)
    np.testing.assert_allclose(Oblique().logmap(x, y).numpy(), peer.log(a, b), atol=1e-7)
    np.testing.assert_allclose(Oblique().retr(x, u).numpy(), peer.retraction(a, c), atol=1e-12)
    hessian = peer.euclidean_to_riemannian_hessian(a, g.numpy(), h.numpy(), c)
    np.testing.assert_allclose(Oblique().ehess2rhess(x, g, h, u).numpy(), hessian, atol=1e-12)


def test_the_distance_adds_squared_angles() -> None:
    x = torch.eye(3, 2, dtype=F64)
    y = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    assert float(Oblique().dist(x, y)) == pytest.approx(np.sqrt(2) * np.pi / 2)
    assert Oblique().dist(x, y, keepdim=True).shape == (1, 1)
    assert Oblique().dimension((7, 4, 3)) == 9
