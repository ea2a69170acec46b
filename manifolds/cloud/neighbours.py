"""Exact nearest neighbours in blocks: matrix products choose the candidates, differences decide.

The squared distance ‖q‖² − 2⟨q, x⟩ + ‖x‖² is one matrix product and fast, but it loses the digits of small
distances. So it only proposes: in single precision, a few more candidates than asked for. Their distances are
then taken from the differences q − x, in the precision of the points. The rounding of the proposal is
bounded, and where the bound does not rule out that a point was overlooked, that query is answered from all
differences. Memory is bounded by the blocks, time is linear in the number of queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manifolds.errors import ManifoldError

BLOCK_ELEMENTS = 2**22
"""How many numbers a block of rounded distances may hold: 16 MB in single precision."""
KEPT_ELEMENTS = 2**21
"""How many numbers the differences of a block may hold."""
CACHED_ELEMENTS = 2**18
"""How many of them are taken at a time on the CPU, so that they stay in its cache."""
SPARE = 8
"""How many candidates more than asked for are proposed."""


@dataclass(frozen=True)
class Neighbours:
    """The nearest points of each query, nearest first; among equals, the lower index first.

    Attributes:
        indices: which points.
        distances: how far, in the units of the points.
    """

    indices: Int[Tensor, "b k"]
    distances: Float[Tensor, "b k"]


def nearest_neighbours(
    points: Float[Tensor, "n D"],
    at: Float[Tensor, "b _"] | Int[Tensor, "b"] | None = None,
    *,
    neighbors: int,
) -> Neighbours:
    """The nearest points of each query in Euclidean distance, exactly.

    Args:
        points: the sample.
        at: the queries: None for every point, indices of points, or places of their own. A point of the
            sample is not its own neighbour; its duplicates are, at distance 0.
        neighbors: how many for each query.

    Raises:
        ManifoldError: if there are fewer points than neighbours, or something is not finite.

    >>> found = nearest_neighbours(torch.tensor([[0.0], [1.0], [3.0]]), neighbors=1)
    >>> found.indices.tolist(), found.distances.tolist()
    ([[1], [0], [1]], [[1.0], [1.0], [2.0]])
    """
    search = Search(points, at, neighbors, "nearest_neighbours")
    parts = [(found.indices, found.distances) for found in search.blocks()]
    indices, distances = (torch.cat(part) for part in zip(*parts, strict=True))
    return Neighbours(indices, distances)


@dataclass(frozen=True)
class Block:
    """The answer for some of the queries, with the differences that decided it.

    Attributes:
        rows: which queries.
        indices: the neighbours, nearest first.
        distances: how far.
        between: candidate − query, of the neighbours and of the spare candidates; the next block overwrites
            it.
        order: where among the candidates the neighbours stand.
    """

    rows: slice
    indices: Int[Tensor, "b k"]
    distances: Float[Tensor, "b k"]
    between: Float[Tensor, "b c D"]
    order: Int[Tensor, "b k"]


class Search:
    """A search for neighbours, answered block by block, for callers that want the differences too.

    Args:
        points: the sample.
        at: the queries, as in `nearest_neighbours`.
        neighbors: how many for each query.
        name: who asks, for the messages.
    """

    def __init__(self, points: Float[Tensor, "n D"], at: Tensor | None, neighbors: int, name: str) -> None:
        check_points(points, name)
        self.points, self.neighbors = points, neighbors
        self.queries, self.own = resolve_queries(points, at, name)
        available = len(points) - (self.own is not None)
        if not 1 <= neighbors <= available:
            raise ManifoldError(
                f"{name}: neighbors is {neighbors}, but each query has {available} points around it; "
                f"ask for 1 to {available}, or give more points"
            )
        # A few points suffice for a centre, and their median is not drawn away by an outlier.
        self._centre = points[:: max(1, len(points) // 256)].median(0).values
        shifted = points - self._centre
        low, high = shifted.aminmax()
        self._scale = torch.maximum(-low, high).clamp_min(torch.finfo(torch.float32).tiny)
        self._shifted = shifted.div_(self._scale).float()
        self._squares = torch.linalg.vector_norm(self._shifted, dim=-1) ** 2

    def blocks(self, most: int | None = None) -> Iterator[Block]:
        """The answers, for at most `most` queries at a time."""
        count = min(self.neighbors + SPARE, len(self.points))
        size = count * self.points.shape[1]
        most = max(1, KEPT_ELEMENTS // size) if most is None else most
        outer = most * max(1, min(BLOCK_ELEMENTS // len(self.points), 1024) // most)
        buffer = self.points.new_empty(min(most, len(self.queries)), count, self.points.shape[1])
        for start in range(0, len(self.queries), outer):
            proposed, limit = self._propose(slice(start, start + outer), count)
            for first in range(0, len(proposed), most):
                inner = slice(first, first + most)
                rows = slice(start + first, start + first + len(proposed[inner]))
                yield self._decide(rows, proposed[inner], limit[inner], buffer)

    def _propose(self, rows: slice, count: int) -> tuple[Tensor, Tensor]:
        """Candidates by rounded distances, and the distance below which none can have been overlooked."""
        points, squares, own = self._shifted, self._squares, None if self.own is None else self.own[rows]
        queries = ((self.queries[rows] - self._centre) / self._scale).float()
        lead = torch.linalg.vector_norm(queries, dim=-1, keepdim=True) ** 2
        columns = max(1, BLOCK_ELEMENTS // max(len(queries), points.shape[1]))
        values = queries.new_empty(len(queries), 0)
        indices = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
        for start in range(0, len(points), columns):
            block = slice(start, start + columns)
            squared = torch.addmm(squares[block], queries, points[block].mT, alpha=-2).add_(lead)
            if own is not None:
                inside = (own >= start) & (own < start + squared.shape[1])
                squared[inside, own[inside] - start] = torch.inf
            found = squared.topk(min(count, squared.shape[1]), largest=False, sorted=False)
            values = torch.cat([values, found.values], 1)
            indices = torch.cat([indices, found.indices + start], 1)
            if values.shape[1] > count:
                found = values.topk(count, largest=False, sorted=False)
                values, indices = found.values, indices.gather(1, found.indices)
        # A product of D terms rounds by at most D units of the product of the lengths; the squares by a few.
        # Points of more than the length `largest` are too far to matter, whatever their rounding.
        eps, farthest = torch.finfo(torch.float32).eps, values.amax(1).clamp_min(0)
        largest = torch.minimum(squares.max(), (lead[:, 0].sqrt() + 2 * farthest.sqrt()) ** 2)
        slack = eps * (2 * (points.shape[1] + 4) * (lead[:, 0] * largest).sqrt() + 8 * (lead[:, 0] + largest))
        limit = (farthest - slack).clamp_min(0).sqrt() * self._scale
        whole = count >= len(points)
        return indices.sort(1).values, torch.full_like(limit, torch.inf) if whole else limit

    def _decide(self, rows: slice, proposed: Tensor, limit: Tensor, buffer: Tensor) -> Block:
        """The nearest candidates by exact distances; of all points where the limit leaves a doubt."""
        points, queries = self.points, self.queries[rows]
        own = None if self.own is None else self.own[rows]
        between = buffer[: len(proposed)]
        exact = limit.new_empty(proposed.shape, dtype=points.dtype)
        size = CACHED_ELEMENTS if points.device.type == "cpu" else buffer.numel()
        step = max(1, size // between[0].numel())
        for start in range(0, len(proposed), step):
            part = slice(start, start + step)
            into = between[part].view(-1, points.shape[1])
            torch.index_select(points, 0, proposed[part].flatten(), out=into)
            between[part].sub_(queries[part, None])
            exact[part] = torch.linalg.vector_norm(between[part], dim=-1)
        if own is not None:
            exact = exact.masked_fill(proposed == own[:, None], torch.inf)
        order = exact.argsort(dim=1, stable=True)[:, : self.neighbors]
        for row in (exact.gather(1, order[:, -1:])[:, 0] >= limit).nonzero()[:, 0].tolist():
            every = _distances(points, queries[row])
            if own is not None:
                every[own[row]] = torch.inf
            found = every.argsort(stable=True)[: proposed.shape[1]]
            proposed[row], exact[row], between[row] = found, every[found], points[found] - queries[row]
            order[row] = torch.arange(self.neighbors, device=order.device)
        return Block(rows, proposed.gather(1, order), exact.gather(1, order), between, order)


def _distances(points: Tensor, query: Tensor) -> Tensor:
    """Distances of all points from one query, in blocks."""
    rows = max(1, BLOCK_ELEMENTS // points.shape[1])
    return torch.cat([torch.linalg.vector_norm(part - query, dim=-1) for part in points.split(rows)])


def check_points(points: Tensor, name: str) -> None:
    """Refuses what is not a matrix of finite floating-point numbers."""
    if points.ndim != 2 or not points.is_floating_point():
        raise ManifoldError(
            f"{name}: points have shape {tuple(points.shape)} and dtype {points.dtype}; "
            "give a floating-point matrix with one point a row"
        )
    if 0 in points.shape:
        raise ManifoldError(f"{name}: points have shape {tuple(points.shape)}; there is nothing in them")
    if not points.sum().isfinite() and not points.isfinite().all():
        bad = (~points.isfinite()).any(-1).nonzero()[:, 0]
        raise ManifoldError(
            f"{name}: {len(bad)} of {len(points)} points hold NaN or infinity, the first in row "
            f"{int(bad[0])}; leave them out"
        )


def resolve_queries(
    points: Float[Tensor, "n D"], at: Tensor | None, name: str
) -> tuple[Float[Tensor, "b D"], Int[Tensor, "b"] | None]:
    """The places asked for, and, where they are points of the sample, which."""
    if at is None:
        return points, torch.arange(len(points), device=points.device)
    if not len(at):
        raise ManifoldError(f"{name}: at is empty; name at least one point or place")
    if at.device != points.device:
        raise ManifoldError(f"{name}: points are on {points.device} and at on {at.device}; move one of them")
    if at.dtype == torch.bool or at.is_complex():
        raise ManifoldError(f"{name}: at has dtype {at.dtype}; give indices or places")
    if not at.is_floating_point():
        if at.ndim != 1:
            raise ManifoldError(f"{name}: indices in at have shape {tuple(at.shape)}; give a vector of them")
        if len(at) and not (-len(points) <= int(at.min()) and int(at.max()) < len(points)):
            raise ManifoldError(
                f"{name}: at names points {int(at.min())} to {int(at.max())}, and there are {len(points)}"
            )
        own = at.long() % len(points)
        return points[own], own
    if at.ndim != 2 or at.shape[1] != points.shape[1]:
        raise ManifoldError(
            f"{name}: places in at have shape {tuple(at.shape)}; give (b, {points.shape[1]}), as points have"
        )
    if not at.isfinite().all():
        raise ManifoldError(f"{name}: at holds NaN or infinity; leave those places out")
    return at.to(points.dtype), None
