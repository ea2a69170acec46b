"""Paths through class means against circles, arcs, helices and spheres, brute force and autograd."""

import copy
import functools
import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from manifolds.base import RiemannianSubmanifold
from manifolds.cloud.path_cloud import PathCloud
from manifolds.cloud.point_cloud import PointCloud
from manifolds.errors import ManifoldError
from manifolds.operations import unchecked

DOUBLE = torch.float64


def classes(kind: str, count: int, width: int, radius: float = 1.0, seed: int = 0) -> Tensor:
    """Class means evenly along a curve, turned at random (count, width)."""
    share = torch.arange(count, dtype=DOUBLE) / (count if kind == "circle" else count - 1)
    if kind == "line":
        points = 4 * share[:, None]
    else:
        angle = {"circle": 2, "arc": 1.5, "helix": 4}[kind] * math.pi * share
        points = torch.stack([angle.cos(), angle.sin()], 1)
        if kind == "helix":
            points = torch.cat([points, angle[:, None] / 4], 1)
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(width, width, dtype=DOUBLE, generator=generator)).Q
    return radius * points @ turn[: points.shape[1]]


def samples(means: Tensor, each: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    labels = torch.arange(len(means)).repeat_interleave(each)
    away = torch.randn(len(labels), means.shape[1], dtype=DOUBLE, generator=generator)
    return means[labels] + noise * away, labels


@functools.cache
def sphere_patch(device: torch.device | str = "cpu") -> tuple[PathCloud, Tensor]:
    """A patch of the unit sphere as a sheet, and its coordinates (longitude, latitude)."""
    grid = torch.cartesian_prod(*[torch.linspace(-0.6, 0.6, 7, dtype=DOUBLE, device=device)] * 2)
    points = torch.stack(
        [grid[:, 0].cos() * grid[:, 1].cos(), grid[:, 0].sin() * grid[:, 1].cos(), grid[:, 1].sin()], 1
    )
    return PathCloud.fit(points, torch.arange(49, device=device), coordinates=grid), grid


@pytest.mark.parametrize("kind", ["circle", "arc", "line", "helix"])
@pytest.mark.parametrize(
    ("count", "width", "noise"), [(7, 3, 0.0), (7, 3, 0.2), (7, 300, 0.1), (12, 16, 0.2), (30, 3, 0.05)]
)
def test_open_or_closed_is_decided_from_the_samples(kind: str, count: int, width: int, noise: float) -> None:
    path = PathCloud.fit(*samples(classes(kind, count, width), 20, noise))
    assert path.closed == (kind == "circle")
    assert path.closing is not None
    assert path.closing.closed is path.closed


def test_many_noisy_classes_are_put_together_until_the_step_can_be_told() -> None:
    closed = PathCloud.fit(*samples(classes("circle", 40, 100), 5, 0.15))
    open_ = PathCloud.fit(*samples(classes("arc", 40, 100), 5, 0.15))
    assert closed.closed and not open_.closed
    assert closed.closing is not None and closed.closing.merged > 1


def test_equidistant_classes_say_nothing_of_a_loop() -> None:
    path = PathCloud.fit(*samples(torch.eye(7, dtype=DOUBLE), 20, 0.01))
    assert path.closing is not None
    assert path.closing.closed is None and path.closed is False
    assert "equally far" in path.closing.reason


def test_the_nearest_point_is_that_of_brute_force(device: torch.device) -> None:
    means = classes("helix", 12, 5).to(device)
    path = PathCloud.fit(means, torch.arange(12, device=device))
    states = 1.5 * torch.randn(40, 5, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)).to(device)
    low, high = float(path.coordinates.min()), float(path.coordinates.max())
    dense = path.at(torch.linspace(low, high, 20001, dtype=DOUBLE, device=device)[:, None])
    found = path.project(states)
    assert found.foot.device.type == device.type
    best = torch.cdist(states, dense).amin(1)
    assert (found.distance <= best + 1e-12).all()
    assert (best - found.distance).max() < 1e-5
    torch.testing.assert_close(path.projx(found.foot), found.foot, atol=1e-13, rtol=0)
    torch.testing.assert_close(path.at(path.coordinate(states)), found.foot, atol=1e-13, rtol=0)


