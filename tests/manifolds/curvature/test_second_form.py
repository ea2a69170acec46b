"""The second fundamental form of samples against closed forms, on draws that nothing was tuned on."""

import math

import numpy as np
import pytest
import torch

from experiments.benchmarks import sampled_shapes as shapes
from manifolds.curvature import second_fundamental_form
from manifolds.errors import ManifoldError

AMBIENT = 128


def generator(seed):
    return torch.Generator().manual_seed(seed)


def estimate(sample, *, neighbors, count, noise=0.0, ambient=AMBIENT, seed=0, device="cpu"):
    placed = sample.embedded(ambient, noise, generator(1000 + seed))
    at = torch.randperm(len(placed.points), generator=generator(2000 + seed))[:count]
    found = second_fundamental_form(
        placed.points.to(device), at.to(device), dim=sample.dim, neighbors=neighbors
    )
    return placed, at, found


def median_error(found, truth):
    return float(((found - truth).abs() / truth.abs()).median())


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize(
    ("dim", "n", "neighbors", "count"), [(5, 5000, 100, 200), (10, 20000, 300, 40), (20, 20000, 600, 24)]
)
def test_spheres_within_three_percent(dim, n, neighbors, count, noise, device):
    sample = shapes.sphere(n, dim, generator(dim))
    _, _, found = estimate(sample, neighbors=neighbors, count=count, noise=noise, device=device)
    lengths = found.mean_curvature.norm(dim=1).cpu()
    assert found.reliable.all()
    assert found.mean_curvature.shape == (count, AMBIENT) and found.scalar.shape == (count,)
    limit = 0.03 if noise else 1e-6
    for value in (lengths, found.sectional.cpu()):
        assert abs(float(value.median()) - 1) < limit
        assert median_error(value, torch.ones(count)) < 1.2 * limit
    torch.testing.assert_close(found.scalar, found.sectional * dim * (dim - 1))


def test_mean_curvature_points_to_the_centre():
    placed, at, found = estimate(shapes.sphere(5000, 5, generator(1), radius=2.0), neighbors=100, count=20)
    wanted = -placed.points[at] / 4
    torch.testing.assert_close(found.mean_curvature, wanted, atol=1e-6, rtol=1e-6)


def test_torus_gaussian_curvature():
    placed, at, found = estimate(shapes.torus(5000, generator(2)), neighbors=50, count=400)
    both = torch.stack([found.sectional, placed.sectional[at]])
    assert float(torch.corrcoef(both)[0, 1]) >= 0.99


def test_torus_gaussian_curvature_with_noise():
    placed, at, found = estimate(shapes.torus(5000, generator(2)), neighbors=100, count=300, noise=0.01)
    both = torch.stack([found.sectional, placed.sectional[at]])[:, found.reliable]
    assert both.shape[1] > 290 and float(torch.corrcoef(both)[0, 1]) >= 0.99


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_ellipsoid(noise):
    placed, at, found = estimate(
        shapes.ellipsoid(20000, 10, generator(3)), neighbors=300, count=40, noise=noise
    )
    assert median_error(found.mean_curvature.norm(dim=1), placed.mean_curvature[at]) < 0.10


@pytest.mark.parametrize("neighbors", [200, 300])
def test_clifford_torus(neighbors):
    placed, at, found = estimate(shapes.clifford_torus(20000, 8, generator(4)), neighbors=neighbors, count=60)
    assert found.reliable.all()
    assert median_error(found.mean_curvature.norm(dim=1), placed.mean_curvature[at]) < 0.01
    assert float(found.sectional.abs().median()) < 0.05


def plain_fit(points, at, dim, neighbors, tilts):
    """Normal parts on products of tangential ones, by numpy, with the tangent of a PCA; |H| at each point."""
    points, found = points.numpy(), []
    first, second = np.triu_indices(dim)
    for base in points[at.numpy()]:
        near = points[np.argsort(np.linalg.norm(points - base, axis=1))[: neighbors + 1]] - base
        tangent = np.linalg.svd(near - near.mean(0), full_matrices=False)[2][:dim].T
        for step in range(tilts + 1):
            flat = near @ tangent
            products = flat[:, first] * flat[:, second] * np.where(first == second, 0.5, 1.0)
            design = np.concatenate([np.ones((len(near), 1)), flat, products], 1)
            values = np.linalg.lstsq(design, near - flat @ tangent.T, rcond=None)[0]
            if step < tilts:
                tangent = np.linalg.qr(tangent + values[1 : 1 + dim].T)[0]
        found.append(np.linalg.norm(values[1 + dim :][first == second].sum(0)) / dim)
    return torch.tensor(np.array(found))


