"""`check` finds nothing wrong with what is right, and finds each defect that is built in on purpose."""

from typing import ClassVar

import geoopt
import numpy as np
import pytest
import torch

import manifolds
from manifolds import ManifoldError, Sphere, properties, transports
from manifolds.checks import Check, check
from manifolds.slopes import fit_slope


def verdict(result: Check, name: str) -> bool | None:
    (row,) = (each for each in result.measurements if each.property == name)
    return row.passed


def failing(result: Check) -> set[str]:
    return {each.property for each in result.failures}


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 6)])
def test_the_sphere_passes_whole(shape: tuple[int, ...]) -> None:
    result = check(Sphere(), size=shape)
    assert result.passed, str(result)
    assert all(each.passed for each in result.measurements)


@pytest.mark.parametrize(
    ("manifold", "shape"),
    [
        (geoopt.EuclideanStiefel(), (6, 3)),
        (geoopt.EuclideanStiefel(), (2, 4, 4)),
        (geoopt.Euclidean(ndim=1), (2, 5)),
        (geoopt.SymmetricPositiveDefinite(), (2, 3, 3)),
    ],
)
def test_what_is_right_in_geoopt_passes(manifold: geoopt.Manifold, shape: tuple[int, ...]) -> None:
    result = check(manifold, size=shape)
    assert result.passed, str(result)
    assert verdict(result, "retr is first order") is True
    assert verdict(result, "gradient") is True
    row = next(each for each in result.measurements if each.property == "Hessian is symmetric")
    assert row.passed is None
    assert "has no ehess2rhess" in row.note


def test_geoopts_default_stiefel_is_found_wrong() -> None:
    result = check(geoopt.Stiefel(), size=(6, 3))
    assert {
        "proju twice is proju",
        "retr is first order",
        "expmap is first order",
        "expmap keeps its speed",
        "expmap goes on along itself",
        "gradient",
    } <= failing(result)
    slope = next(each for each in result.measurements if each.property == "retr is first order")
    assert slope.value == pytest.approx(1.0, abs=0.05)


def test_geoopts_sphere_loses_small_distances() -> None:
    result = check(geoopt.Sphere(), size=(5,))
    lost = {
        "dist to the point itself",
        "dist at 1e-04 in float32",
        "logmap at 1e-04 in float32",
        "dist at 1e-09 in float64",
        "logmap at 1e-09 in float64",
    }
    assert lost <= failing(result)
    assert all("9" in name or "e-04" in name or "itself" in name for name in failing(result))


def test_the_poincare_balls_inner_is_found_wrong_on_batches_and_nowhere_else() -> None:
    result = check(geoopt.PoincareBall(), size=(2, 4))
    # In float32 the ball's small distances lose digits, how many depends on the points.
    single = {"dist at 1e-04 in float32", "logmap at 1e-04 in float32"}
    assert failing(result) - single == {"inner of a batch is that of each item"}


def test_what_is_missing_is_named() -> None:
    result = check(geoopt.EuclideanStiefel(), size=(5, 2))
    row = next(each for each in result.measurements if each.property == "log(exp(u)) is u")
    assert row.passed is None
    assert row.value is None
    assert "logmap" in row.note


class LongRetraction(Sphere):
    def retr(self, x, u):
        return self.projx(x + 1.001 * u)


class FirstOrderRetraction(Sphere):
    def retr(self, x, u):
        turned = u + (u * u).sum(-1, keepdim=True) * self.proju(x, torch.ones_like(u))
        return self.projx(x + turned)


class WrongHessian(Sphere):
    def weingarten(self, x, u, n):
        return 1.001 * super().weingarten(x, u, n)


class LopsidedHessian(Sphere):
    def ehess2rhess(self, x, g, h, u):
        return super().ehess2rhess(x, g, h, u) + 1e-3 * self.proju(x, u.roll(1, -1))


class WrongGradient(Sphere):
    def egrad2rgrad(self, x, g):
        return 1.0001 * super().egrad2rgrad(x, g)


class UnprojectedGradient(Sphere):
    def egrad2rgrad(self, x, g):
        return g


class ObliqueProjection(Sphere):
    def proju(self, x, u):
        beside = x.roll(1, -1) + x
        return u - (x * u).sum(-1, keepdim=True) / (x * beside).sum(-1, keepdim=True) * beside


class ProjectedTransport(Sphere):
    def transp(self, x, y, v):
        return self.proju(y, v)


class UnmovedTransport(Sphere):
    def transp(self, x, y, v):
        return v


class WrongLogarithm(Sphere):
    def logmap(self, x, y):
        return self.proju(x, y - x)


class WrongDimension(Sphere):
    def dimension(self, point):
        return super().dimension(point) + 1


class WrongExponential(Sphere):
    def expmap(self, x, u):
        return self.projx(x + u)


class MixedBatch(Sphere):
    def logmap(self, x, y):
        return super().logmap(x, y) * (1 + 1e-6 * x.mean())


class CosineDistance(Sphere):
    def dist(self, x, y, *, keepdim=False):
        return torch.acos((x * y).sum(-1, keepdim=keepdim).clamp(-1, 1))


