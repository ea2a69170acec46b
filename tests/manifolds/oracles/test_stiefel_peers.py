"""Stiefel against pymanopt, geoopt's `EuclideanStiefel` and dense n×n formulas with scipy.

Where the peers differ from the definitions, and from us: pymanopt has the Euclidean metric alone, and no
logarithm or distance; its transport is the projection, as is our `transp`. geoopt's canonical `Stiefel`
transports and retracts with Ŝ = U Xᵀ − X Uᵀ, which moves x along U + X XᵀU rather than U: it agrees with the
Cayley transform only for horizontal U, or if given U − ½ X XᵀU.
"""

import geoopt
import numpy as np
import pymanopt
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm, logm, null_space
from scipy.optimize import root

from manifolds.stiefel import Stiefel

SHAPES = [(1, 1), (4, 1), (3, 3), (8, 3), (5, 4)]
METRICS = ["euclidean", "canonical"]
shapes = pytest.mark.parametrize("shape", SHAPES)
metrics = pytest.mark.parametrize("metric", METRICS)


def draw(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=size)


def frame(*size: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(draw(*size, seed=seed))[0]


def tangent(x: np.ndarray, length: float = 1.0, seed: int = 1) -> np.ndarray:
    a = draw(*x.shape, seed=seed)
    inner = np.swapaxes(x, -1, -2) @ a
    u = a - x @ (inner + np.swapaxes(inner, -1, -2)) / 2
    size = np.linalg.norm(u, axis=(-2, -1), keepdims=True)
    return length * u / np.where(size > 1e-8, size, 1.0)


def ours(name: str, manifold: Stiefel, *arrays: np.ndarray, dtype: torch.dtype = torch.float64) -> np.ndarray:
    found = getattr(manifold, name)(*(torch.tensor(each, dtype=dtype) for each in arrays))
    return found.double().numpy()


def close(found: np.ndarray, expected: np.ndarray, limit: float = 1e-14) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=limit * max(1.0, np.abs(expected).max()))


def completed(x: np.ndarray) -> np.ndarray:
    """The orthogonal matrix [X X⊥]."""
    return np.concatenate([x, null_space(x.T)], axis=1)


def generator(x: np.ndarray, u: np.ndarray) -> np.ndarray:
    """The skew matrix [[A, −Bᵀ], [B, 0]] of U = X A + X⊥ B."""
    p = x.shape[1]
    found = np.zeros((len(x), len(x)))
    found[:, :p] = completed(x).T @ u
    found[:p, p:] = -found[p:, :p].T
    return found


def canonical_geodesic(x: np.ndarray, u: np.ndarray, t: float = 1.0) -> np.ndarray:
    """[X X⊥] exp(t [[A, −Bᵀ], [B, 0]]) I, dense (Edelman, Arias and Smith 1998, 2.4.1)."""
    return (completed(x) @ expm(t * generator(x, u)))[:, : x.shape[1]]


def euclidean_geodesic(x: np.ndarray, u: np.ndarray, t: float = 1.0) -> np.ndarray:
    """[X U] exp(t [[A, −UᵀU], [I, A]]) [I; 0] exp(−t A), dense (the same, 2.2.2)."""
    p, inner = x.shape[1], x.T @ u
    middle = expm(t * np.block([[inner, -u.T @ u], [np.eye(p), inner]]))[:, :p]
    return np.concatenate([x, u], axis=1) @ middle @ expm(-t * inner)


GEODESIC = {"euclidean": euclidean_geodesic, "canonical": canonical_geodesic}


# pymanopt


