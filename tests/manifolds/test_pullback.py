import math

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import torch
from torch import nn

from manifolds.errors import ManifoldError
from manifolds.pulled_back import Pullback

F64 = torch.float64
BATCHES = [(), (3,), (2, 3)]


def seeded(*size, seed=0, dtype=F64, device="cpu"):
    return torch.randn(*size, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def sphere_chart(x, radius=1.0):
    """Longitude and latitude."""
    a, b = x[..., 0], x[..., 1]
    return radius * torch.stack([a.cos() * b.cos(), a.sin() * b.cos(), b.sin()], -1)


def torus_chart(x, big=2.0, small=0.7):
    a, b = x[..., 0], x[..., 1]
    ring = big + small * b.cos()
    return torch.stack([ring * a.cos(), ring * a.sin(), small * b.sin()], -1)


def paraboloid(x):
    return torch.cat([x, x.square().sum(-1, keepdim=True) / 2], -1)


def decoder(size=2, out=40, seed=0, dtype=F64, device="cpu"):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, out))
    return net.to(device, dtype).requires_grad_(False)


def fisher_matrix(logits):
    p = torch.softmax(logits, -1)
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


def dense_metric(f, x, middle=None):
    """JᵀMJ at one point, by reverse-mode Jacobians."""
    jacobian = torch.func.jacrev(lambda point: f(point[None])[0].flatten())(x).flatten(1)
    return jacobian.T @ (jacobian if middle is None else middle @ jacobian)


def sphere_distance(x, y):
    a, b = sphere_chart(x), sphere_chart(y)
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


# The metric


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_inner_product_of_a_linear_map_by_hand(batch, dtype, device):
    matrix = seeded(7, 4, seed=1, dtype=dtype, device=device)
    pull = Pullback(lambda x: x @ matrix.T)
    x, u, v = (seeded(*batch, 4, seed=s, dtype=dtype, device=device) for s in (2, 3, 4))
    expected = torch.einsum("...i,ij,...j->...", u, matrix.T @ matrix, v)
    assert pull.inner(x, u, v).shape == batch
    torch.testing.assert_close(pull.inner(x, u, v), expected)
    torch.testing.assert_close(pull.metric_vector(x, v), v @ matrix.T @ matrix)
    torch.testing.assert_close(pull.norm(x, u), (u @ matrix.T).norm(dim=-1))
    assert pull.inner(x, u, keepdim=True).shape == (*batch, 1)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_products_equal_the_dense_metric(mode, device):
    f = decoder(size=5, out=11, device=device)
    pull = Pullback(f, derivatives=mode, damping=0.1)
    x, v = seeded(3, 5, seed=1, device=device), seeded(3, 5, seed=2, device=device)
    for row in range(3):
        expected = dense_metric(f, x[row]) + 0.1 * torch.eye(5, dtype=F64, device=device)
        torch.testing.assert_close(pull.metric_vector(x, v)[row], expected @ v[row])
        torch.testing.assert_close(pull.metric(x)[row], expected)


def test_fisher_metric_is_the_dense_one_with_more_dimensions(device):
    f = decoder(size=4, out=12, device=device)
    pull = Pullback(lambda x: f(x).unflatten(-1, (2, 6)), "fisher")
    x, u, v = (seeded(4, seed=s, device=device) for s in (1, 2, 3))
    middle = torch.block_diag(*fisher_matrix(f(x).reshape(2, 6)))
    expected = dense_metric(f, x, middle)
    torch.testing.assert_close(pull.inner(x, u, v), u @ expected @ v)
    torch.testing.assert_close(pull.metric_vector(x, v), expected @ v)


def test_fisher_metric_holds_where_the_model_is_sure():
    pull = Pullback(lambda x: x * 200.0, "categorical")
    x, v = torch.tensor([1.0, 0.5, -1.0], dtype=F64), torch.tensor([0.0, 1.0, 2.0], dtype=F64)
    p = torch.softmax(200 * x, -1)
    expected = 200**2 * ((p * v * v).sum() - (p * v).sum() ** 2)
    torch.testing.assert_close(pull.inner(x, v), expected, rtol=1e-10, atol=0)


def gaussian_matrix(y):
    mean, deviation = y.chunk(2)
    return torch.diag(torch.cat([torch.exp(-2 * deviation), torch.full_like(mean, 2.0)]))


