"""Every item of a batch is a problem of its own: its steps, its end, its failure."""

import geoopt
import pytest
import torch
from torch import Tensor

from manifolds import Sphere
from manifolds.fixed_rank import FixedRank
from manifolds.solvers import State, Status, minimize
from manifolds.stiefel import Stiefel

METHODS = ["gradient", "conjugate-gradient", "lbfgs", "trust-region"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quartic(x: Tensor, matrix: Tensor) -> Tensor:
    """Not convex, and not quadratic: ⟨x, A x⟩ + ‖x‖₄⁴."""
    return torch.einsum("...i,...ij,...j", x, matrix, x) + x.pow(4).sum(-1)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_what_single_runs_give_on_spheres(method: str) -> None:
    matrix = normal(6, 6, 6, seed=1)
    matrix = (matrix + matrix.mT) * torch.logspace(-2, 2, 6, dtype=torch.float64).reshape(-1, 1, 1)
    start = Sphere().projx(normal(6, 6, seed=2))
    both = minimize(lambda x: quartic(x, matrix), start, Sphere(), method)
    for i in range(6):
        one = minimize(lambda x, i=i: quartic(x, matrix[i]), start[i], Sphere(), method)
        assert int(one.steps) == int(both.steps[i])
        assert int(one.evaluations) == int(both.evaluations[i])
        assert int(one.status) == int(both.status[i])
        torch.testing.assert_close(one.x, both.x[i], atol=1e-10, rtol=0)
        torch.testing.assert_close(one.value, both.value[i], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_gives_what_single_runs_give_on_fixed_rank(method: str) -> None:
    target = normal(2, 7, 5, seed=3)
    manifold = FixedRank(7, 5)
    start = manifold.random(2, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))

    def misfit(x: Tensor, goal: Tensor) -> Tensor:
        return (x[..., :7, :] @ x[..., 7:, :].mT - goal).square().sum((-1, -2)) / 2

    both = minimize(lambda x: misfit(x, target), start, manifold, method)
    for i in range(2):
        one = minimize(lambda x, i=i: misfit(x, target[i]), start[i], manifold, method)
        assert int(one.steps) == int(both.steps[i])
        torch.testing.assert_close(
            one.x[:7] @ one.x[7:].mT, both.x[i, :7] @ both.x[i, 7:].mT, atol=1e-9, rtol=0
        )


@pytest.mark.parametrize("method", ["gauss-newton", "levenberg-marquardt"])
def test_a_batch_gives_what_single_runs_give_for_residuals(method: str) -> None:
    a, b = normal(3, 8, 3, seed=5), normal(3, 8, seed=6)

    def residuals(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return 0.5 * (a @ x.unsqueeze(-1)).squeeze(-1).sin() + (a @ x.unsqueeze(-1)).squeeze(-1) - b

    start, flat = normal(3, 3, seed=7), geoopt.Euclidean(ndim=1)
    both = minimize(lambda x: residuals(x, a, b), start, flat, method)
    for i in range(3):
        one = minimize(lambda x, i=i: residuals(x, a[i], b[i]), start[i], flat, method)
        assert int(one.steps) == int(both.steps[i])
        assert int(one.evaluations) == int(both.evaluations[i])
        torch.testing.assert_close(one.x, both.x[i], atol=1e-9, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_items_of_wildly_different_scale_each_converge(method: str) -> None:
    scale = torch.logspace(-6, 6, 13, dtype=torch.float64)
    matrix = normal(8, 8, seed=8)
    matrix = matrix + matrix.mT
    start = Sphere().projx(normal(8, seed=9)).expand(13, 8)
    found = minimize(lambda x: scale * quartic(x, matrix), start, Sphere(), method)
    assert bool(found.converged.all()), found.describe()
    torch.testing.assert_close(found.x, found.x[:1].expand(13, 8), atol=1e-7, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_items_that_have_ended_stay_where_they_are(method: str) -> None:
    matrix = torch.stack([torch.diag(torch.arange(1.0, 7.0).double()), 50 * torch.eye(6).double()])
    matrix[1, 0, 1] = matrix[1, 1, 0] = 49.9
    start = Sphere().projx(torch.stack([torch.eye(6)[0].double(), normal(6, seed=10)]))
    seen: list[Tensor] = []
    found = minimize(
        lambda x: torch.einsum("...i,...ij,...j", x, matrix, x), start, Sphere(), method,
        callback=lambda state: seen.append(state.x[0]),
    )  # fmt: skip
    assert int(found.steps[0]) == 0
    assert int(found.steps[1]) == len(seen) > 0
    assert all(torch.equal(point, start[0]) for point in seen)
    assert torch.equal(found.x[0], start[0])


@pytest.mark.parametrize("method", METHODS)
def test_nan_from_the_start_stops_one_item_and_no_other(method: str) -> None:
    spoil = torch.tensor([1.0, torch.nan, 1.0], dtype=torch.float64)
    matrix = torch.diag(torch.arange(1.0, 6.0).double())
    start = Sphere().projx(normal(3, 5, seed=11))
    found = minimize(lambda x: spoil * torch.einsum("...i,ij,...j", x, matrix, x), start, Sphere(), method)
    assert found.statuses == [Status.CONVERGED, Status.NOT_FINITE, Status.CONVERGED]
    assert torch.equal(found.x[1], start[1])
    assert int(found.steps[1]) == 0
    torch.testing.assert_close(found.value[[0, 2]], torch.ones(2).double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_wall_of_nan_is_not_crossed_and_not_run_into_for_ever(method: str) -> None:
    """f is finite only where x₀ > 0; item 0 has its minimum inside, item 1 wants to go through the wall."""
    goal = torch.tensor([[2.0, 1.0], [-2.0, 1.0]], dtype=torch.float64)

    def walled(x: Tensor) -> Tensor:
        return (x - goal).square().sum(-1) + 0 * x[..., 0].log()

    start = torch.ones(2, 2, dtype=torch.float64)
    found = minimize(walled, start, geoopt.Euclidean(ndim=1), method, max_steps=500)
    assert found.statuses[0] is Status.CONVERGED
    torch.testing.assert_close(found.x[0], goal[0], atol=1e-8, rtol=0)
    assert found.statuses[1] in (
        Status.NOT_FINITE, Status.STALLED, Status.LINE_SEARCH_FAILED, Status.MAX_STEPS,
    )  # fmt: skip
    assert bool(found.x.isfinite().all())
    assert bool(found.value.isfinite().all())
    assert float(found.x[1, 0]) >= 0


@pytest.mark.parametrize("method", METHODS)
def test_everything_nan_away_from_the_start(method: str) -> None:
    start = Sphere().projx(normal(4, seed=12))

    def lonely(x: Tensor) -> Tensor:
        here = (x - start).square().sum(-1) == 0
        return torch.where(here, x[..., 0], torch.nan)

    found = minimize(lonely, start, Sphere(), method)
    assert found.statuses is Status.NOT_FINITE
    torch.testing.assert_close(found.x, start, atol=1e-15, rtol=0)


@pytest.mark.parametrize("method", ["gradient", "conjugate-gradient", "lbfgs"])
def test_a_wrong_gradient_is_found_out(method: str) -> None:
    start = normal(3, seed=13)
    found = minimize(
        lambda x: x.square().sum(-1), start, geoopt.Euclidean(ndim=1), method, egrad=lambda x: -2 * x
    )
    assert found.statuses is Status.LINE_SEARCH_FAILED
    torch.testing.assert_close(found.x, start)


@pytest.mark.parametrize("method", METHODS)
def test_a_start_at_the_minimum_is_the_answer(method: str) -> None:
    matrix = torch.diag(torch.arange(1.0, 6.0).double())
    turn, _ = torch.linalg.qr(normal(5, 5, seed=14))
    found = minimize(
        lambda x: torch.einsum("...i,ij,...j", x, turn @ matrix @ turn.mT, x), turn[:, 0], Sphere(), method
    )
    assert found.statuses is Status.CONVERGED
    assert int(found.steps) <= 1


def test_an_empty_batch_is_no_problem() -> None:
    found = minimize(lambda x: x.sum(-1), torch.zeros(0, 4), Sphere())
    assert found.x.shape == (0, 4)
    assert found.status.shape == (0,)
    assert found.describe() == "no items"


class TestEnds:
    matrix = torch.diag(torch.arange(1.0, 31.0).double() ** 2)
    start = Sphere().projx(torch.ones(3, 30).double() + 0.1 * normal(3, 30, seed=15))

    def f(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,ij,...j", x, self.matrix, x)

    def test_after_the_given_number_of_steps(self) -> None:
        found = minimize(self.f, self.start, Sphere(), "gradient", max_steps=5)
        assert found.statuses == [Status.MAX_STEPS] * 3
        assert found.steps.tolist() == [5, 5, 5]

    def test_with_no_steps_at_all(self) -> None:
        found = minimize(self.f, self.start, Sphere(), max_steps=0)
        assert torch.equal(found.x, self.start)
        assert found.statuses == [Status.MAX_STEPS] * 3

    def test_when_the_time_is_over(self) -> None:
        found = minimize(self.f, self.start, Sphere(), "gradient", max_time=0.0)
        assert found.statuses == [Status.MAX_TIME] * 3
        assert found.steps.tolist() == [0, 0, 0]

    def test_when_the_callback_says_so(self) -> None:
        states: list[State] = []

        def callback(state: State) -> bool:
            states.append(state)
            return state.step == 3

        found = minimize(self.f, self.start, Sphere(), "gradient", callback=callback)
        assert found.statuses == [Status.STOPPED_BY_CALLBACK] * 3
        assert [state.step for state in states] == [1, 2, 3]
        assert torch.equal(states[-1].x, found.x)
        assert torch.equal(states[-1].value, found.value)
        assert bool(states[0].active.all())
        assert states[0].elapsed <= states[-1].elapsed

    def test_for_the_items_that_the_callback_marks(self) -> None:
        marked = torch.tensor([True, False, True])
        found = minimize(self.f, self.start, Sphere(), callback=lambda state: marked)
        assert found.statuses == [Status.STOPPED_BY_CALLBACK, Status.CONVERGED, Status.STOPPED_BY_CALLBACK]

    def test_at_a_step_tolerance(self) -> None:
        found = minimize(self.f, self.start, Sphere(), "gradient", step_tolerance=1e-2)
        assert found.statuses == [Status.STALLED] * 3

    def test_at_a_value_tolerance(self) -> None:
        found = minimize(self.f, self.start, Sphere(), "gradient", value_tolerance=1e-2)
        assert found.statuses == [Status.STALLED] * 3

    def test_at_a_gradient_tolerance_of_each_item(self) -> None:
        wanted = torch.tensor([1e-1, 1e-3, 1e-6], dtype=torch.float64)
        found = minimize(self.f, self.start, Sphere(), "lbfgs", gradient_tolerance=wanted)
        assert bool((found.gradient_norm <= wanted).all())
        assert int(found.steps[0]) < int(found.steps[1]) < int(found.steps[2])

    def test_where_rounding_allows_no_more(self) -> None:
        turn, _ = torch.linalg.qr(normal(30, 30, seed=20))
        matrix = turn @ self.matrix @ turn.mT / 900
        start = self.start @ turn.mT

        def f(x: Tensor) -> Tensor:
            return torch.einsum("...i,ij,...j", x, matrix, x)

        for method in METHODS:
            found = minimize(f, start, Sphere(), method, gradient_tolerance=0.0, max_steps=5000)
            assert set(found.statuses) <= {Status.STALLED, Status.CONVERGED}, (method, found.describe())
            torch.testing.assert_close(found.value, torch.ones(3).double() / 900, atol=1e-13, rtol=0)

    def test_with_a_bar(self, capsys: pytest.CaptureFixture[str]) -> None:
        minimize(self.f, self.start, Sphere(), progress=True)
        assert "gradient norm" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_computes_in_float32(dtype: torch.dtype) -> None:
    matrix, seen = torch.diag(torch.arange(1.0, 6.0)), set()
    start = Sphere().projx(normal(5, seed=16)).to(dtype)

    def f(x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return torch.einsum("...i,ij,...j", x, matrix, x)

    found = minimize(f, start, Sphere(), "conjugate-gradient")
    assert seen == {torch.float32}
    assert found.x.dtype == dtype
    assert float(found.value) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision(method: str) -> None:
    matrix = torch.diag(torch.arange(1.0, 6.0))
    start = Sphere().projx(normal(7, 5, seed=17).float())
    found = minimize(lambda x: torch.einsum("...i,ij,...j", x, matrix, x), start, Sphere(), method)
    assert found.value.dtype == torch.float32
    torch.testing.assert_close(found.value, torch.ones(7), atol=1e-5, rtol=0)


def test_parameters_get_no_gradient_and_results_no_graph() -> None:
    weight = torch.nn.Parameter(torch.diag(torch.arange(1.0, 6.0)))
    sphere = Sphere()
    start = geoopt.ManifoldParameter(sphere.random(5), manifold=sphere)
    for method in METHODS:
        found = minimize(lambda x: torch.einsum("...i,ij,...j", x, weight, x), start, Sphere(), method)
        assert weight.grad is None
        assert start.grad is None
        assert type(found.x) is Tensor
        fields = (found.x, found.value, found.gradient_norm)
        assert not any(tensor.requires_grad for tensor in fields)


def test_under_no_grad_and_inference_mode() -> None:
    start = Sphere().projx(normal(5, seed=18))
    with torch.no_grad():
        assert minimize(lambda x: x[..., 0], start, Sphere()).statuses is Status.CONVERGED


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_twice(method: str) -> None:
    start = Stiefel().projx(normal(3, 6, 2, seed=19))
    first = minimize(lambda x: x.pow(3).sum((-1, -2)), start, Stiefel(), method)
    again = minimize(lambda x: x.pow(3).sum((-1, -2)), start, Stiefel(), method)
    assert torch.equal(first.x, again.x)
