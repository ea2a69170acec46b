"""Points that are spoiled: curvature and dimension of a sphere and of a torus stay right, or are refused."""

import pytest
import torch

from experiments.benchmarks import sampled_shapes as shapes
from manifolds.curvature import intrinsic_dimension, second_fundamental_form
from manifolds.errors import ManifoldError


def generator(seed):
    return torch.Generator().manual_seed(seed)


SPHERE = shapes.sphere(1200, 2, generator(0)).embedded(10, 0.0, generator(1)).points
TORUS = shapes.torus(1500, generator(2))
AT = torch.arange(40)


def spoiled(points, how):
    g = generator(3)
    rows, columns = points.shape
    if how == "shuffled copies":
        return torch.cat([points, points.repeat(2, 1)[torch.randperm(2 * rows, generator=g)]])
    if how == "one point many times":
        return torch.cat([points, points[-1:].expand(rows, -1)])
    if how == "outlier":
        return torch.cat([points, torch.full((1, columns), 1e4, dtype=points.dtype)])
    if how == "outlier beyond squares of single precision":
        return torch.cat([points, torch.full((1, columns), 1e30, dtype=points.dtype)]).float()
    if how == "constant columns":
        return torch.cat([points, torch.full((rows, 2), 1e6, dtype=points.dtype)], 1)
    return points + 1e6


HOWS = [
    "shuffled copies",
    "one point many times",
    "outlier",
    "outlier beyond squares of single precision",
    "constant columns",
    "far from the origin",
]


