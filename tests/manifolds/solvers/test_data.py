"""Functions with data: f is called on the items that have work to do, and nothing else changes."""

from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor

from manifolds import ManifoldError, Sphere
from manifolds.fixed_rank import FixedRank
from manifolds.solvers import NullSpace, Solution, State, Status, TrustBall, minimize
from manifolds.stiefel import Stiefel

METHODS = ["gradient", "conjugate-gradient", "lbfgs", "trust-region"]
FLAT = geoopt.Euclidean(ndim=1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def uneven(*batch: int, size: int = 6, seed: int = 1) -> Tensor:
    """Symmetric matrices whose eigenproblems take from a few steps to many."""
    matrix = normal(*batch, size, size, seed=seed)
    spread = torch.logspace(0, 1.5, max(1, torch.Size(batch).numel()), dtype=torch.float64).reshape(batch)
    stretch = torch.diag_embed(spread.unsqueeze(-1) ** torch.linspace(0, 1, size, dtype=torch.float64))
    return matrix + matrix.mT + stretch


def quartic(x: Tensor, matrix: Tensor) -> Tensor:
    return (x * (matrix @ x.unsqueeze(-1)).squeeze(-1)).sum(-1) + x.pow(4).sum(-1)


def alike(one: Solution, other: Solution, atol: float = 1e-12) -> None:
    """The same results by the same work."""
    assert torch.equal(one.status, other.status), (one.describe(), other.describe())
    assert torch.equal(one.steps, other.steps)
    assert torch.equal(one.evaluations, other.evaluations)
    torch.testing.assert_close(one.x, other.x, atol=atol, rtol=0)
    torch.testing.assert_close(one.value, other.value, atol=atol, rtol=1e-12, equal_nan=True)
    assert (one.multiplier is None) == (other.multiplier is None)
    if one.multiplier is not None and other.multiplier is not None:
        torch.testing.assert_close(one.multiplier, other.multiplier, atol=1e-9, rtol=1e-9)


class Counted:
    """A function that notes on how many items it is called."""

    def __init__(self, f: Callable[..., Tensor]) -> None:
        self.f, self.seen = f, []  # type: ignore[var-annotated]

    def __call__(self, x: Tensor, *data: Tensor) -> Tensor:
        assert all(part.shape[0] == x.shape[0] for part in data)
        self.seen.append(x.shape[0])
        return self.f(x, *data)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_the_same_steps_with_and_without(method: str, batch: tuple[int, ...]) -> None:
    matrix, start = uneven(*batch), Sphere().projx(normal(*batch, 6, seed=2))
    short: dict[str, Any] = {"gradient_tolerance": 1e-4}
    whole = minimize(lambda x: quartic(x, matrix), start, Sphere(), method, **short)
    apart = minimize(quartic, start, Sphere(), method, data=[matrix], **short)
    watched = minimize(quartic, start, Sphere(), method, data=[matrix], callback=lambda state: None, **short)
    assert apart.x.shape == start.shape
    assert apart.value.shape == apart.status.shape == batch
    alike(whole, apart)
    alike(whole, watched)


@pytest.mark.parametrize("method", METHODS)
def test_on_stiefel_with_two_tensors_of_data(method: str) -> None:
    matrix, weights = uneven(5, seed=3), 1 + normal(5, 1, 2, seed=4).abs()
    start = Stiefel().projx(normal(5, 6, 2, seed=5))

    def cost(x: Tensor, matrix: Tensor, weights: Tensor) -> Tensor:
        return (x * (matrix @ x) * weights).sum((-1, -2))

    options: dict[str, Any] = {"gradient_tolerance": 1e-2, "max_steps": 30}
    whole = minimize(lambda x: cost(x, matrix, weights), start, Stiefel(), method, **options)
    alike(whole, minimize(cost, start, Stiefel(), method, data=(matrix, weights), **options), 1e-10)


@pytest.mark.parametrize("method", ["gauss-newton", "levenberg-marquardt"])
def test_residuals(method: str) -> None:
    a = normal(7, 8, 3, seed=6) * torch.logspace(0, 1, 7, dtype=torch.float64).reshape(-1, 1, 1)
    b, start = normal(7, 8, seed=7), normal(7, 3, seed=8)

    def residuals(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        inside = (a @ x.unsqueeze(-1)).squeeze(-1)
        return 0.3 * inside.sin() + inside - b

    f = Counted(residuals)
    whole = minimize(lambda x: residuals(x, a, b), start, FLAT, method)
    alike(whole, minimize(f, start, FLAT, method, data=[a, b]))
    assert min(f.seen) < 7


@pytest.mark.parametrize("method", METHODS)
def test_work_is_done_for_those_that_have_work(method: str) -> None:
    matrix, start = uneven(24, seed=9), Sphere().projx(normal(24, 6, seed=10))
    f = Counted(quartic)
    found = minimize(f, start, Sphere(), method, data=[matrix])
    least = int(found.evaluations.sum())
    assert min(f.seen) <= 6
    if method == "trust-region":  # products are no calls of f
        assert sum(f.seen) < 24 * len(f.seen) * 3 / 4
    else:
        assert sum(f.seen) <= least * 4 / 3 + 24
        assert len(f.seen) <= int(found.evaluations.max()) + 1


@pytest.mark.parametrize("method", METHODS)
def test_items_that_are_nan_and_items_that_end_at_once(method: str) -> None:
    matrix, start = uneven(6, seed=11), Sphere().projx(normal(6, 6, seed=12))
    matrix[1] = torch.nan
    matrix[4] = torch.eye(6)
    start[4] = 6**-0.5
    whole = minimize(lambda x: quartic(x, matrix), start, Sphere(), method)
    apart = minimize(quartic, start, Sphere(), method, data=[matrix])
    assert apart.statuses[1] is Status.NOT_FINITE
    assert int(apart.steps[4]) == 0
    assert torch.equal(apart.x[[1, 4]], start[[1, 4]])
    alike(whole, apart)


@pytest.mark.parametrize("method", METHODS)
def test_callbacks_see_all_items_and_stop_single_ones(method: str) -> None:
    matrix, start = uneven(2, 3, seed=13), Sphere().projx(normal(2, 3, 6, seed=14))
    runs: list[list[State]] = [[], []]

    def watch(states: list[State]) -> Callable[[State], Tensor]:
        def callback(state: State) -> Tensor:
            states.append(state)
            stop = torch.zeros(2, 3, dtype=torch.bool)
            stop[1, 1] = state.step == 3
            stop[0, 2] = state.step == 2
            return stop

        return callback

    whole = minimize(
        lambda x: quartic(x, matrix), start, Sphere(), method, callback=watch(runs[0]), max_steps=12
    )
    apart = minimize(quartic, start, Sphere(), method, data=[matrix], callback=watch(runs[1]), max_steps=12)
    alike(whole, apart)
    assert apart.statuses[1][1] is apart.statuses[0][2] is Status.STOPPED_BY_CALLBACK
    assert len(runs[0]) == len(runs[1])
    for one, other in zip(*runs, strict=True):
        assert one.step == other.step
        assert torch.equal(one.status, other.status)
        assert torch.equal(one.evaluations, other.evaluations)
        torch.testing.assert_close(one.x, other.x, atol=1e-12, rtol=0)
        torch.testing.assert_close(one.gradient_norm, other.gradient_norm, atol=1e-10, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_limits_of_each_item(method: str) -> None:
    matrix, start = uneven(8, seed=15), Sphere().projx(normal(8, 6, seed=16))
    limits: dict[str, Any] = {
        "max_steps": 4, "gradient_tolerance": torch.logspace(1, -9, 8, dtype=torch.float64),
    }  # fmt: skip
    whole = minimize(lambda x: quartic(x, matrix), start, Sphere(), method, **limits)
    apart = minimize(quartic, start, Sphere(), method, data=[matrix], **limits)
    alike(whole, apart)
    assert {Status.CONVERGED, Status.MAX_STEPS} == {Status(number) for number in apart.status.tolist()}
    late = minimize(quartic, start, Sphere(), method, data=[matrix], max_time=0.0)
    assert late.statuses == [Status.MAX_TIME] * 8


@pytest.mark.parametrize(
    ("method", "batch"), [("lbfgs", (4,)), ("trust-region", ()), ("trust-region", (2, 2))]
)
def test_with_a_null_space_and_a_ball(method: str, batch: tuple[int, ...]) -> None:
    goal, keys = normal(*batch, 3, 5, seed=17), normal(*batch, 5, 2, seed=18)
    center, radius = 0.1 * normal(*batch, 3, 5, seed=19), 0.5 + normal(*batch, seed=20).abs()

    def misfit(x: Tensor, goal: Tensor) -> Tensor:
        return (x - goal).square().sum((-1, -2)) + x.pow(4).sum((-1, -2))

    flat = geoopt.Euclidean(ndim=2)
    for constraint in (NullSpace(keys), NullSpace(keys.reshape(-1, 5, 2)[0]), TrustBall(center, radius),
                       [NullSpace(keys), TrustBall(None, 0.8)]):  # fmt: skip
        given: dict[str, Any] = {"constraint": constraint, "gradient_tolerance": 1e-4}
        whole = minimize(lambda x: misfit(x, goal), torch.zeros_like(goal), flat, method, **given)
        f = Counted(misfit)
        apart = minimize(f, torch.zeros_like(goal), flat, method, data=[goal], **given)
        alike(whole, apart, 1e-10)


def test_low_rank_with_a_null_space() -> None:
    goal, keys = normal(4, 7, 6, seed=21), normal(4, 6, 2, seed=22)
    manifold = FixedRank(7, 6)
    start = manifold.random(4, 13, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(23))

    def misfit(x: Tensor, goal: Tensor) -> Tensor:
        return (x[..., :7, :] @ x[..., 7:, :].mT - goal).square().sum((-1, -2)) / 2

    found = minimize(misfit, start, manifold, "lbfgs", data=[goal], constraint=NullSpace(keys))
    off = torch.eye(6).double() - keys @ torch.linalg.pinv(keys)
    lost = torch.linalg.svdvals(goal @ off)[:, 2:].square().sum(-1) + (goal - goal @ off).square().sum(
        (-1, -2)
    )
    torch.testing.assert_close(found.value, lost / 2, atol=1e-11, rtol=0)
    assert float((found.x[:, :7] @ found.x[:, 7:].mT @ keys).abs().max()) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_given_derivatives_get_the_data(method: str) -> None:
    matrix, start = uneven(5, seed=24), Sphere().projx(normal(5, 6, seed=25))

    def times(x: Tensor, matrix: Tensor) -> Tensor:
        return (matrix @ x.unsqueeze(-1)).squeeze(-1)

    found = minimize(
        lambda x, matrix: (x * times(x, matrix)).sum(-1).detach(), start, Sphere(), method, data=[matrix],
        egrad=lambda x, matrix: 2 * times(x.detach(), matrix),
        ehess=lambda x, u, matrix: 2 * times(u, matrix),
    )  # fmt: skip
    torch.testing.assert_close(found.value, torch.linalg.eigvalsh(matrix)[:, 0], atol=1e-10, rtol=0)


def test_hessians_by_differences() -> None:
    ball = geoopt.PoincareBall()
    points = 0.3 * torch.tanh(normal(6, 2, 2, seed=26))

    def spread(x: Tensor, points: Tensor) -> Tensor:
        return ball.dist2(x.unsqueeze(-2), points).sum(-1)

    found = minimize(spread, torch.zeros(6, 2).double(), ball, data=[points])
    halfway = ball.geodesic(torch.tensor(0.5).double(), points[:, 0], points[:, 1])
    torch.testing.assert_close(found.x, halfway, atol=1e-7, rtol=0)


def test_an_empty_batch_and_no_data_at_all() -> None:
    found = minimize(quartic, torch.zeros(0, 4), Sphere(), data=[torch.zeros(0, 4, 4)])
    assert found.x.shape == (0, 4)
    start = Sphere().projx(normal(2, 2, 4, seed=27))
    found = minimize(lambda x: x[:, 0], start, Sphere(), "conjugate-gradient", data=[])
    torch.testing.assert_close(found.value, -torch.ones(2, 2).double(), atol=1e-12, rtol=0)


def test_parameters_as_data_get_no_gradient() -> None:
    weight = torch.nn.Parameter(uneven(3, seed=28))
    start = Sphere().projx(normal(3, 6, seed=29))
    assert not minimize(quartic, start, Sphere(), data=[weight]).value.requires_grad
    assert weight.grad is None


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ([torch.zeros(3, 4, 4)], r"data\[0\] has shape \(3, 4, 4\).*\(2,\)"),
        ([torch.zeros(2, 4, 4), torch.zeros(())], r"data\[1\] has shape \(\)"),
        ([torch.zeros(2, 4, 4, device="meta")], "is on meta and x0 on cpu"),
    ],
)
def test_data_that_do_not_fit(data: Any, match: str) -> None:
    with pytest.raises(ManifoldError, match=match):
        minimize(quartic, Sphere().projx(normal(2, 4)), Sphere(), data=data)


def test_values_of_another_shape() -> None:
    start, matrix = Sphere().projx(normal(2, 3, 6)), uneven(2, 3)
    with pytest.raises(ManifoldError, match=r"f returned shape \(6, 6\)"):
        minimize(lambda x, matrix: x, start, Sphere(), data=[matrix])