@pytest.mark.parametrize(("shape", "count"), [*((shape, 1) for shape in SHAPES), ((6, 3), 4)])
def test_pymanopt(shape: tuple[int, int], count: int) -> None:
    theirs, m = pymanopt.manifolds.Stiefel(*shape, k=count), Stiefel()
    size = shape if count == 1 else (count, *shape)
    x, y = frame(*size), frame(*size, seed=5)
    u, v, a, h = tangent(x, 1.4), tangent(x, seed=2), draw(*size, seed=3), draw(*size, seed=4)
    assert m.dimension(size) * count == theirs.dim
    close(ours("inner", m, x, u, v).sum(), theirs.inner_product(x, u, v))
    close(ours("norm", m, x, u).max(), np.max(np.linalg.norm(u, axis=(-2, -1))))
    close(ours("proju", m, x, a), theirs.projection(x, a))
    close(ours("egrad2rgrad", m, x, a), theirs.euclidean_to_riemannian_gradient(x, a))
    close(ours("ehess2rhess", m, x, a, h, u), theirs.euclidean_to_riemannian_hessian(x, a, h, u))
    normal = a - theirs.projection(x, a)
    close(ours("normal", m, x, a), normal)
    close(ours("weingarten", m, x, u, normal), theirs.weingarten(x, u, normal))
    close(ours("transp", m, x, y, u), theirs.transport(x, y, u))
    close(ours("retr_qr", m, x, u), theirs.retraction(x, u))
    polar = pymanopt.manifolds.Stiefel(*shape, k=count, retraction="polar")
    close(ours("retr_polar", m, x, u), polar.retraction(x, u))
    close(ours("expmap", m, x, u), theirs.exp(x, u), 1e-13)


@shapes
def test_pymanopt_in_single_precision(shape: tuple[int, int]) -> None:
    theirs, m = pymanopt.manifolds.Stiefel(*shape, retraction="polar"), Stiefel()
    x = frame(*shape)
    u, a, h = tangent(x, 1.4), draw(*shape, seed=3), draw(*shape, seed=4)
    single = {"dtype": torch.float32}
    close(ours("retr_polar", m, x, u, **single), theirs.retraction(x, u), 2e-6)
    close(ours("expmap", m, x, u, **single), theirs.exp(x, u), 2e-6)
    expected = theirs.euclidean_to_riemannian_hessian(x, a, h, u)
    close(ours("ehess2rhess", m, x, a, h, u, **single), expected, 2e-6)
    close(ours("logmap", m, x, theirs.exp(x, u / 2), **single), u / 2, 1e-5)
    expected = logarithm_by_dense_rotations(x, canonical_geodesic(x, u / 2))
    close(ours("logmap", Stiefel("canonical"), x, canonical_geodesic(x, u / 2), **single), expected, 1e-5)


# geoopt


@shapes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_geoopt_with_the_euclidean_metric(shape: tuple[int, int], dtype: torch.dtype) -> None:
    theirs, m = geoopt.manifolds.EuclideanStiefel(), Stiefel()
    x = frame(2, 3, *shape)
    arrays = x, tangent(x, 1.4), tangent(x, seed=2), draw(2, 3, *shape, seed=3), frame(2, 3, *shape, seed=4)
    x, u, v, a, y = (torch.tensor(each, dtype=dtype) for each in arrays)
    limit = {"rtol": 0, "atol": 1e-13 if dtype == torch.float64 else 5e-6}
    for name, given in (
        ("inner", (x, u, v)), ("norm", (x, u)), ("proju", (x, a)), ("egrad2rgrad", (x, a)),
        ("retr", (x, u)), ("expmap", (x, u)), ("transp", (x, y, u)), ("projx", (a,)),
    ):  # fmt: skip
        torch.testing.assert_close(getattr(m, name)(*given), getattr(theirs, name)(*given), **limit)


