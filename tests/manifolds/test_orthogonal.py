"""Rotations against scipy, pymanopt and angles known by construction."""

import math

import numpy as np
import pymanopt
import pytest
import scipy.linalg
import torch

from manifolds.base import plain
from manifolds.checks import check
from manifolds.errors import ManifoldError
from manifolds.orthogonal import SpecialOrthogonal

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotation_by(angles: list[float], seed: int = 0) -> torch.Tensor:
    """Q diag(planes turned by the angles) Qᵀ with a random Q: its logarithm is known."""
    n = 2 * len(angles)
    block = np.zeros((n, n))
    for i, angle in enumerate(angles):
        block[2 * i, 2 * i + 1], block[2 * i + 1, 2 * i] = -angle, angle
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((n, n)))[0]
    return torch.tensor(q @ block @ q.T)


@pytest.mark.parametrize(
    ("retraction", "n"), [("cayley", 5), ("polar", 4), ("qr", 3), ("cayley", 2), ("polar", 1)]
)
def test_every_property_holds(retraction: str, n: int) -> None:
    result = check(SpecialOrthogonal(retraction), size=(2, n, n))
    assert result.passed, str(result)


@pytest.mark.parametrize(
    "angles", [[0.3, 0.3], [1.0, 2.0, 3.0], [3.1, 3.1], [math.pi - 1e-4, 0.1], [0.5, 0.0]]
)
def test_the_logarithm_of_known_angles(angles: list[float]) -> None:
    omega = rotation_by(angles)
    rotation = torch.tensor(scipy.linalg.expm(omega.numpy()))
    x = plain(SpecialOrthogonal().random(*omega.shape, dtype=F64, generator=generator(1)))
    torch.testing.assert_close(SpecialOrthogonal().logmap(x, x @ rotation), x @ omega, rtol=0, atol=2e-10)
    expected = math.sqrt(2 * sum(angle**2 for angle in angles))
    assert float(SpecialOrthogonal().dist(x, x @ rotation)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("size", [1e-12, 1e-8, 1e-3])
def test_the_logarithm_of_a_tiny_rotation_has_all_its_digits(size: float) -> None:
    omega = size * rotation_by([1.0, 0.5])
    y = torch.eye(4, dtype=F64) + omega + omega @ omega / 2 + omega @ omega @ omega / 6
    found = SpecialOrthogonal().logmap(torch.eye(4, dtype=F64), y)
    assert float((found - omega).norm() / omega.norm()) < max(1e-13, 0.1 * size**3, 1e-16 / size * 10)


def test_half_a_turn_is_nan_and_leaves_the_others_alone() -> None:
    x = torch.eye(3, dtype=F64).expand(2, 3, 3).contiguous()
    y = x.clone()
    y[0] = torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=F64))
    y[1] = torch.tensor(scipy.linalg.expm(np.array([[0, -1, 0], [1, 0, 0], [0, 0, 0]], dtype=float)))
    distance = SpecialOrthogonal().dist(x, y)
    assert distance[0].isnan()
    assert float(distance[1]) == pytest.approx(math.sqrt(2))


def test_the_second_derivative_holds_at_repeated_angles() -> None:
    manifold = SpecialOrthogonal()
    x = torch.eye(4, dtype=F64)
    y = torch.tensor(scipy.linalg.expm(rotation_by([0.7, 0.7]).numpy()))
    u = manifold.proju(x, torch.randn(4, 4, dtype=F64, generator=generator(2)))
    gradient = torch.func.grad(lambda p: manifold.dist2(p, y))
    along = torch.func.jvp(gradient, (x,), (u,))[1]
    h = 1e-5
    difference = (gradient(x + h * u) - gradient(x - h * u)) / (2 * h)
    torch.testing.assert_close(along, difference, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_exponential_and_parallel_transport_against_scipy(n: int) -> None:
    manifold = SpecialOrthogonal()
    x = plain(manifold.random(n, n, dtype=F64, generator=generator(3)))
    u, v = (manifold.random_tangent(x, generator=generator(seed)) for seed in (4, 5))
    omega, w = (x.mT @ u).numpy(), (x.mT @ v).numpy()
    y = x.numpy() @ scipy.linalg.expm(omega)
    np.testing.assert_allclose(manifold.expmap(x, u).numpy(), y, atol=1e-13)
    half = scipy.linalg.expm(omega / 2)
    carried = y @ half.T @ w @ half
    np.testing.assert_allclose(manifold.transp_follow_expmap(x, u, v).numpy(), carried, atol=1e-12)
    short = 0.3 * u / u.norm()
    half = scipy.linalg.expm((x.mT @ short).numpy() / 2)
    np.testing.assert_allclose(
        manifold.transp(x, manifold.expmap(x, short), v).numpy(), x.numpy() @ half @ w @ half, atol=1e-12
    )


@pytest.mark.parametrize("n", [2, 4])
def test_gradient_hessian_and_retractions_against_pymanopt(n: int) -> None:
    peer = pymanopt.manifolds.SpecialOrthogonalGroup(n, k=1)
    manifold = SpecialOrthogonal()
    x = plain(manifold.random(n, n, dtype=F64, generator=generator(6)))
    u = manifold.random_tangent(x, generator=generator(7))
    g, h = (torch.randn(n, n, dtype=F64, generator=generator(seed)) for seed in (8, 9))
    omega = (x.mT @ u).numpy()
    gradient = peer.euclidean_to_riemannian_gradient(x.numpy(), g.numpy())
    np.testing.assert_allclose(x.numpy() @ gradient, manifold.egrad2rgrad(x, g).numpy(), atol=1e-13)
    hessian = peer.euclidean_to_riemannian_hessian(x.numpy(), g.numpy(), h.numpy(), omega)
    np.testing.assert_allclose(x.numpy() @ hessian, manifold.ehess2rhess(x, g, h, u).numpy(), atol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 4])
def test_projection_is_the_nearest_rotation_and_random_points_are_rotations(n: int) -> None:
    manifold = SpecialOrthogonal()
    a = torch.randn(20, n, n, dtype=F64, generator=generator(10))
    nearest = manifold.projx(a)
    assert bool(manifold.contains(nearest))
    others = plain(manifold.random(500, n, n, dtype=F64, generator=generator(11)))
    assert bool(manifold.contains(others))
    distances = (a[:, None] - others[None]).norm(dim=(-2, -1)).amin(1)
    assert bool(((a - nearest).norm(dim=(-2, -1)) <= distances + 1e-12).all())


def test_random_points_are_even() -> None:
    x = plain(SpecialOrthogonal().random(4000, 3, 3, dtype=F64, generator=generator(12)))
    assert float(x.mean(0).abs().max()) < 0.05
    assert float((x**2).mean(0).sub(1 / 3).abs().max()) < 0.03


def test_bad_input_is_named() -> None:
    with pytest.raises(ManifoldError, match="retraction is 'exp'"):
        SpecialOrthogonal("exp")
    reflection = torch.diag(torch.tensor([1.0, -1.0]))
    assert "det x = 1" in SpecialOrthogonal().contains(reflection).reason
    with pytest.raises(ManifoldError, match="last two dimensions must be equal"):
        SpecialOrthogonal().projx(torch.ones(3, 2))