def test_gaussian_and_callable_metrics_are_the_dense_ones():
    f = decoder(size=3, out=8)
    x, u, v = (seeded(3, seed=s) for s in (1, 2, 3))
    expected = dense_metric(f, x, gaussian_matrix(f(x)))
    for metric in (
        "gaussian",
        lambda y, w: torch.vmap(gaussian_matrix)(y).matmul(w.unsqueeze(-1)).squeeze(-1),
    ):
        pull = Pullback(f, metric)
        torch.testing.assert_close(pull.inner(x, u, v), u @ expected @ v)
        torch.testing.assert_close(pull.metric_vector(x, v), expected @ v)


def test_the_metric_of_points_that_are_images():
    conv = nn.Conv2d(2, 3, 3, padding=1).to(F64).requires_grad_(False)
    pull = Pullback(lambda h: torch.tanh(conv(h)), ndim=3)
    x, u, v = (seeded(2, 2, 4, 4, seed=s) for s in (1, 2, 3))
    for row in range(2):
        dense = dense_metric(lambda h: torch.tanh(conv(h.reshape(-1, 2, 4, 4))), x[row].flatten())
        torch.testing.assert_close(pull.inner(x, u, v)[row], u[row].flatten() @ dense @ v[row].flatten())
    assert pull.dimension(x) == 32


def test_gradient_and_hessian_by_dense_christoffel_symbols():
    f = decoder(size=3, out=9)
    pull = Pullback(f, "fisher")
    x, u = seeded(3, seed=1), seeded(3, seed=2)

    def metric(point):
        return dense_metric(f, point, fisher_matrix(f(point)))

    def value(point):
        return (point.sin() * torch.tensor([1.0, 2.0, 3.0], dtype=F64)).sum() + point.prod()

    slopes = torch.func.jacfwd(metric)(x)  # [i, j, k] = ∂_k G_ij
    first = (slopes + slopes.permute(0, 2, 1) - slopes.permute(2, 0, 1)) / 2  # Γ_kij
    symbols = torch.linalg.solve(metric(x), first.flatten(1)).reshape(3, 3, 3)
    g, hessian = torch.func.grad(value)(x), torch.func.hessian(value)(x)
    torch.testing.assert_close(pull.egrad2rgrad(x, g), torch.linalg.solve(metric(x), g))
    torch.testing.assert_close(pull.christoffel(x, u), torch.einsum("kij,i,j->k", symbols, u, u))
    covariant = hessian - torch.einsum("kij,k->ij", symbols, g)
    torch.testing.assert_close(
        pull.ehess2rhess(x, g, hessian @ u, u), torch.linalg.solve(metric(x), covariant @ u)
    )


@pytest.mark.parametrize("metric", [None, "fisher", "gaussian"])
def test_christoffel_symbols_with_many_coordinates_by_conjugate_gradients(metric):
    f = decoder(size=40, out=80)
    linear = seeded(80, 40, seed=9)
    pull = Pullback(lambda x: f(x) + x @ linear.T, metric)
    few = Pullback(lambda x: f(x) + x @ linear.T, metric)
    x, g = 0.1 * seeded(2, 40, seed=1), seeded(2, 40, seed=2)
    dense = few.metric(x)
    torch.testing.assert_close(
        pull.egrad2rgrad(x, g), torch.linalg.solve(dense, g.unsqueeze(-1)).squeeze(-1), rtol=1e-6, atol=1e-8
    )


# Singular directions


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("out", "size", "k"), [(90, 70, 5), (30, 200, 6), (6, 5, 5), (3, 1, 1)])
def test_singular_directions_of_a_linear_map(batch, out, size, k, device):
    matrix = seeded(out, size, seed=1, device=device)
    generator = torch.Generator(device).manual_seed(0)
    found = Pullback(lambda x: x @ matrix.T).singular_directions(
        seeded(*batch, size, seed=2, device=device), k, generator=generator
    )
    _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    assert bool(found.converged.all())
    assert found.vectors.shape == (*batch, k, size)
    torch.testing.assert_close(found.values, values[:k].expand(*batch, k))
    ours = found.vectors.reshape(-1, k, size)[0]
    angles = scipy.linalg.subspace_angles(right[:k].T.cpu().numpy(), ours.T.cpu().numpy())
    assert angles.max() < 2e-8
    assert angles.max() <= float(found.angle.max()) + 1e-12
    torch.testing.assert_close(found.images, found.vectors @ matrix.T)
    torch.testing.assert_close(ours @ ours.T, torch.eye(k, dtype=F64, device=device))


