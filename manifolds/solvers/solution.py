"""What a solver gives back, and what it tells while it runs."""

from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from torch import Tensor


class Status(IntEnum):
    """Why one item of a batch stopped."""

    RUNNING = -1
    """It has not stopped; seen by callbacks only."""
    CONVERGED = 0
    """The gradient norm is within its tolerance."""
    STALLED = 1
    """No step makes progress that this precision can see, or a step or value change fell below its limit."""
    MAX_STEPS = 2
    """It used up its steps."""
    MAX_TIME = 3
    """The time was over."""
    NOT_FINITE = 4
    """Value or gradient was NaN or infinite at the start or wherever it wanted to go; x is finite still."""
    LINE_SEARCH_FAILED = 5
    """No step gives the decrease that the slope promises: a wrong gradient, or f is not smooth there."""
    STOPPED_BY_CALLBACK = 6
    """The callback said so."""
    UNBOUNDED = 7
    """The value went to −∞."""


@dataclass(frozen=True)
class Solution:
    """The minimisers that were found, one an item of the batch; fields are 0-dimensional without a batch.

    Attributes:
        x: the points (*batch, *point), in the dtype of the start, without a graph.
        value: f at x (*batch); for residuals half of their sum of squares.
        gradient_norm: the norm of the Riemannian gradient at x (*batch); under a trust ball, of the
            Lagrangian's.
        steps: how many steps each item took (*batch), integers.
        evaluations: how often f was evaluated for the item while it ran (*batch): values with or without
            their gradient, Hessian-vector products and products with JᵀJ each count one.
        status: a `Status` for each item (*batch), integers.
        multiplier: the multiplier of the trust ball (*batch), zero where it is not active; None without a
            ball.
    """

    x: Tensor
    value: Tensor
    gradient_norm: Tensor
    steps: Tensor
    evaluations: Tensor
    status: Tensor
    multiplier: Tensor | None = None

    @property
    def converged(self) -> Tensor:
        """Whether the gradient norm is within its tolerance (*batch)."""
        return self.status == Status.CONVERGED

    @property
    def statuses(self) -> Any:
        """The statuses as members of `Status`, in lists nested as the batch; without a batch one member."""
        return _named(self.status.tolist())

    def describe(self) -> str:
        """One line: how many items stopped for which reason, and the largest gradient norm.

        Example:
            >>> import torch
            >>> from manifolds import Sphere
            >>> from manifolds.solvers import minimize
            >>> minimize(lambda x: x[..., 0], torch.tensor([0.6, 0.8]), Sphere()).describe()
            '1 CONVERGED after 5 steps; gradient norm at most ...'
        """
        counts = Counter(Status(number).name for number in self.status.flatten().tolist())
        if not counts:
            return "no items"
        said = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        steps, norm = int(self.steps.max()), float(self.gradient_norm.max())
        return f"{said} after {steps} steps; gradient norm at most {norm:.2g}"


@dataclass(frozen=True)
class State:
    """Where a run stands after a step, as a callback sees it. Its tensors are copies.

    Attributes:
        step: how many steps were made.
        elapsed: seconds since the start.
        x: the points (*batch, *point).
        value: f at x (*batch).
        gradient_norm: the norm of the Riemannian gradient (*batch).
        evaluations: evaluations of f per item (*batch).
        status: a `Status` for each item (*batch); RUNNING for those that go on.
    """

    step: int
    elapsed: float
    x: Tensor
    value: Tensor
    gradient_norm: Tensor
    evaluations: Tensor
    status: Tensor

    @property
    def active(self) -> Tensor:
        """Which items go on (*batch)."""
        return self.status == Status.RUNNING


def _named(numbers: Any) -> Any:
    return [_named(number) for number in numbers] if isinstance(numbers, list) else Status(numbers)
