"""A line search that every item of a batch makes for itself."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manifolds.solvers.geometry import spread
from manifolds.solvers.items import freeze, places, put, take
from manifolds.solvers.method import Iterate
from manifolds.solvers.objective import Problem
from manifolds.solvers.solution import Status


@dataclass(frozen=True)
class Found:
    """The end of a search, or a trial of it. All fields have the batch first.

    Attributes:
        x: the new point (N, *point); the old one where the search failed.
        value: f there (N).
        gradient: the Riemannian gradient there (N, *point).
        norm: its norm (N).
        direction: the search direction brought there (N, *point).
        step: the step length α (N), zero where the search failed.
        evaluations: how often f was evaluated (N).
        status: RUNNING where a point was found, else why not (N).
    """

    x: Tensor
    value: Tensor
    gradient: Tensor
    norm: Tensor
    direction: Tensor
    step: Tensor
    evaluations: Tensor
    status: Tensor

    def moved(self, before: Iterate, length: Tensor) -> dict[str, Tensor]:
        """The fields that every iterate has, after this search; `length` is that of the direction."""
        return {
            "x": self.x,
            "value": self.value,
            "gradient": self.gradient,
            "gradient_norm": self.norm,
            "evaluations": before.evaluations + self.evaluations,
            "status": self.status,
            "moved": self.step > 0,
            "length": self.step * length,
        }


@dataclass(frozen=True)
class Bracket:
    """Between which lengths a good one lies, with value and slope at the lower end (N each)."""

    low: Tensor
    value: Tensor
    slope: Tensor
    high: Tensor

    def narrow(
        self, alpha: Tensor, value: Tensor, slope: Tensor, long: Tensor, blind: Tensor
    ) -> tuple["Bracket", Tensor]:
        """The bracket after a trial, and the next length.

        Args:
            alpha: the length tried.
            value: f there.
            slope: φ' there.
            long: whether it was too long, else it was too short.
            blind: whether nothing finite was seen there.
        """
        width = alpha - self.low
        secant = self.low - self.slope * width / (slope - self.slope)
        parabola = self.low - self.slope * width * width / (2 * (value - self.value - self.slope * width))
        back = torch.where(slope > 0, secant, parabola)
        back = torch.where(blind | ~back.isfinite(), self.low + 0.1 * width, back)
        ahead = torch.where(slope > self.slope, secant, torch.inf)
        ahead = torch.minimum(torch.maximum(ahead, 1.5 * alpha), 10 * alpha)
        low, high = torch.where(long, self.low, alpha), torch.where(long, alpha, self.high)
        narrowed = Bracket(
            low, torch.where(long, self.value, value), torch.where(long, self.slope, slope), high
        )
        gap = torch.where(high < torch.inf, high - low, torch.inf)
        inside = torch.minimum(
            torch.maximum(torch.where(long, back, ahead), low + 0.1 * gap), high - 0.1 * gap
        )
        return narrowed, torch.where(high < torch.inf, inside, ahead)


@dataclass(frozen=True)
class Search:
    """Where the search of each item stands.

    Attributes:
        x: where it began (N, *point).
        direction: where it goes (N, *point).
        value: φ(0) (N).
        slope: φ'(0) (N).
        ceiling: the value that Armijo's condition starts from (N).
        rounding: changes of f that are not seen (N).
        bracket: between which lengths a good one lies.
        best: the lowest trial that fits so far, or the start.
        alpha: the next length to try (N).
        pending: whether the item searches on (N).
        sighted: whether a trial was low enough (N).
        lost: the status if none will be (N).
    """

    x: Tensor
    direction: Tensor
    value: Tensor
    slope: Tensor
    ceiling: Tensor
    rounding: Tensor
    bracket: Bracket
    best: Found
    alpha: Tensor
    pending: Tensor
    sighted: Tensor
    lost: Tensor

    def end(self) -> Found:
        """What was found, with the status."""
        return replace(self.best, status=torch.where(self.sighted, int(Status.RUNNING), self.lost))


@dataclass(frozen=True)
class Trial:
    """One trial of each item: where it led, φ' there, and whether it is finite, low enough, and fits (N)."""

    now: Found
    rise: Tensor
    finite: Tensor
    good: Tensor
    fits: Tensor


