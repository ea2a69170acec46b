"""Grassmann against pymanopt and dense n×n formulas with scipy.

Where pymanopt differs: its distance takes arccos of cosines, which loses angles below 1e-8, so that scipy's
`subspace_angles` is the oracle there; its transport is the projection, which depends on the basis, ours is
parallel transport. Its `log` agrees with ours below right angles.

scipy's `subspace_angles` takes arcsin or arccos by a mask that is in the opposite order of its angles: with
angles on both sides of π/4 it is right to 1e-7 only. There the angles that were put in are the oracle.
"""

import numpy as np
import pymanopt
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm, logm, subspace_angles

from manifolds.grassmann import Grassmann

SHAPES = [(1, 1), (4, 1), (3, 3), (8, 3), (5, 4)]
shapes = pytest.mark.parametrize("shape", SHAPES)
m = Grassmann()


def draw(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size)


def frame(*size: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(draw(*size, seed=seed))[0]


def tangent(x: np.ndarray, angle: float = 1.0, seed: int = 1) -> np.ndarray:
    """A horizontal vector with the given largest angle; zero where n = p."""
    a = draw(*x.shape, seed=seed)
    u = a - x @ (np.swapaxes(x, -1, -2) @ a)
    if x.shape[-2] == x.shape[-1]:
        return 0 * u
    return angle * u / np.linalg.norm(u, 2, axis=(-2, -1), keepdims=True)


def ours(name: str, *arrays: np.ndarray, dtype: torch.dtype = torch.float64) -> np.ndarray:
    found = getattr(m, name)(*(torch.tensor(each, dtype=dtype) for each in arrays))
    return found.double().numpy()


def close(found: np.ndarray, expected: np.ndarray, limit: float = 1e-14) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit * max(1.0, np.abs(expected).max()))


def projector(x: np.ndarray) -> np.ndarray:
    return x @ np.swapaxes(x, -1, -2)


