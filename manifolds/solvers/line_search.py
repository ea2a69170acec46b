"""A line search that every item of a batch makes for itself."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manifolds.solvers.geometry import spread
from manifolds.solvers.method import Iterate, freeze
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

    def search(
        self,
        problem: Problem,
        iterate: Iterate,
        direction: Tensor,
        slope: Tensor,
        start: Tensor,
        active: Tensor,
        reference: Tensor | None = None,
    ) -> Found:
        """Searches from x along `direction` with φ'(0) = `slope` < 0 (N), first at α = `start` (N)."""
        geometry, x, value = problem.geometry, iterate.x, iterate.value
        ceiling = value if reference is None else reference
        rounding = problem.rounding(value)
        zero, none = torch.zeros_like(value), torch.zeros_like(iterate.evaluations)
        bracket = Bracket(zero, value, slope, torch.full_like(value, torch.inf))
        best = Found(
            x, value, iterate.gradient, iterate.gradient_norm, direction, zero, none, none + Status.RUNNING
        )
        alpha, pending, sighted = start, active, torch.zeros_like(active)
        hopeless = (start * slope).abs() <= 100 * rounding
        lost = torch.where(hopeless, int(Status.STALLED), int(Status.LINE_SEARCH_FAILED))
        for trial in range(self.trials):
            y = geometry.retract(x, spread(torch.where(pending, alpha, 0), direction) * direction)
            look = problem.look(y)
            carried = geometry.transport(x, y, direction)
            rise = geometry.inner(y, look.gradient, carried)
            # Where the promised decrease is lost in rounding, an equal value proves nothing.
            lower = (look.value < ceiling) & (look.value <= ceiling + self.decrease * alpha * slope)
            nearly = (rise >= 0.9 * slope) & (rise <= (2 * self.decrease - 1) * slope)
            good = look.finite & (lower | (nearly & (look.value <= ceiling + rounding)))
            fits = good
            if self.curvature is not None and trial < self.trials // 3:
                fits = good & (rise.abs() <= self.curvature * slope.abs())
            now = Found(
                y,
                look.value,
                look.gradient,
                look.norm,
                carried,
                alpha,
                best.evaluations + pending,
                best.status,
            )
            left = pending & ~fits
            wall = torch.where(look.value == -torch.inf, int(Status.UNBOUNDED), int(Status.NOT_FINITE))
            lost = torch.where(look.finite | ~pending, lost, wall)
            going = bool(left.any())
            if trial == 0 and not going:
                return now
            kept = pending & good & (fits | ~sighted | (look.value <= best.value))
            counted = now.evaluations
            best = freeze(kept, now, best)
            best = replace(best, evaluations=counted)
            sighted, pending = sighted | kept, left
            if not going:
                break
            bracket, guess = bracket.narrow(alpha, look.value, rise, ~good | (rise > 0), ~look.finite)
            alpha = torch.where(pending, guess, alpha)
        return replace(best, status=torch.where(active & ~sighted, lost, best.status))
