"""The nearest points on a curve or a sheet: all of it looked at coarsely, then Newton's method.

A table of places over the whole says where to look, so that the foot is the nearest point of all and not only
of a neighbourhood. The distance falls and rises again in the intervals of the table that hold a local
minimum; in each, Newton's method kept inside the interval finds it. Nothing depends on values but
by selection (but for an early end on a sheet), so that all runs under `vmap`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.cloud.splines import Curve, Sheet
from manifolds.pulled_back.chart import readable

PER_SEGMENT = 16
"""Places in the table for each piece of a curve."""
NODES = 2048
"""About how many places the table of a sheet has."""
STEPS = 12
"""Newton steps on a curve; where one leaves its interval, that is halved."""
SHEET_STEPS = 24
"""Damped Newton steps on a sheet."""
BLOCK = 2**22
"""How many numbers a block of distances to the table may hold."""


@dataclass(frozen=True)
class Table:
    """Places over the whole of a curve or sheet.

    Attributes:
        places: their coordinates.
        values: the points.
        slopes: the derivatives.
        low: the least coordinates.
        high: the largest.
        closed: whether the last place is the first again.
    """

    places: Float[Tensor, "g q"]
    values: Float[Tensor, "g r"]
    slopes: Float[Tensor, "g r q"]
    low: Float[Tensor, "q"]
    high: Float[Tensor, "q"]
    closed: bool


def tabulate(shape: Curve | Sheet, closed: bool, nodes: int = NODES) -> Table:
    """The table of a curve or a sheet; of a sheet with about so many nodes."""
    if isinstance(shape, Curve):
        breaks = shape.breaks
        share = torch.arange(PER_SEGMENT, dtype=breaks.dtype, device=breaks.device) / PER_SEGMENT
        inner = (breaks[:-1, None] + share * (breaks[1:] - breaks[:-1])[:, None]).flatten()
        places = torch.cat([inner, breaks[-1:]])[:, None]
        low, high = breaks[:1], breaks[-1:]
    else:
        knots = shape.centres * shape.scale + shape.shift
        low, high = knots.amin(0), knots.amax(0)
        count = max(3, round(nodes ** (1 / shape.q)))
        share = torch.linspace(0, 1, count, dtype=knots.dtype, device=knots.device)
        grid = torch.cartesian_prod(*[share] * shape.q)
        places = torch.cat([low + grid * (high - low), knots])
    values, slopes = shape.derivatives(places, 1)
    return Table(places, values, slopes, low, high, closed)


@dataclass(frozen=True)
class Nearest:
    """Where the nearest points are.

    Attributes:
        coordinate: their coordinates.
        free: which coordinates may change; the others are held by the end of the curve or the edge.
    """

    coordinate: Float[Tensor, "b q"]
    free: Bool[Tensor, "b q"]


def nearest(shape: Curve | Sheet, table: Table, y: Float[Tensor, "b r"]) -> Nearest:
    """The nearest point of the curve or sheet to each state, differentiable twice in the state.

    The search follows no derivatives. Two more Newton steps, which change nothing but rounding, carry them:
    one for the first by the implicit function theorem, and one for the second.
    """
    with torch.no_grad():
        seen = y.detach()
        rows = max(1, BLOCK // len(table.places))
        found = torch.cat([_searched(shape, table, part) for part in seen.split(rows)])
        if isinstance(shape, Curve):
            spacing = (shape.breaks[1:] - shape.breaks[:-1]).amin() / PER_SEGMENT
        else:
            spacing = (table.high - table.low).amin() / 8
        slope = _slope(shape, found, seen)
        end = (found <= table.low) & (slope >= 0) | (found >= table.high) & (slope <= 0)
        free = ~end | table.closed
    for _ in range(2):
        value, first, second = shape.derivatives(found, 2)
        away = value - y
        slope = (first.mT @ away[..., None])[..., 0]
        bend = first.mT @ first + torch.einsum("br,brij->bij", away, second)
        step = _solve(bend, slope, free)
        size = step.detach().abs().amax(-1, keepdim=True)
        found = found - torch.where((size <= spacing) & step.detach().isfinite(), step, 0.0)
        if not table.closed:
            found = torch.where(free, torch.minimum(torch.maximum(found, table.low), table.high), found)
    if table.closed:
        found = table.low + torch.remainder(found - table.low, table.high - table.low)
    # No place is nearest to what is not finite.
    return Nearest(torch.where(y.detach().isfinite().all(-1, keepdim=True), found, torch.nan), free)


def _searched(shape: Curve | Sheet, table: Table, y: Tensor) -> Tensor:
    return _on_curve(shape, table, y) if isinstance(shape, Curve) else _on_sheet(shape, table, y)


def _slope(shape: Curve | Sheet, t: Tensor, y: Tensor) -> Tensor:
    """The derivative of half the squared distance."""
    value, first = shape.derivatives(t, 1)
    return (first.mT @ (value - y)[..., None])[..., 0]


def _solve(bend: Tensor, slope: Tensor, free: Tensor) -> Tensor:
    """The Newton step in the free coordinates; without a derivative in the matrix where it is singular."""
    eye = torch.eye(slope.shape[-1], dtype=slope.dtype, device=slope.device)
    both = free[..., :, None] & free[..., None, :]
    matrix = torch.where(both, bend, eye)
    right = torch.where(free, slope, 0.0)[..., None]
    if slope.shape[-1] == 1:
        pivot = matrix[..., 0]
        usable = pivot.detach() > 0
        return torch.where(usable, right[..., 0] / torch.where(usable, pivot, 1.0), 0.0)
    found, info = torch.linalg.solve_ex(matrix, right)
    return torch.where((info == 0)[..., None], found[..., 0], 0.0)


def _on_curve(shape: Curve, table: Table, y: Tensor) -> Tensor:
    places, lead = table.places[:, 0], table.slopes[..., 0]
    slope = (table.values * lead).sum(-1) - y @ lead.mT
    level = (table.values * table.values).sum(-1) - 2 * y @ table.values.mT
    falls = (slope[:, :-1] <= 0) & (slope[:, 1:] > 0)
    score = torch.where(falls, torch.minimum(level[:, :-1], level[:, 1:]), torch.inf)
    index = score.topk(min(2, score.shape[1]), dim=1, largest=False).indices
    low, high = places[index], places[index + 1]
    left, right = slope.gather(1, index), slope.gather(1, index + 1)
    apart = right - left
    t = low + (high - low) * (-left / torch.where(apart > 0, apart, 1.0)).clamp(0, 1)
    b, k = t.shape
    wide = y[:, None].expand(b, k, y.shape[1]).reshape(b * k, y.shape[1])
    t, low, high = t.flatten(), low.flatten(), high.flatten()
    for _ in range(STEPS):
        value, first, second = shape.derivatives(t[:, None], 2)
        away, first, second = value - wide, first[..., 0], second[..., 0, 0]
        down = (away * first).sum(-1)
        bend = (first * first).sum(-1) + (away * second).sum(-1)
        low, high = torch.where(down <= 0, t, low), torch.where(down > 0, t, high)
        fresh = t - down / torch.where(bend > 0, bend, 1.0)
        t = torch.where((bend > 0) & (fresh >= low) & (fresh <= high), fresh, (low + high) / 2)
    t = torch.where(score.gather(1, index).isfinite(), t.reshape(b, k), places[level.argmin(1)][:, None])
    ends = places[[0, -1]].expand(b, 2)
    tried = torch.cat([t, ends, places[level.argmin(1)][:, None]], 1)
    value = shape.derivatives(tried.reshape(-1, 1), 0)[0].reshape(b, tried.shape[1], y.shape[1])
    best = (value - y[:, None]).square().sum(-1).argmin(1, keepdim=True)
    return tried.gather(1, best)


def _on_sheet(shape: Sheet, table: Table, y: Tensor) -> Tensor:
    level = (table.values * table.values).sum(-1) - 2 * y @ table.values.mT
    index = level.topk(3, dim=1, largest=False).indices
    b, k = index.shape
    t = table.places[index].flatten(0, 1)
    wide = y[:, None].expand(b, k, y.shape[1]).reshape(b * k, y.shape[1])
    damping = t.new_zeros(b * k)
    still = torch.finfo(t.dtype).eps ** 0.5 * (table.high - table.low)
    least = (shape.derivatives(t, 0)[0] - wide).square().sum(-1)
    for _ in range(SHEET_STEPS):
        value, first, second = shape.derivatives(t, 2)
        away = value - wide
        slope = (first.mT @ away[..., None])[..., 0]
        gram = first.mT @ first
        bend = gram + torch.einsum("br,brij->bij", away, second)
        positive = torch.linalg.cholesky_ex(bend).info == 0
        bend = torch.where(positive[:, None, None], bend, gram)
        bend = bend + damping[:, None, None] * torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
        end = (t <= table.low) & (slope > 0) | (t >= table.high) & (slope < 0)
        step = _solve(bend, slope, ~end)
        trial = torch.minimum(torch.maximum(t - step, table.low), table.high)
        reached = (shape.derivatives(trial, 0)[0] - wide).square().sum(-1)
        better = reached <= least
        settled = ((trial - t).abs() <= still) & better[:, None]
        t = torch.where(better[:, None], trial, t)
        least = torch.where(better, reached, least)
        damping = torch.where(better, damping / 8, (8 * damping).clamp_min(1e-2))
        if readable(y) and bool(settled.all()):
            break
    best = least.reshape(b, k).argmin(1)
    return t.reshape(b, k, shape.q)[torch.arange(b, device=t.device), best]
