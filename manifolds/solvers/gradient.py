"""Steepest descent with the steps of Barzilai and Borwein."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manifolds.solvers.line_search import Found, LineSearch
from manifolds.solvers.method import begin, require
from manifolds.solvers.objective import Look, Problem
from manifolds.solvers.searching import Directed, Searching


@dataclass(frozen=True)
class Descent(Directed):
    """Adds whether the next step is of the long kind, and the mean of values with its weight (N each)."""

    long: Tensor
    reference: Tensor
    weight: Tensor


@dataclass(frozen=True)
class Gradient(Searching[Descent]):
    """Steepest descent, x⁺ = R_x(−α grad f), with a line search that allows some rise.

    The first α tried is that of Barzilai and Borwein: with s = T(−α grad f) and y = grad f⁺ − T grad f it is
    ⟨s, s⟩/⟨s, y⟩ and ⟨s, y⟩/⟨y, y⟩ in turn, the two least-squares fits of a multiple of the identity to the
    Hessian. Such steps are good because the value may rise now and then: Armijo's condition is asked against
    a mean of past values, C⁺ = (η Q C + f⁺) / Q⁺ with Q⁺ = η Q + 1.

    Source: Iannazzo and Porcelli, "The Riemannian Barzilai–Borwein method with nonmonotone line search and
    the matrix geometric mean computation" (2018); Zhang and Hager, "A nonmonotone line search technique"
    (2004).

    Attributes:
        memory: η, from 0 (every step lowers the value) to below 1.
        decrease: c₁ of Armijo's condition.
        initial_length: the length of the first step tried.
    """

    memory: float = 0.85
    decrease: float = 1e-4
    initial_length: float = 1.0

    steps: ClassVar[int] = 10000
    patience: ClassVar[int] = 50

    def __post_init__(self) -> None:
        require(0 <= self.memory < 1, "gradient", f"memory is {self.memory}; it lies in [0, 1)")
        require(0 < self.decrease < 0.5, "gradient", f"decrease is {self.decrease}; it lies in (0, ½)")
        require(
            self.initial_length > 0, "gradient", f"initial_length is {self.initial_length}; it is positive"
        )

    def init(self, problem: Problem, look: Look) -> Descent:
        """Starts with a step of the initial length."""
        size = torch.where(look.norm > 0, look.norm, 1.0)
        return Descent(
            **begin(look),
            direction=-look.gradient,
            slope=-(look.norm**2),
            size=look.norm,
            trial=self.initial_length / size,
            long=torch.ones_like(look.finite),
            reference=look.value,
            weight=torch.ones_like(size),
        )

    def line(self) -> LineSearch:
        """Armijo's condition alone."""
        return LineSearch(self.decrease)

    def reference(self, iterate: Descent) -> Tensor:
        """The mean of past values."""
        return iterate.reference

    def follow(self, problem: Problem, iterate: Descent, found: Found, active: Tensor) -> Descent:
        """The next step to try down the gradient."""
        geometry = problem.geometry
        change = found.gradient + found.direction
        s_y = found.step * geometry.inner(found.x, found.direction, change)
        s_s = found.step**2 * geometry.inner(found.x, found.direction, found.direction)
        y_y = geometry.inner(found.x, change, change)
        trial = torch.where(iterate.long, s_s / s_y, s_y / y_y)
        usable = (s_y > 0) & trial.isfinite() & (trial > 0)
        trial = torch.where(usable, trial, torch.where(found.step > 0, 10 * found.step, iterate.trial))
        weight = self.memory * iterate.weight + 1
        reference = (self.memory * iterate.weight * iterate.reference + found.value) / weight
        return Descent(
            **found.moved(iterate, iterate.size),
            direction=-found.gradient,
            slope=-(found.norm**2),
            size=found.norm,
            trial=trial,
            long=~iterate.long,
            reference=torch.maximum(reference, found.value),
            weight=weight,
        )
