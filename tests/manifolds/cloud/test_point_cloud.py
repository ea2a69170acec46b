"""Manifolds learned from samples, against closed forms."""

import math

import pytest
import torch

from manifolds import properties
from manifolds.cloud.learned import LearnedManifold
from manifolds.cloud.point_cloud import PointCloud
from manifolds.errors import ManifoldError


def frame(width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=g)).Q


def sphere(count, dim, width, sigma=0.0, seed=0):
    """A unit sphere, turned at random, with noise in all directions."""
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(count, dim + 1, dtype=torch.float64, generator=g), dim=1)
    noise = sigma * torch.randn(count, width, dtype=torch.float64, generator=g)
    return x @ frame(width)[: dim + 1] + noise


def torus(count, seed=0):
    """The torus of radii 2 and 1, evenly by area."""
    g = torch.Generator().manual_seed(seed)
    a, b = 2 * math.pi * torch.rand(2, 8 * count, dtype=torch.float64, generator=g)
    keep = torch.rand(8 * count, dtype=torch.float64, generator=g) < (2 + b.cos()) / 3
    a, b = a[keep][:count], b[keep][:count]
    return torch.stack([(2 + b.cos()) * a.cos(), (2 + b.cos()) * a.sin(), b.sin()], 1)


def torus_foot(x):
    circle = 2 * torch.nn.functional.normalize(x * x.new_tensor([1, 1, 0]), dim=1)
    return circle + torch.nn.functional.normalize(x - circle, dim=1)


@pytest.fixture(scope="module")
def ball():
    """A unit 2-sphere in 8 dimensions, learned from 600 samples without noise."""
    return PointCloud.fit(sphere(600, 2, 8), dim=2)


@pytest.fixture(scope="module")
def ring():
    """A torus in 5 dimensions, learned from 1500 samples without noise."""
    return PointCloud.fit(torus(1500) @ frame(5)[:3], dim=2)


def test_feet_on_a_sphere_are_the_nearest_points(ball, device):
    cloud = PointCloud.rebuild(*ball.describe()).to(device)
    y = sphere(40, 2, 8, seed=3).to(device)
    x = y * torch.linspace(0.7, 1.3, 40, dtype=torch.float64, device=device)[:, None]
    found = cloud.project(x.reshape(2, 20, 8))
    torch.testing.assert_close(found.foot.reshape(40, 8), y, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.distance.flatten(), (x - y).norm(dim=-1), rtol=0, atol=1e-8)
    assert found.tangent.shape == (2, 20, 8, 2)
    assert (found.tangent.flatten(0, 1).mT @ y[..., None]).abs().max() < 1e-7
    assert found.inside.all()
    assert ball.reach == pytest.approx(1, rel=1e-3) and ball.rank == 3


def test_feet_on_a_torus_are_right_to_third_order_and_better_than_flat_charts(ring):
    y = torus(60, seed=5)
    x = y + 0.15 * torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = ring.project(x @ frame(5)[:3])
    wrong = (found.foot - torus_foot(x) @ frame(5)[:3]).norm(dim=-1)
    values, tensors = ring.describe()
    flat = PointCloud.rebuild(values, {**tensors, "forms": torch.zeros_like(tensors["forms"])})
    off = (flat.project(x @ frame(5)[:3]).foot - torus_foot(x) @ frame(5)[:3]).norm(dim=-1)
    assert wrong.median() < 4e-3 and wrong.median() < off.median() / 4
    assert found.inside.all()


def test_a_foot_is_its_own_foot_and_its_tangent_is_that_of_the_manifold(ring):
    x = torus(12, seed=6) @ frame(5)[:3] + 0.1 * frame(5)[3]
    found = ring.project(x)
    again = ring.projx(found.foot)
    torch.testing.assert_close(again, found.foot, rtol=1e-7, atol=1e-7)
    step = 1e-5 * found.tangent[..., 0]
    speed = (ring.projx(found.foot + step) - ring.projx(found.foot - step)) / 2e-5
    torch.testing.assert_close(speed, found.tangent[..., 0], rtol=0, atol=1e-6)
    single = ring.projx(ring.projx(x.float()))
    torch.testing.assert_close(single, ring.projx(x.float()), rtol=0, atol=1e-4)
    assert ring.projx(x.bfloat16()).dtype == torch.bfloat16


