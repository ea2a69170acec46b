"""Minimisers that are known: from decompositions, from scipy, from geometry worked by hand."""

import geoopt
import pytest
import scipy.linalg
import scipy.optimize
import torch
from torch import Tensor

from manifolds import Sphere
from manifolds.fixed_rank import FixedRank
from manifolds.solvers import Status, minimize
from manifolds.stiefel import Stiefel

METHODS = ["gradient", "conjugate-gradient", "lbfgs", "trust-region"]


def normal(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device)


def symmetric(*shape: int, seed: int = 0, device: torch.device | str = "cpu") -> Tensor:
    matrix = normal(*shape, seed=seed, device=device)
    return matrix + matrix.mT


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_rayleigh_quotients_end_at_the_least_eigenvalue(
    method: str, batch: tuple[int, ...], device: torch.device
) -> None:
    matrix = symmetric(*batch, 7, 7, seed=1, device=device)
    start = Sphere().projx(normal(*batch, 7, seed=2, device=device))
    found = minimize(lambda x: torch.einsum("...i,...ij,...j", x, matrix, x), start, Sphere(), method)
    values, vectors = torch.linalg.eigh(matrix)
    assert found.x.shape == start.shape
    assert found.value.shape == found.status.shape == found.steps.shape == found.evaluations.shape == batch
    assert bool(found.converged.all())
    torch.testing.assert_close(found.value, values[..., 0], atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(
        (found.x * vectors[..., 0]).sum(-1).abs(), torch.ones(batch).to(matrix), atol=1e-12, rtol=0
    )
    residual = (matrix @ found.x.unsqueeze(-1)).squeeze(-1) - values[..., :1] * found.x
    assert float(residual.abs().max()) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_the_brockett_cost_sorts_eigenvectors(method: str) -> None:
    matrix, weights = symmetric(2, 6, 6, seed=3), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    manifold = Stiefel()
    start = manifold.projx(normal(2, 6, 3, seed=4))
    found = minimize(lambda x: (x * (matrix @ x) * weights).sum((-1, -2)), start, manifold, method)
    values, vectors = torch.linalg.eigh(matrix)
    torch.testing.assert_close(found.value, (values[:, :3] * weights).sum(-1), atol=1e-11, rtol=1e-11)
    cosines = (found.x * vectors[..., :3]).sum(-2).abs()
    torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-10, rtol=0)
    assert bool(manifold.contains(found.x))


@pytest.mark.parametrize("method", METHODS)
def test_procrustes_is_the_polar_factor(method: str) -> None:
    a, b = normal(20, 5, seed=5), normal(20, 5, seed=6)
    best, _ = scipy.linalg.orthogonal_procrustes(a.numpy(), b.numpy())
    best = torch.from_numpy(best)
    manifold = Stiefel()
    # near enough to lie in the component of the group where the best one is
    start = manifold.projx(best + 0.2 * normal(5, 5, seed=7))
    found = minimize(lambda x: (a @ x - b).square().sum((-1, -2)), start, manifold, method)
    torch.testing.assert_close(found.x, best, atol=1e-8, rtol=0)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", [[5.0, 4.0, 1.0, 0.5], [3.0, 3.0, 1.0, 1.0]])
