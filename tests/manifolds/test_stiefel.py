"""Stiefel against definitions, finite differences, the integrated geodesic equation and dense matrices."""

from functools import partial

import geoopt
import pytest
import torch
from torch import Tensor

from manifolds import ManifoldError, unchecked
from manifolds.checks import check
from manifolds.stiefel import Stiefel
from manifolds.stiefel_logarithm import solve

METRICS = ["euclidean", "canonical"]
SHAPES = [(1, 1), (4, 1), (3, 3), (5, 3), (9, 4), (6, 5)]
BATCHES = [(), (3,), (2, 3)]
EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}


def generator(seed: int = 0, device: torch.device | None = None) -> torch.Generator:
    return torch.Generator(device or "cpu").manual_seed(seed)


def noise(*size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=generator(seed), dtype=dtype)


def frame(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(noise(*size, seed=seed, dtype=dtype))[0].contiguous()


def tangent(x: Tensor, length: float = 1.0, seed: int = 2) -> Tensor:
    """X A + a vector orthogonal to X, built from its parts."""
    a, b = noise(*x.shape, seed=seed, dtype=x.dtype), noise(*x.shape, seed=seed + 50, dtype=x.dtype)
    inner = x.mT @ a
    u = x @ (inner - inner.mT) + (b - x @ (x.mT @ b))
    return length * u / torch.linalg.matrix_norm(u, keepdim=True).clamp_min(1e-30)


def definition(metric: str, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """The metric with the n×n matrix of its definition."""
    middle = torch.eye(x.shape[-2], dtype=x.dtype)
    if metric == "canonical":
        middle = middle - x @ x.mT / 2
    return torch.einsum("...ij,...ik,...kj->...", u, middle.expand(*x.shape[:-2], -1, -1), v)


def defect(y: Tensor) -> float:
    return float((y.mT @ y - torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)).abs().max())


@pytest.mark.parametrize(
    ("metric", "retraction", "size"),
    [
        ("euclidean", "polar", (2, 5, 3)),
        ("euclidean", "qr", (2, 4, 4)),
        ("canonical", "cayley", (2, 5, 3)),
        ("canonical", "qr", (1, 1)),
    ],
)
def test_every_property_holds(metric: str, retraction: str, size: tuple[int, ...]) -> None:
    found = check(Stiefel(metric, retraction), size=size)
    assert found.passed, str(found)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", BATCHES)
def test_projection_is_the_nearest_tangent_vector(shape: tuple[int, int], batch: tuple[int, ...]) -> None:
    x, a = frame(*batch, *shape), noise(*batch, *shape)
    for metric in METRICS:
        u = Stiefel(metric).proju(x, a)
        assert (x.mT @ u + u.mT @ x).abs().max() < 1e-14
        v = tangent(x)
        assert ((a - u) * v).sum((-2, -1)).abs().max() < 1e-14
        assert definition(metric, x, a - u, v).abs().max() < 1e-14


def test_projection_of_points_is_nearest(device: torch.device) -> None:
    a = noise(3, 7, 3).to(device)
    y = Stiefel().projx(a)
    u, _, v = torch.linalg.svd(a, full_matrices=False)
    torch.testing.assert_close(y, u @ v, rtol=0, atol=1e-14)
    for other in (frame(3, 7, 3).to(device), torch.linalg.qr(a)[0]):
        assert ((a - y).square().sum((-2, -1)) <= (a - other).square().sum((-2, -1))).all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_metric_norm_and_gradient(metric: str, shape: tuple[int, int]) -> None:
    m = Stiefel(metric)
    x, g = frame(2, *shape), noise(2, *shape)
    u, v = tangent(x, 0.7), tangent(x, seed=9)
    torch.testing.assert_close(m.inner(x, u, v), definition(metric, x, u, v), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(m.norm(x, u) ** 2, definition(metric, x, u, u), rtol=1e-13, atol=1e-28)
    gradient = m.egrad2rgrad(x, g)
    assert m.contains_tangent(x, gradient)
    torch.testing.assert_close(
        definition(metric, x, gradient, v), (g * v).sum((-2, -1)), rtol=1e-12, atol=1e-14
    )
    tiny = 1e-200 * u
    torch.testing.assert_close(m.norm(x, tiny), 1e-200 * m.norm(x, u), rtol=1e-13, atol=0)
    assert m.inner(x, u, v, keepdim=True).shape == (2, 1, 1)
    assert m.norm(x, u, keepdim=True).shape == (2, 1, 1)


def acceleration(metric: str, x: Tensor, u: Tensor) -> Tensor:
    """The geodesic equation of Edelman, Arias and Smith: (2.7) Euclidean, (2.41) canonical."""
    if metric == "euclidean":
        return -x @ u.mT @ u
    inner = x.mT @ u
    return -(u @ u.mT @ x) - x @ (inner @ inner + u.mT @ u)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_expmap_solves_the_geodesic_equation(metric: str, shape: tuple[int, int]) -> None:
    m = Stiefel(metric)
    x = frame(*shape)
    u = tangent(x, 2.0)
    with unchecked():
        speed = torch.func.jacfwd(lambda t: m.expmap(x, t * u))
        bend = torch.func.jacfwd(speed)
        for t in (0.0, 0.4, 1.0):
            at = torch.tensor(t, dtype=torch.float64)
            y, v, a = m.expmap(x, at * u), speed(at), bend(at)
            torch.testing.assert_close(a, acceleration(metric, y, v), rtol=0, atol=2e-11)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_any_length_stay_orthonormal(metric: str, dtype: torch.dtype, device: torch.device) -> None:
    m = Stiefel(metric)
    for shape in ((1, 1), (4, 4), (6, 4), (300, 8)):
        x = frame(2, *shape, dtype=dtype)
        for length in (0.0, 1e-3, 1.0, 100.0):
            u = tangent(x, length).to(device)
            at = x.to(device)
            for move in (m.retr_qr, m.retr_polar, m.retr_cayley, m.expmap):
                assert defect(move(at, u)) < 25 * EPS[dtype], (move.__name__, shape, length)


def test_qr_retraction_has_a_positive_diagonal() -> None:
    for length in (1e-3, 1.0, 100.0):
        x = frame(5, 20, 6)
        u = tangent(x, length)
        y = Stiefel().retr_qr(x, u)
        triangle = y.mT @ (x + u)
        assert triangle.tril(-1).abs().max() < 1e-13 * max(1.0, length)
        assert (triangle.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_cayley_is_the_dense_cayley_transform() -> None:
    for shape in SHAPES:
        x = frame(*shape)
        u = tangent(x, 1.7)
        eye = torch.eye(shape[0], dtype=x.dtype)
        half = u @ x.mT - x @ (x.mT @ u) @ x.mT / 2
        s = half - half.mT
        rotation = torch.linalg.solve(eye - s / 2, eye + s / 2)
        m, v = Stiefel("canonical", "cayley"), tangent(x, seed=5)
        y, carried = m.retr_transp(x, u, v)
        torch.testing.assert_close(y, rotation @ x, rtol=0, atol=1e-14)
        torch.testing.assert_close(carried, rotation @ v, rtol=0, atol=1e-14)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_transport_along_geodesics_is_isometric_and_undone(metric: str, shape: tuple[int, int]) -> None:
    m = Stiefel(metric)
    x = frame(3, *shape)
    u, v, w = tangent(x, 1.5), tangent(x, seed=5), tangent(x, seed=7)
    y, moved = m.expmap_transp(x, u, v)
    other, velocity = m.transp_follow_expmap(x, u, w), m.transp_follow_expmap(x, u, u)
    assert m.contains_tangent(y, moved)
    torch.testing.assert_close(
        definition(metric, y, moved, other), definition(metric, x, v, w), rtol=1e-12, atol=1e-14
    )
    with unchecked():
        ahead, behind = m.expmap(x, 1.0001 * u), m.expmap(x, 0.9999 * u)
    torch.testing.assert_close(velocity, (ahead - behind) / 2e-4, rtol=0, atol=1e-7)
    torch.testing.assert_close(m.expmap(y, -velocity), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(m.transp_follow_expmap(y, -velocity, moved), v, rtol=0, atol=1e-13)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", SHAPES)
def test_logarithm_gives_back_the_velocity(metric: str, shape: tuple[int, int]) -> None:
    m = Stiefel(metric)
    x = frame(2, 3, *shape)
    for length in (1e-12, 1e-6, 0.1, 1.0, 2.5):
        u = tangent(x, length)
        y = m.expmap(x, u)
        found = m.logarithm(x, y)
        assert found.converged.all() and found.converged.shape == (2, 3)
        # y is rounded to 1e-16: what it says about u is no better.
        assert (found.vector - u).norm(dim=(-2, -1)).max() < 1e-14 * max(1.0, length)
        torch.testing.assert_close(m.dist(x, y), m.norm(x, u), rtol=1e-13, atol=2e-15)
        torch.testing.assert_close(m.dist2(x, y), m.norm(x, u) ** 2, rtol=1e-12, atol=4e-15 * length)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_tiny_distances_keep_full_relative_precision(metric: str, dtype: torch.dtype, apart: float) -> None:
    """With x a block of the identity, x + u is on the manifold up to u², and its entries are exact."""
    m = Stiefel(metric)
    x = torch.eye(6, 3, dtype=dtype)
    u = torch.zeros(6, 3, dtype=dtype)
    u[3:] = noise(3, 3, dtype=dtype)
    u[0, 1], u[1, 0] = 0.5, -0.5
    u = apart * u
    y = x + u
    limit = 20 * EPS[dtype]
    expected = definition(metric, x.double(), u.double(), u.double()).sqrt()
    assert abs(float(m.dist(x, y)) / float(expected) - 1) < limit + apart
    assert ((m.logmap(x, y) - u).abs().max() / apart) < limit + 2 * apart


def test_logarithm_says_what_does_not_converge() -> None:
    m = Stiefel()
    x = frame(2, 4, 4)
    y = torch.stack([m.expmap(x[0], tangent(x[0], 0.5)), -x[1]])
    found = m.logarithm(x, y)
    assert found.converged.tolist() == [True, False]
    assert (m.expmap(x[0], found.vector[0]) - y[0]).abs().max() < 1e-14
    with pytest.raises(ManifoldError, match="1 of 2 items did not converge"):
        m.logmap(x, y)
    silent = torch.vmap(m.logmap)(x, y)
    assert silent[0].isfinite().all() and silent[1].isnan().all()
    x = frame(1, 6, 4)
    few = m.logarithm(x, m.expmap(x, tangent(x, 2.0)), max_iterations=3)
    assert not few.converged.any() and few.iterations == 3 and (few.residual > 1e-14).all()


@pytest.mark.parametrize("metric", METRICS)
def test_hessian_by_finite_differences_along_geodesics(metric: str) -> None:
    """For random quartic f at a random point, where the gradient is not zero."""
    m = Stiefel(metric)
    for shape in ((4, 4), (5, 1), (6, 3)):
        x = frame(*shape)
        weight, shift = noise(shape[0], shape[0], seed=3), noise(*shape, seed=4)

        def f(y: Tensor, weight: Tensor = weight, shift: Tensor = shift) -> Tensor:
            return ((weight @ y) ** 2 * shift).sum() + (y**4 * shift).sum() + (y.mT @ shift).trace()

        u, v = tangent(x, 1.0), tangent(x, seed=8)
        with unchecked():

            def second(w: Tensor, x: Tensor = x) -> Tensor:
                along = torch.func.grad(lambda t: f(m.expmap(x, t * w)))
                return torch.func.grad(along)(torch.tensor(0.0, dtype=torch.float64))

            mixed = (second(u + v) - second(u - v)) / 4
        g, h = torch.func.jvp(torch.func.grad(f), (x,), (u,))
        found = m.ehess2rhess(x, g, h, u)
        assert m.contains_tangent(x, found)
        torch.testing.assert_close(definition(metric, x, found, v), mixed, rtol=1e-10, atol=1e-10)


def test_second_fundamental_form_and_weingarten() -> None:
    m = Stiefel()
    x = frame(7, 3)
    u, v, n = tangent(x), tangent(x, seed=6), m.normal(x, noise(7, 3, seed=12))
    with unchecked():
        curve = torch.func.jacfwd(torch.func.jacfwd(lambda t: m.expmap(x, t * u)))
        bend = curve(torch.tensor(0.0, dtype=torch.float64))
    torch.testing.assert_close(m.second_fundamental_form(x, u, u), bend, rtol=0, atol=1e-13)
    form = m.second_fundamental_form(x, u, v)
    torch.testing.assert_close(form, m.second_fundamental_form(x, v, u), rtol=0, atol=1e-15)
    assert m.proju(x, form).abs().max() < 1e-15
    w = m.weingarten(x, u, n)
    assert m.contains_tangent(x, w)
    torch.testing.assert_close((w * v).sum(), (n * form).sum(), rtol=1e-12, atol=1e-14)
    for call in (m.second_fundamental_form, m.weingarten):
        with pytest.raises(ManifoldError, match="canonical metric is not that of the surrounding space"):
            getattr(Stiefel("canonical"), call.__name__)(x, u, v)


def moves(m: Stiefel) -> dict[str, tuple[int, object]]:
    return {
        "retr_qr": m.retr_qr, "retr_polar": m.retr_polar, "retr_cayley": m.retr_cayley, "expmap": m.expmap,
    }  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["generic", "zero", "repeated", "rotation"])
def test_derivatives(metric: str, kind: str) -> None:
    """First and second, forward and reverse; at zero, at equal singular values, inside the rotation part."""
    m = Stiefel(metric)
    for shape in ((5, 2), (3, 2), (3, 3)):
        x = frame(*shape)
        u = {
            "generic": tangent(x),
            "zero": torch.zeros(shape, dtype=x.dtype),
            "repeated": frame(*shape, seed=4) - x @ (x.mT @ frame(*shape, seed=4)),
            "rotation": x @ (noise(shape[1], shape[1]).triu(1) - noise(shape[1], shape[1]).triu(1).mT),
        }[kind]
        if kind == "repeated" and shape == (5, 2):
            u = torch.linalg.qr(torch.cat([x, noise(5, 2)], 1))[0][:, 2:]
        v = tangent(x, seed=6)
        inputs = (x.requires_grad_(), u.requires_grad_())
        with unchecked():
            for name, move in moves(m).items():
                assert torch.autograd.gradcheck(move, inputs, fast_mode=True, check_forward_ad=True), name
            carried = partial(m.transp_follow_expmap, v=v)
            assert torch.autograd.gradcheck(carried, inputs, fast_mode=True, check_forward_ad=True)
            if shape == (3, 2):
                for name, move in moves(m).items():
                    assert torch.autograd.gradgradcheck(move, inputs, fast_mode=True), name


@pytest.mark.parametrize(
    ("metric", "shape", "length"),
    [
        ("euclidean", (3, 2), 0.9), ("euclidean", (3, 3), 0.9), ("euclidean", (3, 2), 1e-7),
        ("canonical", (3, 2), 0.9), ("canonical", (3, 2), 0.0),
    ],
)  # fmt: skip
def test_derivatives_of_the_logarithm(metric: str, shape: tuple[int, int], length: float) -> None:
    m = Stiefel(metric)
    x = frame(*shape)
    y = m.expmap(x, tangent(x, length)).requires_grad_()
    with unchecked():
        assert torch.autograd.gradcheck(
            m.logmap, (x.requires_grad_(), y), fast_mode=True, check_forward_ad=True
        )


@pytest.mark.parametrize("metric", METRICS)
def test_second_derivatives_of_the_squared_distance(metric: str) -> None:
    m = Stiefel(metric)
    x = frame(4, 2)
    y, d = m.expmap(x, tangent(x, 0.8)), noise(4, 2, seed=9)
    with unchecked():
        gradient = torch.func.grad(lambda y: m.dist2(x, y))
        product = torch.func.jvp(gradient, (y,), (d,))[1]
        h = 1e-5
        difference = (gradient(y + h * d) - gradient(y - h * d)) / (2 * h)
    torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_gradient_of_half_the_squared_distance_is_minus_the_logarithm(metric: str) -> None:
    m = Stiefel(metric)
    x = frame(4, 6, 3)
    y = m.expmap(x, tangent(x, 1.2)).requires_grad_()
    (m.dist2(x, y).sum() / 2).backward()
    assert y.grad is not None
    with torch.no_grad():
        gradient = m.egrad2rgrad(y, y.grad)
        torch.testing.assert_close(gradient, -m.logmap(y, x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("metric", METRICS)
def test_vmap(metric: str) -> None:
    m = Stiefel(metric)
    x = frame(3, 5, 3)
    u, v = tangent(x, 0.5), tangent(x, seed=4)
    y = m.expmap(x, u)
    calls = {
        "retr_qr": (x, u), "retr_polar": (x, u), "retr_cayley": (x, u), "expmap": (x, u), "logmap": (x, y),
        "proju": (x, u), "projx": (x,), "egrad2rgrad": (x, v), "ehess2rhess": (x, v, u, u),
        "inner": (x, u, v), "norm": (x, u), "transp": (x, y, v), "transp_follow_expmap": (x, u, v),
        "expmap_transp": (x, u, v),
        "retr_transp": (x, u, v),
    }  # fmt: skip
    for name, given in calls.items():
        run = getattr(m, name)
        torch.testing.assert_close(torch.vmap(run)(*given), run(*given), rtol=0, atol=1e-13)


@pytest.mark.parametrize("metric", METRICS)
def test_compiled_operations_and_their_gradients_are_the_eager_ones(metric: str) -> None:
    """All in one graph, as tracing is what takes long."""
    m = Stiefel(metric)
    x = frame(2, 4, 2)
    u, v = tangent(x, 0.5), tangent(x, seed=4)
    y = m.retr(x, u)

    def run(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        by_metric = (
            m.egrad2rgrad(x, v), m.ehess2rhess(x, v, u, u), m.inner(x, u, v), m.norm(x, u),
            *m.expmap_transp(x, u, v),
        )  # fmt: skip
        if metric == "canonical":
            return by_metric
        return (
            *by_metric, m.projx(x + u), m.proju(x, v), m.transp(x, y, v), m.retr_qr(x, u), m.retr_polar(x, u),
            m.retr_cayley(x, u),
        )  # fmt: skip

    x.requires_grad_()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x, y, u, v)
    expected = run(x, y, u, v)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    slopes = [torch.autograd.grad(sum((each**2).sum() for each in part), x)[0] for part in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11)
    torch._dynamo.reset()


def test_logarithm_compiles() -> None:
    """One iteration, which is traced for long and is all that such a short way takes."""
    m = Stiefel("euclidean")
    x = frame(2, 3, 1)
    y = m.expmap(x, tangent(x, 1e-7))

    def run(x: Tensor, y: Tensor) -> Tensor:
        return solve(x, y, m.bend, max_iterations=1)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y) * 1e7, m.logmap(x, y) * 1e7, rtol=0, atol=1e-9)
    torch._dynamo.reset()


@pytest.mark.parametrize("metric", METRICS)
def test_points_broadcast(metric: str) -> None:
    m = Stiefel(metric)
    x = frame(5, 3)
    u = m.proju(x, noise(4, 5, 3))
    v = m.proju(x, noise(2, 1, 5, 3))
    assert u.shape == (4, 5, 3)
    y = m.retr(x, u)
    for name, given, size in (
        ("expmap", (x, u), (4, 5, 3)), ("logmap", (x, m.expmap(x, 0.1 * u)), (4, 5, 3)),
        ("transp_follow_expmap", (x, u, v), (2, 4, 5, 3)), ("inner", (x, u, v), (2, 4)),
        ("transp", (x, y, v), (2, 4, 5, 3)), ("retr_cayley", (x, u), (4, 5, 3)),
        ("ehess2rhess", (x, noise(5, 3), v, u), (2, 4, 5, 3)), ("normal", (x, u), (4, 5, 3)),
        ("second_fundamental_form", (x, u, v), (2, 4, 5, 3)),
    ):  # fmt: skip
        if name == "second_fundamental_form" and metric == "canonical":
            continue
        assert getattr(m, name)(*given).shape == size, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_computes_in_float32(dtype: torch.dtype, metric: str) -> None:
    m = Stiefel(metric, "cayley")
    x = frame(2, 6, 3).to(dtype)
    u = (0.1 * tangent(frame(2, 6, 3))).to(dtype)
    y, moved = m.retr_transp(x, u, u)
    assert y.dtype == moved.dtype == dtype
    with unchecked():
        torch.testing.assert_close(y, m.retr(x.float(), u.float()).to(dtype), rtol=0, atol=0)
    assert m.logarithm(x, y).vector.dtype == dtype
    assert m.logmap(x, y).dtype == dtype and m.random(4, 2, dtype=dtype).dtype == dtype


def test_random_points_are_uniform_and_repeatable(device: torch.device) -> None:
    m = Stiefel()
    x = m.random(4000, 3, 2, generator=generator(3, device), device=device, dtype=torch.float64)
    assert defect(x.as_subclass(Tensor)) < 1e-14
    again = m.random(4000, 3, 2, generator=generator(3, device), device=device, dtype=torch.float64)
    assert torch.equal(x, again)
    entries = x.as_subclass(Tensor).reshape(4000, 6)
    assert entries.mean(0).abs().max() < 0.05
    covariance = entries.mT @ entries / 4000
    torch.testing.assert_close(
        covariance, torch.eye(6, dtype=torch.float64, device=device) / 3, rtol=0, atol=0.03
    )
    assert isinstance(x, geoopt.ManifoldTensor)
    assert m.dimension((7, 5, 3)) == 9 and m.dimension(torch.zeros(4, 4)) == 6


def test_bad_input_is_refused_with_words() -> None:
    m, x = Stiefel(), frame(2, 5, 3)
    u = tangent(x)
    for call, said in (
        (lambda: m.random(2, 3), "n ≥ p"),
        (lambda: m.retr(x.mT, u.mT), "n×p with n ≥ p"),
        (lambda: m.retr(x[0, 0], u[0, 0]), "2 dimensions"),
        (lambda: m.retr(2 * x, u), r"x is not on the manifold: XᵀX = I fails by"),
        (lambda: m.expmap(x.flip(0), u), "u is not tangent at x: XᵀU \\+ UᵀX = 0"),
        (lambda: m.egrad2rgrad(x, u * float("nan")), "30 entries that are not finite"),
        (lambda: m.retr(x, u.float()), "convert one"),
        (lambda: m.logmap(x, 2 * x), "y is not on the manifold"),
        (lambda: m.logarithm(x, x * float("nan")), "y is not on the manifold"),
        (lambda: Stiefel("flat"), "'euclidean', 'canonical'"),
        (lambda: Stiefel(retraction="svd"), "'qr', 'polar', 'cayley'"),
    ):
        with pytest.raises(ManifoldError, match=said):
            call()
    assert not m.contains(x + 1e-6) and "XᵀX = I fails by" in m.contains(x + 1e-6).reason
    assert m.contains(x.mT).reason and m.contains(x)


def test_a_poisoned_item_leaves_the_others_alone() -> None:
    m, x = Stiefel(), frame(3, 8, 3)
    u = tangent(x)
    u[1, 2, 1] = float("nan")
    with unchecked():
        for move in (m.retr_qr, m.retr_polar, m.retr_cayley):
            y = move(x, u)
            assert y[1].isnan().any()
            torch.testing.assert_close(y[::2], move(x[::2], u[::2]))


@pytest.mark.parametrize(
    ("metric", "optimizer"),
    [("canonical", geoopt.optim.RiemannianAdam), ("euclidean", geoopt.optim.RiemannianSGD)],
)
def test_geoopt_optimizers_find_the_top_subspace(metric: str, optimizer: type) -> None:
    a = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.5, 0.1], dtype=torch.float64))
    x = geoopt.ManifoldParameter(frame(5, 2), manifold=Stiefel(metric))
    steps = optimizer([x], lr=0.05)
    for _ in range(300):
        steps.zero_grad()
        loss = -(x.mT @ a @ x).trace()
        loss.backward()
        steps.step()
    assert defect(x.detach().as_subclass(Tensor)) < 1e-13
    assert abs(float(loss.detach()) + 9) < 1e-3
