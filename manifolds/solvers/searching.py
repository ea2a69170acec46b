"""Methods that search along a direction, all items together or each at its own pace."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from manifolds.solvers.items import freeze, places, put, take
from manifolds.solvers.line_search import Found, LineSearch, Search
from manifolds.solvers.method import Iterate, Method
from manifolds.solvers.objective import Problem


@dataclass(frozen=True)
class Directed(Iterate):
    """Adds the search direction (N, *point), its slope, its length and the first step to try (N each)."""

    direction: Tensor
    slope: Tensor
    size: Tensor
    trial: Tensor


I = TypeVar("I", bound=Directed)  # noqa: E741


class Searching(Method[I]):
    """A method whose step is a line search; `follow` makes the next iterate of what was found."""

    @abstractmethod
    def line(self) -> LineSearch:
        """The line search."""

    @abstractmethod
    def follow(self, problem: Problem, iterate: I, found: Found, active: Tensor) -> I:
        """The next iterate with its direction, from where the search ended."""

    def reference(self, iterate: I) -> Tensor | None:
        """The value against which a decrease is measured (N), if it is not that of f."""
        return None

    def aim(self, problem: Problem, iterate: I, active: Tensor) -> Search:
        """The search that begins at an iterate."""
        return self.line().begin(
            problem, iterate, iterate.direction, iterate.slope, iterate.trial, active, self.reference(iterate)
        )

    def step(self, problem: Problem, iterate: I, active: Tensor) -> I:
        """A search of every active item; those that have found wait for the last."""
        found = self.line().search(problem, self.aim(problem, iterate, active))
        return self.follow(problem, iterate, found, active)

    def turn(
        self, problem: Problem, iterate: I, search: Search | None, active: Tensor
    ) -> tuple[I, Search, Tensor]:
        """One trial of every active item, and a step of those that have found with it, marked (N).

        An item goes through the same trials and steps as in `step`, but none waits for another.
        """
        search = self.aim(problem, iterate, active) if search is None else replace(search, pending=active)
        search = self.line().advance(problem, search)
        ended = active & ~search.pending
        count = int(ended.sum())
        if count == 0:
            return iterate, search, ended
        if problem.sparse(count, len(ended)):
            chosen = places(ended)
            part, found = problem.subset(chosen), take(search, chosen)
            new = self.follow(part, take(iterate, chosen), found.end(), found.pending.logical_not())
            fresh = self.aim(part, new, ~found.pending)
            return put(iterate, chosen, new), put(search, chosen, fresh), ended
        new = self.follow(problem, iterate, search.end(), ended)
        fresh = self.aim(problem, new, ended)
        return freeze(ended, new, iterate), freeze(ended, fresh, search), ended
