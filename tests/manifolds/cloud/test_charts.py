"""Local charts against closed forms and automatic differentiation; the cover; the common span; the reach."""

import math

import pytest
import torch

from manifolds.cloud.charts import bend, bend_with_slope, fit_charts, symmetric
from manifolds.cloud.cover import cover, distinct_rows
from manifolds.cloud.moving import Local, blend
from manifolds.cloud.reach import largest_bend
from manifolds.cloud.subspace import common_subspace


def sphere(count, dim, width, radius=1.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(count, dim + 1, dtype=torch.float64, generator=g), dim=1)
    return (
        radius * x @ torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=g)).Q[: dim + 1]
    )


@pytest.mark.parametrize(("dim", "neighbors"), [(1, 12), (2, 30), (4, 80)])
def test_charts_of_a_sphere_are_that_sphere(dim, neighbors, device):
    points = sphere(500, dim, 20, radius=3.0).to(device)
    charts = fit_charts(points, torch.arange(0, 500, 50, device=device), dim=dim, neighbors=neighbors)
    assert charts.curved.all() and not charts.alone.any()
    step = 0.5 * torch.nn.functional.normalize(
        torch.ones(10, 1, dim, dtype=torch.float64, device=device), dim=-1
    )
    on = charts.centres[:, None] + step @ charts.tangent.mT + bend(step, charts.form)
    torch.testing.assert_close(on.norm(dim=-1), torch.full((10, 1), 3.0).to(on), rtol=0, atol=1e-6)
    assert (charts.tangent.mT @ charts.centres[..., None]).abs().max() < 1e-5
    torch.testing.assert_close(
        largest_bend(charts.form, dim), torch.full((10,), 1 / 3).to(on), rtol=1e-4, atol=0
    )


def test_slope_of_the_bend_is_its_derivative():
    g = torch.Generator().manual_seed(0)
    t = 0.2 * torch.randn(6, 3, dtype=torch.float64, generator=g)
    form = torch.randn(6, 6, 5, dtype=torch.float64, generator=g)
    value, slope = bend_with_slope(t, form)
    torch.testing.assert_close(value, bend(t[:, None], form)[:, 0])
    for i in range(6):
        jacobian = torch.func.jacrev(lambda s, i=i: bend(s[None], form[i])[0])(t[i])
        torch.testing.assert_close(slope[i], jacobian)
    whole = symmetric(form)[0]
    torch.testing.assert_close(whole, whole.transpose(0, 1))


def test_image_of_the_blend_is_its_derivative():
    g = torch.Generator().manual_seed(1)
    tangent = torch.linalg.qr(torch.randn(1, 5, 4, 2, dtype=torch.float64, generator=g)).Q
    form = torch.randn(1, 5, 3, 4, dtype=torch.float64, generator=g)
    form = form - (form @ tangent) @ tangent.mT
    centres = 0.3 * torch.randn(1, 5, 4, dtype=torch.float64, generator=g)
    charts = torch.cat([centres[:, :, None], tangent.mT, form], 2)
    local = Local.of(charts, 2, torch.full((1, 5), 2.0, dtype=torch.float64), torch.arange(5)[None])
    y = 0.1 * torch.randn(1, 4, dtype=torch.float64, generator=g)

    def mean(place):
        total, count = 0, 0
        for i in range(5):
            rest = place - centres[0, i]
            weight = (1 - (rest @ rest) / 4).clamp_min(0) ** 4
            t = tangent[0, i].T @ rest
            total = total + weight * (rest - tangent[0, i] @ t - bend(t[None], form[0, i])[0])
            count = count + weight
        return total / count

    found = blend(local, y)
    expected = torch.eye(4, dtype=torch.float64) - torch.func.jacrev(mean)(y[0])
    torch.testing.assert_close(found.image(torch.eye(4, dtype=torch.float64)[None])[0], expected)


def test_a_cover_leaves_no_sample_alone_and_follows_the_density():
    g = torch.Generator().manual_seed(0)
    points = torch.cat([torch.rand(1500, 2, generator=g), 10 + 0.01 * torch.rand(1500, 2, generator=g)])
    which = cover(points, 200, neighbors=30)
    assert len(which.unique()) == 200 and 60 < int((which < 1500).sum()) < 140
    near = torch.cdist(points, points[which]).amin(1)
    assert near[:1500].max() < 0.2 and near[1500:].max() < 0.002
    assert torch.equal(which, cover(points, 200, neighbors=30))


def test_distinct_rows_keep_their_order_and_count():
    rows, times = distinct_rows(torch.tensor([[2.0, 1.0], [0.0, 1.0], [2.0, 1.0], [2.0, 0.0]]))
    assert rows.tolist() == [[2, 1], [0, 1], [2, 0]] and times.tolist() == [2, 1, 1]


def test_the_common_span_leaves_noise_out():
    g = torch.Generator().manual_seed(0)
    plane = torch.linalg.qr(torch.randn(200, 3, dtype=torch.float64, generator=g)).Q
    clean = torch.randn(300, 3, dtype=torch.float64, generator=g) @ plane.mT
    noise = 0.1 / math.sqrt(200) * torch.randn(300, 200, dtype=torch.float64, generator=g)
    _, frame = common_subspace(clean + noise, torch.full((300,), 0.01, dtype=torch.float64), 300.0, 2)
    assert frame.shape == (200, 3)
    assert torch.linalg.svdvals(frame.mT @ plane).min() > 0.99
    _, exact = common_subspace(clean, torch.zeros(300, dtype=torch.float64), 300.0, 2)
    assert exact.shape == (200, 3)
