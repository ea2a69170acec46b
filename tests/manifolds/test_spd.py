"""Positive definite matrices against scipy, pymanopt and numbers worked by hand."""

import numpy as np
import pymanopt
import pytest
import scipy.linalg
import torch

from manifolds.base import plain
from manifolds.checks import check
from manifolds.errors import ManifoldError
from manifolds.operations import unchecked
from manifolds.spd import SPD
from manifolds.spectral_functions import expm_symmetric, log1pm_symmetric, logm_spd

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(n: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
    x, y = (plain(SPD().random(n, n, dtype=F64, generator=generator(seed + k))) for k in (0, 1))
    u, v = (SPD().random_tangent(x, generator=generator(seed + k)) for k in (2, 3))
    return x, y, u, v


@pytest.mark.parametrize("n", [1, 2, 4])
def test_every_property_holds(n: int) -> None:
    result = check(SPD(), size=(2, n, n))
    assert result.passed, str(result)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_against_pymanopt(n: int) -> None:
    peer = pymanopt.manifolds.SymmetricPositiveDefinite(n)
    x, y, u, v = draw(n)
    g, h = (torch.randn(n, n, dtype=F64, generator=generator(seed)) for seed in (8, 9))
    a, b, c, d = (each.numpy() for each in (x, y, u, v))
    np.testing.assert_allclose(SPD().inner(x, u, v).item(), peer.inner_product(a, c, d), rtol=1e-10)
    np.testing.assert_allclose(SPD().dist(x, y).item(), peer.dist(a, b), rtol=1e-10)
    np.testing.assert_allclose(SPD().expmap(x, u).numpy(), peer.exp(a, c), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(SPD().logmap(x, y).numpy(), peer.log(a, b), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(SPD().retr(x, u).numpy(), peer.retraction(a, c), rtol=1e-9, atol=1e-10)
    gradient = peer.euclidean_to_riemannian_gradient(a, g.numpy())
    np.testing.assert_allclose(SPD().egrad2rgrad(x, g).numpy(), gradient, rtol=1e-10, atol=1e-10)
    hessian = peer.euclidean_to_riemannian_hessian(a, g.numpy(), h.numpy(), c)
    np.testing.assert_allclose(SPD().ehess2rhess(x, g, h, u).numpy(), hessian, rtol=1e-9, atol=1e-10)


def test_parallel_transport_against_scipy() -> None:
    x, y, _, v = draw(4)
    e = scipy.linalg.sqrtm(y.numpy() @ np.linalg.inv(x.numpy())).real
    np.testing.assert_allclose(SPD().transp(x, y, v).numpy(), e @ v.numpy() @ e.T, atol=1e-10)


def test_distances_do_not_change_under_congruence() -> None:
    x, y, _, _ = draw(4)
    a = torch.randn(4, 4, dtype=F64, generator=generator(5))
    assert float(SPD().dist(a @ x @ a.mT, a @ y @ a.mT)) == pytest.approx(float(SPD().dist(x, y)), rel=1e-9)


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [2.0, 2.0, 5.0], [1.0, 1.03, 1.06], [0.5, 1.0, 4.0]])
def test_two_derivatives_hold_where_eigenvalues_meet(values: list[float]) -> None:
    q = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=generator(0)))[0]
    matrix = q @ torch.diag(torch.tensor(values, dtype=F64)) @ q.mT
    v, w = (torch.randn(3, 3, dtype=F64, generator=generator(seed)) for seed in (1, 2))
    for function in (expm_symmetric, log1pm_symmetric, logm_spd):
        gradient = torch.func.grad(lambda a, f=function: (f(a) * w).sum() + (f(a) ** 2).sum())
        h = 1e-5
        difference = (gradient(matrix + h * v) - gradient(matrix - h * v)) / (2 * h)
        forward = torch.func.jvp(gradient, (matrix,), (v,))[1]
        scale = float(difference.abs().max())
        assert float((forward - difference).abs().max()) < 1e-7 * scale
    np.testing.assert_allclose(logm_spd(matrix).numpy(), scipy.linalg.logm(matrix.numpy()).real, atol=1e-12)
    np.testing.assert_allclose(
        expm_symmetric(matrix).numpy(), scipy.linalg.expm(matrix.numpy()), rtol=1e-11, atol=1e-13
    )


def test_a_third_derivative_says_that_there_is_none() -> None:
    with pytest.raises(ManifoldError, match="two derivatives"):
        torch.func.jacrev(torch.func.hessian(lambda a: logm_spd(a).sum()))(2 * torch.eye(2, dtype=F64))


def test_the_mean_of_commuting_matrices_is_their_geometric_mean() -> None:
    values = torch.tensor([[1.0, 4.0], [9.0, 4.0], [3.0, 0.5]], dtype=F64)
    points, x = torch.diag_embed(values), torch.eye(2, dtype=F64)
    for _ in range(3):
        x = SPD().expmap(x, SPD().logmap(x, points).mean(0))
    torch.testing.assert_close(x, torch.diag(values.log().mean(0).exp()))


def test_projection_raises_low_eigenvalues_and_differentiates() -> None:
    matrix = torch.diag(torch.tensor([2.0, -1.0, 0.0], dtype=F64)).requires_grad_()
    found = SPD().projx(matrix)
    assert bool(SPD().contains(found.detach()))
    torch.testing.assert_close(
        found, torch.diag(torch.tensor([2.0, 0.0, 0.0], dtype=F64)), atol=1e-12, rtol=0
    )
    torch.testing.assert_close(SPD().projx(found), found, atol=1e-13, rtol=0)
    (gradient,) = torch.autograd.grad(found[0, 0], matrix)
    assert float(gradient[0, 0]) == pytest.approx(1.0)
    assert bool(gradient.isfinite().all())


def test_bad_input_is_named_and_unchecked_items_give_nan() -> None:
    indefinite = torch.diag(torch.tensor([1.0, -1.0], dtype=F64))
    assert "smallest eigenvalue > 0" in SPD().contains(indefinite).reason
    assert "x = xᵀ" in SPD().contains(torch.tensor([[1.0, 0.5], [0.0, 1.0]])).reason
    with pytest.raises(ManifoldError, match="last two dimensions must be equal"):
        SPD().projx(torch.ones(3, 2))
    both = torch.stack([indefinite, torch.eye(2, dtype=F64)])
    with unchecked():
        found = SPD().dist(both, torch.eye(2, dtype=F64))
    assert found.isnan().tolist() == [True, False]
