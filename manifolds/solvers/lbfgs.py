"""Limited-memory BFGS with transported pairs."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from manifolds.solvers.geometry import spread
from manifolds.solvers.line_search import Found, LineSearch
from manifolds.solvers.method import begin, require
from manifolds.solvers.objective import Look, Problem
from manifolds.solvers.searching import Directed, Searching
from manifolds.solvers.solution import Status


@dataclass(frozen=True)
class QuasiNewton(Directed):
    """Adds the pairs, all tangent at x, the newest last; a pair that was not taken has the weight zero.

    Attributes:
        steps: s, steps brought to x (N, m, *point).
        changes: y, changes of the gradient brought to x (N, m, *point).
        weight: 1 / ⟨s, y⟩ (N, m).
        scale: γ, the multiple of the identity that the inverse Hessian starts from (N).
        plain: whether the direction is the negative gradient (N).
        filled: how many places, the last ones, hold pairs in any item.
    """

    steps: Tensor
    changes: Tensor
    weight: Tensor
    scale: Tensor
    plain: Tensor
    filled: int


@dataclass(frozen=True)
class LBFGS(Searching[QuasiNewton]):
    """Limited-memory BFGS: the inverse Hessian from the last m steps and changes of the gradient.

    The pairs s = T(α d) and y = grad f⁺ − T grad f are transported along with x. A pair is used only if
    ⟨s, y⟩ ≥ c ‖s‖ ‖y‖ (cautious update; the units of f do not matter), so that the inverse Hessian stays
    positive definite where f is not convex. It starts from γ = ⟨s, y⟩/⟨y, y⟩ of the newest pair.

    Source: Nocedal, "Updating quasi-Newton matrices with limited storage" (1980); Huang, Gallivan and Absil,
    "A Broyden class of quasi-Newton methods for Riemannian optimization" (2015); Huang, Absil and Gallivan,
    "A Riemannian BFGS method without differentiated retraction for nonconvex optimization problems" (2018).

    Attributes:
        memory: m, how many pairs are kept.
        caution: c of the cautious update.
        decrease: c₁ of the line search.
        curvature: c₂ of the line search.
        initial_length: the length of the first step tried.
    """

    memory: int = 10
    caution: float = 1e-8
    decrease: float = 1e-4
    curvature: float = 0.9
    initial_length: float = 1.0

    steps: ClassVar[int] = 5000
    patience: ClassVar[int] = 20

    def __post_init__(self) -> None:
        require(
            isinstance(self.memory, int) and self.memory > 0,
            "lbfgs",
            f"memory is {self.memory}; it is a positive integer",
        )
        require(self.caution >= 0, "lbfgs", f"caution is {self.caution}; it is not negative")
        require(
            0 < self.decrease < self.curvature < 1,
            "lbfgs",
            f"decrease is {self.decrease} and curvature {self.curvature}; 0 < decrease < curvature < 1",
        )
        require(self.initial_length > 0, "lbfgs", f"initial_length is {self.initial_length}; it is positive")

    def init(self, problem: Problem, look: Look) -> QuasiNewton:
        """Starts without pairs."""
        count, *point = look.x.shape
        size = torch.where(look.norm > 0, look.norm, 1.0)
        return QuasiNewton(
            **begin(look),
            direction=-look.gradient,
            slope=-(look.norm**2),
            size=look.norm,
            trial=self.initial_length / size,
            steps=look.x.new_zeros(count, self.memory, *point),
            changes=look.x.new_zeros(count, self.memory, *point),
            weight=look.x.new_zeros(count, self.memory),
            scale=torch.ones_like(look.norm),
            plain=torch.ones_like(look.finite),
            filled=0,
        )

    def line(self) -> LineSearch:
        """The strong Wolfe conditions."""
        return LineSearch(self.decrease, self.curvature)

    def follow(self, problem: Problem, iterate: QuasiNewton, found: Found, active: Tensor) -> QuasiNewton:
        """The pair that the step gives, and the quasi-Newton direction after it."""
        geometry, x, gradient = problem.geometry, iterate.x, iterate.gradient
        failed = found.step == 0
        again = failed & ~iterate.plain & active
        fields = found.moved(iterate, iterate.size)
        fields["status"] = torch.where(again, int(Status.RUNNING), found.status)

        s = spread(found.step, found.direction) * found.direction
        filled = iterate.filled
        used = slice(self.memory - filled, None)
        bundle = torch.cat([iterate.steps[:, used], iterate.changes[:, used], gradient.unsqueeze(1)], dim=1)
        bundle = geometry.transport(x.unsqueeze(1), found.x.unsqueeze(1), bundle)
        y = found.gradient - bundle[:, -1]
        steps = _push(iterate.steps, bundle[:, :filled], s)
        changes = _push(iterate.changes, bundle[:, filled : 2 * filled], y)
        s_y = geometry.inner(found.x.unsqueeze(1), steps, changes)
        lengths = geometry.norm(found.x, s) * geometry.norm(found.x, y)
        newest = s_y[:, -1] >= self.caution * lengths
        taken = torch.cat([iterate.weight[:, 1:] > 0, newest.unsqueeze(1)], dim=1) & (s_y > 0)
        weight = torch.where(taken, 1 / torch.where(taken, s_y, 1.0), 0)
        scale = s_y[:, -1] / geometry.inner(found.x, y, y)
        scale = torch.where(taken[:, -1] & scale.isfinite(), scale, iterate.scale)
        after = QuasiNewton(
            **fields,
            direction=found.direction,
            slope=iterate.slope,
            size=iterate.size,
            trial=iterate.trial,
            steps=steps,
            changes=changes,
            weight=weight,
            scale=scale,
            plain=again | ~taken.any(1),
            filled=min(filled + 1, self.memory),
        )
        return self._aimed(problem, after)

    def _aimed(self, problem: Problem, iterate: QuasiNewton) -> QuasiNewton:
        """The iterate with its direction, the negative gradient where the pairs give none that descends."""
        geometry = problem.geometry
        x, gradient, norm = iterate.x, iterate.gradient, iterate.gradient_norm
        direction = -self._apply(problem, iterate)
        slope, size = geometry.inner(x, gradient, direction), geometry.norm(x, direction)
        plain = iterate.plain | ~(slope < -1e-10 * norm * size)
        direction = torch.where(spread(plain, direction), -gradient, direction)
        slope, size = torch.where(plain, -(norm**2), slope), torch.where(plain, norm, size)
        trial = torch.where(plain, self.initial_length / torch.where(size > 0, size, 1.0), 1.0)
        return replace(iterate, direction=direction, slope=slope, size=size, trial=trial, plain=plain)

    def _apply(self, problem: Problem, iterate: QuasiNewton) -> Tensor:
        """The inverse Hessian applied to the gradient: the two loops of Nocedal, in the metric at x."""
        inner, x, q = problem.geometry.inner, iterate.x, iterate.gradient
        used = range(self.memory - iterate.filled, self.memory)
        taken: list[Tensor] = []
        for i in reversed(used):
            s, y = iterate.steps[:, i], iterate.changes[:, i]
            taken.append(iterate.weight[:, i] * inner(x, s, q))
            q = q - spread(taken[-1], y) * y
        q = spread(iterate.scale, q) * q
        for i in used:
            s, y = iterate.steps[:, i], iterate.changes[:, i]
            q = q + spread(taken.pop() - iterate.weight[:, i] * inner(x, y, q), s) * s
        return q


def _push(places: Tensor, carried: Tensor, newest: Tensor) -> Tensor:
    """The places with carried vectors and a new one at the end; the first place falls out."""
    room = places.shape[1] - 1
    empty = places[:, : max(0, room - carried.shape[1])]
    kept = carried[:, max(0, carried.shape[1] - room) :]
    return torch.cat([empty, kept, newest.unsqueeze(1)], dim=1)