@pytest.mark.parametrize("metric", [None, "fisher", "gaussian"])
def test_singular_directions_equal_the_dense_decomposition(metric):
    f = decoder(size=60, out=50)
    x = seeded(2, 60, seed=3)
    found = Pullback(f, metric).singular_directions(x, 4, generator=torch.Generator().manual_seed(1))
    assert bool(found.converged.all())
    for row in range(2):
        middle = {None: None, "fisher": fisher_matrix(f(x[row])), "gaussian": gaussian_matrix(f(x[row]))}[
            metric
        ]
        squares, vectors = torch.linalg.eigh(dense_metric(f, x[row], middle))
        torch.testing.assert_close(found.values[row], squares.flip(0)[:4].sqrt())
        angles = scipy.linalg.subspace_angles(vectors[:, -4:].numpy(), found.vectors[row].T.numpy())
        assert angles.max() < 1e-7


def test_singular_directions_of_a_spectrum_with_repeats_and_beyond_the_rank():
    left = torch.linalg.qr(seeded(80, 70, seed=1)).Q
    right = torch.linalg.qr(seeded(100, 70, seed=2)).Q
    spectrum = torch.zeros(70, dtype=F64)
    spectrum[:6] = torch.tensor([3.0, 3, 3, 2, 2, 1], dtype=F64)
    matrix = left * spectrum @ right.T
    found = Pullback(lambda x: x @ matrix.T).singular_directions(torch.zeros(100, dtype=F64), 9)
    assert bool(found.converged)
    torch.testing.assert_close(found.values, spectrum[:9], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.vectors @ found.vectors.T, torch.eye(9, dtype=F64), rtol=0, atol=1e-12)
    angles = scipy.linalg.subspace_angles(right[:, :6].numpy(), found.vectors[:6].T.numpy())
    assert angles.max() < 1e-8


def test_singular_directions_in_single_precision_and_of_the_zero_map():
    matrix = seeded(64, 300, dtype=torch.float32) * torch.logspace(0, -3, 300)
    found = Pullback(lambda x: x @ matrix.T).singular_directions(torch.zeros(300), 5)
    torch.testing.assert_close(found.values, torch.linalg.svdvals(matrix)[:5])
    zero = Pullback(lambda x: x @ matrix.T * 0).singular_directions(torch.zeros(2, 300), 3)
    assert zero.values.abs().max() == 0 and bool(zero.converged.all())


def test_small_singular_values_keep_their_digits():
    matrix = torch.diag(torch.tensor([1.0, 1e-5, 1e-10], dtype=F64))
    found = Pullback(lambda x: x @ matrix.T).singular_directions(torch.zeros(3, dtype=F64), 3)
    torch.testing.assert_close(found.values, matrix.diagonal(), rtol=1e-12, atol=0)


def test_unconverged_directions_say_so():
    matrix = seeded(500, 500)
    found = Pullback(lambda x: x @ matrix.T).singular_directions(
        torch.zeros(500, dtype=F64), 8, max_iterations=2
    )
    assert not bool(found.converged) and found.iterations == 2 and found.angle > 1e-3


def test_same_seed_same_bits_and_each_item_of_a_batch_as_alone():
    f = decoder(size=90, out=70)
    x = seeded(3, 90, seed=3)
    pull = Pullback(f)

    def directions(points):
        return pull.singular_directions(points, 3, generator=torch.Generator().manual_seed(5))

    assert torch.equal(directions(x).vectors, directions(x).vectors)
    for row in range(3):
        torch.testing.assert_close(directions(x).values[row], directions(x[row]).values, rtol=1e-9, atol=0)


def test_singular_values_are_differentiable():
    f = decoder(size=3, out=6)
    pull = Pullback(f, "fisher")
    x = seeded(3, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda point: pull.singular_directions(point, 2).values, x)


# Lengths and energies


@pytest.mark.parametrize("batch", BATCHES)
def test_length_and_energy_of_a_line_through_a_linear_map(batch):
    matrix = seeded(6, 3, seed=1)
    pull = Pullback(lambda x: x @ matrix.T)
    x, step = seeded(*batch, 3, seed=2), seeded(*batch, 3, seed=3)
    path = x.unsqueeze(-2) + torch.linspace(0, 1, 9, dtype=F64)[:, None] * step.unsqueeze(-2)
    size = (step @ matrix.T).norm(dim=-1)
    torch.testing.assert_close(pull.length(path), size)
    torch.testing.assert_close(pull.energy(path), size**2)


