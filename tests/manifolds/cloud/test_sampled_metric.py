"""Metrics known at samples against the hyperbolic plane, constant metrics and difference quotients."""

import json
import math

import pytest
import torch
from torch import Tensor

from manifolds.cloud.path_cloud import PathCloud
from manifolds.cloud.sampled_metric import SampledMetric
from manifolds.errors import ManifoldError, MissingOperationError

DOUBLE = torch.float64


def plane(device: torch.device | str = "cpu") -> tuple[PathCloud, Tensor]:
    """A flat sheet over [−1.5, 1.5] × [0.5, 2.5] in three dimensions, and the embedding (2, 3)."""
    grid = torch.cartesian_prod(
        torch.linspace(-1.5, 1.5, 5, dtype=DOUBLE, device=device),
        torch.linspace(0.5, 2.5, 5, dtype=DOUBLE, device=device),
    )
    turn = torch.randn(3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    embed = torch.linalg.qr(turn).Q[:2].to(device)
    return PathCloud.fit(grid @ embed, torch.arange(25, device=device), coordinates=grid), embed


def hyperbolic(embed: Tensor) -> SampledMetric:
    """The metric I / y² of the upper half plane, where the paths of the tests lead."""
    places = torch.cartesian_prod(
        torch.linspace(-1.28, 1.28, 33, dtype=DOUBLE), torch.linspace(0.5, 1.7, 16, dtype=DOUBLE)
    )
    factors = torch.eye(2, dtype=DOUBLE) / places[:, 1, None, None]
    return SampledMetric(places @ embed, factors @ embed)


def test_geodesics_of_the_half_plane_are_circles() -> None:
    sheet, embed = plane()
    half = sheet.with_metric(hyperbolic(embed))
    a, b = torch.tensor([[-1.0, 0.8], [1.0, 0.8]], dtype=DOUBLE)
    x, y = a @ embed, b @ embed
    true = math.acosh(1 + float((a - b).square().sum() / (2 * a[1] * b[1])))
    found = half.shortest_path(x, y)
    assert bool(found.converged)
    assert float(found.length) == pytest.approx(true, rel=0.01)
    radius = (found.path @ embed.mT).norm(dim=-1)  # the centre is the origin
    torch.testing.assert_close(radius, radius[:1].expand(17), rtol=0.01, atol=0)
    log = half.logmap(x, y)
    assert float(half.norm(x, log)) == pytest.approx(true, rel=0.01)
    torch.testing.assert_close(half.expmap(x, log), y, atol=0.02, rtol=0)
    assert float(sheet.dist(x, y)) == pytest.approx(2.0, rel=1e-9)


def test_a_constant_metric_has_straight_lines_of_its_own_length(device: torch.device) -> None:
    sheet, embed = plane(device)
    factor = torch.tensor([[2.0, 0.5], [0.0, 1.0]], dtype=DOUBLE, device=device)
    metric = SampledMetric(sheet.knots[:4], (factor @ embed).expand(4, 2, 3))
    carried = sheet.with_metric(metric)
    a, b = torch.tensor([[-1.0, 1.0], [1.0, 2.0]], dtype=DOUBLE, device=device)
    found = carried.shortest_path(a @ embed, b @ embed)
    assert float(found.length) == pytest.approx(float((factor @ (b - a)).norm()), rel=1e-9)
    straight = torch.linspace(0, 1, 17, dtype=DOUBLE, device=device)[:, None] * (b - a) + a
    torch.testing.assert_close(found.path @ embed.mT, straight, atol=1e-6, rtol=0)


def test_the_gradient_is_the_riesz_representative() -> None:
    sheet, embed = plane()
    half = sheet.with_metric(hyperbolic(embed))
    generator = torch.Generator().manual_seed(1)
    x = torch.tensor([[0.3, 1.2], [-0.4, 2.0]], dtype=DOUBLE) @ embed
    g, v = (torch.randn(2, 3, dtype=DOUBLE, generator=generator) for _ in "gv")
    v = half.proju(x, v)
    torch.testing.assert_close(half.inner(x, half.egrad2rgrad(x, g), v), (g * v).sum(-1))
    with pytest.raises(MissingOperationError):
        half.ehess2rhess(x, g, g, v)


def test_derivatives_of_the_metric_are_those_of_autograd() -> None:
    _, embed = plane()
    metric = hyperbolic(embed)
    generator = torch.Generator().manual_seed(1)
    x = torch.tensor([[0.3, 1.2], [-0.4, 2.0]], dtype=DOUBLE) @ embed
    u = torch.randn(2, 3, dtype=DOUBLE, generator=generator)
    slope = torch.func.grad(lambda z: metric.inner(z, u, u).sum())(x)
    torch.testing.assert_close(metric.gradient(x, u), slope)
    changed = torch.func.jvp(lambda z: metric.product(z, u), (x,), (u,))[1]
    torch.testing.assert_close(metric.changed(x, u), changed)
    path = torch.randn(2, 5, 3, dtype=DOUBLE, generator=generator)

    def half_energy(inner: Tensor) -> Tensor:
        whole = torch.cat([path[:, :1], inner, path[:, -1:]], 1)
        steps = whole[:, 1:] - whole[:, :-1]
        return metric.inner((whole[:, 1:] + whole[:, :-1]) / 2, steps, steps).sum() / 2

    torch.testing.assert_close(metric.slope(path), torch.func.grad(half_energy)(path[:, 1:-1]))


def test_a_curve_is_measured_in_its_metric_and_saved_with_it(tmp_path: object) -> None:
    ends = torch.linspace(1, 3, 9, dtype=DOUBLE)[:, None] * torch.tensor([0.6, 0.8], dtype=DOUBLE)
    line = PathCloud.fit(ends, torch.arange(9))
    place = torch.linspace(0.8, 3.2, 200, dtype=DOUBLE)[:, None]
    unit = torch.tensor([[0.6, 0.8]], dtype=DOUBLE)
    metric = SampledMetric(place * unit, (1 / place)[..., None] * torch.eye(2, dtype=DOUBLE))
    carried = line.with_metric(metric)
    assert float(carried.length()) == pytest.approx(math.log(3), rel=1e-3)
    x, y = line.knots[0], line.knots[-1]
    middle = carried.geodesic(x, y, points=3)[1]
    assert float(middle.norm()) == pytest.approx(math.sqrt(3), rel=1e-3)
    log = carried.logmap(x, y)
    torch.testing.assert_close(carried.norm(x, log), carried.dist(x, y))
    torch.testing.assert_close(carried.expmap(x, log), y, atol=1e-9, rtol=0)
    values, tensors = carried.describe()
    again = PathCloud.rebuild(json.loads(json.dumps(values)), tensors)
    assert again.metric is not None and torch.equal(again.dist(x, y), carried.dist(x, y))
    assert line.metric is None and carried.with_metric(None).metric is None
    assert float(line.dist(x, y)) == pytest.approx(2.0, rel=1e-9)


def test_the_metric_outlives_inference_mode_and_half_precision() -> None:
    generator = torch.Generator().manual_seed(0)
    anchors, factors = (torch.randn(*shape, generator=generator) for shape in ((5, 3), (5, 2, 3)))
    x = torch.randn(4, 3, generator=generator, requires_grad=True)
    expected = SampledMetric(anchors, factors).inner(x, x, x)
    with torch.inference_mode():
        metric = SampledMetric(anchors, factors)
    metric.inner(x, x, x).sum().backward()
    torch.testing.assert_close(metric.bfloat16().inner(x, x, x), expected, rtol=0, atol=0)


def test_bad_input_is_named() -> None:
    anchors, factors = torch.rand(5, 3), torch.rand(5, 2, 3)
    with pytest.raises(ManifoldError, match="NaN"):
        SampledMetric(anchors, factors.index_fill(0, torch.tensor([1]), torch.nan))
    with pytest.raises(ManifoldError, match="damping"):
        SampledMetric(anchors, factors, damping=-1.0)
    with pytest.raises(ManifoldError, match="bandwidth"):
        SampledMetric(anchors, factors, bandwidth=0.0)
    with pytest.raises(ManifoldError, match="same place"):
        SampledMetric(torch.ones(5, 3), factors)
    sheet, _ = plane()
    wrong = torch.rand(2, 4)
    with pytest.raises(ManifoldError, match=r"\(2, 4\).*vectors of 3"):
        SampledMetric(anchors, factors).product(wrong, wrong)
    with pytest.raises(ManifoldError, match="vectors of 4"):
        sheet.with_metric(SampledMetric(torch.rand(5, 4), torch.rand(5, 2, 4)))
    flat = sheet.with_metric(SampledMetric(sheet.knots, torch.zeros(25, 1, 3, dtype=DOUBLE)))
    with pytest.raises(ManifoldError, match="singular"):
        flat.egrad2rgrad(sheet.knots[7], sheet.knots[3])
