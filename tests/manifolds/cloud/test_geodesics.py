"""Geodesics of learned manifolds against great circles, helices on cylinders and rolled-up planes."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from manifolds.cloud.geodesics import exponential
from manifolds.cloud.learned import LearnedManifold, Projection
from manifolds.cloud.neighbours import nearest_neighbours
from manifolds.cloud.path_cloud import PathCloud
from manifolds.errors import ManifoldError

DOUBLE = torch.float64


class Known(LearnedManifold):
    """A surface with a known projection, and samples on it: a learned manifold without errors."""

    def __init__(self, kind: str, points: Tensor) -> None:
        super().__init__()
        self.shape, self.samples = kind, points
        self.dim, self.width, self.noise, self.reach = points.shape[1] - 1, points.shape[1], 0.0, 1.0
        self.name = kind

    @property
    def anchors(self) -> Tensor:
        return self.samples

    def graph(self) -> tuple[Tensor, Tensor]:
        found = nearest_neighbours(self.samples, neighbors=8)
        return found.indices, found.distances

    def project(self, x: Tensor) -> Projection:
        if self.shape == "sphere":
            normal = x / x.norm(dim=-1, keepdim=True)
            foot = normal
        else:  # the cylinder around the last axis
            flat = torch.cat([x[..., :2], torch.zeros_like(x[..., 2:])], -1)
            normal = flat / flat.norm(dim=-1, keepdim=True)
            foot = torch.cat([normal[..., :2], x[..., 2:]], -1)
        whole = torch.linalg.svd(normal[..., None, :], full_matrices=True).Vh
        away = (x - foot).norm(dim=-1)
        return Projection(foot, whole[..., 1:, :].mT, away, away < 1)

    def second_fundamental_form(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        bent = slice(None) if self.shape == "sphere" else slice(0, 2)
        product = (u[..., bent] * v[..., bent]).sum(-1, keepdim=True)
        away = torch.zeros_like(x)
        away[..., bent] = x[..., bent]
        return -product * away

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"kind": self.shape}, {"points": self.samples}

    @classmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Known":
        return cls(values["kind"], tensors["points"])


def sphere(dim: int, count: int = 400) -> Known:
    points = torch.randn(count, dim + 1, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    return Known("sphere", points / points.norm(dim=1, keepdim=True))


def pairs(manifold: Known, count: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (2, count, manifold.width)
    x, y = manifold.projx(torch.randn(shape, dtype=DOUBLE, generator=generator))
    return x, y


@pytest.mark.parametrize("dim", [2, 5])
def test_great_circles(dim: int) -> None:
    manifold = sphere(dim)
    x, y = pairs(manifold, 6)
    angle = torch.acos((x * y).sum(-1))
    found = manifold.shortest_path(x, y, 9)
    assert found.converged.all() and found.path.shape == (6, 9, dim + 1)
    assert torch.equal(found.path[:, 0], x) and torch.equal(found.path[:, -1], y)
    torch.testing.assert_close(found.length, angle, atol=1e-7, rtol=0)
    share = torch.linspace(0, 1, 9, dtype=DOUBLE)[:, None]
    weights = [
        torch.sin(part * angle[:, None, None]) / angle.sin()[:, None, None] for part in (1 - share, share)
    ]
    torch.testing.assert_close(
        found.path, weights[0] * x[:, None] + weights[1] * y[:, None], atol=1e-6, rtol=0
    )
    steps = (found.path[:, 1:] - found.path[:, :-1]).norm(dim=-1)
    torch.testing.assert_close(steps, steps.mean(1, keepdim=True).expand_as(steps), rtol=1e-6, atol=0)
    log = manifold.logmap(x, y)
    torch.testing.assert_close(log.norm(dim=-1), angle, atol=1e-6, rtol=0)
    torch.testing.assert_close(manifold.expmap(x, log), y, atol=1e-4, rtol=0)


def test_helices_on_a_cylinder() -> None:
    angle, height = torch.meshgrid(
        torch.arange(24, dtype=DOUBLE) * math.pi / 12, torch.linspace(-1, 1, 9, dtype=DOUBLE), indexing="ij"
    )
    points = torch.stack([angle.cos(), angle.sin(), height], -1).reshape(-1, 3)
    manifold = Known("cylinder", points)
    turn, rise = torch.tensor([0.3, 2.0, -2.5], dtype=DOUBLE), torch.tensor([0.2, 1.0, 1.5], dtype=DOUBLE)
    x = torch.tensor([[1.0, 0.0, -0.8]], dtype=DOUBLE).expand(3, 3)
    y = torch.stack([turn.cos(), turn.sin(), -0.8 + rise], 1)
    found = manifold.shortest_path(x, y)
    torch.testing.assert_close(found.length, (turn**2 + rise**2).sqrt(), rtol=1e-3, atol=0)
    assert (found.path[..., :2].norm(dim=-1) - 1).abs().max() < 1e-12
    share = torch.linspace(0, 1, 17, dtype=DOUBLE)
    torch.testing.assert_close(found.path[..., 2], -0.8 + share * rise[:, None], atol=5e-3, rtol=0)


def test_the_error_of_the_exponential_falls_as_the_square_of_the_steps() -> None:
    points = torch.randn(50, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0))
    manifold = Known("cylinder", points)
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=DOUBLE)
    u = torch.tensor([[0.0, 1.5, 1.0]], dtype=DOUBLE)
    true = torch.tensor([[math.cos(1.5), math.sin(1.5), 1.0]], dtype=DOUBLE)
    errors = [float((exponential(manifold, x, u, steps=n)[0] - true).norm()) for n in (8, 16, 32)]
    assert errors[2] < 1e-3
    for before, after in pairwise(errors):
        assert math.log2(before / after) > 1.8


def test_the_gradient_of_the_distance_is_the_unit_logarithm() -> None:
    manifold = sphere(2)
    x, y = pairs(manifold, 3)
    x = x.requires_grad_()
    (slope,) = torch.autograd.grad(manifold.dist(x, y).sum(), x)
    angle = torch.acos((x * y).sum(-1, keepdim=True)).detach()
    toward = (y - (x * y).sum(-1, keepdim=True) * x).detach()
    torch.testing.assert_close(slope, -toward / angle.sin(), atol=1e-5, rtol=0)


def test_the_path_moves_with_its_ends() -> None:
    manifold = sphere(2)
    x, y = pairs(manifold, 2)
    u = manifold.proju(x, torch.ones_like(x))

    def middle(step: float) -> Tensor:
        return manifold.shortest_path(manifold.projx(x + step * u), y, 5).path[:, 2]

    lead = x.clone().requires_grad_()
    path = manifold.shortest_path(lead, y, 5).path[:, 2]
    weights = torch.randn(path.shape, dtype=DOUBLE, generator=torch.Generator().manual_seed(3))
    (slope,) = torch.autograd.grad((path * weights).sum(), lead)
    numeric = (((middle(1e-3) - middle(-1e-3)) / 2e-3) * weights).sum()
    assert float((slope * u).sum()) == pytest.approx(float(numeric), rel=1e-4)


def test_a_rolled_up_sheet_is_flat() -> None:
    grid = torch.cartesian_prod(torch.linspace(0, 4, 9, dtype=DOUBLE), torch.linspace(0, 2, 4, dtype=DOUBLE))

    def roll(t: Tensor) -> Tensor:  # around a cylinder of radius one: an isometry
        return torch.stack([t[..., 0].cos(), t[..., 0].sin(), t[..., 1], 0 * t[..., 0]], -1)

    sheet = PathCloud.fit(roll(grid), torch.arange(len(grid)), coordinates=grid)
    ends = torch.tensor([[[0.3, 0.2], [3.7, 1.8]], [[2.0, 0.3], [2.2, 1.5]]], dtype=DOUBLE)
    x, y = (sheet.projx(roll(each)) for each in ends.unbind(1))
    found = sheet.shortest_path(x, y, 9)
    torch.testing.assert_close(found.length, (ends[:, 1] - ends[:, 0]).norm(dim=-1), rtol=5e-3, atol=0)


def test_along_a_circle_in_closed_form(device: torch.device) -> None:
    angle = torch.arange(12, dtype=DOUBLE, device=device) * math.pi / 6
    loop = PathCloud.fit(
        torch.stack([angle.cos(), angle.sin(), 0 * angle], 1), torch.arange(12, device=device)
    )
    x, y = loop.knots[[0, 0]], loop.knots[[4, 9]]
    away = torch.tensor([2 / 3, -1 / 2], dtype=DOUBLE, device=device) * math.pi
    assert loop.length() == pytest.approx(2 * math.pi, rel=1e-5)
    torch.testing.assert_close(loop.dist(x, y), away.abs(), rtol=1e-5, atol=0)
    log = loop.logmap(x, y)
    torch.testing.assert_close(log[:, 1], away, rtol=1e-5, atol=0)
    torch.testing.assert_close(loop.expmap(x, log), y, atol=1e-12, rtol=0)
    path = loop.geodesic(x, y, points=5)
    assert torch.equal(path[:, 0], x) and torch.equal(path[:, -1], y)
    share = torch.linspace(0, 1, 5, dtype=DOUBLE, device=device) * away[:, None]
    torch.testing.assert_close(path[..., 0], share.cos(), atol=1e-4, rtol=0)
    end, carried = loop.expmap_transp(x, log, log)
    torch.testing.assert_close(carried.norm(dim=-1), away.abs(), rtol=1e-5, atol=0)
    torch.testing.assert_close(loop.expmap(end, -carried), x, atol=1e-12, rtol=0)
    start = (1.1 * x).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loop.dist(loop.projx(z), y), (start,), fast_mode=True)


def test_the_ends_of_an_open_curve_hold() -> None:
    line = PathCloud.fit(
        torch.arange(6, dtype=DOUBLE)[:, None] * torch.ones(3, dtype=DOUBLE), torch.arange(6)
    )
    u = torch.full((3,), 100.0, dtype=DOUBLE)
    torch.testing.assert_close(line.expmap(line.knots[2], u), line.knots[5], atol=1e-10, rtol=0)


def test_two_pieces_have_no_way_between() -> None:
    near = sphere(2, 30).samples
    far = torch.cat([0.05 * near + near[0], 0.05 * near - near[0]])
    apart = Known("sphere", far / far.norm(dim=1, keepdim=True))
    with pytest.raises(ManifoldError, match="separate pieces"):
        apart.geodesic(apart.samples[:2], apart.samples[-2:])
    with pytest.raises(ManifoldError, match="its two ends"):
        apart.geodesic(apart.samples[:2], apart.samples[:2], points=1)


def test_a_point_is_a_path_of_no_length() -> None:
    manifold = sphere(2, 100)
    x = manifold.samples[:3]
    found = manifold.shortest_path(x, x)
    assert found.converged.all() and found.length.max() < 1e-14 and manifold.logmap(x, x).abs().max() < 1e-14