@pytest.mark.parametrize("metric", [None, "fisher", "gaussian"])
def test_length_and_energy_converge_to_integrals(metric):
    f = decoder(size=2, out=6)
    pull = Pullback(f, metric)

    def curve(t):
        return torch.stack([torch.cos(2 * t), t * t], -1)

    def speed2(t):
        t = torch.tensor(t, dtype=F64)
        x, v = torch.func.jvp(curve, (t,), (torch.ones_like(t),))
        middle = {None: None, "fisher": fisher_matrix(f(x)), "gaussian": gaussian_matrix(f(x))}[metric]
        return float(v @ dense_metric(f, x, middle) @ v)

    energy = scipy.integrate.quad(speed2, 0, 1, epsabs=1e-10)[0]
    length = scipy.integrate.quad(lambda t: speed2(t) ** 0.5, 0, 1, epsabs=1e-10)[0]
    errors = []
    for count in (33, 65):
        path = curve(torch.linspace(0, 1, count, dtype=F64))
        errors.append([abs(float(pull.energy(path)) - energy), abs(float(pull.length(path)) - length)])
    ratios = np.array(errors[0]) / np.array(errors[1])
    assert (ratios > 3.5).all() and max(errors[1]) < 2e-3 * energy


def test_short_segments_keep_their_digits():
    offset = 1e3  # the images are far larger than their differences
    pull = Pullback(lambda x: sphere_chart(x) + offset)
    x = torch.tensor([0.3, 0.5], dtype=F64)
    step = torch.tensor([2e-11, 1e-11], dtype=F64)
    path = torch.stack([x, x + step])
    taken = path[1] - path[0]
    expected = ((taken[0] * math.cos(0.5)) ** 2 + taken[1] ** 2) ** 0.5
    assert abs(float(pull.length(path)) / float(expected) - 1) < 1e-9


# Geodesics


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_geodesics_of_the_sphere_are_great_circles(batch, dtype, device):
    pull = Pullback(sphere_chart)
    x = torch.tensor([0.1, 0.7], dtype=dtype, device=device) + 0.1 * seeded(
        *batch, 2, dtype=dtype, device=device
    )
    y = torch.tensor([1.4, 0.9], dtype=dtype, device=device) + 0.1 * seeded(
        *batch, 2, seed=1, dtype=dtype, device=device
    )
    exact = sphere_distance(x, y)
    found = pull.geodesic(x, y, steps=40)
    assert found.path.shape == (*batch, 41, 2) and bool(found.converged.all())
    torch.testing.assert_close(found.path[..., 0, :], x)
    torch.testing.assert_close(found.path[..., -1, :], y)
    chords = 80 * torch.sin(exact / 80)  # 40 chords of a great circle, equally long
    torch.testing.assert_close(found.length, chords, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=0)
    torch.testing.assert_close(found.energy, found.length**2)
    torch.testing.assert_close(pull.energy(found.path), found.energy)
    normal = torch.linalg.cross(sphere_chart(x), sphere_chart(y))
    off = (sphere_chart(found.path) * normal.unsqueeze(-2)).sum(-1).abs().max()
    assert off < (1e-4 if dtype == torch.float32 else 1e-8)


@pytest.mark.parametrize(("metric", "mode"), [(None, "reverse"), ("fisher", "forward")])
def test_geodesics_through_a_decoder_solve_the_boundary_value_problem(metric, mode):
    f = decoder(size=2, out=10, seed=3)
    pull = Pullback(f, metric, derivatives=mode)
    x, y = torch.tensor([-1.0, -0.5], dtype=F64), torch.tensor([1.0, 0.8], dtype=F64)

    def metric_at(point):
        middle = {None: None, "fisher": fisher_matrix(f(point)), "gaussian": gaussian_matrix(f(point))}[
            metric
        ]
        return dense_metric(f, point, middle)

    def turn(point, v):
        slopes = torch.func.jacfwd(metric_at)(point)
        along = torch.einsum("ijk,j,k->i", slopes, v, v)
        uphill = torch.einsum("ijk,i,j->k", slopes, v, v)
        return -torch.linalg.solve(metric_at(point), along - uphill / 2)

    def field(_, state):
        points, velocities = torch.tensor(state[:2].T), torch.tensor(state[2:].T)
        return torch.cat([velocities, torch.vmap(turn)(points, velocities)], 1).numpy().T

    mesh = np.linspace(0, 1, 9)
    line = (x[:, None] + torch.tensor(mesh) * (y - x)[:, None]).numpy()
    start = np.concatenate([line, np.repeat((y - x)[:, None].numpy(), 9, 1)])
    solved = scipy.integrate.solve_bvp(
        field, lambda a, b: np.concatenate([a[:2] - x.numpy(), b[:2] - y.numpy()]), mesh, start, tol=1e-6
    )
    assert solved.success
    velocity = torch.tensor(solved.sol(0.0)[2:])
    torch.testing.assert_close(pull.logmap(x, y), velocity, rtol=0, atol=2e-4)
    found = pull.geodesic(x, y, steps=48)
    assert bool(found.converged)
    torch.testing.assert_close(found.path[24], torch.tensor(solved.sol(0.5)[:2]), rtol=0, atol=2e-3)