@pytest.mark.parametrize("how", HOWS)
def test_the_curvature_of_a_sphere_stays_one(how, device):
    points = spoiled(SPHERE, how).to(device)
    neighbors = 121 if how == "shuffled copies" else 40
    found = second_fundamental_form(points, AT.to(device), dim=2, neighbors=neighbors)
    assert found.reliable.all()
    one = torch.ones(len(AT), dtype=points.dtype, device=device)
    torch.testing.assert_close(found.mean_curvature.norm(dim=1), one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sectional, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", HOWS)
def test_the_curvature_of_a_torus_stays_what_it_is(how):
    points = spoiled(TORUS.points, how)
    neighbors = 91 if how == "shuffled copies" else 30
    found = second_fundamental_form(points, AT, dim=2, neighbors=neighbors)
    kept = found.reliable
    assert float(kept.double().mean()) > 0.9
    both = torch.stack([found.sectional.double(), TORUS.sectional[AT]])[:, kept]
    assert float(torch.corrcoef(both)[0, 1]) > 0.99


@pytest.mark.parametrize("method", ["local_pca", "twonn", "mle"])
@pytest.mark.parametrize("how", HOWS)
def test_the_dimension_of_a_sphere_stays_two(how, method, device):
    points = spoiled(SPHERE, how).to(device)
    if how == "one point many times" and method == "local_pca":
        points = points[: len(SPHERE) + 20]
    neighbors = 61 if how == "shuffled copies" else 30
    found = intrinsic_dimension(points, method, neighbors)
    assert abs(found.value - 2) < 0.25 and found.low <= 2 <= found.high
    assert found.pointwise[: len(SPHERE)].isfinite().all() and found.pointwise.shape == points.shape[:1]


@pytest.mark.parametrize("unit", [1e-30, 1e30])
@pytest.mark.parametrize("method", ["local_pca", "twonn", "mle"])
def test_the_dimension_in_single_precision_in_any_unit(method, unit):
    wanted = intrinsic_dimension(SPHERE.float(), method, 30)
    found = intrinsic_dimension((SPHERE * unit).float(), method, 30)
    assert found.value == pytest.approx(wanted.value, rel=1e-4)


def test_curvature_in_extreme_units_is_right_or_refused():
    found = second_fundamental_form((SPHERE * 1e15).float(), AT, dim=2, neighbors=40)
    torch.testing.assert_close(found.mean_curvature.norm(dim=1) * 1e15, torch.ones(40), rtol=1e-4, atol=1e-4)
    with pytest.raises(ManifoldError, match=r"beyond what torch.float32 holds; .*float64"):
        second_fundamental_form((SPHERE * 1e-25).float(), AT, dim=2, neighbors=40)
    with pytest.raises(ManifoldError, match=r"beyond what torch.float16 holds"):
        second_fundamental_form((SPHERE * 1e-3).half(), AT, dim=2, neighbors=40)


@pytest.mark.parametrize("out", [0.8, 1.03, 1.2])
def test_a_point_off_the_manifold_is_refused_and_right_as_a_place(out):
    points = torch.cat([SPHERE, out * SPHERE[:1]])
    found = second_fundamental_form(points, [0, 5, 1200], dim=2, neighbors=40)
    assert found.reliable.tolist()[1:] == [True, False] and "lies off the manifold" in found.reason[2]
    assert found.mean_curvature[2].isnan().all() and found.scalar[2].isnan()
    assert found.along(torch.ones(10, dtype=torch.float64))[2].isnan().all()
    place = second_fundamental_form(SPHERE, out * SPHERE[:1], dim=2, neighbors=40)
    torch.testing.assert_close(place.sectional, torch.ones(1).double(), rtol=1e-2, atol=1e-2)


def test_a_point_with_noise_is_not_taken_for_an_outlier():
    for dim, ambient in ((2, 3), (2, 10), (5, 6), (5, 40)):
        sample = shapes.sphere(3000, dim, generator(4)).embedded(ambient, 0.02, generator(5))
        found = second_fundamental_form(sample.points, torch.arange(500), dim=dim, neighbors=80)
        assert sum("lies off the manifold" in reason for reason in found.reason) <= 1


def test_a_far_point_has_no_curvature_in_any_direction():
    points = torch.cat([SPHERE, 3 * SPHERE[:1]])
    found = second_fundamental_form(points, [1200], dim=2, neighbors=40)
    assert "far outside" in found.reason[0]
    assert found.along(torch.ones(10, dtype=torch.float64)).isnan().all()


def test_a_base_among_its_own_copies_is_refused():
    points = torch.cat([SPHERE, SPHERE[:1].expand(60, -1)])
    found = second_fundamental_form(points, [0, 1230, 7], dim=2, neighbors=40)
    assert found.reliable.tolist() == [False, False, True] and "duplicates" in found.reason[1]
    assert found.along(torch.ones(10, dtype=torch.float64))[:2].isnan().all()


def test_a_line_has_no_second_dimension():
    line = torch.linspace(0, 1, 300, dtype=torch.float64)[:, None] * torch.tensor([[1.0, 2.0, 3.0]]).double()
    found = second_fundamental_form(line, AT, dim=2, neighbors=20)
    assert not found.reliable.any() and "lower dim" in found.reason[0]
    assert found.along(torch.tensor([1.0, 2.0, 3.0]).double()).isnan().all()
    assert intrinsic_dimension(line, neighbors=20).value == 1


def test_a_grid_and_near_copies_do_not_suit_two_neighbours():
    grid = torch.cartesian_prod(torch.arange(20.0), torch.arange(20.0))
    with pytest.raises(ManifoldError, match=r"equally far, as on a grid.*local_pca"):
        intrinsic_dimension(grid, "twonn", 10)
    assert intrinsic_dimension(grid, neighbors=24).value == 2
    near = torch.cat([SPHERE, SPHERE + 1e-9 * torch.randn(SPHERE.shape, generator=generator(6)).double()])
    with pytest.raises(ManifoldError, match="nearly the same"):
        intrinsic_dimension(near, "twonn", 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": SPHERE[:7]}, "7 points are too few; in dim 2 the fit needs 8 or more"),
        ({"points": SPHERE[:1]}, "1 points are too few"),
        ({"points": SPHERE[:30], "at": None}, "neighbors is 30, but each query has 29 points"),
        ({"points": SPHERE[:30], "at": SPHERE[:1], "neighbors": 31}, "has 30 points"),
        ({"points": SPHERE.clone().index_fill_(0, torch.tensor([3, 9]), torch.nan)}, "2 of 1200 .* row 3"),
        ({"points": SPHERE.clone().index_fill_(0, torch.tensor([3]), torch.inf)}, "NaN or infinity"),
        ({"points": SPHERE[:0]}, "nothing in them"),
        ({"dim": 10}, "dim is 10 and the points have 10 coordinates"),
        ({"dim": 400}, "1 to 9"),
        ({"dim": -1}, "1 to 9"),
        ({"at": SPHERE[:2] * torch.nan}, "at holds NaN"),
        ({"at": SPHERE[:2, :3]}, r"give \(b, 10\)"),
    ],
)
def test_second_fundamental_form_says_what_is_wrong(change, message):
    arguments = {"points": SPHERE, "at": AT, "dim": 2, "neighbors": 30} | change
    with pytest.raises(ManifoldError, match=message):
        second_fundamental_form(**arguments)


@pytest.mark.parametrize("method", ["local_pca", "twonn", "mle"])
@pytest.mark.parametrize(
    ("points", "neighbors", "message"),
    [
        (SPHERE[:0], 10, "nothing in them"),
        (SPHERE[:9], 9, "9"),
        (SPHERE * torch.nan, 10, "1200 of 1200 points"),
        (SPHERE, 5000, "5000"),
        (SPHERE, 0, "3 or more"),
    ],
)
def test_intrinsic_dimension_says_what_is_wrong(points, neighbors, message, method):
    with pytest.raises(ManifoldError, match=message):
        intrinsic_dimension(points, method, neighbors)


def test_points_that_are_all_one_have_no_dimension():
    assert intrinsic_dimension(SPHERE[:1].expand(60, -1), neighbors=20).value == 0
    with pytest.raises(ManifoldError, match="1 distinct points"):
        intrinsic_dimension(SPHERE[:1].expand(60, -1), "twonn", 20)
