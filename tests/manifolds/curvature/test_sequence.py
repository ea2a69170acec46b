import math

import pytest
import torch

from manifolds import ManifoldError
from manifolds.curvature.sequence import sequence_curvature


def rotated(points, width=40, seed=0):
    """Points turned at random into a wider space, away from its origin."""
    generator = torch.Generator().manual_seed(seed)
    frame = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return points @ frame[: points.shape[1]] + torch.randn(width, generator=generator, dtype=torch.float64)


def circle(count, radius, uneven=0.0):
    generator = torch.Generator().manual_seed(1)
    step = torch.arange(count) + uneven * torch.rand(count, generator=generator)
    angle = step.double() * (2 * math.pi / count)
    return rotated(torch.stack([radius * angle.cos(), radius * angle.sin()], 1))


def noisy(points, size, seed=2):
    """Noise of this root mean square length."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(points.shape, generator=generator, dtype=points.dtype)
    return points + size * noise / points.shape[1] ** 0.5


@pytest.mark.parametrize("count", [7, 12, 60])
@pytest.mark.parametrize("radius", [0.1, 3.0])
def test_a_circle_of_few_points(count, radius, device):
    points = circle(count, radius).to(device)
    found = sequence_curvature(points, closed=True)
    assert found.reliable and found.reason == ""
    assert found.typical == pytest.approx(1 / radius, rel=0.03)
    centre = points.mean(0)
    inward = torch.nn.functional.cosine_similarity(found.vectors, centre - points)
    assert found.vectors.device == points.device and bool((inward > 0.999).all())


def test_steps_need_not_be_even():
    assert sequence_curvature(circle(12, 2.0, uneven=0.5), closed=True).typical == pytest.approx(
        0.5, rel=0.03
    )


def test_an_open_curve_has_no_curvature_at_its_ends():
    t = torch.linspace(0, 3, 25, dtype=torch.float64)
    helix = rotated(torch.stack([2 * t.cos(), 2 * t.sin(), t / 2], 1))
    found = sequence_curvature(helix, closed=False)
    assert bool(found.curvature[[0, -1]].isnan().all()) and bool(found.curvature[1:-1].isfinite().all())
    truth = torch.full((23,), 2 / 4.25, dtype=torch.float64)
    torch.testing.assert_close(found.curvature[1:-1], truth, rtol=5e-3, atol=0)


def test_an_ellipse_point_by_point():
    t = torch.arange(80, dtype=torch.float64) * (2 * math.pi / 80)
    a, b = 3.0, 1.5
    found = sequence_curvature(rotated(torch.stack([a * t.cos(), b * t.sin()], 1)), closed=True)
    truth = a * b / (a**2 * t.sin() ** 2 + b**2 * t.cos() ** 2) ** 1.5
    torch.testing.assert_close(found.curvature, truth, rtol=0.02, atol=0)


@pytest.mark.parametrize("noise", [0.05, 0.3, 0.6])
def test_noise_is_seen_and_does_not_raise_the_curvature(noise):
    found = sequence_curvature(noisy(circle(24, 2.0), noise), closed=True)
    assert found.reliable and found.typical == pytest.approx(0.5, rel=0.06)
    assert found.roughness == pytest.approx(noise, rel=0.15)
    assert found.lag > 1 or noise < 0.1


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("count", [5, 7, 12, 30])
def test_orthogonal_points_are_no_curve(count, closed):
    found = sequence_curvature(torch.eye(count, dtype=torch.float64), closed=closed)
    assert not found.reliable and "roughness" in found.reason and math.isnan(found.typical)
    assert bool(found.vectors.isnan().all())


def test_random_points_are_no_curve():
    draws = [torch.randn(12, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(100)]
    assert sum(sequence_curvature(points, closed=True).reliable for points in draws) <= 5


def test_a_known_error_counts_at_least():
    points = circle(12, 2.0)
    assert sequence_curvature(points, closed=True, error=torch.full((12,), 0.01)).reliable
    drowned = sequence_curvature(points, closed=True, error=torch.full((12,), 5.0))
    assert not drowned.reliable and drowned.roughness == pytest.approx(5.0)


def test_straight_points_are_known_to_be_straight_only_without_noise():
    points = rotated(torch.arange(9, dtype=torch.float64)[:, None])
    exact = sequence_curvature(points, closed=False)
    assert exact.reliable and exact.typical == pytest.approx(0.0, abs=1e-9)
    assert not sequence_curvature(noisy(points, 0.05), closed=False).reliable


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtype_follows_the_points(kind):
    found = sequence_curvature(circle(8, 2.0).to(kind), closed=True)
    assert found.vectors.dtype == kind and found.typical == pytest.approx(0.5, rel=0.05)


@pytest.mark.parametrize(
    ("points", "arguments", "message"),
    [
        (torch.zeros(4, 3), {}, "5 or more"),
        (torch.full((6, 3), torch.nan), {}, "NaN"),
        (torch.randn(6, 3), {"error": torch.zeros(5)}, "error has shape"),
        (torch.randn(6, 3), {"error": -torch.ones(6)}, "at least 0"),
    ],
)
def test_what_is_no_curve_is_refused(points, arguments, message):
    with pytest.raises(ManifoldError, match=message):
        sequence_curvature(points, closed=True, **arguments)


def test_equal_points_have_no_curvature():
    found = sequence_curvature(torch.ones(6, 3), closed=True)
    assert not found.reliable and math.isnan(found.typical)
