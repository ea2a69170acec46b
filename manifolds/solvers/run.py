"""The loop around a method: what stops whom, and what a callback sees."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from manifolds.errors import ManifoldError
from manifolds.operations import unchecked
from manifolds.solvers.items import freeze, places, put, take
from manifolds.solvers.line_search import Search
from manifolds.solvers.method import Iterate, Method, Progress, Stop
from manifolds.solvers.objective import Look, Problem
from manifolds.solvers.searching import Searching
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
        batch: the shape that the callback sees.
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
    batch: torch.Size
    made: int = 0


@dataclass(frozen=True)
class End:
    """Where each item stands, or ended (N): point (N, *point), value, gradient norm, counts and status."""

    x: Tensor
    value: Tensor
    gradient_norm: Tensor
    evaluations: Tensor
    steps: Tensor
    status: Tensor


@dataclass(frozen=True)
class Standing:
    """The items that a run is still at.

    Attributes:
        iterate: where the method is.
        search: where their searches are, if each goes at its own pace.
        progress: what they last achieved.
        stop: their tolerances.
        most: the most steps of each (N).
        steps: the steps that each has made (N).
        status: a status for each (N).
        awake: which take part (N).
    """

    iterate: Any
    search: Search | None
    progress: Progress
    stop: Stop
    most: Tensor
    steps: Tensor
    status: Tensor
    awake: Tensor

    def end(self) -> End:
        """The part that is told."""
        at: Iterate = self.iterate
        return End(at.x, at.value, at.gradient_norm, at.evaluations, self.steps, self.status)


class Whole:
    """All items of a run: those that are still at work, and what is known of the others.

    Attributes:
        problem: that of the items at work.
        now: those items.
    """

    def __init__(self, problem: Problem, now: Standing) -> None:
        self.problem, self.now = problem, now
        self._end: End | None = None
        self._index: Tensor | None = None

    def end(self) -> End:
        """Where all items stand."""
        return self.now.end() if self._end is None else put(self._end, self._place(), self.now.end())

    def keep(self, running: Tensor) -> Tensor:
        """Leaves out the items that do not run, and gives which of the rest do: all."""
        self._end, chosen = self.end(), places(running)
        self._index = chosen if self._index is None else self._index[chosen]
        self.problem, self.now = self.problem.subset(chosen), take(self.now, chosen)
        return running.index_select(0, chosen)

    def tell(self, status: Tensor) -> None:
        """Sets the statuses of all items (N)."""
        if self._end is not None:
            self._end, status = replace(self._end, status=status), status[self._place()]
        self.now = replace(self.now, status=status)

    def _place(self) -> Tensor:
        assert self._index is not None
        return self._index


def run(
    method: Method[Any], problem: Problem, x: Tensor, limits: Limits, active: Tensor | None = None
) -> End:
    """Steps from x (N, *point) until every item has stopped. Items that are not `active` (N) stay.

    If the problem is divisible, items that have stopped are left out of the work, and nobody watches step by
    step, those that search along a line do not wait for each other.
    """
    made = limits.made
    apart = problem.divisible and limits.callback is None and limits.bar.disable
    with unchecked(), torch.no_grad():
        look = problem.look(x, curvature=method.second_order)
        problem.first = look.value
        iterate = method.init(problem, look)
        problem.goal = tolerance(limits.gradient, look)
        stop = Stop(problem.goal, limits.step, limits.value, method.patience)
        status = stop.converged(iterate, iterate.status)
        awake = torch.ones_like(look.finite) if active is None else active
        most = torch.zeros_like(status) + limits.max_steps
        start = Standing(
            iterate, None, Progress.start(iterate), stop, most, torch.zeros_like(status), status, awake
        )
        whole = Whole(problem, start)
        while True:
            now = whole.now
            running = now.awake & (now.status == Status.RUNNING)
            spent = running & (now.steps >= now.most)
            whole.now = now = replace(now, status=torch.where(spent, int(Status.MAX_STEPS), now.status))
            running = running & ~spent
            count = int(running.sum())
            if count and time.monotonic() >= limits.deadline:
                late = torch.where(running, int(Status.MAX_TIME), now.status)
                whole.now = replace(now, status=late)
                break
            if count == 0:
                break
            if whole.problem.sparse(count, len(running)):
                running = whole.keep(running)
                now = whole.now
            if apart and isinstance(method, Searching):
                new, search, ended = method.turn(whole.problem, now.iterate, now.search, running)
            else:
                new, search, ended = method.step(whole.problem, now.iterate, running), None, running
                new = new if count == len(running) else freeze(running, new, now.iterate)
            progress = (
                freeze(ended, now.progress.after(new), now.progress) if apart else now.progress.after(new)
            )
            whole.now = replace(
                now,
                iterate=new,
                search=search,
                progress=progress,
                steps=now.steps + ended,
                status=torch.where(ended, now.stop.judge(new, now.iterate, progress), now.status),
            )
            made = made + 1
            if not limits.bar.disable:
                worst = float(new.gradient_norm.max())
                limits.bar.set_postfix_str(f"{count} running, gradient norm {worst:.1e}", refresh=False)
                limits.bar.update()
            if limits.callback is not None:
                whole.tell(_report(limits, problem, whole.end(), made))
    return whole.end()


def tolerance(given: Tensor | None, look: Look) -> Tensor:
    """The tolerance of each item (N): as given, or relative to its first gradient and above its rounding."""
    if given is not None:
        return given
    size = torch.linalg.vector_norm(look.egrad.unsqueeze(-1).flatten(1), dim=1)
    rounding = 50 * torch.finfo(look.norm.dtype).eps * size
    return RELATIVE_TOLERANCE.get(look.norm.dtype, 1e-4) * look.norm + rounding


def _report(limits: Limits, problem: Problem, end: End, made: int) -> Tensor:
    """Shows the callback where the run stands; the statuses after its answer."""
    assert limits.callback is not None
    batch, status = limits.batch, end.status
    x = problem.shown(end.x)
    answer = limits.callback(
        State(
            step=made,
            elapsed=time.monotonic() - limits.begun,
            x=x.reshape(batch + x.shape[len(problem.batch) :]).clone(),
            value=end.value.reshape(batch).clone(),
            gradient_norm=end.gradient_norm.reshape(batch).clone(),
            evaluations=end.evaluations.reshape(batch).clone(),
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
