"""The sphere against angles worked by hand and pymanopt."""

import math

import geoopt
import numpy as np
import pymanopt
import pytest
import torch

from manifolds.base import plain
from manifolds.errors import ManifoldError
from manifolds.sphere import Sphere

F64 = torch.float64


@pytest.mark.parametrize("angle", [1e-12, 1e-5, 0.5, math.pi / 2, 3.0, math.pi - 1e-6])
def test_angles_are_read_to_full_precision(angle: float) -> None:
    x = torch.tensor([1.0, 0.0, 0.0], dtype=F64)
    y = torch.tensor([math.cos(angle), math.sin(angle), 0.0], dtype=F64)
    assert float(Sphere().dist(x, y)) == pytest.approx(angle, rel=1e-14)
    log = Sphere().logmap(x, y)
    assert float(log[1]) == pytest.approx(angle, rel=1e-9)
    torch.testing.assert_close(Sphere().expmap(x, log), y, rtol=0, atol=1e-15)


def test_a_distance_that_geoopt_misreads_in_float32() -> None:
    x = torch.tensor([1.0, 0.0])
    y = torch.tensor([1.0, 1.8e-5])
    assert float(Sphere().dist(x, y)) == pytest.approx(1.8e-5, rel=1e-5)
    assert float(geoopt.Sphere().dist(x, y)) > 1e-2


def test_opposite_points_have_a_distance_and_no_direction() -> None:
    x = torch.tensor([1.0, 0.0], dtype=F64)
    assert float(Sphere().dist(x, -x)) == pytest.approx(math.pi)
    assert bool(Sphere().logmap(x, -x).isnan().all())


@pytest.mark.parametrize("n", [2, 5])
def test_against_pymanopt(n: int) -> None:
    peer = pymanopt.manifolds.Sphere(n)
    seeded = torch.Generator().manual_seed(n)
    x, y = (plain(Sphere().random(n, dtype=F64, generator=seeded)) for _ in range(2))
    u = Sphere().random_tangent(x, generator=seeded)
    g, h = (torch.randn(n, dtype=F64, generator=seeded) for _ in range(2))
    a, b, c = x.numpy(), y.numpy(), u.numpy()
    np.testing.assert_allclose(Sphere().logmap(x, y).numpy(), peer.log(a, b), atol=1e-10)
    np.testing.assert_allclose(Sphere().expmap(x, u).numpy(), peer.exp(a, c), atol=1e-13)
    hessian = peer.euclidean_to_riemannian_hessian(a, g.numpy(), h.numpy(), c)
    np.testing.assert_allclose(Sphere().ehess2rhess(x, g, h, u).numpy(), hessian, atol=1e-13)


def test_bad_input_is_named() -> None:
    with pytest.raises(ManifoldError, match="ndim is 0"):
        Sphere(ndim=0)
    assert bool(Sphere().projx(torch.zeros(3)).isnan().all())


def test_second_fundamental_form_and_weingarten_by_hand() -> None:
    x, u, v = (torch.tensor(each) for each in ([1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 1.0, 3.0]))
    m = Sphere()
    torch.testing.assert_close(m.second_fundamental_form(x, u, u), -4 * x)
    torch.testing.assert_close(m.second_fundamental_form(x, u, v), -2 * x)
    torch.testing.assert_close(m.weingarten(x, u, 3 * x), -3 * u)