def test_derivatives_of_the_foot(ring):
    x = (torus(1, seed=7) @ frame(5)[:3] + 0.1 * frame(5)[3]).requires_grad_()
    assert torch.autograd.gradcheck(lambda state: ring.project(state).foot, (x,), atol=1e-5, fast_mode=True)
    v = torch.ones_like(x)
    ahead, back = (ring.projx(x.detach() + sign * 1e-6 * v) for sign in (1, -1))
    pushed = torch.func.jvp(ring.projx, (x.detach(),), (v,))[1]
    torch.testing.assert_close(pushed, (ahead - back) / 2e-6, rtol=1e-4, atol=1e-5)
    mapped = torch.func.vmap(lambda state: ring.project(state).foot)(x.detach())
    torch.testing.assert_close(mapped, ring.projx(x.detach()), rtol=0, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_averaged_out(dtype):
    samples = sphere(1500, 2, 64, sigma=0.02, seed=1).to(dtype)
    cloud = PointCloud.fit(samples, dim=2)
    off = 0.02 * 62**0.5
    assert cloud.noise == pytest.approx(off, rel=0.1)
    truth = torch.nn.functional.normalize(samples[:200].double() @ frame(64)[:3].T, dim=1) @ frame(64)[:3]
    feet = cloud.project(samples[:64].float()).foot.double()
    assert (feet - truth[:64]).norm(dim=-1).square().mean().sqrt() < off / 3


def test_curvature_of_a_sphere_and_transport(ball):
    x = ball.projx(sphere(4, 2, 8, seed=8))
    u, v = (ball.random_tangent(x, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    expected = -(u * v).sum(-1, keepdim=True) * x
    torch.testing.assert_close(ball.second_fundamental_form(x, u, v), expected, rtol=0, atol=0.05)
    y = ball.retr(x, 0.1 * u)
    torch.testing.assert_close(y, torch.nn.functional.normalize(x + 0.1 * u, dim=-1), rtol=0, atol=1e-7)
    carried = ball.transp(x, y, v)
    torch.testing.assert_close(carried, v - (v * y).sum(-1, keepdim=True) * y, rtol=0, atol=1e-7)


def test_at_the_edge_inside_is_what_has_samples(ball):
    g = torch.Generator().manual_seed(0)
    sheet = torch.rand(800, 2, dtype=torch.float64, generator=g)

    def rolled(at):
        return torch.stack([at[:, 0].cos(), at[:, 0].sin(), at[:, 1]], 1).float()

    cloud = PointCloud.fit(rolled(sheet), dim=2)
    near = torch.tensor([[0.5, 0.96], [0.5, 0.04], [0.96, 0.5], [0.04, 0.5], [0.5, 0.5]])
    beyond = torch.tensor([[0.5, 1.15], [0.5, -0.15], [1.15, 0.5], [-0.15, 0.5], [0.5, 1.4], [-0.4, 0.5]])
    assert cloud.project(rolled(near)).inside.all()
    assert not cloud.project(rolled(beyond)).inside.any()
    assert not ball.project(2.5 * sphere(3, 2, 8).float()).inside.any()


def test_feet_on_a_noisy_swiss_roll_are_nearer_to_it_than_the_samples_and_an_outlier_is_left_out():
    g = torch.Generator().manual_seed(4)
    at = torch.rand(1000, 2, dtype=torch.float64, generator=g)
    angle = math.pi * (1 + 2 * at[:, 0])
    clean = torch.stack([angle * angle.cos(), angle * angle.sin(), 6 * at[:, 1]], 1) @ frame(12)[:3]
    samples = clean + 0.05 * torch.randn(1000, 12, dtype=torch.float64, generator=g)
    outlier = 50 * frame(12)[:1]
    cloud = PointCloud.fit(torch.cat([samples, outlier]).float(), dim=2)
    some = (at[:, 1] - 0.5).abs() < 0.4
    feet = cloud.projx(samples[some][:150].float()).double()
    turn = torch.linspace(math.pi, 3 * math.pi, 20000, dtype=torch.float64)
    curve = torch.stack([turn * turn.cos(), turn * turn.sin()], 1)
    flat = feet @ frame(12).T
    off = (torch.cdist(flat[:, :2], curve).amin(1).square() + flat[:, 3:].square().sum(1)).mean().sqrt()
    assert cloud.outliers == 1 and not cloud.project(outlier.float()).inside.any()
    assert cloud.noise == pytest.approx(0.05 * 10**0.5, rel=0.15)
    assert off < cloud.noise / 3


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)])
def test_half_precision_is_right_to_its_rounding(ball, device, dtype, error):
    cloud = PointCloud.rebuild(*ball.describe()).to(device)
    y = sphere(20, 2, 8, seed=3).to(device)
    found = cloud.project((1.1 * y).to(dtype))
    assert found.foot.dtype == found.tangent.dtype == found.distance.dtype == dtype and found.inside.all()
    torch.testing.assert_close(found.foot.double(), y, rtol=0, atol=error)
    torch.testing.assert_close(found.distance.double(), torch.full_like(y[:, 0], 0.1), rtol=0, atol=error)
    assert (found.tangent.double().mT @ y[..., None]).abs().max() < 2 * error