def test_paraboloid_no_worse_than_the_plain_fit():
    placed, at, found = estimate(shapes.paraboloid(5000, 5, generator(5)), neighbors=100, count=60)
    plain = plain_fit(placed.points, at, 5, 100, tilts=2)
    truth = placed.mean_curvature[at]
    ours = median_error(found.mean_curvature.norm(dim=1), truth)
    assert ours < median_error(plain, truth) and ours < 0.05


def test_paraboloid_at_its_apex_where_the_plain_fit_is_exact():
    sample = shapes.paraboloid(4000, 3, generator(6))
    apex = torch.zeros(1, sample.points.shape[1], dtype=torch.float64)
    found = second_fundamental_form(torch.cat([apex, sample.points]), [0], dim=3, neighbors=60)
    torch.testing.assert_close(found.mean_curvature.norm(dim=1), apex.new_ones(1), atol=1e-6, rtol=0)


def test_stiefel_against_its_closed_form():
    sample = shapes.stiefel(20000, 4, 2, generator(7))
    found = second_fundamental_form(sample.points, torch.arange(60), dim=5, neighbors=150)
    assert median_error(found.mean_curvature.norm(dim=1), sample.mean_curvature[:60]) < 0.03
    assert median_error(found.sectional, sample.sectional[:60]) < 0.05
    x = sample.points[:60].view(60, 4, 2)
    z = torch.randn(60, 4, 2, dtype=torch.float64, generator=generator(8))
    inner = x.mT @ z
    z = z - x @ (inner + inner.mT) / 2
    wanted = -(x @ z.mT @ z).flatten(1)
    scale = wanted.norm(dim=1)
    assert float(((found(z.flatten(1), z.flatten(1)) - wanted).norm(dim=1) / scale).median()) < 0.1
    assert float(((found.along(z.flatten(1)) - wanted).norm(dim=1) / scale).median()) < 0.2


def test_fixed_rank_against_its_closed_form():
    g = generator(9)
    n = 20000
    u = torch.nn.functional.normalize(torch.randn(n, 3, 1, dtype=torch.float64, generator=g), dim=1)
    v = torch.nn.functional.normalize(torch.randn(n, 3, 1, dtype=torch.float64, generator=g), dim=1)
    s = 1.2 + 0.6 * torch.rand(n, 1, 1, dtype=torch.float64, generator=g)
    at = ((s > 1.4) & (s < 1.6)).flatten().nonzero()[:60, 0]
    found = second_fundamental_form((s * u @ v.mT).flatten(1), at, dim=5, neighbors=150)
    u, v, s = u[at], v[at], s[at]
    up = torch.randn(60, 3, 1, dtype=torch.float64, generator=g)
    vp = torch.randn(60, 3, 1, dtype=torch.float64, generator=g)
    up, vp = up - u @ (u.mT @ up), vp - v @ (v.mT @ vp)
    z = (u @ v.mT * 0.7 + up @ v.mT + u @ vp.mT).flatten(1)
    wanted = (2 * up @ vp.mT / s).flatten(1)
    error = (found(z, z) - wanted).norm(dim=1) / wanted.norm(dim=1)
    assert found.reliable.all() and float(error.median()) < 0.15


def test_planes_of_a_product_of_spheres():
    n = 20000
    one = shapes.sphere(n, 2, generator(10))
    two = shapes.sphere(n, 2, generator(11), radius=0.5)
    points = torch.cat([one.points, two.points], 1)
    found = second_fundamental_form(points, torch.arange(80), dim=4, neighbors=60)
    axes = torch.randn(2, 80, 3, dtype=torch.float64, generator=generator(12))
    zero = torch.zeros_like(axes[0])

    def tangent(x, direction):
        return direction - x * (x * direction).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True)

    first = [torch.cat([tangent(one.points[:80], axis), zero], 1) for axis in axes]
    second = [torch.cat([zero, tangent(two.points[:80], axis)], 1) for axis in axes]
    assert abs(float(found.sectional_of(first[0], first[1]).median()) - 1) < 0.1
    assert abs(float(found.sectional_of(second[0], second[1]).median()) - 4) < 0.4
    assert abs(float(found.sectional_of(first[0], second[0]).median())) < 0.1
    assert found.sectional_of(first[0], 2 * first[0]).isnan().all()


