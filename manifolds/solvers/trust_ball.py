"""Minimisation inside a ball, by the augmented Lagrangian."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manifolds.operations import unchecked
from manifolds.solvers.geometry import spread
from manifolds.solvers.method import Method
from manifolds.solvers.objective import Problem
from manifolds.solvers.run import End, Limits, run, tolerance
from manifolds.solvers.solution import Status

ROUNDS = 50


@dataclass(frozen=True)
class Ball:
    """The constraint c(x) = (dist² − R²) / (2 R) ≤ 0, whose gradient is a unit vector on the boundary.

    Attributes:
        problem: ½ dist² as a function on the manifold, with the centers as data.
        radius: R (N).
    """

    problem: Problem
    radius: Tensor

    def measure(self, x: Tensor) -> Tensor:
        """The values of c (N) at the solver's points (N, *point)."""
        half = self.problem.f(self.problem.shown(x), *self.problem.data)
        return half.reshape(-1) / self.radius - self.radius / 2

    def enter(self, x: Tensor) -> Tensor:
        """The points, with those outside moved towards the center until rounding has them inside."""
        geometry, eps = self.problem.geometry, torch.finfo(x.dtype).eps
        for attempt in range(50):
            look = self.problem.look(x)
            distance = (2 * look.value).sqrt()
            outside = look.finite & (distance > self.radius)
            if not bool(outside.any()):
                break
            goal = self.radius * (1 - min(2.0**attempt, 2.0**20) * eps)
            t = torch.where(outside, distance * (distance - goal) / look.norm**2, 0)
            t = torch.where(t.isfinite(), t, 0)
            x = torch.where(spread(outside, x), geometry.retract(x, -spread(t, x) * look.gradient), x)
        return x


def minimize_in_ball(
    method: Method[Any], problem: Problem, x: Tensor, limits: Limits, ball: Ball
) -> tuple[End, Tensor]:
    """Minimises f subject to c ≤ 0 for each item; the multipliers (N) come with the end, a point inside.

    Each round minimises f + ρ/2 max(0, c + λ/ρ)² from where the last one ended, then sets λ ← max(0, λ + ρ
    c). ρ is raised tenfold where the violation max(c, −λ/ρ) did not fall to a quarter. After a round the
    point is moved into the ball to rounding and judged there: it is CONVERGED when the gradient of the
    Lagrangian f + λ c, with the multiplier that makes it least, is within its tolerance.

    Source: Liu and Boumal, "Simple algorithms for optimization on Riemannian manifolds with constraints"
    (2020).
    """
    with unchecked(), torch.no_grad():
        x = inside = ball.enter(x)
        first = problem.look(x)
        goal = tolerance(limits.gradient, first)
        force = torch.where(first.norm > 0, 10 * first.norm / ball.radius, 1.0)
        multiplier, last = torch.zeros_like(force), torch.full_like(force, torch.inf)
        status = torch.full_like(first.value, int(Status.RUNNING), dtype=torch.long)
        steps, evaluations = torch.zeros_like(status), torch.ones_like(status)
        best, waited = last, steps
        for turn in range(ROUNDS):
            active = status == Status.RUNNING
            part = replace(
                limits,
                gradient=torch.maximum(goal / 2, 0.1 ** (turn + 2) * first.norm),
                max_steps=limits.max_steps - steps,
                made=int(steps.max()),
            )
            ended = run(method, _augmented(problem, ball, multiplier, force), x, part, active)
            x = torch.where(spread(active, x), ended.x, x)
            inside = torch.where(spread(active, x), ball.enter(x), inside)
            residual = _lagrangian(problem, ball, inside)[1]
            steps = steps + ended.steps
            evaluations = evaluations + torch.where(active, ended.evaluations + 1, 0)
            waited = torch.where(residual < 0.5 * best, 0, waited + 1)
            best = torch.minimum(best, residual)
            final = (ended.status != Status.CONVERGED) & (ended.status != Status.STALLED)
            verdict = torch.where(final, ended.status, status)
            verdict = torch.where(~final & (waited >= 6), int(Status.STALLED), verdict)
            verdict = torch.where(residual <= goal, int(Status.CONVERGED), verdict)
            status = torch.where(active, verdict, status)
            active = status == Status.RUNNING
            if not bool(active.any()):
                break
            c = ball.measure(x)
            violation = torch.maximum(c, -multiplier / force).abs()
            multiplier = torch.where(active, (multiplier + force * c).clamp(min=0), multiplier)
            force = torch.where(active & (violation > last / 4), 10 * force, force)
            last = torch.where(active, violation, last)
        status = torch.where(status == Status.RUNNING, int(Status.STALLED), status)
        value, residual, multiplier = _lagrangian(problem, ball, inside)
    return End(inside, value, residual, evaluations, steps, status), multiplier


def _augmented(problem: Problem, ball: Ball, multiplier: Tensor, force: Tensor) -> Problem:
    """The function f + ρ/2 max(0, c + λ/ρ)²."""
    half, batch = ball.problem.f, problem.batch

    def penalty(x: Tensor, multiplier: Tensor, force: Tensor, radius: Tensor, center: Tensor) -> Tensor:
        """ρ/2 max(0, c + λ/ρ)², whose gradient is zero inside even where that of the distance is NaN."""
        with torch.no_grad():
            idle = half(x, center) / radius - radius / 2 + multiplier / force <= 0
        far = torch.where(spread(idle, x), x.detach(), x)
        excess = half(far, center) / radius - radius / 2 + multiplier / force
        return force * torch.where(idle, 0, excess) ** 2 / 2

    numbers = (part.reshape(batch) for part in (multiplier, force, ball.radius))
    added = Problem(
        penalty,
        problem.geometry,
        batch,
        data=(*numbers, *ball.problem.data),
        divisible=problem.divisible,
        lift=problem.lift,
    )
    total = copy.copy(problem)
    total.penalty = added
    return total


def _lagrangian(problem: Problem, ball: Ball, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, least norm of grad f + λ grad c over λ ≥ 0, and that λ, zero off the boundary (N each)."""
    look, there = problem.look(x), ball.problem.look(x)
    geometry, normal = problem.geometry, there.gradient / spread(ball.radius, x)
    touches = (2 * there.value).sqrt() >= ball.radius * (1 - 1e-6)
    multiplier = -geometry.inner(x, look.gradient, normal) / geometry.inner(x, normal, normal)
    multiplier = torch.where(touches & (multiplier > 0), multiplier, 0)
    norm = geometry.norm(x, look.gradient + spread(multiplier, x) * normal)
    return look.value, torch.where(look.finite, norm, torch.nan), multiplier