@dataclass(frozen=True)
class LineSearch:
    """Finds a step length α along y(α) = R_x(α d) with φ(α) = f(y(α)) low enough.

    A step is taken when φ(α) ≤ φ₀ + c₁ α φ'(0) (Armijo), where φ₀ is the value or a larger reference, and
    |φ'(α)| ≤ c₂ |φ'(0)| (strong Wolfe) if a curvature constant c₂ is given. Near a minimum φ cannot show the
    decrease; there φ(α) ≤ φ₀ + rounding with 0.9 φ'(0) ≤ φ'(α) ≤ (2c₁ − 1) φ'(0) serves (the approximate
    Wolfe condition). φ' is ⟨grad f(y), T d⟩ with the manifold's transport T. The next trial is the secant's
    zero of φ', kept well inside the bracket; a trial that is NaN or infinite counts as too long.

    Source: Hager and Zhang, "A new conjugate gradient method with guaranteed descent and an efficient line
    search" (2005).

    Attributes:
        decrease: c₁.
        curvature: c₂, or None for Armijo alone.
        trials: how many lengths are tried at most; a third of that for the curvature condition.
    """

    decrease: float = 1e-4
    curvature: float | None = None
    trials: int = 60

    def begin(
        self,
        problem: Problem,
        iterate: Iterate,
        direction: Tensor,
        slope: Tensor,
        start: Tensor,
        active: Tensor,
        reference: Tensor | None = None,
    ) -> Search:
        """A search from x along `direction` with φ'(0) = `slope` < 0 (N), first at α = `start` (N)."""
        x, value = iterate.x, iterate.value
        rounding = problem.rounding(value)
        zero, none = torch.zeros_like(value), torch.zeros_like(iterate.evaluations)
        best = Found(
            x, value, iterate.gradient, iterate.gradient_norm, direction, zero, none, none + Status.RUNNING
        )
        hopeless = (start * slope).abs() <= 100 * rounding
        return Search(
            x=x,
            direction=direction,
            value=value,
            slope=slope,
            ceiling=value if reference is None else reference,
            rounding=rounding,
            bracket=Bracket(zero, value, slope, torch.full_like(value, torch.inf)),
            best=best,
            alpha=start,
            pending=active,
            sighted=torch.zeros_like(active),
            lost=torch.where(hopeless, int(Status.STALLED), int(Status.LINE_SEARCH_FAILED)),
        )

    def search(self, problem: Problem, state: Search) -> Found:
        """Searches until every item has ended; trials are made for the pending items alone where they can."""
        trial = self._try(problem, state)
        pending = state.pending & ~trial.fits
        count = int(pending.sum())
        if count == 0:
            return trial.now
        state = self._after(state, trial)
        found, where = state.end(), None
        while count > 0:
            if problem.sparse(count, len(state.pending)):
                found = state.end() if where is None else put(found, where, state.end())
                chosen = places(state.pending)
                where = chosen if where is None else where[chosen]
                state, problem = take(state, chosen), problem.subset(chosen)
            state = self.advance(problem, state)
            count = int(state.pending.sum())
        return state.end() if where is None else put(found, where, state.end())

    def advance(self, problem: Problem, state: Search) -> Search:
        """One trial of every pending item."""
        return self._after(state, self._try(problem, state))

    def _try(self, problem: Problem, state: Search) -> Trial:
        geometry, x, slope, alpha = problem.geometry, state.x, state.slope, state.alpha
        y = geometry.retract(x, spread(torch.where(state.pending, alpha, 0), x) * state.direction)
        look = problem.look(y)
        carried = geometry.transport(x, y, state.direction)
        rise = geometry.inner(y, look.gradient, carried)
        # Where the promised decrease is lost in rounding, an equal value proves nothing.
        lower = (look.value < state.ceiling) & (look.value <= state.ceiling + self.decrease * alpha * slope)
        nearly = (rise >= 0.9 * slope) & (rise <= (2 * self.decrease - 1) * slope)
        good = look.finite & (lower | (nearly & (look.value <= state.ceiling + state.rounding)))
        number = state.best.evaluations + state.pending
        fits = good
        if self.curvature is not None:
            fits = good & ((rise.abs() <= self.curvature * slope.abs()) | (number > self.trials // 3))
        now = Found(y, look.value, look.gradient, look.norm, carried, alpha, number, state.best.status)
        return Trial(now, rise, look.finite, good, fits)

    def _after(self, state: Search, trial: Trial) -> Search:
        """The search after a trial, and the next length."""
        now, value = trial.now, trial.now.value
        wall = torch.where(value == -torch.inf, int(Status.UNBOUNDED), int(Status.NOT_FINITE))
        kept = state.pending & trial.good & (trial.fits | ~state.sighted | (value <= state.best.value))
        pending = state.pending & ~trial.fits & (now.evaluations < self.trials)
        bracket, guess = state.bracket.narrow(
            state.alpha, value, trial.rise, ~trial.good | (trial.rise > 0), ~trial.finite
        )
        return replace(
            state,
            bracket=bracket,
            best=replace(freeze(kept, now, state.best), evaluations=now.evaluations),
            alpha=torch.where(pending, guess, state.alpha),
            pending=pending,
            sighted=state.sighted | kept,
            lost=torch.where(trial.finite | ~state.pending, state.lost, wall),
        )