def test_along_needs_few_neighbours_in_many_dimensions():
    sample = shapes.sphere(20000, 20, generator(13), radius=2.0)
    placed, at, found = estimate(sample, neighbors=60, count=40, noise=0.0)
    assert not found.reliable.any() and found.sectional.isnan().all()
    assert "232" in found.reason[0] or "231" in found.reason[0]
    v = torch.randn(40, AMBIENT, dtype=torch.float64, generator=generator(14))
    inside = (found.tangent @ (found.tangent.mT @ v[..., None]))[..., 0]
    values = found.along(v)
    wanted = -placed.points[at] / 4 * (inside * inside).sum(1, keepdim=True)
    assert float(((values - wanted).norm(dim=1) / wanted.norm(dim=1)).median()) < 0.02
    torch.testing.assert_close(found.along(2 * v), 4 * values)


@pytest.mark.parametrize("make", [shapes.torus, lambda n, g: shapes.sphere(n, 2, g)])
def test_noise_that_drowns_the_curvature_is_refused(make):
    _, _, found = estimate(make(5000, generator(15)), neighbors=50, count=200, noise=0.03)
    assert not found.reliable.any()
    for value in (found.mean_curvature, found.scalar, found.sectional, found.coefficients):
        assert value.isnan().all()
    assert "noise" in found.reason[0]
    assert found.along(torch.ones(AMBIENT, dtype=torch.float64)).isnan().all()


def test_reliable_estimates_are_right_and_the_ratio_ranks_the_errors():
    errors, ratios = [], []
    for noise in (0.002, 0.005, 0.01, 0.02, 0.03, 0.05):
        _, _, found = estimate(shapes.sphere(1500, 2, generator(16)), neighbors=50, count=100, noise=noise)
        errors.append((found.sectional - 1).abs()[found.reliable])
        ratios.append(found.snr[found.reliable])
    errors, ratios = torch.cat(errors), torch.cat(ratios)
    assert len(errors) > 120 and float(errors.quantile(0.9)) < 0.35
    assert float(errors[ratios > 3].median()) < 0.5 * float(errors[ratios < 1.5].median())


def test_flat_without_noise_is_known_to_be_flat():
    plane = torch.randn(500, 3, dtype=torch.float64, generator=generator(17))
    basis = torch.linalg.qr(torch.randn(20, 3, dtype=torch.float64, generator=generator(18))).Q
    found = second_fundamental_form(plane @ basis.mT, torch.arange(50), dim=3, neighbors=40)
    assert found.reliable.all() and float(found.mean_curvature.abs().max()) < 1e-5
    noisy = plane @ basis.mT + 0.05 * torch.randn(500, 20, dtype=torch.float64, generator=generator(19))
    assert float(second_fundamental_form(noisy, dim=3, neighbors=40).reliable.float().mean()) < 0.05


def test_a_curve_has_a_curvature_vector_and_no_sectional():
    t = torch.linspace(0, 4 * math.pi, 2000, dtype=torch.float64)
    helix = torch.stack([3 * t.cos(), 3 * t.sin(), 4 * t], 1)
    found = second_fundamental_form(helix, torch.arange(100, 1900, 50), dim=1, neighbors=20)
    normal = -torch.stack([t.cos(), t.sin(), 0 * t], 1)[100:1900:50]
    torch.testing.assert_close(found.mean_curvature, normal * 3 / 25, atol=1e-4, rtol=1e-3)
    assert found.sectional.isnan().all() and (found.scalar.abs() < 1e-9).all()


def test_bases_are_orthonormal_and_the_form_is_bilinear():
    _, _, found = estimate(shapes.ellipsoid(3000, 3, generator(20)), neighbors=60, count=10)
    frames = torch.cat([found.tangent, found.normal], -1)
    torch.testing.assert_close(frames.mT @ frames, torch.eye(frames.shape[-1]).double().expand(10, -1, -1))
    u, v = torch.randn(2, 10, AMBIENT, dtype=torch.float64, generator=generator(21))
    torch.testing.assert_close(found(u + 2 * v, v), found(u, v) + 2 * found(v, v))
    torch.testing.assert_close(found(u, v), found(v, u))
    trace = sum(found(found.tangent[..., i], found.tangent[..., i]) for i in range(3)) / 3
    torch.testing.assert_close(trace, found.mean_curvature, rtol=1e-3, atol=1e-4)