def subspaces(angles: list[float], n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bases, in no particular position, of two subspaces with the given angles."""
    p = len(angles)
    whole = frame(n, n, seed=seed)
    x = whole[:, :p]
    y = x * np.cos(angles) + whole[:, p : 2 * p] * np.sin(angles)
    return x @ frame(p, p, seed=seed + 1), y @ frame(p, p, seed=seed + 2)


def rotation(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """exp(U Xᵀ − X Uᵀ): takes X along the geodesic and vectors by parallel transport."""
    return expm(u @ x.T - x @ u.T)


@pytest.mark.parametrize(("shape", "count"), [*((shape, 1) for shape in SHAPES), ((7, 3), 4)])
def test_pymanopt(shape: tuple[int, int], count: int) -> None:
    theirs = pymanopt.manifolds.Grassmann(*shape, k=count)
    size = shape if count == 1 else (count, *shape)
    x = frame(*size)
    u, v, a, h = tangent(x, 1.3), tangent(x, seed=2), draw(*size, seed=3), draw(*size, seed=4)
    assert m.dimension(size) * count == theirs.dim
    close(ours("inner", x, u, v).sum(), theirs.inner_product(x, u, v))
    close(ours("proju", x, a), theirs.projection(x, a))
    close(ours("egrad2rgrad", x, a), theirs.euclidean_to_riemannian_gradient(x, a))
    close(ours("ehess2rhess", x, a, h, u), theirs.euclidean_to_riemannian_hessian(x, a, h, u))
    close(ours("retr_polar", x, u), theirs.retraction(x, u))
    close(projector(ours("retr_qr", x, u)), projector(theirs.retraction(x, u)))
    y = theirs.exp(x, u)
    close(projector(ours("expmap", x, u)), projector(y), 1e-13)
    close(ours("logmap", x, y), theirs.log(x, y), 1e-13)
    distance = np.sqrt(np.sum(ours("dist", x, y) ** 2))
    # arccos near 1 knows an angle to the root of ε.
    close(distance, theirs.dist(x, y), 1e-7)


@shapes
def test_pymanopt_in_single_precision(shape: tuple[int, int]) -> None:
    theirs = pymanopt.manifolds.Grassmann(*shape)
    x = frame(*shape)
    u, v, a, h = tangent(x, 1.3), tangent(x, seed=2), draw(*shape, seed=3), draw(*shape, seed=4)
    single = {"dtype": torch.float32}
    y = theirs.exp(x, u)
    close(projector(ours("expmap", x, u, **single)), projector(y), 2e-6)
    close(ours("logmap", x, y, **single), u, 5e-6)
    close(ours("retr_polar", x, u, **single), theirs.retraction(x, u), 2e-6)
    expected = theirs.euclidean_to_riemannian_hessian(x, a, h, u)
    close(ours("ehess2rhess", x, a, h, u, **single), expected, 5e-6)
    close(ours("transp_follow_expmap", x, u, v, **single), rotation(x, u) @ v, 5e-6)
    close(ours("dist", x, y, **single), np.linalg.norm(subspace_angles(x, y)), 5e-6)


@pytest.mark.parametrize(
    "angles",
    [
        [0.3], [0.2, 0.9, 1.4], [1e-10], [1e-10, 1e-10, 1e-10], [1e-10, 1e-5, 1.0], [1e-10, 1.5707963],
        [np.pi / 2 - 1e-10], [np.pi / 2 - 1e-10, np.pi / 2 - 1e-6, 0.4], [np.pi / 2, np.pi / 2], [0.7, 0.7],
    ],
)  # fmt: skip
def test_scipy_subspace_angles(angles: list[float]) -> None:
    x, y = subspaces(angles, 2 * len(angles) + 2)
    theirs, chosen = subspace_angles(x, y), np.sort(angles)[::-1]
    mixed = min(angles) < np.pi / 4 < max(angles)
    np.testing.assert_allclose(theirs, chosen, rtol=0, atol=1e-7 if mixed else 2e-15)
    theirs = chosen if mixed else theirs
    expected = np.linalg.norm(theirs)
    # Points are rounded to 1e-16: angles are known to that, absolutely.
    np.testing.assert_allclose(ours("dist", x, y), expected, rtol=1e-14, atol=2e-15)
    np.testing.assert_allclose(ours("dist2", x, y), expected**2, rtol=2e-14, atol=4e-15 * expected)
    log = ours("logmap", x, y)
    np.testing.assert_allclose(np.linalg.svd(log, compute_uv=False), theirs, rtol=0, atol=4e-15)
    assert np.abs(x.T @ log).max() < 1e-15 * max(1.0, expected) * 4


@shapes
def test_scipy_subspace_angles_of_random_subspaces_in_a_batch(shape: tuple[int, int]) -> None:
    x, y = frame(2, 3, *shape), frame(2, 3, *shape, seed=9)
    found = ours("dist", x, y)
    for i in np.ndindex(2, 3):
        assert abs(found[i] - np.linalg.norm(subspace_angles(x[i], y[i]))) < 1e-13


@pytest.mark.parametrize("apart", [1e-14, 1e-10, 1e-6])
def test_angles_in_coordinates_keep_their_digits(apart: float) -> None:
    """Where entries are exact, scipy and we know the angle relative to itself."""
    x = np.eye(6, 2)
    y = np.concatenate([np.diag(np.cos([apart, 2 * apart])), np.diag(np.sin([apart, 2 * apart])), x[2:4]])
    theirs = np.linalg.norm(subspace_angles(x, y))
    np.testing.assert_allclose(ours("dist", x, y), theirs, rtol=1e-14, atol=0)


@shapes
def test_geodesic_logarithm_and_transport_by_dense_exponentials(shape: tuple[int, int]) -> None:
    x = frame(*shape)
    v = tangent(x, seed=2)
    for angle in (1e-8, 0.5, 1.5, 6.0):
        u = tangent(x, angle)
        turn = rotation(x, u)
        y = turn @ x
        close(ours("expmap", x, u), y, 1e-13)
        close(ours("transp_follow_expmap", x, u, v), turn @ v, 1e-13)
        if angle < np.pi / 2:
            basis = frame(shape[1], shape[1], seed=6)
            close(ours("transp", x, y @ basis, v), turn @ v @ basis, 1e-13)
            close(ours("logmap", x, y @ basis), u, 1e-13)


@pytest.mark.parametrize("shape", [(4, 1), (8, 3), (5, 4)])
def test_logarithm_by_reflections(shape: tuple[int, int]) -> None:
    """½ log((I − 2 Q)(I − 2 P)) X, with projectors alone (Bendokat, Zimmermann and Absil 2024, 5.2)."""
    x = frame(*shape)
    y = rotation(x, tangent(x, 1.2, seed=8)) @ x @ frame(shape[1], shape[1], seed=3)
    eye = np.eye(shape[0])
    half = logm((eye - 2 * projector(y)) @ (eye - 2 * projector(x))).real / 2
    close(ours("logmap", x, y), half @ x, 1e-12)


@pytest.mark.parametrize("shape", [(4, 1), (8, 3), (5, 4)])
def test_geodesics_and_parallel_transport_integrate_their_equations(shape: tuple[int, int]) -> None:
    """Ẍ = −X ẊᵀẊ and V̇ = −X ẊᵀV: what changes is vertical."""
    x = frame(*shape)
    u, v = tangent(x, 1.4), tangent(x, seed=2)

    def field(_: float, state: np.ndarray) -> np.ndarray:
        point, velocity, carried = state.reshape(3, *shape)
        return np.stack([velocity, -point @ velocity.T @ velocity, -point @ velocity.T @ carried]).ravel()

    start = np.stack([x, u, v]).ravel()
    solved = solve_ivp(field, (0, 1), start, method="DOP853", rtol=1e-12, atol=1e-13)
    point, _, carried = solved.y[:, -1].reshape(3, *shape)
    close(ours("expmap", x, u), point, 1e-10)
    close(ours("transp_follow_expmap", x, u, v), carried, 1e-10)


@pytest.mark.parametrize("shape", [(4, 1), (6, 2), (5, 4)])
def test_gradient_and_hessian_by_differences_along_dense_geodesics(shape: tuple[int, int]) -> None:
    """f = tr(S P) + Σ W ∘ sin P of the projector P, by differences of sixth order of f(γ(t))."""
    x = frame(*shape)
    s, w = (each + each.T for each in (draw(shape[0], shape[0], seed=7), draw(shape[0], shape[0], seed=8)))

    def f(y: np.ndarray) -> float:
        return float(np.sum(s * projector(y)) + np.sum(w * np.sin(projector(y))))

    slope = s + w * np.cos(projector(x))
    g = 2 * slope @ x
    first = np.array([-1, 9, -45, 0, 45, -9, 1]) / 60
    second = np.array([2, -27, 270, -490, 270, -27, 2]) / 180
    step = 0.02

    def along(u: np.ndarray) -> tuple[float, float]:
        values = np.array([f(rotation(x, step * k * u) @ x) for k in range(-3, 4)])
        return first @ values / step, second @ values / step**2

    vectors = [tangent(x, 0.5, seed=20 + k) for k in range(3)]
    gradient = ours("egrad2rgrad", x, g)
    for u in vectors:
        change = u @ x.T + x @ u.T
        h = 2 * slope @ u - 2 * (w * np.sin(projector(x)) * change) @ x
        hessian = ours("ehess2rhess", x, g, h, u)
        close(ours("inner", x, gradient, u), along(u)[0], 1e-8)
        for v in vectors:
            mixed = (along(u + v)[1] - along(u - v)[1]) / 4
            close(ours("inner", x, hessian, v), mixed, 1e-7)