def test_a_circle_is_a_circle() -> None:
    path = PathCloud.fit(classes("circle", 12, 6, radius=3.0), torch.arange(12))
    t = torch.linspace(0, path.period, 50, dtype=DOUBLE)[:, None]
    torch.testing.assert_close(
        path.at(t).norm(dim=-1), torch.full((50,), 3.0, dtype=DOUBLE), atol=1e-4, rtol=0
    )
    first, second = path.velocity(t)[..., 0], path.acceleration(t)[..., 0, 0]
    area = (first.square().sum(1) * second.square().sum(1) - (first * second).sum(1) ** 2).sqrt()
    torch.testing.assert_close(
        area / first.norm(dim=1) ** 3, torch.full((50,), 1 / 3, dtype=DOUBLE), atol=1e-4, rtol=0
    )
    assert path.reach == pytest.approx(3.0, rel=1e-3)
    assert path.at(t + path.period).sub(path.at(t)).abs().max() < 1e-12


@pytest.mark.parametrize("count", [12, 24])
@pytest.mark.parametrize(("width", "noise"), [(2, 0.2), (200, 0.2)])
def test_curvature_of_noisy_circles_within_five_percent(count: int, width: int, noise: float) -> None:
    wrong = []
    for seed in range(4):
        path = PathCloud.fit(*samples(classes("circle", count, width, 2.0), 20, noise, seed), closed=True)
        t = torch.linspace(0, path.period, 33, dtype=DOUBLE)[:-1, None]
        found = path.curvature(t)
        assert found.reliable.all() and found.reason == ""
        wrong.append((found.value - 0.5) / found.standard_error)
        assert abs(float(found.value.median()) / 0.5 - 1) < 0.05
    assert 0.3 < float(torch.cat(wrong).square().mean().sqrt()) < 2.0


def test_the_noise_of_the_means_is_taken_off_the_curvature() -> None:
    """As it stands the noisy curve is six percent too bent, what is left of its noise after smoothing."""
    raw, clean = [], []
    for seed in range(4):
        points, labels = samples(classes("circle", 12, 100, 2.0), 10, 0.6, seed)
        path = PathCloud.fit(points, labels, closed=True)
        found = path.curvature(torch.linspace(0, path.period, 33, dtype=DOUBLE)[:-1, None])
        raw.append(found.vector.norm(dim=-1))
        clean.append(found.value)
    assert float(torch.cat(raw).median()) > 0.5 * 1.04
    assert float(torch.cat(clean).median()) == pytest.approx(0.5, rel=0.025)


def test_curvature_is_refused_where_the_samples_do_not_tell() -> None:
    line = PathCloud.fit(*samples(classes("line", 30, 20), 10, 0.3))
    found = line.curvature(line.coordinates)
    assert not found.reliable.any() and found.value.isnan().all() and "standard errors" in found.reason
    single = PathCloud.fit(classes("circle", 12, 4), torch.arange(12))
    assert "two samples" in single.curvature(single.coordinates).reason
    arc = PathCloud.fit(*samples(classes("arc", 12, 4), 10, 1e-3))
    told = arc.curvature(arc.coordinates).reliable
    assert not told[0] and not told[-1] and told[2:-2].all()


def test_projection_is_differentiable_twice() -> None:
    path = PathCloud.fit(*samples(classes("circle", 8, 4), 5, 0.05))
    states = (1.2 * path.knots[:2] + 0.1).detach().requires_grad_()
    assert torch.autograd.gradcheck(path.projx, (states,))
    assert torch.autograd.gradgradcheck(path.projx, (states,), fast_mode=True)
    sheet, _ = sphere_patch()
    off = (1.2 * sheet.knots[[10, 24]] + 0.03).detach().requires_grad_()
    assert torch.autograd.gradcheck(sheet.projx, (off,), fast_mode=True)
    torch.testing.assert_close(torch.vmap(path.projx)(states), path.projx(states))


