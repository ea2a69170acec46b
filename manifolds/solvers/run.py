"""The loop around a method: what stops whom, and what a callback sees."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from manifolds.errors import ManifoldError
from manifolds.operations import unchecked
from manifolds.solvers.method import Iterate, Method, Progress, Stop, freeze
from manifolds.solvers.objective import Look, Problem
from manifolds.solvers.solution import State, Status

Callback = Callable[[State], Any]

RELATIVE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


@dataclass(frozen=True)
class Limits:
    """When a run ends.

    Attributes:
        max_steps: most steps an item makes, one number or one an item (N).
        begun: when the call began, on `time.monotonic`'s clock.
        deadline: the time, on the same clock, after which no step begins.
        gradient: the tolerance of each item's gradient norm (N), or None for the default.
        step: the tolerance of step lengths.
        value: the tolerance of relative value changes.
        callback: is called after every step.
        bar: shows how far it is.
        made: how many steps were made before.
    """

    max_steps: int | Tensor
    begun: float
    deadline: float
    gradient: Tensor | None
    step: float
    value: float
    callback: Callback | None
    bar: "tqdm[Any]"
    made: int = 0


@dataclass(frozen=True)
class Run:
    """The end of a run: the last iterate, final statuses (N), steps of each item (N) and of the loop."""

    iterate: Iterate
    status: Tensor
    steps: Tensor
    made: int


def run(
    method: Method[Any], problem: Problem, x: Tensor, limits: Limits, active: Tensor | None = None
) -> Run:
    """Steps from x (N, *point) until every item has stopped. Items that are not `active` (N) stay."""
    made = limits.made
    with unchecked(), torch.no_grad():
        look = problem.look(x, curvature=method.second_order)
        problem.first = look.value
        iterate = method.init(problem, look)
        problem.goal = tolerance(limits.gradient, look)
        stop = Stop(problem.goal, limits.step, limits.value, method.patience)
        status = stop.converged(iterate, iterate.status)
        awake = torch.ones_like(look.finite) if active is None else active
        steps, progress = torch.zeros_like(status), Progress.start(iterate)
        while True:
            running = awake & (status == Status.RUNNING)
            status = torch.where(running & (steps >= limits.max_steps), int(Status.MAX_STEPS), status)
            running = running & (status == Status.RUNNING)
            count = int(running.sum())
            if count and time.monotonic() >= limits.deadline:
                status = torch.where(running, int(Status.MAX_TIME), status)
                break
            if count == 0:
                break
            new = method.step(problem, iterate, running)
            new = new if count == len(status) else freeze(running, new, iterate)
            progress = progress.after(new)
            status = torch.where(running, stop.judge(new, iterate, progress), status)
            iterate, steps, made = new, steps + running, made + 1
            if not limits.bar.disable:
                worst = float(new.gradient_norm.max())
                limits.bar.set_postfix_str(f"{count} running, gradient norm {worst:.1e}", refresh=False)
                limits.bar.update()
            if limits.callback is not None:
                status = _report(limits, problem, iterate, status, made)
    return Run(iterate, status, steps, made)


def tolerance(given: Tensor | None, look: Look) -> Tensor:
    """The tolerance of each item (N): as given, or relative to its first gradient and above its rounding."""
    if given is not None:
        return given
    size = torch.linalg.vector_norm(look.egrad.unsqueeze(-1).flatten(1), dim=1)
    rounding = 50 * torch.finfo(look.norm.dtype).eps * size
    return RELATIVE_TOLERANCE.get(look.norm.dtype, 1e-4) * look.norm + rounding


def _report(limits: Limits, problem: Problem, iterate: Iterate, status: Tensor, made: int) -> Tensor:
    """Shows the callback where the run stands; the statuses after its answer."""
    assert limits.callback is not None
    batch = problem.batch
    answer = limits.callback(
        State(
            step=made,
            elapsed=time.monotonic() - limits.begun,
            x=problem.shown(iterate.x).clone(),
            value=iterate.value.reshape(batch).clone(),
            gradient_norm=iterate.gradient_norm.reshape(batch).clone(),
            evaluations=iterate.evaluations.reshape(batch).clone(),
            status=status.reshape(batch).clone(),
        )
    )
    if answer is None or answer is False:
        return status
    if answer is True:
        told = torch.ones_like(status, dtype=torch.bool)
    elif isinstance(answer, Tensor) and answer.dtype == torch.bool and answer.shape == batch:
        told = answer.to(status.device).reshape(-1)
    else:
        raise ManifoldError(
            f"minimize: the callback returned {answer!r}; "
            "it returns None, True to stop, False, or which items stop, "
            f"a boolean tensor of shape {tuple(batch)}"
        )
    return torch.where(told & (status == Status.RUNNING), int(Status.STOPPED_BY_CALLBACK), status)
