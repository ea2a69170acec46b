"""`FixedRank` against dense matrices, finite differences and the geodesic equation integrated by scipy."""

import geoopt
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from manifolds.errors import ManifoldError
from manifolds.fixed_rank import FixedRank
from manifolds.low_rank import LowRank
from manifolds.operations import unchecked

SIZES = [(7, 5, 3), (4, 6, 1), (4, 4, 4), (3, 8, 3), (1, 1, 1), (1, 5, 1)]
DTYPE = torch.float64


def plain(x: Tensor) -> Tensor:
    return x.detach().as_subclass(Tensor)


def seeded(seed: int = 0, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


class Dense:
    """A manifold, points and tangent vectors, with everything multiplied out."""

    def __init__(self, m: int, n: int, r: int, batch: tuple[int, ...] = (), device="cpu", equal=False):
        self.manifold, self.rank = FixedRank(m, n), r
        generator = seeded(0, device)
        options = {"dtype": DTYPE, "device": device, "generator": generator}
        self.x, self.y = (plain(self.manifold.random(*batch, m + n, r, **options)) for _ in range(2))
        if equal:
            self.x = torch.cat(
                [torch.linalg.qr(self.left(self.x))[0], torch.linalg.qr(self.right(self.x))[0]], -2
            )
        self.u, self.v = (self.manifold.random_tangent(self.x, generator=generator) for _ in range(2))
        self.noise = torch.randn(self.x.shape, **options)
        self.ambient = torch.randn(*batch, m, n, **options)

    def left(self, x: Tensor) -> Tensor:
        return x[..., : self.manifold.rows, :]

    def right(self, x: Tensor) -> Tensor:
        return x[..., self.manifold.rows :, :]

    def point(self, x: Tensor) -> Tensor:
        return self.left(x) @ self.right(x).mT

    def vector(self, x: Tensor, u: Tensor) -> Tensor:
        return self.left(u) @ self.right(x).mT + self.left(x) @ self.right(u).mT

    def project(self, x: Tensor, Z: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(self.point(x), full_matrices=False)
        P = U[..., : self.rank] @ U[..., : self.rank].mT
        Q = Vh[..., : self.rank, :].mT @ Vh[..., : self.rank, :]
        return P @ Z + Z @ Q - P @ Z @ Q

    def smallest(self) -> Tensor:
        return torch.linalg.svdvals(self.point(self.x))[..., self.rank - 1, None, None]


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("size", SIZES)
def test_vectors_are_those_of_the_dense_matrices(size, batch, device):
    d = Dense(*size, batch, device)
    m = d.manifold
    assert m.contains(d.x) and m.contains_tangent(d.x, d.u)
    close(m.inner(d.x, d.u, d.v), (d.vector(d.x, d.u) * d.vector(d.x, d.v)).sum((-2, -1)))
    close(m.norm(d.x, d.u), d.vector(d.x, d.u).norm(dim=(-2, -1)))
    kept = m.proju(d.x, d.noise)
    close(d.vector(d.x, kept), d.vector(d.x, d.noise))
    assert m.contains_tangent(d.x, kept, tolerance=1e-12)
    close(m.proju(d.x, kept), kept)
    moved = m.transp(d.x, d.y, d.u)
    assert m.contains_tangent(d.y, moved, tolerance=1e-12)
    close(d.vector(d.y, moved), d.project(d.y, d.vector(d.x, d.u)))
    for matrix in (d.ambient, LowRank.from_dense(d.ambient)):
        found = m.project_ambient(d.x, matrix)
        assert m.contains_tangent(d.x, found, tolerance=1e-12)
        close(d.vector(d.x, found), d.project(d.x, d.ambient))
    gradient = m.egrad2rgrad(d.x, d.noise)
    close(m.inner(d.x, gradient, d.u), (d.noise * d.u).sum((-2, -1)))
    assert m.tangent_lowrank(d.x, d.u).rank == 2 * d.rank
    close(m.tangent_lowrank(d.x, d.u).dense(), d.vector(d.x, d.u))


def test_the_projection_of_a_sparse_matrix():
    d = Dense(7, 5, 2)
    matrix = torch.where(d.ambient > 0.5, d.ambient, 0.0)
    close(d.vector(d.x, d.manifold.project_ambient(d.x, matrix.to_sparse())), d.project(d.x, matrix))


@pytest.mark.parametrize("size", SIZES)
def test_dimension_is_the_rank_of_the_tangent_vectors(size):
    d = Dense(*size)
    count = d.manifold.dimension(d.x) + 5
    vectors = d.manifold.random_tangent(d.x.expand(count, *d.x.shape), generator=seeded(1))
    assert torch.linalg.matrix_rank(d.vector(d.x, vectors).flatten(1)) == d.manifold.dimension(d.x)
    assert d.manifold.dimension(d.x) == (size[0] + size[1] - size[2]) * size[2]


def test_random_tangent_is_standard_normal():
    d = Dense(5, 4, 2)
    many = d.manifold.random_tangent(d.x.expand(20000, *d.x.shape), generator=seeded(3))
    flat = d.vector(d.x, many).flatten(1)
    spread = torch.linalg.eigvalsh(flat.mT @ flat / 20000).flip(0)
    assert (spread[:14] - 1).abs().max() < 0.1 and spread[14:].abs().max() < 1e-12


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("name", ["orthographic", "projection"])
@pytest.mark.parametrize("size", SIZES)
def test_retractions_are_of_second_order(size, name, equal, device):
    d = Dense(*size, (2,), device, equal)
    m = FixedRank(*size[:2], retraction=name)
    close(m.retr(d.x, 0 * d.u), d.x)
    assert m.contains(m.retr(d.x, 0.1 * d.u), tolerance=1e-10)

    def curve(time: Tensor) -> Tensor:
        return d.point(m.retr(d.x, time * d.u))

    with unchecked():
        start, one = torch.zeros((), dtype=DTYPE, device=device), torch.ones((), dtype=DTYPE, device=device)
        speed = torch.func.jvp(curve, (start,), (one,))[1]
        bend = torch.func.jacfwd(torch.func.jacrev(curve))(start)
    close(speed, d.vector(d.x, d.u), 1e-8)
    close(bend, m.second_fundamental_form(d.x, d.u, d.u).dense(), 1e-7)
    close(d.project(d.x, bend), torch.zeros_like(bend), 1e-7)


def test_what_the_retractions_promise():
    d = Dense(7, 5, 3, (2,))
    whole = d.point(d.x) + d.vector(d.x, d.u)
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    best = U[..., :3] * S[..., None, :3] @ Vh[..., :3, :]
    close(d.point(d.manifold.retr_projection(d.x, d.u)), best)
    step = 0.3 * d.u
    back = d.point(d.manifold.retr_orthographic(d.x, step)) - d.point(d.x)
    close(d.project(d.x, back), d.vector(d.x, step))
    assert d.manifold.retr_orthographic(d.x, -0.5 * d.x).isnan().all()


@pytest.mark.parametrize("size", [(5, 4, 2), (3, 3, 3), (4, 3, 1)])
def test_the_exponential_solves_the_geodesic_equation_of_dense_matrices(size):
    d = Dense(*size)
    U = d.u / d.manifold.norm(d.x, d.u) * d.smallest() * 0.8
    shape = d.point(d.x).shape

    def rhs(_, state):
        W, velocity = torch.tensor(state, dtype=DTYPE).reshape(2, *shape)
        left, values, right = torch.linalg.svd(W, full_matrices=False)
        left, values, right = left[:, : d.rank], values[: d.rank], right[: d.rank].mT
        out_left = velocity @ right - left @ (left.mT @ velocity @ right)
        out_right = velocity.mT @ left - right @ (right.mT @ velocity.mT @ left)
        return torch.stack([velocity, 2 * (out_left / values) @ out_right.mT]).flatten().numpy()

    begin = torch.stack([d.point(d.x), d.vector(d.x, U)]).flatten().numpy()
    end = solve_ivp(rhs, (0, 1), begin, method="DOP853", rtol=1e-12, atol=1e-13).y[:, -1]
    reached = d.manifold.expmap(d.x, U)
    close(d.point(reached), torch.tensor(end).reshape(2, *shape)[0], 1e-9)
    close(d.manifold.dist(d.x, reached), d.manifold.norm(d.x, U), 1e-10)


@pytest.mark.parametrize("share", [1e-9, 1e-3, 0.3, 1.0])
@pytest.mark.parametrize("equal", [False, True])
def test_logarithm_undoes_the_exponential(share, equal, device):
    d = Dense(6, 5, 2, (3,), device, equal)
    u = d.u / d.manifold.norm(d.x, d.u)[..., None, None] * d.smallest() * share
    y = d.manifold.expmap(d.x, u)
    found = d.manifold.logarithm(d.x, y)
    assert found.converged.all() and (found.residual <= 1e-12).all()
    # y is stored with a rounding of 1e-16, which is 1e-16 / share of its distance
    assert (d.manifold.norm(d.x, found.vector - u) <= (1e-11 + 1e-15 / share) * d.manifold.norm(d.x, u)).all()
    one = d.manifold.logmap(d.x[1], y[1])
    close(one, found.vector[1], 1e-10)


@pytest.mark.parametrize(
    ("dtype", "gap", "tolerance"), [(torch.float64, 1e-12, 1e-9), (torch.float32, 1e-6, 1e-4)]
)
def test_tiny_distances_have_all_their_digits(dtype, gap, tolerance):
    d = Dense(7, 5, 3)
    x = d.x.to(dtype)
    y = x + gap * d.u.to(dtype)
    a, b = x.double(), y.double()
    step = d.left(b - a) @ d.right(b).mT + d.left(a) @ d.right(b - a).mT
    with unchecked():
        found = d.manifold.dist(x, y)
    assert abs(float(found.double() / d.project(a, step).norm()) - 1) < tolerance


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_hessian_is_the_second_derivative_along_geodesics(size, equal):
    d = Dense(*size, equal=equal)
    weights, target = torch.rand(size[:2], dtype=DTYPE), torch.randn(size[:2], dtype=DTYPE)

    def f(x: Tensor) -> Tensor:
        return (weights * (d.point(x) - target) ** 2 + torch.sin(d.point(x))).sum()

    gradient, change = torch.func.jvp(torch.func.grad(f), (d.x,), (d.u,))
    hessian = d.manifold.ehess2rhess(d.x, gradient, change, d.u)
    assert d.manifold.contains_tangent(d.x, hessian, tolerance=1e-12)

    def along(time: Tensor) -> Tensor:
        return f(FixedRank(*size[:2], retraction="projection").retr(d.x, time * d.u))

    with unchecked():
        second = torch.func.jacfwd(torch.func.jacrev(along))(torch.zeros((), dtype=DTYPE))
    close(d.manifold.inner(d.x, hessian, d.u), second, 1e-7)
    other = d.manifold.ehess2rhess(d.x, gradient, torch.func.jvp(torch.func.grad(f), (d.x,), (d.v,))[1], d.v)
    close(d.manifold.inner(d.x, hessian, d.v), d.manifold.inner(d.x, other, d.u))


def test_weingarten_is_adjoint_to_the_second_fundamental_form():
    d = Dense(7, 5, 3, (2,))
    normal = d.ambient - d.project(d.x, d.ambient)
    map_ = d.manifold.weingarten(d.x, d.u, LowRank.from_dense(normal))
    form = d.manifold.second_fundamental_form(d.x, d.u, d.v).dense()
    close(d.manifold.inner(d.x, map_, d.v), (normal * form).sum((-2, -1)))
    with pytest.raises(ManifoldError, match="LowRank"):
        d.manifold.weingarten(d.x, d.u, d.x)


def test_gauge_invariance():
    d = Dense(7, 5, 3, (2,))
    m = d.manifold
    Q = torch.linalg.qr(torch.randn(2, 3, 3, dtype=DTYPE))[0]
    y = m.retr(d.x, 0.1 * d.u)
    pairs = [
        (m.inner(d.x, d.u, d.v), m.inner(d.x @ Q, d.u @ Q, d.v @ Q)),
        (m.dist(d.x, y), m.dist(d.x @ Q, y)),
        (d.point(m.retr(d.x, d.u)), d.point(m.retr(d.x @ Q, d.u @ Q))),
        (m.proju(d.x, d.noise) @ Q, m.proju(d.x @ Q, d.noise @ Q)),
        (m.egrad2rgrad(d.x, d.noise) @ Q, m.egrad2rgrad(d.x @ Q, d.noise @ Q)),
        (m.transp(d.x, d.y, d.u) @ Q, m.transp(d.x, d.y @ Q, d.u)),
    ]
    T = torch.randn(2, 3, 3, dtype=DTYPE) + 3 * torch.eye(3, dtype=DTYPE)

    def general(x: Tensor) -> Tensor:
        return torch.cat([d.left(x) @ T, d.right(x) @ torch.linalg.inv(T).mT], -2)

    with unchecked():
        pairs.append((m.inner(d.x, d.u, d.v), m.inner(general(d.x), general(d.u), general(d.v))))
        pairs.append((general(m.proju(d.x, d.noise)), m.proju(general(d.x), general(d.noise))))
    pairs.append((d.point(m.projx(general(d.x))), d.point(d.x)))
    for found, expected in pairs:
        close(found, expected, 1e-9)
    assert m.contains(m.projx(general(d.x)), tolerance=1e-10)
    close(m.projx(d.x), d.x)


@pytest.mark.parametrize("equal", [False, True])
def test_derivatives(equal):
    d = Dense(4, 3, 2, equal=equal)
    m, u = d.manifold, 0.1 * d.u
    with unchecked():
        for f, inputs in [
            (m.projx, (d.x,)), (m.proju, (d.x, d.noise)), (m.egrad2rgrad, (d.x, d.noise)), (m.norm, (d.x, u)),
            (m.ehess2rhess, (d.x, d.noise, d.v, u)), (m.transp, (d.x, d.y, u)),
            (m.retr_orthographic, (d.x, 0 * u)),
            (m.retr_projection, (d.x, 0 * u)), (m.retr_projection, (d.x, u)),
        ]:  # fmt: skip
            tracked = tuple(t.clone().requires_grad_() for t in inputs)
            assert gradcheck(f, tracked, check_forward_ad=True, fast_mode=True)
            assert gradgradcheck(f, tracked, fast_mode=True)


@pytest.mark.parametrize("equal", [False, True])
def test_derivatives_of_geodesics(equal):
    d = Dense(4, 3, 2, equal=equal)
    u = d.u / d.manifold.norm(d.x, d.u) * d.smallest() * 0.2
    y = d.manifold.retr(d.x, u)
    with unchecked():
        for f, inputs in [(d.manifold.expmap, (d.x, u)), (d.manifold.logmap, (d.x, y))]:
            assert gradcheck(f, tuple(t.clone().requires_grad_() for t in inputs), fast_mode=True)


def test_vmap_and_compile():
    d = Dense(6, 5, 2, (3,))
    m, u = d.manifold, 0.1 * d.u
    near = m.retr(d.x, 0.1 * u)
    pairs = [
        (m.projx, (d.x,)), (m.proju, (d.x, d.noise)), (m.inner, (d.x, u, d.v)), (m.transp, (d.x, d.y, u)),
        (m.ehess2rhess, (d.x, d.noise, d.v, u)), (m.retr_orthographic, (d.x, u)),
        (m.retr_projection, (d.x, u)),
        (m.expmap, (d.x, u)), (m.logmap, (d.x, near)),
    ]  # fmt: skip
    for f, inputs in pairs:
        expected = f(*inputs)
        close(torch.func.vmap(f)(*inputs), expected, 1e-9)
        close(torch.stack([f(*item) for item in zip(*inputs, strict=True)]), expected, 1e-9)

    closed = pairs[:-2]

    def run(*given: tuple[Tensor, ...]) -> list[Tensor]:
        return [f(*inputs) for (f, _), inputs in zip(closed, given, strict=True)]

    given = [inputs for _, inputs in closed]
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*given)
    for one, expected in zip(found, run(*given), strict=True):
        close(one, expected, 1e-9)
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype):
    m = FixedRank(6, 5)
    x = plain(m.random(2, 11, 2, dtype=torch.float32, generator=seeded())).to(dtype)
    u = 0.1 * m.random_tangent(x, generator=seeded(1))
    for found in (
        m.retr(x, u),
        m.proju(x, u),
        m.transp(x, m.projx(x), u),
        m.inner(x, u),
        m.egrad2rgrad(x, u),
    ):
        assert found.dtype == dtype and found.isfinite().all()