def test_geodesics_of_many_coordinates_by_products_alone():
    """A sphere of dimension 40 in stereographic coordinates: closed-form distances."""

    def chart(x):
        square = x.square().sum(-1, keepdim=True)
        return torch.cat([2 * x, square - 1], -1) / (1 + square)

    x, y = 0.1 * seeded(2, 40, seed=1), 0.1 * seeded(2, 40, seed=2)
    exact = 2 * torch.atan2((chart(x) - chart(y)).norm(dim=-1), (chart(x) + chart(y)).norm(dim=-1))
    pull = Pullback(chart)
    found = pull.geodesic(x, y, steps=20)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.length, 40 * torch.sin(exact / 40), rtol=1e-10, atol=0)
    logarithm = pull.logarithm(x, y, steps=16)
    assert bool(logarithm.converged.all())
    torch.testing.assert_close(pull.norm(x, logarithm.vector), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(pull.expmap(x, logarithm.vector), y, rtol=0, atol=1e-5)


def test_every_pair_of_a_batch_has_its_own_search():
    pull = Pullback(decoder(size=2, out=20, seed=1))
    x, y = 2 * seeded(4, 2, seed=1), 2 * seeded(4, 2, seed=2)
    y[0] = x[0]
    together = pull.geodesic(x, y, steps=12)
    assert together.energy[0] == 0 and bool(together.converged[0])
    for row in range(4):
        alone = pull.geodesic(x[row], y[row], steps=12)
        torch.testing.assert_close(together.path[row], alone.path, rtol=1e-9, atol=1e-9)
        assert together.iterations[row] == alone.iterations


def test_an_initial_path_chooses_the_way_round():
    pull = Pullback(lambda x: torch.stack([x[..., 0], x[..., 1], 3 * torch.exp(-2 * x.square().sum(-1))], -1))
    x, y = torch.tensor([-1.5, 0.0], dtype=F64), torch.tensor([1.5, 0.0], dtype=F64)
    t = torch.linspace(0, 1, 33, dtype=F64)
    over = torch.stack([-1.5 + 3 * t, 0.8 * torch.sin(math.pi * t)], -1)
    left = pull.geodesic(x, y, steps=32, initial=over)
    right = pull.geodesic(x, y, steps=32, initial=over * torch.tensor([1.0, -1.0], dtype=F64))
    straight = pull.geodesic(x, y, steps=32)
    assert left.path[16, 1] > 0.5 and right.path[16, 1] < -0.5 and straight.path[16, 1].abs() < 1e-6
    assert bool(straight.converged)  # the way over the top is a geodesic too, though not a shortest
    torch.testing.assert_close(left.energy, right.energy)
    assert bool(left.converged) and left.energy < straight.energy


def test_unconverged_geodesics_say_so():
    pull = Pullback(decoder(size=2, out=30, seed=4))
    found = pull.geodesic(*(3 * seeded(2, 2, seed=1)), steps=30, max_iterations=1)
    assert not bool(found.converged) and found.residual > 1e-6


def test_stochman_agrees_on_energies():
    manifold = pytest.importorskip("stochman.manifold")
    f = decoder(size=2, out=25, seed=6)

    class Embedded(manifold.EmbeddedManifold):
        def embed(self, points, jacobian=False):
            return f(points)

    path = seeded(3, 15, 2, seed=1)
    torch.testing.assert_close(
        Pullback(f).energy(path), Embedded().curve_energy(path.clone(), reduction="none")
    )
    torch.testing.assert_close(Pullback(f).length(path), Embedded().curve_length(path.clone()))


# Exponential and logarithm


@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_exponential_of_the_sphere_by_rodrigues(batch):
    pull = Pullback(sphere_chart)
    x = torch.tensor([0.2, 0.4], dtype=F64) + 0.1 * seeded(*batch, 2, seed=1)
    u = 0.3 * seeded(*batch, 2, seed=2)
    position, velocity = torch.func.jvp(sphere_chart, (x,), (u,))
    speed = velocity.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(pull.norm(x, u), speed.squeeze(-1))
    expected = torch.cos(speed) * position + torch.sin(speed) * velocity / speed
    torch.testing.assert_close(sphere_chart(pull.expmap(x, u)), expected, rtol=0, atol=1e-11)
    ended = pull.exponential(x, u)
    carried = torch.func.jvp(sphere_chart, (ended.point,), (ended.velocity,))[1]
    torch.testing.assert_close(carried, -torch.sin(speed) * speed * position + torch.cos(speed) * velocity)
    torch.testing.assert_close(pull.logmap(x, pull.expmap(x, u)), u, rtol=0, atol=1e-9)


def test_exponential_of_the_hyperbolic_plane_through_a_gaussian():
    """Fisher's metric of normal distributions: distance in closed form (Atkinson and Mitchell 1981)."""
    pull = Pullback(lambda x: x, "gaussian")
    x, y = (
        torch.tensor([[0.3, -0.2], [0.0, 0.0]], dtype=F64),
        torch.tensor([[1.1, 0.4], [0.0, 0.5]], dtype=F64),
    )
    (m, s), (n, t) = (x[:, 0], x[:, 1].exp()), (y[:, 0], y[:, 1].exp())
    exact = 2**0.5 * torch.acosh(1 + ((m - n) ** 2 / 2 + (s - t) ** 2) / (2 * s * t))
    velocity = pull.logmap(x, y)
    torch.testing.assert_close(pull.norm(x, velocity), exact, rtol=1e-10, atol=0)
    torch.testing.assert_close(pull.expmap(x, velocity), y, rtol=0, atol=1e-9)
    coarse, fine = (abs(pull.geodesic(x, y, steps=n).length - exact)[0] for n in (16, 32))
    assert coarse / fine > 3.5


def test_distance_of_distributions_is_the_arc_on_the_sphere():
    pull = Pullback(lambda x: torch.cat([x, torch.zeros_like(x[..., :1])], -1), "fisher")
    x, y = seeded(3, 2, seed=1), seeded(3, 2, seed=2)
    p, q = (torch.softmax(torch.cat([z, torch.zeros_like(z[..., :1])], -1), -1) for z in (x, y))
    torch.testing.assert_close(pull.dist(x, y), 2 * torch.acos((p * q).sqrt().sum(-1)), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("dtype", "gap", "tolerance"), [(F64, 1e-12, 1e-9), (torch.float32, 1e-6, 1e-4)])
def test_tiny_distances_to_full_relative_precision(dtype, gap, tolerance):
    pull = Pullback(sphere_chart)
    x = torch.tensor([0.0, 0.0], dtype=dtype)
    y = x + gap * torch.tensor([3.0, 4.0], dtype=dtype)
    assert abs(float(pull.dist(x, y)) / (5 * gap) - 1) < tolerance
    torch.testing.assert_close(pull.logmap(x, y), y - x, rtol=tolerance, atol=0)
    assert abs(float(pull.geodesic(x, y).length) / (5 * gap) - 1) < tolerance
    assert pull.dist(x, x) == 0 and pull.logmap(x, x).abs().max() == 0


def test_a_long_exponential_is_cut_into_pieces():
    pull = Pullback(torus_chart)
    x, u = torch.tensor([0.3, 0.2], dtype=F64), torch.tensor([2.0, 5.0], dtype=F64)

    def field(_, state):
        b, da, db = state[1], state[2], state[3]
        ring, slope = 2 + 0.7 * np.cos(b), -0.7 * np.sin(b)
        return [da, db, -2 * slope / ring * da * db, ring * slope / 0.49 * da * da]

    solved = scipy.integrate.solve_ivp(field, (0, 1), [0.3, 0.2, 2.0, 5.0], rtol=1e-12, atol=1e-12)
    found = pull.exponential(x, u)
    assert bool(found.converged) and found.pieces > 1
    np.testing.assert_allclose(found.point.numpy(), solved.y[:2, -1], atol=1e-8)
    np.testing.assert_allclose(found.velocity.numpy(), solved.y[2:, -1], atol=1e-7)


def test_transport_is_the_projection_of_the_image():
    pull = Pullback(sphere_chart)
    x, y, v = (0.4 * seeded(3, 2, seed=s) for s in (1, 2, 3))
    image = torch.func.jvp(sphere_chart, (x,), (v,))[1]
    carried = torch.func.jvp(sphere_chart, (y,), (pull.transp(x, y, v),))[1]
    place = sphere_chart(y)
    torch.testing.assert_close(carried, image - (image * place).sum(-1, keepdim=True) * place)


# Curvature


@pytest.mark.parametrize("radius", [1.0, 0.25])
def test_curvature_of_the_sphere(radius):
    pull = Pullback(lambda x: sphere_chart(x, radius))
    x, u, v = (0.5 * seeded(3, 2, seed=s) for s in (1, 2, 3))
    torch.testing.assert_close(pull.curvature(x, v), torch.full((3,), 1 / radius, dtype=F64))
    torch.testing.assert_close(pull.sectional_curvature(x, u, v), torch.full((3,), 1 / radius**2, dtype=F64))
    image = torch.func.jvp(pull.f, (x,), (v,))[1]
    expected = -image.square().sum(-1, keepdim=True) * pull.f(x) / radius**2
    torch.testing.assert_close(pull.second_fundamental_form(x, v, v), expected)


def test_curvature_of_the_torus_and_of_the_paraboloid():
    torus = Pullback(torus_chart)
    x = seeded(4, 2, seed=1)
    around, across = torch.tensor([1.0, 0.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    ring = 2 + 0.7 * x[:, 1].cos()
    torch.testing.assert_close(torus.curvature(x, across), torch.full((4,), 1 / 0.7, dtype=F64))
    torch.testing.assert_close(torus.curvature(x, around), (x[:, 1].cos() / ring).abs())
    torch.testing.assert_close(torus.sectional_curvature(x, around, across), x[:, 1].cos() / (0.7 * ring))
    bowl = Pullback(paraboloid)
    v = torch.tensor([0.6, 0.8], dtype=F64)
    torch.testing.assert_close(bowl.curvature(torch.zeros(2, dtype=F64), v), torch.tensor(1.0, dtype=F64))
    square = x.square().sum(-1)
    torch.testing.assert_close(bowl.sectional_curvature(x, around, across), (1 + square) ** -2)
    root = (1 + square).sqrt()
    radial = bowl.curvature(x, x)
    torch.testing.assert_close(radial, root**-3)


def test_curvature_does_not_depend_on_coordinates_and_is_zero_for_linear_maps():
    f, mix = decoder(size=2, out=9, seed=2), torch.tensor([[2.0, 0.3], [-0.4, 0.7]], dtype=F64)
    x, v = seeded(3, 2, seed=1), seeded(3, 2, seed=2)
    other = Pullback(lambda z: f(z.sinh() @ mix.T))
    z = torch.asinh(x @ torch.linalg.inv(mix).T)
    w = (v @ torch.linalg.inv(mix).T) / z.cosh()
    for metric in (None, "fisher", "gaussian"):
        here = Pullback(lambda y: torch.nn.functional.pad(f(y), (0, 1)), metric)
        there = Pullback(lambda y: torch.nn.functional.pad(other.f(y), (0, 1)), metric)
        torch.testing.assert_close(here.curvature(x, v), there.curvature(z, w), rtol=1e-8, atol=0)
    matrix = seeded(6, 2)
    assert Pullback(lambda y: y @ matrix.T).curvature(x, v).abs().max() < 1e-12


def test_a_totally_geodesic_image_has_no_curvature_among_distributions():
    """2 √p runs along a great circle where the odds of two outcomes alone change."""
    pull = Pullback(lambda x: torch.cat([x, torch.zeros_like(x), torch.full_like(x, -500.0)], -1), "fisher")
    assert pull.curvature(torch.tensor([0.7], dtype=F64), torch.ones(1, dtype=F64)) < 1e-10


# Derivatives, transforms, and refusals


@pytest.mark.parametrize("metric", [None, "gaussian"])
def test_derivatives_of_geodesics_and_logarithms(metric):
    f = decoder(size=2, out=6, seed=5)
    pull = Pullback(f, metric)
    x, y = (0.5 * seeded(2, seed=s) for s in (1, 2))
    x.requires_grad_()
    y.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda a, b: pull.geodesic(a, b, steps=4, tolerance=1e-10).path, (x, y), atol=1e-5, fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda a, b: pull.geodesic(a, b, steps=4, tolerance=1e-10).length, (x, y), atol=1e-5, fast_mode=True
    )
    assert torch.autograd.gradcheck(pull.logmap, (x, y), atol=1e-5, fast_mode=True)


def test_derivatives_of_the_other_operations():
    pull = Pullback(decoder(size=2, out=6, seed=5), "fisher")
    x, u, v = (0.4 * seeded(2, seed=s).requires_grad_() for s in (1, 2, 3))
    for operation in (
        pull.inner,
        pull.metric_vector,
        pull.norm,
        pull.egrad2rgrad,
        pull.christoffel,
        pull.expmap,
    ):
        arguments = (x, u, v) if operation == pull.inner else (x, u)
        assert torch.autograd.gradcheck(
            operation, [a.detach().requires_grad_() for a in arguments], atol=1e-5, fast_mode=True
        )
    assert torch.autograd.gradgradcheck(pull.inner, (x.detach().requires_grad_(), u.detach(), v.detach()))
    assert torch.autograd.gradcheck(pull.curvature, (x.detach().requires_grad_(), v.detach()), atol=1e-5)


def test_operations_under_vmap():
    pull = Pullback(sphere_chart)
    x, u = 0.4 * seeded(4, 2, seed=1), 0.4 * seeded(4, 2, seed=2)
    for operation in (
        pull.inner,
        pull.norm,
        pull.metric_vector,
        pull.egrad2rgrad,
        pull.christoffel,
        pull.expmap,
    ):
        torch.testing.assert_close(torch.vmap(operation)(x, u), operation(x, u), rtol=1e-8, atol=1e-10)


def test_half_precision_and_broadcasting():
    matrix = seeded(5, 3, dtype=torch.float32)
    pull = Pullback(lambda x: x @ matrix.T)
    x, u = seeded(3, dtype=torch.float32).bfloat16(), seeded(4, 3, seed=1, dtype=torch.float32).bfloat16()
    assert pull.inner(x, u).dtype == torch.bfloat16 and pull.inner(x, u).shape == (4,)
    torch.testing.assert_close(pull.inner(x, u), (u.float() @ matrix.T).square().sum(-1).bfloat16())


def test_damping_is_the_metric_of_the_map_with_its_input():
    f = decoder(size=4, out=3)  # rank 3 at most
    pull = Pullback(f, damping=0.25)
    other = Pullback(lambda x: torch.cat([f(x), 0.5 * x], -1))
    x, u = seeded(2, 4, seed=1), seeded(2, 4, seed=2)
    for name in ("metric_vector", "norm", "expmap", "egrad2rgrad"):
        torch.testing.assert_close(getattr(pull, name)(x, u), getattr(other, name)(x, u))
    with pytest.raises(ManifoldError, match="damping"):
        Pullback(f).egrad2rgrad(x, u)


@pytest.mark.parametrize("broken", [lambda x: x[0], lambda x: x.sum(), lambda x: (x, x), lambda x: x.long()])
def test_maps_that_do_not_fit_are_refused(broken):
    with pytest.raises(ManifoldError, match="gave"):
        Pullback(broken).energy(seeded(5, 3))


def test_refusals_say_what_is_wrong():
    pull = Pullback(lambda x: x * 2)
    x = seeded(4, 3)
    with pytest.raises(ManifoldError, match="k is 4"):
        pull.singular_directions(x, 4)
    with pytest.raises(ManifoldError, match="shape"):
        pull.geodesic(x, x[:, :2])
    with pytest.raises(ManifoldError, match="NaN or infinite"):
        Pullback(lambda x: x.log()).energy(-x.abs())
    with pytest.raises(ManifoldError, match="not on the manifold"):
        pull.norm(x * math.nan, x)
    with pytest.raises(ManifoldError, match="two nodes"):
        pull.length(x[:1])
    with pytest.raises(ManifoldError, match="steps is 0"):
        pull.geodesic(x, x, steps=0)
    with pytest.raises(ManifoldError, match="initial has shape"):
        pull.geodesic(x, x, steps=4, initial=seeded(4, 4, 3))
    with pytest.raises(ManifoldError, match="output_metric is 'fischer'"):
        Pullback(lambda x: x, "fischer")
    with pytest.raises(ManifoldError, match="mixes the items"):
        Pullback(nn.BatchNorm1d(3).double()).geodesic(x, x + 1)
    with pytest.raises(ManifoldError, match="of the shape of v"):
        Pullback(lambda x: x, lambda y, v: v[..., :1]).norm(x, x)
    with pytest.raises(ManifoldError, match="n means"):
        Pullback(lambda x: x, "gaussian").norm(x, x)