@shapes
def test_geoopt_with_the_canonical_metric(shape: tuple[int, int]) -> None:
    theirs, m = geoopt.manifolds.CanonicalStiefel(), Stiefel("canonical", "cayley")
    x = frame(2, *shape)
    arrays = x, tangent(x, 1.4), tangent(x, seed=2), draw(2, *shape, seed=3)
    x, u, v, a = (torch.tensor(each) for each in arrays)
    limit = {"rtol": 0, "atol": 1e-13}
    torch.testing.assert_close(m.inner(x, u, v), theirs.inner(x, u, v), **limit)
    torch.testing.assert_close(m.egrad2rgrad(x, a), theirs.egrad2rgrad(x, a), **limit)
    given = u - x @ (x.mT @ u) / 2
    torch.testing.assert_close(m.retr(x, u), theirs.retr(x, given), **limit)
    torch.testing.assert_close(m.transp_follow_retr(x, u, v), theirs.transp_follow_retr(x, given, v), **limit)


# Dense formulas and scipy


@shapes
@metrics
def test_geodesics_and_their_rotations_are_the_dense_ones(shape: tuple[int, int], metric: str) -> None:
    m, x = Stiefel(metric), frame(*shape)
    v = tangent(x, seed=2)
    for length in (1e-8, 1.0, 5.0):
        u = tangent(x, length)
        close(ours("expmap", m, x, u), GEODESIC[metric](x, u), 1e-13)
        if metric == "canonical":
            q = completed(x)
            close(ours("transp_follow_expmap", m, x, u, v), q @ expm(generator(x, u)) @ q.T @ v, 1e-13)


@shapes
def test_euclidean_geodesics_integrate_their_equation(shape: tuple[int, int]) -> None:
    """Ẍ = −X ẊᵀẊ, the acceleration normal to the manifold that keeps the velocity tangent."""
    x = frame(*shape)
    u = tangent(x, 2.0)

    def field(_: float, state: np.ndarray) -> np.ndarray:
        point, velocity = state.reshape(2, *shape)
        return np.stack([velocity, -point @ velocity.T @ velocity]).ravel()

    solved = solve_ivp(field, (0, 1), np.stack([x, u]).ravel(), method="DOP853", rtol=1e-12, atol=1e-13)
    point, velocity = solved.y[:, -1].reshape(2, *shape)
    m = Stiefel()
    close(ours("expmap", m, x, u), point, 1e-10)
    close(ours("transp_follow_expmap", m, x, u, u), velocity, 1e-10)


def logarithm_by_dense_rotations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The canonical logarithm by Zimmermann's algorithm (2017) on n×n matrices.

    Among the rotations R with R X = Y, one has a logarithm without a lower right block in the basis
    [X X⊥]: X⊥ is turned until it has.
    """
    n, p = x.shape
    q = completed(x)
    rotation = np.concatenate([q.T @ y, null_space((q.T @ y).T)], axis=1)
    # Near the identity the completed columns are, too, so that the principal logarithm is the right one.
    if n > p:
        left, _, right = np.linalg.svd(rotation[p:, p:])
        rotation[:, p:] = rotation[:, p:] @ (left @ right).T
    found = logm(rotation).real
    for _ in range(200):
        if np.abs(found[p:, p:]).max(initial=0.0) < 1e-15:
            break
        rotation[:, p:] = rotation[:, p:] @ expm(-found[p:, p:])
        found = logm(rotation).real
    return q @ found[:, :p]


@shapes
@pytest.mark.parametrize("length", [1e-3, 0.5, 1.2])
def test_canonical_logarithm_by_dense_rotations(shape: tuple[int, int], length: float) -> None:
    m, x = Stiefel("canonical"), frame(*shape)
    y = canonical_geodesic(x, tangent(x, length))
    expected = logarithm_by_dense_rotations(x, y)
    close(ours("logmap", m, x, y), expected, 1e-13)
    inner = x.T @ expected
    square = np.sum(expected**2) - np.sum(inner**2) / 2
    close(ours("dist", m, x, y), np.sqrt(square), 1e-13)


@shapes
def test_euclidean_logarithm_by_shooting(shape: tuple[int, int]) -> None:
    """A geodesic of pymanopt's from x that meets y: scipy finds the coordinates of its velocity."""
    theirs, x = pymanopt.manifolds.Stiefel(*shape), frame(*shape)
    y = theirs.exp(x, tangent(x, 1.1))
    basis = null_space(
        np.stack([(e - theirs.projection(x, e)).ravel() for e in np.eye(x.size).reshape(-1, *shape)])
    )
    if not basis.shape[1]:
        close(ours("logmap", Stiefel(), x, y), np.zeros(shape))
        return

    def missed(coordinates: np.ndarray) -> np.ndarray:
        return basis.T @ (theirs.exp(x, (basis @ coordinates).reshape(shape)) - y).ravel()

    solved = root(missed, basis.T @ (y - x).ravel(), tol=1e-14)
    velocity = (basis @ solved.x).reshape(shape)
    close(theirs.exp(x, velocity), y, 1e-13)
    close(ours("logmap", Stiefel(), x, y), velocity, 1e-12)
    close(ours("dist", Stiefel(), x, y), np.linalg.norm(velocity), 1e-12)