def test_second_form_is_the_derivative_of_the_projection() -> None:
    curve = PathCloud.fit(*samples(classes("helix", 12, 5), 5, 0.02))
    sheet, grid = sphere_patch()
    generator = torch.Generator().manual_seed(0)
    for path, x in ((curve, curve.knots[3:5]), (sheet, sheet.at(grid[[16, 31]] + 0.05))):
        u, v = (path.proju(x, torch.randn(x.shape, dtype=DOUBLE, generator=generator)) for _ in "uv")
        expected = RiemannianSubmanifold.second_fundamental_form(path, x, u, v)
        torch.testing.assert_close(path.second_fundamental_form(x, u, v), expected, atol=1e-8, rtol=1e-8)


def test_a_sheet_is_the_sphere_and_ends_at_its_hull() -> None:
    sheet, grid = sphere_patch()
    assert sheet.dim == 2 and not sheet.closed
    inner = sheet.at(grid[24:32] * 0.7 + 0.02)
    torch.testing.assert_close(inner.norm(dim=-1), torch.ones(8, dtype=DOUBLE), atol=2e-4, rtol=0)
    torch.testing.assert_close(sheet.projx(1.3 * inner), inner, atol=2e-3, rtol=0)
    u = sheet.proju(inner, torch.randn(8, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(0)))
    form = sheet.second_fundamental_form(inner, u, u)
    assert (form + inner * u.square().sum(-1, keepdim=True)).norm(dim=-1).max() < 0.05 * u.square().sum(
        -1
    ).max()
    assert sheet.project(1.2 * inner).inside.all()
    assert not bool(sheet.project(torch.tensor([0.0, 1.0, 0.0], dtype=DOUBLE)).inside)


def test_states_beyond_an_end_are_outside() -> None:
    path = PathCloud.fit(classes("line", 6, 3), torch.arange(6))
    along = path.project(path.knots[0]).tangent[:, 0]
    assert not bool(path.project(path.knots[0] - along).inside)
    assert bool(path.project(path.knots[0] + along).inside)
    noisy, labels = samples(classes("line", 6, 3), 50, 0.1)
    assert PathCloud.fit(noisy, labels).project(noisy).inside.double().mean() > 0.95