def test_random_points_are_on_it_and_follow_the_generator(ball):
    one, two = (ball.random(3, 4, 8, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(one, two)
    torch.testing.assert_close(one.norm(dim=-1), torch.ones(3, 4, dtype=torch.float64), rtol=0, atol=1e-8)
    with pytest.raises(ManifoldError, match="width 8"):
        ball.random(3)


def test_anchors_and_their_graph(ball):
    indices, lengths = ball.graph()
    assert ball.anchors.shape == (len(ball.centres), 8) and indices.shape == lengths.shape
    between = (ball.anchors[indices] - ball.anchors[:, None]).norm(dim=-1)
    torch.testing.assert_close(between, lengths)
    assert "dim=2" in repr(ball) and ball.bytes > 0


def test_to_a_file_and_back_to_the_bit(ball, tmp_path):
    path = tmp_path / "ball.safetensors"
    ball.save(path)
    again = LearnedManifold.load(path)
    assert isinstance(again, PointCloud) and (again.noise, again.reach) == (ball.noise, ball.reach)
    x = 1.1 * sphere(5, 2, 8, seed=4).float()
    assert torch.equal(again.projx(x), ball.projx(x))
    assert abs(path.stat().st_size - ball.bytes) < 4096 and len(list(tmp_path.iterdir())) == 1
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ManifoldError, match="not a whole safetensors file"):
        LearnedManifold.load(path)
    with pytest.raises(ManifoldError, match="no file"):
        PointCloud.load(tmp_path / "none")


def test_the_dimension_is_estimated():
    assert PointCloud.fit(sphere(600, 2, 6).float()).dim == 2


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        (torch.randn(6, 5), {"dim": 2}, "6 points are too few; in dim 2 a chart needs 7"),
        (torch.randn(3, 5), {}, "too few to tell a dimension"),
        (torch.randn(50, 5), {"dim": 5}, "dim is 5 and the points have 5"),
        (
            torch.randn(50, 5),
            {"dim": 2, "neighbors": 50},
            "neighbors is 50; with 50 points in dim 2 it can be",
        ),
        (torch.randn(50, 5), {"dim": 2, "neighbors": 3}, "it can be 6 to 49"),
        (torch.full((50, 5), torch.nan), {"dim": 2}, "NaN"),
        (torch.zeros(0, 5), {"dim": 2}, "nothing in them"),
        (torch.ones(50, 5), {"dim": 1}, r"1 distinct points \(of 50\)"),
        (torch.randn(400, 3), {}, "no manifold with normal directions"),
        (torch.randn(70_000, 3), {"dim": 1, "neighbors": 6}, "neighbors is 6; it must be at least 18"),
        (torch.randn(600, 2000), {"dim": 500}, "no number is both: take a lower dim"),
    ],
)
def test_what_cannot_be_learned_is_refused(points, options, message):
    with pytest.raises(ManifoldError, match=message):
        PointCloud.fit(points, **options)


def test_another_width_is_refused(ball):
    with pytest.raises(ManifoldError, match="width 8"):
        ball.project(torch.zeros(3, 9))


def test_a_state_that_is_not_a_number_has_no_foot_and_spoils_no_other(ball):
    x = sphere(2, 2, 8, seed=2).float()
    found = ball.project(torch.stack([x[0], torch.full((8,), torch.nan), x[1]]))
    assert found.inside.tolist() == [True, False, True] and found.foot[1].isnan().all()
    torch.testing.assert_close(found.foot[[0, 2]], x, rtol=0, atol=1e-4)


def test_duplicates_a_constant_dimension_and_an_outlier_change_nothing(ball):
    samples = sphere(600, 2, 8)
    samples = torch.cat([samples, samples[:50], 30 * samples[:1]])
    samples = torch.nn.functional.pad(samples, (0, 1), value=5.0)
    cloud = PointCloud.fit(samples, dim=2)
    y = sphere(20, 2, 8, seed=9).float()
    foot = cloud.projx(torch.nn.functional.pad(1.1 * y, (0, 1), value=5.0))
    torch.testing.assert_close(foot[:, :8], y, rtol=0, atol=1e-4)
    torch.testing.assert_close(foot[:, 8], torch.full((20,), 5.0))
    assert cloud.outliers == 1 and cloud.noise < 1e-6
    assert not cloud.project(samples[-1]).inside


@pytest.mark.parametrize(
    "measure",
    [
        properties.projection_is_idempotent,
        properties.projection_is_self_adjoint,
        properties.tangent_dimension,
    ],
)
def test_projections_of_a_torus_keep_the_promises_of_a_manifold(ring, measure):
    x = ring.projx(torus(2, seed=11) @ frame(5)[:3])
    found = measure(ring, x, generator=torch.Generator().manual_seed(1))
    assert all(each.passed for each in found), [each for each in found if not each.passed]
