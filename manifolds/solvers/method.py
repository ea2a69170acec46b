"""What every method has: a start, a step, and the rules by which an item stops."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from manifolds.errors import ManifoldError
from manifolds.solvers.objective import Look, Problem
from manifolds.solvers.solution import Status


@dataclass(frozen=True)
class Iterate:
    """Where all items stand. Tensors have the batch as first dimension; methods add fields of their own.

    Attributes:
        x: the points (N, *point).
        value: f (N).
        gradient: the Riemannian gradient (N, *point).
        gradient_norm: its norm (N).
        evaluations: how often f was evaluated (N).
        status: RUNNING, or why the method cannot go on (N).
        moved: whether the last step was taken, and not refused (N).
        length: the length of the last step (N).
    """

    x: Tensor
    value: Tensor
    gradient: Tensor
    gradient_norm: Tensor
    evaluations: Tensor
    status: Tensor
    moved: Tensor
    length: Tensor


I = TypeVar("I", bound=Iterate)  # noqa: E741


class Method(ABC, Generic[I]):
    """A way to minimise; its options are the fields of a frozen dataclass.

    A subclass makes a step for all items at once, each with its own numbers. Items that stopped are held
    where they are by the driver, so that a step may do with them whatever is cheap.

    Attributes:
        steps: how many steps are made if `max_steps` is not given.
        patience: how many steps without progress mean that there is none.
        residuals: whether f returns residuals.
        second_order: whether the method looks at second derivatives.
    """

    steps: ClassVar[int] = 2000
    patience: ClassVar[int] = 10
    residuals: ClassVar[bool] = False
    second_order: ClassVar[bool] = False

    @abstractmethod
    def init(self, problem: Problem, look: Look) -> I:
        """The iterate at the start."""

    @abstractmethod
    def step(self, problem: Problem, iterate: I, active: Tensor) -> I:
        """One step of every active item."""


def begin(look: Look) -> dict[str, Tensor]:
    """The fields that every iterate has, at the start."""
    number = torch.zeros_like(look.value, dtype=torch.long)
    status = torch.where(look.finite, number + Status.RUNNING, number + Status.NOT_FINITE)
    status = torch.where(look.value == -torch.inf, number + Status.UNBOUNDED, status)
    return {
        "x": look.x,
        "value": look.value,
        "gradient": look.gradient,
        "gradient_norm": look.norm,
        "evaluations": number + 1,
        "status": status,
        "moved": look.finite,
        "length": torch.full_like(look.norm, torch.inf),
    }


@dataclass(frozen=True)
class Progress:
    """What each item last achieved, and for how many steps there was nothing more (N each).

    Attributes:
        value: the lowest value.
        norm: the gradient norm when it last fell by a tenth.
        floor: gradients below this are rounding.
        waited: steps since the last progress.
    """

    value: Tensor
    norm: Tensor
    floor: Tensor
    waited: Tensor

    @staticmethod
    def start(iterate: Iterate) -> "Progress":
        """Nothing was waited for yet."""
        norm = iterate.gradient_norm
        floor = torch.finfo(norm.dtype).eps * norm
        return Progress(iterate.value, norm, floor, torch.zeros_like(iterate.status))

    def after(self, iterate: Iterate) -> "Progress":
        """Counts a step: progress is a lower value beyond rounding, or a gradient smaller by a tenth."""
        rounding = 2 * torch.finfo(iterate.value.dtype).eps
        lower = iterate.value < self.value - rounding * self.value.abs()
        flatter = (iterate.gradient_norm < 0.9 * self.norm) & (iterate.gradient_norm > self.floor)
        waited = torch.where(lower | flatter, 0, self.waited + iterate.moved)
        norm = torch.where(flatter, iterate.gradient_norm, self.norm)
        return Progress(torch.where(lower, iterate.value, self.value), norm, self.floor, waited)


@dataclass(frozen=True)
class Stop:
    """When an item stops, with each tolerance (N) or zero for none.

    Attributes:
        gradient: CONVERGED when the gradient norm is at most this (N).
        step: STALLED when a step is at most this long.
        value: STALLED when a step changes the value by at most this part of it.
        patience: STALLED after this many steps without progress.
    """

    gradient: Tensor
    step: float
    value: float
    patience: int

    def judge(self, new: Iterate, old: Iterate, progress: Progress) -> Tensor:
        """The status of each item after a step (N)."""
        status = new.status
        stalled = progress.waited >= self.patience
        if self.step > 0:
            stalled = stalled | (new.moved & (new.length <= self.step))
        if self.value > 0:
            change = (new.value - old.value).abs()
            stalled = stalled | (
                new.moved & (change <= self.value * torch.maximum(new.value.abs(), old.value.abs()))
            )
        status = torch.where(stalled & (status == Status.RUNNING), int(Status.STALLED), status)
        return self.converged(new, status)

    def converged(self, iterate: Iterate, status: Tensor) -> Tensor:
        """CONVERGED where a finite gradient is small enough, else the status as it is."""
        done = (
            (iterate.gradient_norm <= self.gradient)
            & (status != Status.NOT_FINITE)
            & (status != Status.UNBOUNDED)
        )
        return torch.where(done, int(Status.CONVERGED), status)


def require(condition: bool, method: str, message: str) -> None:
    """Refuses an option of a method."""
    if not condition:
        raise ManifoldError(f"minimize, method {method!r}: {message}")
