"""Grassmann against definitions, angles worked by hand, the transport equation and finite differences."""

from functools import partial

import geoopt
import pytest
import torch
from torch import Tensor

from manifolds import ManifoldError, unchecked
from manifolds.checks import check
from manifolds.grassmann import Grassmann

SHAPES = [(1, 1), (4, 1), (3, 3), (5, 3), (9, 4), (6, 5)]
EPS = {torch.float32: 1.2e-7, torch.float64: 2.3e-16}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*size: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*size, generator=generator(seed), dtype=dtype)


def frame(*size: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.linalg.qr(noise(*size, seed=seed, dtype=dtype))[0].contiguous()


def tangent(x: Tensor, angle: float = 1.0, seed: int = 2) -> Tensor:
    """A horizontal vector whose largest principal angle is the given one."""
    a = noise(*x.shape, seed=seed, dtype=x.dtype)
    u = a - x @ (x.mT @ a)
    if x.shape[-2] == x.shape[-1]:
        return u * 0
    return angle * u / torch.linalg.matrix_norm(u, 2, keepdim=True)


def turned(x: Tensor, seed: int = 30) -> Tensor:
    """An orthogonal p×p matrix for each item, with determinants of both signs."""
    return frame(*x.shape[:-2], x.shape[-1], x.shape[-1], seed=seed, dtype=x.dtype)


def defect(y: Tensor) -> float:
    return float((y.mT @ y - torch.eye(y.shape[-1], dtype=y.dtype, device=y.device)).abs().max())


@pytest.mark.parametrize(
    ("retraction", "size"), [("polar", (2, 5, 3)), ("qr", (2, 6, 4)), ("polar", (2, 4, 4)), ("qr", (4, 1))]
)
def test_every_property_holds(retraction: str, size: tuple[int, ...]) -> None:
    found = check(Grassmann(retraction), size=size)
    assert found.passed, str(found)


def test_angles_that_were_chosen(device: torch.device) -> None:
    """The distance of span(e₁, e₂) to span(cos a e₁ + sin a e₃, cos b e₂ + sin b e₄), in any bases."""
    m = Grassmann()
    for a, b in ((0.3, 0.3), (1e-12, 1.5), (1e-9, 1e-9), (0.0, 0.7), (1.570796, 0.2), (1.5707, 1.5707963)):
        angles = torch.tensor([a, b], dtype=torch.float64, device=device)
        x = torch.eye(5, 2, dtype=torch.float64, device=device)
        y = torch.cat([angles.cos().diag(), angles.sin().diag(), torch.zeros_like(angles)[None]])
        expected = torch.linalg.vector_norm(angles)
        torch.testing.assert_close(m.dist(x, y), expected, rtol=2e-15, atol=0)
        log = torch.cat([torch.zeros_like(x[:2]), angles.diag(), torch.zeros_like(angles)[None]])
        torch.testing.assert_close(m.logmap(x, y), log, rtol=0, atol=2e-15)
        q = frame(2, 2, seed=3).to(device)
        torch.testing.assert_close(m.dist(x, y @ q), expected, rtol=0, atol=2e-15)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_tiny_distances_keep_full_relative_precision(dtype: torch.dtype, apart: float) -> None:
    m = Grassmann()
    x = torch.eye(6, 3, dtype=dtype)
    u = torch.zeros(6, 3, dtype=dtype)
    u[3:] = apart * noise(3, 3, dtype=dtype)
    y = x + u
    size = u.double().norm()
    assert abs(float(m.dist(x, y)) / float(size) - 1) < 20 * EPS[dtype] + apart
    assert (m.logmap(x, y) - u).abs().max() / apart < 20 * EPS[dtype] + apart


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_logarithm_and_exponential(shape: tuple[int, int], batch: tuple[int, ...]) -> None:
    m = Grassmann()
    x = frame(*batch, *shape)
    for angle in (1e-12, 1e-5, 0.5, 1.5707):
        u = tangent(x, angle)
        y = m.expmap(x, u)
        assert defect(y) < 3e-15
        torch.testing.assert_close(m.logmap(x, y), u, rtol=0, atol=2e-14)
        q = turned(x)
        torch.testing.assert_close(m.logmap(x, y @ q), u, rtol=0, atol=2e-14)
        torch.testing.assert_close(m.dist(x, y @ q), u.norm(dim=(-2, -1)), rtol=0, atol=2e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_nothing_depends_on_the_basis(shape: tuple[int, int]) -> None:
    m = Grassmann()
    x = frame(4, *shape)
    u, v = tangent(x, 0.9), tangent(x, 1.3, seed=8)
    y = m.expmap(x, tangent(x, 1.1, seed=9))
    q, r = turned(x), turned(x, seed=31)

    def same(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=0, atol=3e-14)

    same(m.inner(x @ q, u @ q, v @ q), m.inner(x, u, v))
    same(m.logmap(x @ q, y @ r), m.logmap(x, y) @ q)
    same(m.expmap(x @ q, u @ q), m.expmap(x, u) @ q)
    same(m.retr_polar(x @ q, u @ q), m.retr_polar(x, u) @ q)
    same(m.embedding(m.retr_qr(x @ q, u @ q)), m.embedding(m.retr_qr(x, u)))
    same(m.transp(x @ q, y @ r, v @ q), m.transp(x, y, v) @ r)
    same(m.transp_follow_expmap(x @ q, u @ q, v @ q), m.transp_follow_expmap(x, u, v) @ q)
    g, h = noise(4, *shape, seed=20), noise(4, *shape, seed=21)
    g = g - x @ (x.mT @ g)  # of a function of the subspace
    same(m.egrad2rgrad(x @ q, g @ q), m.egrad2rgrad(x, g) @ q)
    same(m.ehess2rhess(x @ q, g @ q, h @ q, u @ q), m.ehess2rhess(x, g, h, u) @ q)


@pytest.mark.parametrize("shape", SHAPES)
def test_parallel_transport_solves_its_equation(shape: tuple[int, int]) -> None:
    """V' = −γ (γ'ᵀ V): the derivative of the field along the geodesic is vertical."""
    m = Grassmann()
    x = frame(*shape)
    u, v = tangent(x, 1.4), tangent(x, 0.8, seed=8)
    with unchecked():
        for t in (0.2, 1.0):
            at = torch.tensor(t, dtype=torch.float64)
            y, speed = m.expmap(x, at * u), torch.func.jacfwd(lambda t: m.expmap(x, t * u))(at)
            field = m.transp_follow_expmap(x, at * u, v)
            rate = torch.func.jacfwd(lambda t: m.transp_follow_expmap(x, t * u, v))(at)
            torch.testing.assert_close(rate, -y @ (speed.mT @ field), rtol=0, atol=1e-12)
            torch.testing.assert_close(m.transp_follow_expmap(x, at * u, u), speed, rtol=0, atol=1e-12)
            torch.testing.assert_close(m.transp(x, y, v), field, rtol=0, atol=1e-13)


@pytest.mark.parametrize("retraction", ["polar", "qr"])
def test_transport_along_the_retraction(retraction: str) -> None:
    m = Grassmann(retraction)
    for length in (0.1, 1.0, 100.0):
        x = frame(3, 7, 3)
        u, v = tangent(x, length), tangent(x, seed=8)
        y, moved = m.retr_transp(x, u, v)
        torch.testing.assert_close(y, m.retr(x, u), rtol=0, atol=0)
        torch.testing.assert_close(moved, m.transp(x, y, v), rtol=0, atol=1e-11)
        torch.testing.assert_close(m.inner(y, moved), m.inner(x, v), rtol=1e-12, atol=0)
        torch.testing.assert_close(m.transp(y, x, moved), v, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_of_any_length_stay_orthonormal(dtype: torch.dtype, device: torch.device) -> None:
    m = Grassmann()
    for shape in ((4, 1), (6, 4), (300, 8)):
        x = frame(2, *shape, dtype=dtype)
        for length in (0.0, 1e-3, 1.0, 100.0):
            u = tangent(x, length).to(device)
            for move in (m.retr_qr, m.retr_polar, m.expmap):
                y = move(x.to(device), u)
                assert defect(y) < 25 * EPS[dtype], (move.__name__, shape, length)
            if length:
                span = torch.linalg.qr(x.to(device) + u)[0]
                assert (
                    span - m.retr_qr(x.to(device), u) @ (m.retr_qr(x.to(device), u).mT @ span)
                ).abs().max() < (200 * EPS[dtype] * max(1, length))


def test_hessian_by_second_derivatives_along_geodesics() -> None:
    """For f(X) = Σ w ∘ (X Xᵀ)³ + tr XᵀAX, at a random point, where the gradient is not zero."""
    m = Grassmann()
    for shape in ((5, 1), (6, 3), (5, 4)):
        x, a, w = frame(*shape), noise(shape[0], shape[0], seed=3), noise(shape[0], shape[0], seed=4)

        def f(y: Tensor, a: Tensor = a, w: Tensor = w) -> Tensor:
            return (w * (y @ y.mT) ** 3).sum() + (y.mT @ a @ y).trace()

        u, v = tangent(x, 0.8), tangent(x, seed=8)
        with unchecked():

            def second(d: Tensor, x: Tensor = x) -> Tensor:
                along = torch.func.grad(lambda t: f(m.expmap(x, t * d)))
                return torch.func.grad(along)(torch.tensor(0.0, dtype=torch.float64))

            mixed = (second(u + v) - second(u - v)) / 4
        g, h = torch.func.jvp(torch.func.grad(f), (x,), (u,))
        found = m.ehess2rhess(x, g, h, u)
        assert m.contains_tangent(x, found)
        torch.testing.assert_close((found * v).sum(), mixed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["generic", "zero", "repeated"])
def test_derivatives(kind: str) -> None:
    m = Grassmann()
    for shape in ((5, 2), (3, 2)):
        x = frame(*shape)
        u = tangent(x, 0.9)
        if kind == "zero":
            u = u * 0
        if kind == "repeated" and shape == (5, 2):
            u = 0.9 * torch.linalg.qr(torch.cat([x, noise(5, 2)], 1))[0][:, 2:]
        v = tangent(x, seed=8)
        y = m.expmap(x, u)
        with unchecked():
            inputs = (x.requires_grad_(), u.requires_grad_())
            carried = partial(m.transp_follow_expmap, v=v)
            for move in (m.retr_qr, m.retr_polar, m.expmap, carried):
                assert torch.autograd.gradcheck(move, inputs, fast_mode=True, check_forward_ad=True)
            pair = (x, y.detach().requires_grad_())
            for pull in (m.logmap, m.dist2, partial(m.transp, v=v)):
                assert torch.autograd.gradcheck(pull, pair, fast_mode=True, check_forward_ad=True)
            if shape == (3, 2):
                assert torch.autograd.gradgradcheck(m.expmap, inputs, fast_mode=True)
                assert torch.autograd.gradgradcheck(m.logmap, pair, fast_mode=True)


def test_distance_has_gradient_zero_at_the_point_itself() -> None:
    m = Grassmann()
    x = frame(2, 5, 3)
    y = x.clone().requires_grad_()
    m.dist(x, y).sum().backward()
    assert y.grad is not None and torch.equal(y.grad, torch.zeros_like(y))
    far = m.expmap(x, tangent(x, 1.2)).requires_grad_()
    (m.dist2(x, far).sum() / 2).backward()
    with torch.no_grad():
        torch.testing.assert_close(m.egrad2rgrad(far, far.grad), -m.logmap(far, x), rtol=0, atol=1e-12)


def test_cut_locus_gives_a_shortest_geodesic() -> None:
    x, y = torch.eye(4, 2, dtype=torch.float64), torch.eye(4, dtype=torch.float64)[:, 2:]
    m = Grassmann()
    torch.testing.assert_close(m.dist(x, y), torch.tensor(torch.pi / 2**0.5, dtype=torch.float64))
    end = m.expmap(x, m.logmap(x, y))
    torch.testing.assert_close(end @ end.mT, y @ y.mT, rtol=0, atol=1e-14)


def test_vmap() -> None:
    m = Grassmann()
    x = frame(3, 5, 3)
    u, v = tangent(x, 0.5), tangent(x, seed=4)
    y = m.expmap(x, u)
    calls = {
        "retr_qr": (x, u), "retr_polar": (x, u), "expmap": (x, u), "logmap": (x, y), "proju": (x, v),
        "projx": (x,), "ehess2rhess": (x, v, u, u), "inner": (x, u, v), "dist": (x, y), "dist2": (x, y),
        "transp": (x, y, v), "transp_follow_expmap": (x, u, v), "expmap_transp": (x, u, v),
        "retr_transp": (x, u, v),
    }  # fmt: skip
    for name, given in calls.items():
        run = getattr(m, name)
        torch.testing.assert_close(torch.vmap(run)(*given), run(*given), rtol=0, atol=1e-13)


def test_compiled_operations_and_their_gradients_are_the_eager_ones() -> None:
    """All in one graph, as tracing is what takes long."""
    m = Grassmann()
    x = frame(2, 4, 2)
    u, v, g = tangent(x, 0.5), tangent(x, seed=4), noise(2, 4, 2, seed=5)
    y = m.expmap(x, tangent(x, 0.7, seed=6))

    def run(x: Tensor, y: Tensor, u: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return (
            m.projx(x + u), m.proju(x, g), m.inner(x, u, v), m.ehess2rhess(x, g, v, u), m.retr_qr(x, u),
            *m.retr_transp(x, u, v), *m.expmap_transp(x, u, v), m.dist(x, y), m.dist2(x, y), m.logmap(x, y),
            m.transp(x, y, v),
        )  # fmt: skip

    x.requires_grad_()
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x, y, u, v, g)
    expected = run(x, y, u, v, g)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    slopes = [torch.autograd.grad(sum((each**2).sum() for each in part), x)[0] for part in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11)
    torch._dynamo.reset()


def test_points_broadcast() -> None:
    m = Grassmann()
    x = frame(5, 3)
    u, v = m.proju(x, noise(4, 5, 3)), m.proju(x, noise(2, 1, 5, 3))
    y = m.retr(x, 0.1 * u)
    for name, given, size in (
        ("expmap", (x, u), (4, 5, 3)), ("logmap", (x, y), (4, 5, 3)), ("transp", (x, y, v), (2, 4, 5, 3)),
        ("transp_follow_expmap", (x, u, v), (2, 4, 5, 3)), ("inner", (x, u, v), (2, 4)),
        ("dist", (y, x), (4,)),
        ("ehess2rhess", (x, noise(5, 3), v, u), (2, 4, 5, 3)), ("norm", (x, u), (4,)),
    ):  # fmt: skip
        assert getattr(m, name)(*given).shape == size, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    m = Grassmann()
    x = frame(2, 6, 3).to(dtype)
    u = (0.1 * tangent(frame(2, 6, 3))).to(dtype)
    y, moved = m.retr_transp(x, u, u)
    assert y.dtype == moved.dtype == m.logmap(x, y).dtype == m.random(4, 2, dtype=dtype).dtype == dtype
    with unchecked():
        torch.testing.assert_close(y, m.retr(x.float(), u.float()).to(dtype), rtol=0, atol=0)


def test_random_subspaces_are_uniform_and_repeatable(device: torch.device) -> None:
    m = Grassmann()
    given = {"device": device, "dtype": torch.float64}
    x = m.random(4000, 4, 2, generator=torch.Generator(device).manual_seed(3), **given)
    assert torch.equal(x, m.random(4000, 4, 2, generator=torch.Generator(device).manual_seed(3), **given))
    mean = m.embedding(x.as_subclass(Tensor)).mean(0)
    torch.testing.assert_close(mean, torch.eye(4, **given) / 2, rtol=0, atol=0.03)
    assert m.dimension((7, 5, 3)) == 6 and m.dimension(torch.zeros(4, 4)) == 0


def test_bad_input_is_refused_with_words() -> None:
    m, x = Grassmann(), frame(2, 5, 3)
    u = tangent(x)
    for call, said in (
        (lambda: m.random(2, 3), "n ≥ p"),
        (lambda: m.retr(2 * x, u), "x is not on the manifold: XᵀX = I"),
        (lambda: m.expmap(x, u + x), "u is not tangent at x: XᵀU = 0 fails by"),
        (lambda: m.transp(x, x, u.flip(0)), "v is not tangent"),
        (lambda: m.egrad2rgrad(x, u * float("nan")), "entries that are not finite"),
        (lambda: m.second_fundamental_form(x, u, u), "quotient of Stiefel"),
        (lambda: Grassmann("svd"), "'polar', 'qr'"),
    ):
        with pytest.raises(ManifoldError, match=said):
            call()


@pytest.mark.parametrize("optimizer", [geoopt.optim.RiemannianAdam, geoopt.optim.RiemannianSGD])
def test_geoopt_optimizers_find_the_top_subspace(optimizer: type) -> None:
    a = torch.diag(torch.tensor([5.0, 4.0, 1.0, 0.5, 0.1], dtype=torch.float64))
    x = geoopt.ManifoldParameter(frame(5, 2), manifold=Grassmann())
    steps = optimizer([x], lr=0.05)
    for _ in range(300):
        steps.zero_grad()
        loss = -(x.mT @ a @ x).trace()
        loss.backward()
        steps.step()
    assert defect(x.detach().as_subclass(Tensor)) < 1e-13
    assert abs(float(loss.detach()) + 9) < 1e-3