def test_units_and_motions():
    sample = shapes.torus(3000, generator(22))
    at = torch.arange(60)
    base = second_fundamental_form(sample.points, at, dim=2, neighbors=40)
    axes = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=generator(23))).Q
    moved = second_fundamental_form(1e-3 * sample.points @ axes.mT + 5, at, dim=2, neighbors=40)
    torch.testing.assert_close(moved.sectional, base.sectional * 1e6, rtol=1e-3, atol=1.0)
    torch.testing.assert_close(moved.mean_curvature, base.mean_curvature @ axes.mT * 1e3, rtol=1e-3, atol=0.1)


def test_float32_and_blocks_and_places():
    placed, at, found = estimate(shapes.sphere(3000, 3, generator(24)), neighbors=60, count=200, noise=0.003)
    single = second_fundamental_form(placed.points.float(), at, dim=3, neighbors=60)
    assert single.mean_curvature.dtype == single.tangent.dtype == torch.float32
    torch.testing.assert_close(single.sectional.double(), found.sectional, rtol=1e-3, atol=1e-3)
    few = second_fundamental_form(placed.points, at[:3], dim=3, neighbors=60)
    torch.testing.assert_close(few.mean_curvature, found.mean_curvature[:3], rtol=1e-6, atol=1e-8)
    again = second_fundamental_form(placed.points, at, dim=3, neighbors=60)
    assert torch.equal(again.mean_curvature, found.mean_curvature)
    place = second_fundamental_form(placed.points, 1.02 * placed.points[at], dim=3, neighbors=60)
    assert median_error(place.mean_curvature.norm(dim=1), torch.ones(200)) < 0.05


def test_duplicates_and_constant_columns_change_nothing():
    sample = shapes.ellipsoid(2000, 3, generator(25)).embedded(20, 0.0, generator(28))
    at = torch.arange(40)
    once = second_fundamental_form(sample.points, at, dim=3, neighbors=50)
    columns = torch.full((2000, 2), 3.0, dtype=torch.float64)
    wide = second_fundamental_form(torch.cat([sample.points, columns], 1), at, dim=3, neighbors=50)
    torch.testing.assert_close(wide.scalar, once.scalar, rtol=1e-6, atol=1e-8)
    twice = torch.cat([sample.points, sample.points])
    doubled = second_fundamental_form(twice, at, dim=3, neighbors=101)
    torch.testing.assert_close(doubled.scalar, once.scalar, rtol=1e-6, atol=1e-8)
    all_one = second_fundamental_form(twice[:1].repeat(100, 1), at, dim=3, neighbors=50)
    assert not all_one.reliable.any() and all_one.scalar.isnan().all()
    assert "duplicates" in all_one.reason[0]


def test_an_outlier_is_refused_and_harms_nobody():
    sample = shapes.sphere(2000, 2, generator(26))
    far = torch.cat([sample.points, torch.full((1, 3), 1e5, dtype=torch.float64)])
    found = second_fundamental_form(far, [0, 1, 2, 2000], dim=2, neighbors=50)
    assert found.reliable.tolist() == [True, True, True, False]
    assert "outside" in found.reason[3] and found.mean_curvature[3].isnan().all()
    torch.testing.assert_close(found.sectional[:3], torch.ones(3).double(), rtol=1e-4, atol=1e-4)


def test_a_dimension_too_high_is_refused():
    sample = shapes.sphere(2000, 2, generator(27))
    _, _, found = estimate(sample, neighbors=80, count=20)
    _, _, wrong = estimate(
        shapes.Sample(sample.points, sample.mean_curvature, sample.sectional, 3), neighbors=80, count=20
    )
    assert found.reliable.all() and not wrong.reliable.any() and "lower dim" in wrong.reason[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.randn(10, 8)}, "12 or more"),
        ({"neighbors": 100}, "1 to 99"),
        ({"neighbors": 6}, "7 or more"),
        ({"dim": 8}, "1 to 7"),
        ({"dim": 0}, "1 to 7"),
        ({"at": torch.tensor([100])}, "there are 100"),
        ({"at": torch.randn(2, 5)}, "as points have"),
        ({"at": []}, "empty"),
        ({"points": torch.randn(100, 8).index_fill(0, torch.tensor([3]), torch.nan)}, "row 3"),
        ({"points": torch.zeros(100, 8, dtype=torch.long)}, "floating-point"),
    ],
)
def test_bad_input_is_refused_with_words(change, message):
    arguments = {"points": torch.randn(100, 8), "at": None, "dim": 3, "neighbors": 30} | change
    if arguments["points"].dtype == torch.long:
        with pytest.raises(Exception, match=r"float|points"):
            second_fundamental_form(**arguments)
        return
    with pytest.raises(ManifoldError, match=message):
        second_fundamental_form(**arguments)