def test_the_nearest_matrix_of_a_rank_is_the_truncated_svd(method: str, spectrum: list[float]) -> None:
    """The second spectrum repeats its singular values: pymanopt's trust region raises there."""
    u, _ = torch.linalg.qr(normal(9, 4, seed=8))
    v, _ = torch.linalg.qr(normal(6, 4, seed=9))
    s = torch.tensor(spectrum, dtype=torch.float64)
    target = (u * s) @ v.mT
    manifold = FixedRank(9, 6)
    start = manifold.random(15, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def misfit(x: Tensor) -> Tensor:
        return (x[..., :9, :] @ x[..., 9:, :].mT - target).square().sum((-1, -2)) / 2

    found = minimize(misfit, start, manifold, method)
    best = (u[:, :2] * s[:2]) @ v[:, :2].mT
    assert found.status == Status.CONVERGED
    torch.testing.assert_close(found.x[:9] @ found.x[9:].mT, best, atol=1e-7, rtol=0)
    torch.testing.assert_close(found.value, s[2:].square().sum() / 2, atol=1e-12, rtol=1e-12)


def test_completion_of_a_low_rank_matrix_recovers_it() -> None:
    left, right = normal(40, 2, seed=10), normal(30, 2, seed=11)
    target = left @ right.mT
    seen = torch.rand(40, 30, generator=torch.Generator().manual_seed(12)) < 0.5
    manifold = FixedRank(40, 30)
    start = manifold.random(70, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def misfit(x: Tensor) -> Tensor:
        return ((x[:40] @ x[40:].mT - target) * seen).square().sum() / 2

    for method in ("conjugate-gradient", "lbfgs", "trust-region"):
        found = minimize(misfit, start, manifold, method, gradient_tolerance=1e-10)
        assert found.status == Status.CONVERGED, (method, found.describe())
        torch.testing.assert_close(found.x[:40] @ found.x[40:].mT, target, atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_the_karcher_mean_of_two_points_lies_halfway(method: str) -> None:
    sphere = Sphere()
    points = sphere.projx(normal(2, 5, seed=13) + 3)
    found = minimize(
        lambda x: sphere.dist2(points, x.unsqueeze(-2)).sum(-1), points[0].clone(), sphere, method
    )
    torch.testing.assert_close(found.x, sphere.projx(points.sum(0)), atol=1e-8, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_badly_conditioned_quadratic_in_flat_space(method: str) -> None:
    scales = torch.logspace(0, 3, 12, dtype=torch.float64)
    center = normal(12, seed=14)
    found = minimize(
        lambda x: (scales * (x - center) ** 2).sum(-1) + 7.0,
        torch.zeros(12, dtype=torch.float64),
        geoopt.Euclidean(ndim=1),
        method,
    )
    assert found.status in (Status.CONVERGED, Status.STALLED)
    torch.testing.assert_close(found.x, center, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [*METHODS])
def test_rosenbrock_as_scipy_finds_it(method: str) -> None:
    start = torch.tensor([[-1.2, 1.0], [2.0, -1.0], [0.0, 0.0]], dtype=torch.float64)

    def valley(x: Tensor) -> Tensor:
        return 100 * (x[..., 1] - x[..., 0] ** 2) ** 2 + (1 - x[..., 0]) ** 2

    found = minimize(valley, start, geoopt.Euclidean(ndim=1), method)
    best = scipy.optimize.minimize(scipy.optimize.rosen, start[0].numpy(), method="BFGS", tol=1e-10).x
    torch.testing.assert_close(found.x, torch.from_numpy(best).expand(3, 2), atol=1e-5, rtol=0)


def residuals(x: Tensor, times: Tensor, seen: Tensor) -> Tensor:
    """Errors of a x exp(−b t) + c fit."""
    a, b, c = x.unsqueeze(-1).unbind(-2)
    return a * torch.exp(-b * times) + c - seen


@pytest.mark.parametrize("method", ["gauss-newton", "levenberg-marquardt"])
def test_least_squares_as_scipy_finds_them(method: str) -> None:
    times = torch.linspace(0, 4, 25, dtype=torch.float64)
    truth = torch.tensor([[2.0, 1.3, 0.5], [1.0, 0.4, -0.3], [3.0, 2.0, 0.0]], dtype=torch.float64)
    seen = residuals(truth, times, torch.zeros(25).double()) + 0.05 * normal(3, 25, seed=15)
    start = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).expand(3, 3)
    found = minimize(lambda x: residuals(x, times, seen), start, geoopt.Euclidean(ndim=1), method)
    assert bool(found.converged.all())
    for item in range(3):
        best = scipy.optimize.least_squares(
            lambda p, item=item: residuals(torch.from_numpy(p), times, seen[item]).numpy(),
            start[item].numpy(), method="lm", xtol=1e-14, ftol=1e-14, gtol=1e-14,
        )  # fmt: skip
        torch.testing.assert_close(found.x[item], torch.from_numpy(best.x), atol=1e-7, rtol=1e-7)
        assert float(found.value[item]) == pytest.approx(best.cost, rel=1e-12)


@pytest.mark.parametrize("method", ["gauss-newton", "levenberg-marquardt"])
def test_residuals_on_a_sphere(method: str) -> None:
    """min ‖A x − A x*‖² over unit x has the minimiser x* and the value zero."""
    a = normal(2, 9, 5, seed=16)
    best = Sphere().projx(normal(2, 5, seed=17))
    goal = (a @ best.unsqueeze(-1)).squeeze(-1)
    start = Sphere().projx(best + 0.7 * normal(2, 5, seed=18))
    found = minimize(lambda x: (a @ x.unsqueeze(-1)).squeeze(-1) - goal, start, Sphere(), method)
    torch.testing.assert_close(found.x, best, atol=1e-8, rtol=0)
    assert float(found.value.max()) < 1e-15


@pytest.mark.parametrize("method", METHODS)
def test_the_same_minimum_as_pymanopt(method: str) -> None:
    pymanopt = pytest.importorskip("pymanopt")
    import autograd.numpy as np

    a = normal(10, 10, seed=19)
    manifold = pymanopt.manifolds.Stiefel(10, 3)

    @pymanopt.function.autograd(manifold)
    def cost(x):  # type: ignore[no-untyped-def]
        return -np.sum((a.numpy().T @ x) ** 4)

    start = Stiefel().projx(normal(10, 3, seed=20))
    peer = pymanopt.optimizers.TrustRegions(verbosity=0, min_gradient_norm=1e-9).run(
        pymanopt.Problem(manifold, cost), initial_point=start.numpy().copy()
    )
    near = Stiefel().projx(torch.from_numpy(peer.point) + 0.05 * normal(10, 3, seed=21))
    found = minimize(lambda x: -(a.mT @ x).pow(4).sum((-1, -2)), near, Stiefel(), method)
    assert float(found.value) == pytest.approx(peer.cost, rel=1e-9)


RULES = ["fletcher-reeves", "polak-ribiere", "polak-ribiere+", "hestenes-stiefel", "dai-yuan", "hager-zhang"]


@pytest.mark.parametrize("beta", [*RULES, "hybrid"])
@pytest.mark.parametrize("powell", [0.2, float("inf")])
def test_every_rule_of_conjugate_gradients(beta: str, powell: float) -> None:
    matrix = symmetric(3, 6, 6, seed=22)
    start = Sphere().projx(normal(3, 6, seed=23))
    found = minimize(
        lambda x: torch.einsum("...i,...ij,...j", x, matrix, x), start, Sphere(), "conjugate-gradient",
        beta=beta, powell=powell,
    )  # fmt: skip
    torch.testing.assert_close(found.value, torch.linalg.eigvalsh(matrix)[:, 0], atol=1e-11, rtol=0)
    assert bool(found.converged.all())


@pytest.mark.parametrize("beta", RULES)
def test_conjugate_gradients_solve_linear_systems_in_few_steps(beta: str) -> None:
    """With nearly exact searches every rule is the linear method, which ends after five steps or so."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64))
    found = minimize(
        lambda x: torch.einsum("...i,ij,...j", x, matrix, x) / 2 - x.sum(-1),
        torch.zeros(5).double(), geoopt.Euclidean(ndim=1), "conjugate-gradient",
        beta=beta, curvature=2e-4, decrease=1e-4, gradient_tolerance=1e-6,
    )  # fmt: skip
    assert int(found.steps) <= 8
    torch.testing.assert_close(found.x, 1 / matrix.diagonal(), atol=1e-5, rtol=0)


def test_the_trust_region_converges_quadratically() -> None:
    """Near the end ‖g‖ falls to about its square, in units of its first size: the order is at least 1.7."""
    matrix, norms = symmetric(12, 12, seed=24), []
    start = Sphere().projx(normal(12, seed=25))
    minimize(
        lambda x: torch.einsum("...i,ij,...j", x, matrix, x) + x.pow(4).sum(-1), start, Sphere(),
        gradient_tolerance=1e-13, callback=lambda state: norms.append(float(state.gradient_norm)),
    )  # fmt: skip
    tail = torch.tensor([norm for norm in norms if norm > 1e-13], dtype=torch.float64).log()[-3:]
    assert float((tail[2] - tail[1]) / (tail[1] - tail[0])) > 1.7