@pytest.mark.parametrize("kind", ["circle", "arc"])
def test_described_and_rebuilt_to_the_bit(kind: str) -> None:
    path = PathCloud.fit(*samples(classes(kind, 9, 6), 5, 0.1))
    values, tensors = path.describe()
    again = PathCloud.rebuild(json.loads(json.dumps(values)), tensors)
    states = torch.randn(10, 6, dtype=DOUBLE, generator=torch.Generator().manual_seed(2))
    assert torch.equal(again.projx(states), path.projx(states))
    assert again.reach == path.reach and repr(again.closing) == repr(path.closing)
    tensors.pop("knots")
    with pytest.raises(ManifoldError, match="not whole"):
        PathCloud.rebuild(values, tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_precision_follows_the_states(dtype: torch.dtype) -> None:
    points, labels = samples(classes("circle", 10, 8), 5, 0.05)
    path = PathCloud.fit(points, labels)
    found = path.project(points[:6].to(dtype))
    assert found.foot.dtype == found.tangent.dtype == found.distance.dtype == dtype
    limit = {torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(found.foot.double(), path.projx(points[:6]), atol=limit, rtol=limit)
    moved = PathCloud.fit(points, labels).to(torch.float32)
    torch.testing.assert_close(
        moved.projx(points[:6].float()), path.projx(points[:6]).float(), atol=1e-5, rtol=0
    )


def test_half_precision_keeps_no_path_in_it() -> None:
    points, labels = samples(classes("circle", 10, 8), 5, 0.05)
    states = points[:6].float()
    expected = PathCloud.fit(points, labels).projx(states)
    for dtype in (torch.bfloat16, torch.float16):
        found = PathCloud.fit(points, labels).to(dtype).projx(states)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_autocast_leaves_the_digits() -> None:
    points, labels = samples(classes("circle", 10, 8), 5, 0.05)
    plain, cast = PathCloud.fit(points, labels), PathCloud.fit(points, labels)
    states = points[:6].float()
    feet = plain.projx(states)

    def everything(path: PathCloud) -> list[Tensor]:
        ways = path.proju(feet, states), path.dist(feet, feet[:1].expand_as(feet))
        return [path.projx(states), path.project(states).tangent, path.at(path.coordinate(states)), *ways]

    with torch.autocast("cpu", torch.bfloat16):
        inside = everything(cast)
    for each in (inside, everything(cast)):  # what autocast left in the caches is seen by the second
        assert all(torch.equal(one, other) for one, other in zip(each, everything(plain), strict=True))


def test_clouds_too_are_free_of_autocast_and_inference_mode() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 4, generator=generator) @ torch.randn(4, 8, generator=generator)
    points = points / points.norm(dim=1, keepdim=True)
    expected = PointCloud.fit(points, dim=3).project(points[:5]).foot
    with torch.inference_mode():
        cloud = PointCloud.fit(points, dim=3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cloud.project(points[:5]).foot, expected)
    states = points[:5].clone().requires_grad_()
    cloud.projx(states).square().sum().backward()
    assert states.grad is not None and states.grad.isfinite().all()


@pytest.mark.parametrize("fitted", ["inside", "outside"])
def test_gradients_after_inference_mode(fitted: str) -> None:
    points, labels = samples(classes("circle", 10, 8), 5, 0.05)
    plain = PathCloud.fit(points, labels)
    with torch.inference_mode():
        path = PathCloud.fit(points, labels) if fitted == "inside" else plain
        path.dist(path.projx(points[:6]), path.projx(points[6:12]))
    states = points[:6].clone().requires_grad_()
    path.dist(path.projx(states), path.knots[:1].expand_as(states)).sum().backward()
    assert states.grad is not None and states.grad.norm() > 0.1


def test_copies_and_pickles_of_a_used_path() -> None:
    path = PathCloud.fit(*samples(classes("circle", 10, 8), 5, 0.05))
    far = path.dist(path.knots[0], path.knots[4])
    for again in (copy.deepcopy(path), pickle.loads(pickle.dumps(path))):
        assert torch.equal(again.dist(again.knots[0], again.knots[4]), far)


def test_no_states_have_no_feet_and_those_that_are_not_finite_none_either() -> None:
    sheet, _ = sphere_patch()
    for path in (PathCloud.fit(*samples(classes("circle", 10, 3), 5, 0.05)), sheet):
        none = torch.zeros(0, 3, dtype=DOUBLE)
        found = path.project(none)
        assert found.foot.shape == (0, 3) and found.tangent.shape == (0, 3, path.q)
        states = path.knots[:3].clone()
        states[1, 0], states[2, 1] = torch.nan, torch.inf
        found = path.project(states)
        assert found.foot.isnan().all(-1).tolist() == found.tangent.isnan().all((1, 2)).tolist()
        assert found.foot.isnan().any(-1).tolist() == [False, True, True]
        assert found.inside.tolist() == [True, False, False]
    assert path.coordinate(none).shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_labels_of_any_integer_type_in_any_order(dtype: torch.dtype) -> None:
    points, labels = samples(classes("circle", 10, 8), 5, 0.05)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(0))
    found = PathCloud.fit(points[order], labels[order].to(dtype))
    torch.testing.assert_close(found.knots, PathCloud.fit(points, labels).knots, atol=1e-12, rtol=0)


def test_a_loop_that_names_its_first_class_again_is_told_so() -> None:
    angle = torch.arange(9, dtype=DOUBLE) * math.pi / 4
    points, labels = torch.stack([angle.cos(), angle.sin()], 1), torch.arange(9)
    uneven = torch.tensor([0.0, 1, 2, 3, 4, 5, 6, 7, 9])
    for options in ({}, {"closed": True}, {"closed": True, "coordinates": uneven}, {"coordinates": uneven}):
        for given in (points, points.float()):
            with pytest.raises(ManifoldError, match="first and the last class have the same mean"):
                PathCloud.fit(given, labels, **options)
    assert float(PathCloud.fit(points, labels, closed=False).length()) == pytest.approx(2 * math.pi, rel=1e-3)


