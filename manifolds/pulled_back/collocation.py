"""The geodesic equation by collocation: the exponential from one end, the logarithm from two.

A polynomial's second derivative is asked to be the acceleration at Gauss's nodes, all of which are evaluated
at once: a few calls of the map with many points, where a stepping method makes many calls with few.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.polynomial import legendre
from torch import Tensor

from manifolds.pulled_back.derivatives import derivative
from manifolds.pulled_back.geodesic import DENSE, attach, minimize_energy, straight
from manifolds.pulled_back.local import MetricAt, acceleration
from manifolds.pulled_back.paths import Embedding, differences, squared_segments

NODES = 12
"""Nodes of a piece of an initial value problem; its end is right to order 24 in the piece's length."""
PICARD = 40
"""The most evaluations of a piece."""


@dataclass(frozen=True)
class Exponential:
    """Ends of geodesics.

    Attributes:
        point: where the geodesic is after unit time (*batch, *point).
        velocity: its velocity there: the initial one, carried parallel along it.
        displacement: point − x, to full relative precision.
        converged: whether the equation was solved to the tolerance.
        pieces: into how many equal pieces the unit of time was cut for it.
    """

    point: Float[Tensor, "..."]
    velocity: Float[Tensor, "..."]
    displacement: Float[Tensor, "..."]
    converged: Bool[Tensor, "*batch"]
    pieces: Int[Tensor, "*batch"]


@dataclass(frozen=True)
class Logarithm:
    """Initial velocities of geodesics between pairs of points.

    Attributes:
        vector: (*batch, *point).
        converged: for each pair.
        iterations: Newton steps of the collocation; for points of more than 32 coordinates those of the finer
            path.
        residual: the estimated error of the vector, as a part of y − x.
    """

    vector: Float[Tensor, "..."]
    converged: Bool[Tensor, "*batch"]
    iterations: Int[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]


@dataclass(frozen=True)
class Rule:
    """Gauss's nodes t on [0, 1] and what turns values of a polynomial there into other values.

    Attributes:
        t: the nodes (n,).
        once: ∫₀ᵗ at the nodes (n, n).
        twice: ∫₀ᵗ∫₀ˢ at the nodes (n, n).
        end: ∫₀¹ (n,).
        end_twice: ∫₀¹∫₀ˢ (n,).
        tail: the last two coefficients in Legendre's polynomials (2, n), which tell whether n is enough.
    """

    t: Tensor
    once: Tensor
    twice: Tensor
    end: Tensor
    end_twice: Tensor
    tail: Tensor


