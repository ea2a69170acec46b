"""Where paths between points of a learned manifold start: along the shortest way through a graph."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from manifolds.base import frobenius_norm, safe_sqrt
from manifolds.cloud.neighbours import nearest_neighbours
from manifolds.errors import ManifoldError, NoPathError

if TYPE_CHECKING:
    from manifolds.cloud.learned import LearnedManifold

NEAR = 4
"""Through how many of the nearest anchors a way into the graph may lead."""
ROWS = 64
"""For how many anchors at a time the lengths of their links are taken in a metric."""


def check_count(name: str, points: int) -> None:
    """Refuses what is no number of points of a path."""
    if isinstance(points, bool) or not isinstance(points, int) or points < 2:
        raise ManifoldError(f"{name}.geodesic: points is {points!r}; a path has at least its two ends")


def through_graph(
    manifold: "LearnedManifold", x: Float[Tensor, "b D"], y: Float[Tensor, "b D"], points: int
) -> Float[Tensor, "b points D"]:
    """Chains from x to y, evenly along the shortest ways through the graph of anchors, on the manifold."""
    anchors = manifold.anchors.to(x)
    near = min(NEAR, len(anchors))
    starts = nearest_neighbours(anchors, x, neighbors=near)
    goals = nearest_neighbours(anchors, y, neighbors=1).indices[:, 0]
    roots, which = goals.unique(return_inverse=True)
    far, before = dijkstra(
        _links(manifold), directed=False, indices=roots.cpu().numpy(), return_predecessors=True
    )
    far, before = np.atleast_2d(far), np.atleast_2d(before)
    row = which.cpu().numpy()
    first = starts.indices.cpu().numpy()
    ways = far[row[:, None], first] + starts.distances.cpu().double().numpy()
    if not np.isfinite(ways.min(1)).all():
        lost = np.flatnonzero(~np.isfinite(ways.min(1)))
        raise NoPathError(
            f"{manifold.name}.geodesic: no way through the samples leads from x to y in {len(lost)} of "
            f"{len(x)} pairs, first in item {lost[0]}: they lie on separate pieces of the manifold; fit it "
            "with more samples between, or with more neighbours",
            lost.tolist(),
        )
    place = first[np.arange(len(first)), ways.argmin(1)]
    stops = [place]
    while True:
        onward = before[row, place]
        place = np.where(onward < 0, place, onward)
        if (place == stops[-1]).all():
            break
        stops.append(place)
    between = anchors[torch.from_numpy(np.stack(stops, 1)).to(x.device).long()]
    # The anchors next to the ends may lie behind them: the way goes by those that are between.
    line = torch.cat([x[:, None], between[:, 1:-1], y[:, None]], 1)
    # Within one neighbourhood of the graph the manifold is nearly flat: the straight line is better.
    near_by = manifold.graph()[1].amax(-1).to(x)[starts.indices[:, 0]]
    close = frobenius_norm(y - x, 1) <= near_by
    chain = torch.where(close[:, None, None], evenly(torch.stack([x, y], 1), points), evenly(line, points))
    inner = manifold.projx(chain[:, 1:-1]) if points > 2 else chain[:, 1:-1]
    return torch.cat([x[:, None], inner, y[:, None]], 1)


def _links(manifold: "LearnedManifold") -> csr_matrix:
    """The graph of anchors, kept with the manifold; two anchors at one place are joined."""
    kept = manifold.__dict__.get("_graph_links")
    if kept is None:
        indices, distances = manifold.graph()
        count, width = indices.shape
        if manifold.metric is not None:
            anchors = manifold.anchors
            parts = []
            for own, near in zip(anchors.split(ROWS), indices.split(ROWS), strict=True):
                step = anchors[near] - own[:, None]
                parts.append(safe_sqrt(manifold.metric.inner(own[:, None] + step / 2, step, step)))
            distances = torch.cat(parts)
        rows = np.repeat(np.arange(count), width)
        size = distances.detach().cpu().double().numpy().ravel()
        tiny = np.finfo(float).tiny
        kept = coo_matrix(
            (np.maximum(size, tiny), (rows, indices.cpu().numpy().ravel())), shape=(count, count)
        ).tocsr()
        kept = kept.maximum(kept.T)
        manifold.__dict__["_graph_links"] = kept
    return kept


def evenly(line: Float[Tensor, "b stops D"], points: int) -> Float[Tensor, "b points D"]:
    """Points evenly along polygons."""
    steps = frobenius_norm(line[:, 1:] - line[:, :-1], 1)
    far = torch.cat([steps.new_zeros(len(steps), 1), steps.cumsum(1)], 1)
    share = torch.linspace(0, 1, points, dtype=line.dtype, device=line.device)
    goal = (share * far[:, -1:]).contiguous()
    left = (torch.searchsorted(far, goal, right=True) - 1).clamp(0, line.shape[1] - 2)
    step = steps.gather(1, left)
    part = ((goal - far.gather(1, left)) / torch.where(step > 0, step, 1.0)).clamp(0, 1)[..., None]
    width = (-1, -1, line.shape[-1])
    start = line.gather(1, left[..., None].expand(width))
    end = line.gather(1, left[..., None].expand(width) + 1)
    return start + part * (end - start)