def test_a_file_with_other_contents_is_refused(tmp_path: Path) -> None:
    path = PathCloud.fit(*samples(classes("circle", 10, 8), 5, 0.05))
    path.save(tmp_path / "path")
    with safe_open(tmp_path / "path", framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        named = dict(file.metadata())
    values = json.loads(named["values"])
    for wrong in ([], {**values, "closing": 3}, {**values, "closing": {"x": 1}}, {**values, "noise": None}):
        save_file(held, tmp_path / "other", metadata={**named, "values": json.dumps(wrong)})
        with pytest.raises(ManifoldError, match="lacks what a PathCloud is made of"):
            PathCloud.load(tmp_path / "other")


def test_a_far_outlier_is_left_out() -> None:
    points, labels = samples(classes("circle", 8, 4), 10, 0.05)
    clean = PathCloud.fit(points, labels)
    points[13] = 1e6
    path = PathCloud.fit(points, labels)
    assert path.outliers.tolist() == [13] and path.closed
    assert (path.knots - clean.knots).norm(dim=-1).max() < 0.05


def test_bad_input_is_named() -> None:
    points, labels = samples(classes("circle", 5, 3), 4, 0.1)
    cases = [
        ({"points": points.index_fill(0, torch.tensor([3]), torch.nan), "labels": labels}, "NaN"),
        ({"points": points, "labels": labels[:-1]}, "one integer"),
        ({"points": points, "labels": labels + (labels > 2)}, "class 3 of 6 has no sample"),
        ({"points": points, "labels": torch.where(labels == 2, 2**40, labels)}, "class 2 of .* no sample"),
        ({"points": points, "labels": labels - 1}, "count from 0"),
        ({"points": points, "labels": torch.zeros_like(labels)}, "one class"),
        ({"points": torch.ones_like(points), "labels": labels}, "same mean"),
        ({"points": points, "labels": labels.clamp(max=1), "closed": True}, "3 classes"),
        ({"points": points, "labels": labels, "coordinates": torch.tensor([0.0, 2, 1, 3, 4])}, "increase"),
        ({"points": points, "labels": labels, "coordinates": torch.rand(4, 2)}, "one row"),
        ({"points": points, "labels": labels, "coordinates": torch.ones(5, 2).cumsum(0)}, "line or a plane"),
        (
            {"points": points, "labels": labels, "coordinates": torch.rand(5, 2), "closed": True},
            "only a curve",
        ),
    ]
    for arguments, said in cases:
        with pytest.raises(ManifoldError, match=said):
            PathCloud.fit(**arguments)
    path = PathCloud.fit(points, labels)
    with pytest.raises(ManifoldError, match="a vector of 3"):
        path.project(torch.ones(2, 4, dtype=DOUBLE))
    with pytest.raises(ManifoldError, match="shape"):
        path.at(torch.ones(2, 2, dtype=DOUBLE))


def test_a_state_that_is_not_finite_stays_alone_in_its_batch(device):
    grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1).reshape(-1, 2)
    bowl = torch.cat([grid, (grid * grid).sum(1, keepdim=True) / 4], 1).double().to(device)
    labels = torch.arange(16, device=device).repeat_interleave(2)
    manifold = PathCloud.fit(bowl[labels], labels, coordinates=grid.double().to(device))
    with unchecked():
        states = bowl[5:8] + 0.01
        alone = manifold.project(states), manifold.second_fundamental_form(states, states, states)
        states[1, 0] = torch.nan
        found = manifold.project(states), manifold.second_fundamental_form(states, states, states)
    for ours, theirs in ((found[0].foot, alone[0].foot), (found[1], alone[1])):
        assert ours[1].isnan().all()
        torch.testing.assert_close(ours[[0, 2]], theirs[[0, 2]])
    assert found[0].inside.tolist()[1] is False