class Raises(Sphere):
    def logmap(self, x, y):
        raise RuntimeError("out of order")


@pytest.mark.parametrize(
    ("manifold", "found"),
    [
        (LongRetraction, {"retr is first order"}),
        (FirstOrderRetraction, {"retr follows geodesics to second order"}),
        (WrongHessian, {f"{name} follows geodesics to second order" for name in ("retr", "expmap")}),
        (LopsidedHessian, {"Hessian is symmetric"}),
        (WrongGradient, {"gradient"}),
        (UnprojectedGradient, {"gradient is tangent"}),
        (ObliqueProjection, {"proju is self-adjoint"}),
        (ProjectedTransport, {"transp keeps inner products", "transp there and back"}),
        (UnmovedTransport, {"transp gives a tangent vector"}),
        (WrongLogarithm, {"log(exp(u)) is u", "exp(log(y)) is y", "dist is the length of the logarithm"}),
        (WrongDimension, {"rank of proju is the dimension"}),
        (WrongExponential, {"expmap keeps its speed", "expmap goes on along itself"}),
        (MixedBatch, {"logmap of a batch is that of each item"}),
        (CosineDistance, {"dist at 1e-09 in float64", "dist at 1e-04 in float32"}),
        (Raises, {"log(exp(u)) is u", "logmap of a batch is that of each item"}),
    ],
)  # fmt: skip
def test_a_defect_is_found(manifold: type[Sphere], found: set[str]) -> None:
    result = check(manifold(), size=(2, 6))
    assert not result.passed
    assert found <= failing(result), str(result)


def test_an_order_that_is_not_claimed_is_not_asked() -> None:
    class Modest(FirstOrderRetraction):
        retractions: ClassVar[dict[str, int]] = {"projection": 1}

    names = {each.property for each in check(Modest(), size=(4,)).measurements}
    assert "retr follows geodesics to second order" not in names


def test_the_table() -> None:
    result = check(geoopt.Stiefel(), size=(4, 2))
    table = result.table
    assert list(table.columns) == ["property", "measured", "expected", "passed", "note"]
    assert len(table) == len(result.measurements)
    assert int((table.passed == False).sum()) == len(result.failures)  # noqa: E712
    assert table.passed.isna().sum() == sum(each.passed is None for each in result.measurements)
    assert "proju twice is proju" in str(result)
    assert f"fails {len(result.failures)} of" in str(result)
    assert "<table" in result._repr_html_()


def test_the_same_generator_gives_the_same_numbers_and_leaves_the_global_one_alone() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = check(geoopt.Sphere(), generator=torch.Generator().manual_seed(5))
    second = check(geoopt.Sphere(), generator=torch.Generator().manual_seed(5))
    other = check(geoopt.Sphere(), generator=torch.Generator().manual_seed(6))
    assert torch.equal(before, torch.get_rng_state())
    values = [[each.value for each in result.measurements] for result in (first, second, other)]
    assert values[0] == values[1]
    assert values[0] != values[2]


def test_points_of_any_precision_and_place_are_taken(device: torch.device) -> None:
    x = Sphere().random(3, 5, dtype=torch.float32, device=device)
    result = manifolds.checks.check(Sphere(), x)
    assert result.passed, str(result)
    assert result.shape == (3, 5)


def test_bad_input_is_refused() -> None:
    with pytest.raises(ManifoldError, match="not on Sphere"):
        check(Sphere(), torch.ones(3, dtype=torch.float64))
    with pytest.raises(ManifoldError, match="dtype torch"):
        check(Sphere(), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ManifoldError, match="give x or size"):
        check(geoopt.Stiefel(), size=(2, 5))
    with pytest.raises(ManifoldError, match="complex"):
        check(geoopt.UpperHalf(), size=(2, 2))


def test_single_properties_run_alone() -> None:
    x = geoopt.Sphere().random(4, dtype=torch.float64)
    for measure in (
        properties.projection_is_idempotent,
        properties.projection_is_self_adjoint,
        properties.retractions_are_first_order,
        transports.transport_keeps_its_promises,
    ):
        rows = measure(geoopt.Sphere(), x)
        assert rows
        assert all(row.passed is not False for row in rows), rows


@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_slope_is_read_through_rounding_and_higher_terms(order: int) -> None:
    steps = 10.0 ** np.linspace(-6, 0, 49)
    rounding = 1e-15 * np.random.default_rng(0).standard_normal(49)
    errors = np.abs(0.3 * steps**order + 2.0 * steps ** (order + 1) + rounding)
    assert fit_slope(steps, errors, floor=3e-14).value == pytest.approx(order, abs=0.1)


def test_a_small_error_of_low_order_is_not_hidden_by_a_large_one_of_high_order() -> None:
    steps = 10.0 ** np.linspace(-6, 0, 49)
    assert fit_slope(steps, 1e-4 * steps + steps**3, floor=1e-14).value == pytest.approx(1.0, abs=0.05)


def test_an_error_of_rounding_alone_has_an_infinite_slope() -> None:
    steps = 10.0 ** np.linspace(-6, 0, 49)
    assert fit_slope(steps, np.full(49, 1e-16), floor=1e-14).value == np.inf