@functools.lru_cache(maxsize=8)
def _rule(count: int) -> dict[str, np.ndarray]:
    z, _ = legendre.leggauss(count)
    coefficients = np.linalg.inv(
        legendre.legvander(z, count - 1)
    )  # column k: the polynomial that is 1 at node k
    first = legendre.legint(coefficients, lbnd=-1, axis=0) / 2
    second = legendre.legint(first, lbnd=-1, axis=0) / 2

    def at(points: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return legendre.legvander(points, len(columns) - 1) @ columns

    one = np.ones(1)
    return {
        "t": (z + 1) / 2, "once": at(z, first), "twice": at(z, second), "end": at(one, first)[0],
        "end_twice": at(one, second)[0], "tail": coefficients[-2:],
    }  # fmt: skip


def rule(count: int, like: Tensor) -> Rule:
    """Gauss's rule with as many nodes, in the dtype and on the device of a tensor."""
    parts = {
        name: torch.as_tensor(part, dtype=like.dtype, device=like.device)
        for name, part in _rule(count).items()
    }
    return Rule(**parts)


def _mix(matrix: Tensor, values: Tensor) -> Tensor:
    """Σₖ matrix[j, k] values[:, k], for values (items, nodes, *point)."""
    return torch.tensordot(values, matrix, ([1], [1])).movedim(-1, 1)


def _norms(values: Tensor) -> Tensor:
    return values.detach().flatten(1).norm(dim=1)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part / torch.where(whole > 0, whole, 1.0)


def _accelerations(embedding: Embedding, x: Tensor, places: Tensor, paces: Tensor) -> Tensor:
    where = (x.unsqueeze(1) + places).flatten(0, 1)
    return acceleration(embedding, where, paces.flatten(0, 1)).unflatten(0, places.shape[:2])


def exponential(
    embedding: Embedding, x: Float[Tensor, "items *point"], v: Float[Tensor, "items *point"],
    *, tolerance: float, max_pieces: int, adaptive: bool = True,
) -> Exponential:  # fmt: skip
    """Solve the geodesic equation over unit time, from x with velocity v.

    Time is cut into pieces, twice as many each time until the equation is solved to the tolerance in all of
    them; in a piece Picard's iteration is made to its end. An item keeps the first solution that is good.
    Where values cannot be read (`adaptive` false) there are four pieces, and an item that would need more is
    NaN.
    """
    rank = (1,) * (x.ndim - 1)
    pieces = 1 if adaptive else 4
    kept: tuple[Tensor, Tensor] | None = None
    done = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    counts = torch.zeros(x.shape[0], dtype=torch.long, device=x.device)
    while True:
        moved, velocity, error = _pieces(embedding, x, v, pieces, tolerance, adaptive)
        good = error <= tolerance
        fresh = (good & ~done).reshape(-1, *rank)
        kept = (
            (moved, velocity)
            if kept is None
            else (torch.where(fresh, moved, kept[0]), torch.where(fresh, velocity, kept[1]))
        )
        counts = torch.where(done, counts, pieces)
        done = done | good
        if not adaptive or pieces >= max_pieces or bool(done.all()):
            return Exponential(x + kept[0], kept[1], kept[0], done, counts)
        pieces *= 2


def _pieces(
    embedding: Embedding, x: Tensor, v: Tensor, pieces: int, tolerance: float, adaptive: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Displacement and velocity at the end, and the estimated error as a part of the speed."""
    gauss, h = rule(NODES, x), 1 / pieces
    t = gauss.t.reshape(1, -1, *(1,) * (x.ndim - 1))
    speed = _norms(v)
    moved, velocity, error = torch.zeros_like(x), v, torch.zeros_like(speed)
    for _ in range(pieces):
        bend = _accelerations(embedding, x, moved.unsqueeze(1), velocity.unsqueeze(1)).expand(
            -1, NODES, *x.shape[1:]
        )
        settled = False
        for _ in range(PICARD if adaptive else PICARD // 2):
            places = (moved.unsqueeze(1) + h * t * velocity.unsqueeze(1)) + h * h * _mix(gauss.twice, bend)
            paces = velocity.unsqueeze(1) + h * _mix(gauss.once, bend)
            before, bend = bend, _accelerations(embedding, x, places, paces)
            change = h * _share(_norms(bend - before), speed)
            if settled:  # one more, so that derivatives settle as well
                break
            if adaptive:
                growing = ~change.isfinite() | (change > 1e6)
                settled = bool(((change <= tolerance / 10) | growing).all())
        tail = h * _share(_norms(_mix(gauss.tail, bend)), speed)
        worst = torch.maximum(change, tail)
        error = torch.maximum(error, torch.where(worst.isfinite(), worst, math.inf))
        moved = moved + h * velocity + h * h * _mix(gauss.end_twice[None], bend).squeeze(1)
        velocity = velocity + h * _mix(gauss.end[None], bend).squeeze(1)
        if adaptive and not bool((error <= tolerance).any()):
            break
    return moved, velocity, error


def logarithm(
    embedding: Embedding, x: Float[Tensor, "items *point"], y: Float[Tensor, "items *point"],
    *, steps: int, tolerance: float, max_iterations: int,
) -> Logarithm:  # fmt: skip
    """The initial velocity of the geodesic from x to y.

    The discretised geodesic says which way; its velocity is right to second order. For points of at most 32
    coordinates Newton's method then solves the collocated equation with both ends, with 8, 16, 32 and 64
    nodes until they are enough; for others the velocities of two discretisations are extrapolated.
    """
    with torch.no_grad():
        line = straight(x.detach(), y.detach(), steps)
        found = minimize_energy(embedding, line, tolerance=1e-3, max_iterations=100)
    if x[0].numel() > DENSE or steps < 2:
        return _extrapolated(embedding, x, y, found.path, tolerance)
    start, goal = x.detach(), (y - x).detach()
    distance, rank = _norms(goal), (1,) * (x.ndim - 1)
    vector, done = torch.zeros_like(goal), distance == 0
    residual = torch.where(done, 0.0, torch.inf).to(distance)
    iterations = torch.zeros_like(distance, dtype=torch.long)
    for count in (8, 16, 32, 64, 128):
        if count > 8 and count * x[0].numel() > 2048:
            break
        with torch.no_grad():
            bend = _guess(found.path, rule(count, x))
            for _ in range(max_iterations):
                change, slopes = _newton(embedding, start, goal, bend)
                bend = bend - change
                error = _share(_norms(change), distance)
                iterations = iterations + (~done & (error > tolerance)).long()
                if bool(((error <= tolerance / 10) | ~error.isfinite() | done).all()):
                    break
            tail = _share(_norms(_mix(rule(count, x).tail, bend)), distance) / (
                4 * count**2
            )  # what two integrations leave of it
            error = torch.maximum(error, tail)
            error = torch.where(error.isfinite(), error, math.inf)
        fresh = _initial(embedding, x, y, bend, slopes)
        better = (error < residual) & ~done
        vector = torch.where(better.reshape(-1, *rank), fresh, vector)
        residual = torch.where(better, error, residual)
        done = done | (residual <= tolerance)
        if bool(done.all()):
            break
    return Logarithm(
        torch.where((distance == 0).reshape(-1, *rank), y - x, vector), done, iterations, residual
    )


def _guess(path: Tensor, gauss: Rule) -> Tensor:
    """The second derivative at the nodes, from the second differences of a discretised geodesic."""
    segments = path.shape[1] - 1
    bend = (path[:, 2:] - 2 * path[:, 1:-1] + path[:, :-2]) * segments**2
    place = (gauss.t * segments - 1).clamp(0, segments - 2)
    low = place.floor().long().clamp(max=max(segments - 3, 0))
    share = (place - low).reshape(1, -1, *(1,) * (path.ndim - 2))
    return bend[:, low] * (1 - share) + bend[:, (low + 1).clamp(max=segments - 2)] * share


def _along(x: Tensor, goal: Tensor, bend: Tensor, gauss: Rule) -> tuple[Tensor, Tensor]:
    """Places and paces at the nodes of the path from x by `goal` with this second derivative."""
    t = gauss.t.reshape(1, -1, *(1,) * (x.ndim - 1))
    lost = _mix(gauss.end_twice[None], bend)
    return t * (goal.unsqueeze(1) - lost) + _mix(gauss.twice, bend), (goal.unsqueeze(1) - lost) + _mix(
        gauss.once, bend
    )


def _newton(embedding: Embedding, x: Tensor, goal: Tensor, bend: Tensor) -> tuple[Tensor, Tensor]:
    """The step that Newton's method takes off, and its matrix (items, nodes·size, nodes·size)."""
    items, count, size = bend.shape[0], bend.shape[1], x[0].numel()
    gauss = rule(count, x)
    places, paces = _along(x, goal, bend, gauss)
    eye = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *x.shape[1:])

    def of(place: Tensor, pace: Tensor) -> Tensor:
        return _accelerations(embedding, x, place, pace)

    def in_place(direction: Tensor) -> Tensor:
        return derivative(lambda p: of(p, paces), places, direction.expand(places.shape), embedding.mode)[1]

    def in_pace(direction: Tensor) -> Tensor:
        return derivative(lambda p: of(places, p), paces, direction.expand(places.shape), embedding.mode)[1]

    of_place = torch.func.vmap(in_place)(eye).flatten(3).permute(1, 2, 3, 0)
    of_pace = torch.func.vmap(in_pace)(eye).flatten(3).permute(1, 2, 3, 0)
    into_place = gauss.twice - gauss.t[:, None] * gauss.end_twice
    into_pace = gauss.once - gauss.end_twice
    matrix = -(
        torch.einsum("njab,jk->njakb", of_place, into_place)
        + torch.einsum("njab,jk->njakb", of_pace, into_pace)
    ).reshape(items, count * size, count * size)
    matrix = matrix + torch.eye(count * size, dtype=x.dtype, device=x.device)
    miss = (bend - of(places, paces)).reshape(items, -1, 1)
    change = torch.linalg.solve_ex(matrix, miss)[0].reshape(bend.shape)
    return change, matrix


def _initial(embedding: Embedding, x: Tensor, y: Tensor, bend: Tensor, slopes: Tensor) -> Tensor:
    """The initial velocity, and by the implicit function theorem its derivative in ends and map."""
    gauss = rule(bend.shape[1], x)
    goal = y - x
    if torch.is_grad_enabled():
        miss = bend - _accelerations(embedding, x, *_along(x, goal, bend, gauss))
        moved = torch.linalg.solve_ex(slopes, (miss - miss.detach()).reshape(x.shape[0], -1, 1))[0]
        bend = bend - moved.reshape(bend.shape)
    return goal - _mix(gauss.end_twice[None], bend).squeeze(1)


def initial_velocity(
    embedding: Embedding, path: Float[Tensor, "items nodes *point"]
) -> Float[Tensor, "items *point"]:
    """The velocity at the start of a discretised geodesic, from the momentum of its energy.

    G⁻¹ Jᵀ Δz · steps where M = I: right to second order in the step.
    """
    at = MetricAt(embedding, path[:, 0])
    if embedding.weight is None:
        step = differences(embedding, path[:, :2], embedding.along(path[:, :2])).squeeze(1)
        return (path.shape[1] - 1) * at.solve(at.pull(step))

    def half(start: Tensor) -> Tensor:
        return squared_segments(embedding, torch.stack([start, path[:, 1]], 1)).sum() / 2

    return (path.shape[1] - 1) * at.solve(-torch.func.grad(half)(path[:, 0]))


def _extrapolated(embedding: Embedding, x: Tensor, y: Tensor, path: Tensor, tolerance: float) -> Logarithm:
    finest = torch.finfo(x.dtype).eps ** 0.5
    with torch.no_grad():
        coarse = minimize_energy(embedding, path, tolerance=finest, max_iterations=100)
        middle = (coarse.path[:, 1:] + coarse.path[:, :-1]) / 2
        nodes = torch.stack([coarse.path[:, :-1], middle], 2).flatten(1, 2)
        finer = torch.cat([nodes, coarse.path[:, -1:]], 1)
        fine = minimize_energy(embedding, finer, tolerance=finest, max_iterations=100)
    paths = [coarse.path, fine.path]
    if torch.is_grad_enabled():
        paths = [attach(embedding, each, x, y) for each in paths]
    first, second = (initial_velocity(embedding, each) for each in paths)
    vector = second + (second - first) / 3
    residual = _share(_norms(second - first) / 3, _norms(vector))
    return Logarithm(
        vector, coarse.converged & fine.converged & residual.isfinite(), fine.iterations, residual
    )