@pytest.mark.parametrize("length", [1e-12, 1e-7])
@metrics
def test_tiny_logarithms_keep_their_digits(metric: str, length: float) -> None:
    """From [I; 0] every entry of y − x but those on the diagonal is exact."""
    x = np.eye(7, 3)
    u = tangent(x, length)
    y = GEODESIC[metric](x, u)
    found = ours("logmap", Stiefel(metric), x, y)
    close(found / length, u / length, 1e-14 + length)


@metrics
@pytest.mark.parametrize("shape", [(4, 1), (3, 3), (5, 2), (4, 3)])
def test_gradient_and_hessian_by_differences_along_dense_geodesics(
    metric: str, shape: tuple[int, int]
) -> None:
    """All entries ⟨Hess f[eᵢ], eⱼ⟩, polarised from second differences of f(γ(t)) of sixth order."""
    x = frame(*shape)
    weight, shift = draw(shape[0], shape[0], seed=7), draw(*shape, seed=8)

    def f(y: np.ndarray) -> float:
        return float(np.sum(shift * (weight @ y) ** 2) + np.sum(np.sin(y) * shift))

    g = 2 * weight.T @ (shift * (weight @ x)) + np.cos(x) * shift
    first = np.array([-1, 9, -45, 0, 45, -9, 1]) / 60
    second = np.array([2, -27, 270, -490, 270, -27, 2]) / 180
    step = 0.02

    def along(u: np.ndarray) -> tuple[float, float]:
        values = np.array([f(GEODESIC[metric](x, u, step * k)) for k in range(-3, 4)])
        return first @ values / step, second @ values / step**2

    vectors = [tangent(x, 0.5, seed=20 + k) for k in range(3)]
    m = Stiefel(metric)
    gradient = ours("egrad2rgrad", m, x, g)
    for u in vectors:
        h = 2 * weight.T @ (shift * (weight @ u)) - np.sin(x) * shift * u
        hessian = ours("ehess2rhess", m, x, g, h, u)
        close(ours("inner", m, x, gradient, u), along(u)[0], 1e-8)
        for v in vectors:
            mixed = (along(u + v)[1] - along(u - v)[1]) / 4
            close(ours("inner", m, x, hessian, v), mixed, 1e-7)


@shapes
def test_cayley_by_a_dense_solve(shape: tuple[int, int]) -> None:
    x = frame(*shape)
    u, v = tangent(x, 1.7), tangent(x, seed=2)
    q, skewed = completed(x), generator(x, u)
    eye = np.eye(len(x))
    rotation = q @ np.linalg.solve(eye - skewed / 2, eye + skewed / 2) @ q.T
    m = Stiefel("canonical", "cayley")
    close(ours("retr", m, x, u), rotation @ x)
    close(ours("transp_follow_retr", m, x, u, v), rotation @ v)