@pytest.mark.parametrize("optimizer", [geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
def test_geoopts_optimizers_work_on_it(optimizer):
    d = Dense(7, 5, 2)
    goal = d.point(d.y)
    point = geoopt.ManifoldParameter(d.x.clone(), manifold=d.manifold)
    adaptive = optimizer is geoopt.optim.RiemannianAdam
    steps = optimizer([point], lr=0.3 if adaptive else 0.05)
    for _ in range(150):
        steps.zero_grad()
        loss = (d.point(point) - goal).square().sum()
        loss.backward()
        steps.step()
    assert float(loss.detach()) < 1e-2 * float((d.point(d.x) - goal).square().sum())
    assert d.manifold.contains(point.detach(), tolerance=1e-6)


def test_bad_input_is_refused_with_words():
    d = Dense(5, 4, 2, (2,))
    m = d.manifold
    lame = d.x.clone()
    lame[1, :, 1] = 0
    skewed = torch.cat([2 * d.left(d.x), d.right(d.x)], -2)
    for call, words in [
        (lambda: m.random(9, 5), r"rank 5.*min\(rows, columns\) = 4"),
        (lambda: m.proju(d.x[..., :-1, :], d.u[..., :-1, :]), "shape"),
        (lambda: m.retr(skewed, d.u), "LᵀL = RᵀR"),
        (lambda: m.retr(lame, 0 * d.u), "item 1"),
        (lambda: m.retr(d.x, d.noise), "not tangent"),
        (lambda: m.retr(d.x * torch.nan, d.u), "not finite"),
        (lambda: m.egrad2rgrad(d.x, d.noise * torch.nan), "not finite"),
        (lambda: m.inner(d.x, d.u.float()), "dtype"),
        (lambda: m.expmap(d.x, -1.0 * m.proju(d.x, d.x)), "did not converge"),
        (lambda: FixedRank(0, 3), "rows"),
        (lambda: FixedRank(3, 3, retraction="qr"), "retraction"),
        (lambda: m.from_lowrank(LowRank.from_dense(d.ambient), 9), "rank"),
        (lambda: m.from_lowrank(LowRank.from_dense(d.ambient.mT)), "shape"),
    ]:
        with pytest.raises(ManifoldError, match=words):
            call()


def test_points_from_factors_and_back():
    d = Dense(6, 5, 2, (2,))
    W = LowRank.from_dense(d.ambient)
    x = d.manifold.from_lowrank(W, 2)
    assert d.manifold.contains(x, tolerance=1e-10)
    close(d.point(x), W.truncate(2).dense())
    factors = LowRank.from_factors(3 * d.left(d.x), d.right(d.x).mT)
    close(d.manifold.to_lowrank(d.manifold.from_lowrank(factors)).dense(), factors.dense())
