"""Geodesics on learned manifolds: between two points by relaxing a chain, from one point by steps.

All that is asked of the manifold is its projection, and for far points a graph over it. A chain of points
between the ends starts along the shortest way through the graph and is relaxed to the least energy
Σ ⟨Δᵢ, g Δᵢ⟩ while each point stays on the manifold; the chain then stands evenly along the geodesic. With n
steps it is off by O(1/n²).
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manifolds.base import frobenius_norm, safe_sqrt
from manifolds.cloud.graph_paths import check_count, through_graph
from manifolds.pulled_back.linear_solvers import solve_block_tridiagonal

if TYPE_CHECKING:
    from manifolds.cloud.learned import LearnedManifold
    from manifolds.cloud.sampled_metric import SampledMetric

MEMORY = 3
"""How many earlier steps of the relaxation are looked at (Anderson's method)."""
ANGLE = 0.1
"""The largest turn of an exponential's step, in radians of the tightest bend, the reach being its radius."""
STEPS = (8, 64)
"""The fewest and the most steps of an exponential."""


@dataclass(frozen=True)
class ShortestPath:
    """Shortest paths between pairs of points of a learned manifold.

    Attributes:
        path: points that stand evenly along it (*batch, points, D), both ends among them, as they were given.
        length: in the metric of the manifold; of the arcs between the points, not of the chords.
        converged: for each pair, whether `residual` came under the tolerance.
        iterations: relaxation steps taken for each pair.
        residual: by what part of the path's own length the next step would move it.
    """

    path: Float[Tensor, "*batch points D"]
    length: Float[Tensor, "*batch"]
    converged: Bool[Tensor, "*batch"]
    iterations: Int[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]


def shortest_path(
    manifold: "LearnedManifold",
    x: Float[Tensor, "b D"],
    y: Float[Tensor, "b D"],
    *,
    points: int,
    tolerance: float | None = None,
    max_iterations: int = 100,
) -> ShortestPath:
    """The shortest paths between points of a manifold.

    Args:
        manifold: where.
        x: starts.
        y: ends.
        points: how many points a path has.
        tolerance: of the residual; the root of the dtype's precision if not given.
        max_iterations: relaxation steps.

    Raises:
        ManifoldError: no way through the samples leads from a start to its end, or points is less than 2.
    """
    check_count(manifold.name, points)
    limit = torch.finfo(x.dtype).eps ** 0.5 if tolerance is None else tolerance
    metric = manifold.metric
    with torch.no_grad():
        chain = through_graph(manifold, x.detach(), y.detach(), points)
        found = relax(manifold, chain, metric, limit, max_iterations)
    path = attach(manifold, found.path, x, y) if metric is None else _with_ends(found.path, x, y)
    return ShortestPath(
        path, lengths(manifold, found.path, x, y, metric), found.converged, found.iterations, found.residual
    )


@dataclass(frozen=True)
class Relaxed:
    """Chains where the relaxation ended, and how."""

    path: Tensor
    converged: Tensor
    iterations: Tensor
    residual: Tensor


def relax(
    manifold: "LearnedManifold",
    path: Float[Tensor, "b points D"],
    metric: "SampledMetric | None",
    tolerance: float,
    max_iterations: int,
) -> Relaxed:
    """Chains of least energy, by Gauss–Newton steps in the tangent spaces, mixed by Anderson's method.

    A step solves the block tridiagonal system of the chain with each point held to its tangent space, then
    projects. It leaves out how the manifold bends, and so converges linearly, the faster the shorter the
    path; mixing with earlier steps makes up for that. A mixed step that raises the energy is taken back and
    the plain one taken, and of that half if it does, too.

    Source: Walker and Ni, "Anderson acceleration for fixed-point iterations" (2011).
    """
    b, count, width = path.shape
    done = torch.zeros(b, dtype=torch.bool, device=path.device)
    iterations = torch.zeros(b, dtype=torch.long, device=path.device)
    residual = path.new_zeros(b)
    if count == 2:
        return Relaxed(path, ~done, iterations, residual)
    tangent = manifold.project(path[:, 1:-1]).tangent
    energy = chain_energy(path, metric)
    scale = torch.ones_like(energy)
    history: list[tuple[Tensor, Tensor]] = []
    fresh = torch.zeros(b, dtype=torch.long, device=path.device)
    # Ends that differ by nothing but rounding are one point.
    size = path.square().sum(-1).amax(1)
    still = energy <= (count * 8 * torch.finfo(path.dtype).eps) ** 2 * size
    done = done | still
    for _ in range(max_iterations):
        step, found = _gauss_newton(path, tangent, metric, energy)
        residual = torch.where(done, residual, found)
        done = done | (residual <= tolerance)
        if bool(done.all()):
            break
        inner = path[:, 1:-1].flatten(1)
        step = step.flatten(1)
        moved = inner + scale[:, None] * step
        mixed = _mix(history, inner, step, fresh)
        plain = (scale < 1) | (fresh < 1)
        history = [*history, (inner, step)][-MEMORY - 1 :]
        goal = torch.where(plain[:, None], moved, mixed).unflatten(1, (count - 2, width))
        goal = torch.where(goal.isfinite(), goal, path[:, 1:-1])
        feet = manifold.project(goal)
        trial = torch.cat([path[:, :1], feet.foot, path[:, -1:]], 1)
        level = chain_energy(trial, metric)
        better = level <= energy * (1 + 100 * torch.finfo(energy.dtype).eps)
        taken = (better & ~done)[:, None, None]
        path = torch.where(taken, trial, path)
        tangent = torch.where(taken[..., None], feet.tangent, tangent)
        energy = torch.where(taken[:, 0, 0], level, energy)
        # What was mixed and failed is tried plain; what was plain and failed, by halves.
        scale = torch.where(better, (2 * scale).clamp_max(1), torch.where(plain, scale / 2, scale))
        fresh = torch.where(better, fresh + 1, 0)
        iterations = iterations + (~done).long()
        done = done | (scale < 1e-6)
    return Relaxed(path, residual <= tolerance, iterations, residual)


def chain_energy(path: Float[Tensor, "b points D"], metric: "SampledMetric | None") -> Float[Tensor, "b"]:
    """(points − 1) Σ ⟨Δ, g(m) Δ⟩, m being the middles: the energy of a path of unit time."""
    steps = path[:, 1:] - path[:, :-1]
    return (path.shape[1] - 1) * _squares(path, steps, metric).sum(1)


def _squares(path: Tensor, steps: Tensor, metric: "SampledMetric | None") -> Tensor:
    if metric is None:
        return steps.square().sum(-1)
    return metric.inner((path[:, 1:] + path[:, :-1]) / 2, steps, steps)


def _gauss_newton(
    path: Tensor, tangent: Tensor, metric: "SampledMetric | None", energy: Tensor
) -> tuple[Tensor, Tensor]:
    """The step (b, inner, D), and its size by the size of the path."""
    steps = path[:, 1:] - path[:, :-1]
    if metric is None:
        pull = steps[:, 1:] - steps[:, :-1]
        weighed = tangent
        diagonal = 2 * tangent.mT @ tangent
    else:
        middle = (path[:, 1:] + path[:, :-1]) / 2
        pull = -metric.slope(path)
        before = metric.product(middle[:, :-1, None], tangent.mT).mT
        weighed = metric.product(middle[:, 1:, None], tangent.mT).mT
        diagonal = tangent.mT @ (before + weighed)
    above = -weighed[:, :-1].mT @ tangent[:, 1:]
    right = tangent.mT @ pull[..., None]
    diagonal = (diagonal + diagonal.mT) / 2
    ridge = torch.finfo(path.dtype).eps ** 0.75 * diagonal.diagonal(dim1=-2, dim2=-1).mean((-1, -2))
    eye = torch.eye(diagonal.shape[-1], dtype=path.dtype, device=path.device)
    found, positive = solve_block_tridiagonal(diagonal + ridge[:, None, None, None] * eye, above, right)
    cautious = right / diagonal.diagonal(dim1=-2, dim2=-1)[..., None].clamp_min(torch.finfo(path.dtype).tiny)
    found = torch.where(positive[:, None, None, None], found, cautious / 2)
    gain = (found * right).sum((1, 2, 3)).clamp_min(0)
    half = energy / (2 * (path.shape[1] - 1))
    return (tangent @ found)[..., 0], (gain / torch.where(half > 0, half, 1.0)).sqrt()


def _mix(history: list[tuple[Tensor, Tensor]], point: Tensor, step: Tensor, fresh: Tensor) -> Tensor:
    """Anderson's mixture of this step and the last ones since an item was last taken back."""
    if not history:
        return point + step
    count = len(history)
    points = [each[0] for each in history] + [point]
    steps = [each[1] for each in history] + [step]
    apart = torch.stack([after - before for before, after in pairwise(points)], 1)
    differ = torch.stack([after - before for before, after in pairwise(steps)], 1)
    age = torch.arange(count, 0, -1, device=point.device)
    usable = (age <= fresh[:, None])[..., None]
    apart, differ = torch.where(usable, apart, 0.0), torch.where(usable, differ, 0.0)
    gram = differ @ differ.mT
    eye = torch.eye(count, dtype=gram.dtype, device=gram.device)
    ridge = gram.diagonal(dim1=-2, dim2=-1).sum(-1) * 1e-10 + torch.finfo(gram.dtype).tiny
    weights = torch.linalg.solve_ex(gram + ridge[:, None, None] * eye, differ @ step[..., None])[0]
    mixed = point + step - ((apart + differ).mT @ weights)[..., 0]
    return torch.where(mixed.isfinite().all(-1, keepdim=True), mixed, point + step)


# Lengths and derivatives


def lengths(
    manifold: "LearnedManifold",
    path: Float[Tensor, "b points D"],
    x: Float[Tensor, "b D"],
    y: Float[Tensor, "b D"],
    metric: "SampledMetric | None",
) -> Float[Tensor, "b"]:
    """The lengths of relaxed chains, with their derivative in the ends.

    A chord that makes the angles α, β with the tangent spaces at its ends spans an arc longer by the mean of
    α / sin α and β / sin β: exact on circles, else right to the fourth order. By the first variation the
    length changes with its ends by the unit velocities there.
    """
    steps = path[:, 1:] - path[:, :-1]
    size = frobenius_norm(steps, 1)
    if not (x.requires_grad or y.requires_grad) and bool((size == 0).all()):
        return size.sum(1)
    tangent = manifold.project(path).tangent
    stretch = [
        _arc(frobenius_norm(steps - _onto(tangent[:, part], steps), 1), size)
        for part in (slice(None, -1), slice(1, None))
    ]
    measured = safe_sqrt(_squares(path, steps, metric))
    total = (measured * (stretch[0] + stretch[1]) / 2).sum(1)
    if not torch.is_grad_enabled():
        return total
    ways = []
    for node, step in ((0, steps[:, 0]), (-1, steps[:, -1])):
        way = _onto(tangent[:, node], step)
        if metric is None:
            ways.append(way / frobenius_norm(way, 1, keepdim=True).clamp_min(torch.finfo(way.dtype).tiny))
        else:
            pulled = metric.product(path[:, node], way)
            size = safe_sqrt(metric.inner(path[:, node], way, way))[:, None]
            ways.append(pulled / size.clamp_min(torch.finfo(way.dtype).tiny))
    change = ((y - y.detach()) * ways[1]).sum(-1) - ((x - x.detach()) * ways[0]).sum(-1)
    return total + change


def _onto(tangent: Tensor, vector: Tensor) -> Tensor:
    return (tangent @ (tangent.mT @ vector[..., None]))[..., 0]


def _arc(normal: Tensor, size: Tensor) -> Tensor:
    """α / sin α with sin α = normal / size; at most π / 2."""
    sine = (normal / torch.where(size > 0, size, 1.0)).clamp(0, 1)
    small = sine < 1e-3
    safe = torch.where(small, 0.5, sine)
    return torch.where(small, 1 + sine**2 / 6, torch.asin(safe) / safe)


def attach(
    manifold: "LearnedManifold",
    path: Float[Tensor, "b points D"],
    x: Float[Tensor, "b D"],
    y: Float[Tensor, "b D"],
) -> Float[Tensor, "b points D"]:
    """A relaxed chain with its first derivative in the ends, by the implicit function theorem.

    The Hessian is the Gauss–Newton matrix less ⟨Δ², II(·, ·)⟩ of the second differences.
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)) or path.shape[1] == 2:
        return _with_ends(path, x, y)
    with torch.no_grad():
        inner = path[:, 1:-1]
        tangent = manifold.project(inner).tangent
        bend = path[:, 2:] - 2 * inner + path[:, :-2]
        dim = tangent.shape[-1]
        eye = torch.eye(dim, dtype=path.dtype, device=path.device)
        diagonal = (2 * eye).expand(*inner.shape[:2], dim, dim).clone()
        for i in range(dim):
            for j in range(i, dim):
                form = manifold.second_fundamental_form(inner, tangent[..., i], tangent[..., j])
                part = (bend * form).sum(-1)
                diagonal[..., i, j] -= part
                if i != j:
                    diagonal[..., j, i] -= part
        above = -tangent[:, :-1].mT @ tangent[:, 1:]
    pull = torch.zeros_like(inner)
    pull = torch.cat([(x - x.detach())[:, None], pull[:, 1:]], 1)
    pull = torch.cat([pull[:, :-1], pull[:, -1:] + (y - y.detach())[:, None]], 1)
    moved, _ = solve_block_tridiagonal(diagonal, above, tangent.mT @ pull[..., None])
    return torch.cat([x[:, None], inner + (tangent @ moved)[..., 0], y[:, None]], 1)


def _with_ends(path: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x[:, None], path[:, 1:-1], y[:, None]], 1)


# From one point


def exponential(
    manifold: "LearnedManifold",
    x: Float[Tensor, "b D"],
    u: Float[Tensor, "b D"],
    *,
    steps: int | None = None,
) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b D"]]:
    """Where geodesics from x with velocity u are after unit time, and their velocities there.

    A step goes along the tangent, to the foot, and the direction is carried there by the isometry nearest to
    the projection. Both are right to third order, so that the end is off by O(1 / steps²).

    Args:
        manifold: where.
        x: starts.
        u: velocities.
        steps: as many as make a step turn by `ANGLE` where the manifold bends most, if not given.
    """
    if steps is None:
        far = float(frobenius_norm(u.detach(), 1).max()) if len(u) else 0.0
        far = far if math.isfinite(far) else 0.0  # such a state ends nowhere, in any number of steps
        turn = far / manifold.reach if manifold.reach > 0 else math.inf
        if manifold.metric is not None:  # a metric cannot change faster than its anchors tell
            turn = max(turn, far / manifold.metric.bandwidth * ANGLE)
        steps = int(min(max(turn / ANGLE, STEPS[0]), STEPS[1])) + 1
    follow = _by_length if manifold.metric is None else _by_time
    return follow(manifold, x, u, steps)


def _by_length(manifold: "LearnedManifold", x: Tensor, u: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Steps whose arcs are measured, so that the last one makes up for what the others fell short."""
    length = frobenius_norm(u, 1, keepdim=True)
    place, way, rest = x, u / torch.where(length > 0, length, 1.0), length
    tangent = manifold.project(x).tangent
    for left in range(steps, -1, -1):
        feet = manifold.project(place + way * rest / max(left, 1))
        chord = feet.foot - place
        size = frobenius_norm(chord, 1)
        bend = _arc(frobenius_norm(chord - _onto(feet.tangent, chord), 1), size)
        forth = torch.where((chord * way).sum(-1) < 0, -1.0, 1.0)
        rest = rest - (forth * size * bend)[:, None]
        place, way, tangent = feet.foot, _turned(tangent, feet.tangent, way), feet.tangent
    return place, way * length


def _by_time(manifold: "LearnedManifold", x: Tensor, u: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Steps of equal time, with half a step of the metric's acceleration before and after each."""
    metric = cast("SampledMetric", manifold.metric)
    place, pace, tangent = x, u, manifold.project(x).tangent
    for _ in range(steps):
        pace = pace + metric.acceleration(manifold, place, tangent, pace) / (2 * steps)
        feet = manifold.project(place + pace / steps)
        size = frobenius_norm(pace, 1, keepdim=True)
        pace = size * _turned(tangent, feet.tangent, pace / torch.where(size > 0, size, 1.0))
        place, tangent, half = feet.foot, feet.tangent, pace
        for _ in range(2):
            half = pace + metric.acceleration(manifold, place, tangent, half) / (2 * steps)
        pace = half
    return place, pace


def _turned(before: Tensor, after: Tensor, way: Tensor) -> Tensor:
    """A unit tangent vector carried to the next tangent space, parallel to third order in the step.

    With the projection A from one tangent space to the next, (3 A − A Aᵀ A) / 2 is the nearest isometry to
    the fourth order (a step of Newton and Schulz).
    """
    once = _onto(after, way)
    turned = _onto(after, 1.5 * way - 0.5 * _onto(before, once))
    size = frobenius_norm(turned, 1, keepdim=True)
    return turned / torch.where(size > 0, size, 1.0)
