"""Geodesics of the matrices of fixed rank, in coefficients of size r × r.

Along the geodesic from W = L Rᵀ with velocity L E Rᵀ + Lₚ Rᵀ + L Rₚᵀ (LᵀLₚ = 0, RᵀRₚ = 0) the factors stay
in the spans of [L Lₚ] and [R Rₚ]: L(t) = [L Lₚ] a(t) and R(t) = [R Rₚ] b(t). The acceleration of the
geodesic is normal, which reads

    L̈ = −2 (I − ½ P_L) L̇ (ṘᵀR) (RᵀR)⁻¹,    R̈ = −2 (I − ½ P_R) Ṙ (L̇ᵀL) (LᵀL)⁻¹

for the velocities L̇ = ½ L E + Lₚ and Ṙ = ½ R Eᵀ + Rₚ. With the Gram matrices of both spans, which are
block-diagonal, this is an equation in a and b alone: its cost does not depend on m and n.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd import forward_ad

from manifolds.fixed_rank_factors import inverse

SUBSTEPS = (2, 4, 6, 8, 10, 12)
LEVELS = (1, 2, 4, 8, 16)
BLIND_LEVEL, BLIND_ITERATIONS = 4, 12
"""Steps of a geodesic and corrections of a search under `vmap` and `torch.compile`, which read no values."""
WINDOW = 4
"""How many earlier corrections Anderson's mixing looks back."""


@dataclass(frozen=True)
class Grams:
    """The four Gram matrices that a geodesic knows of its point and of the normal parts of its velocity."""

    left: Float[Tensor, "*batch r r"]
    right: Float[Tensor, "*batch r r"]
    left_normal: Float[Tensor, "*batch r r"]
    right_normal: Float[Tensor, "*batch r r"]

    def scaled(self, left: Tensor, right: Tensor) -> "Grams":
        """With the normal parts multiplied by r × r matrices from the right."""
        return Grams(
            self.left, self.right,
            left.mT @ self.left_normal @ left, right.mT @ self.right_normal @ right,
        )  # fmt: skip


@dataclass(frozen=True)
class Arrival:
    """The end of a geodesic at time 1: L(1) = L + [L Lₚ] left, R(1) = R + [R Rₚ] right.

    Attributes:
        left: the displacement a(1) − a(0), (*batch, 2r, r).
        right: the displacement b(1) − b(0), (*batch, 2r, r).
        converged: whether the estimated error is below the tolerance.
        error: the estimated error relative to the length of the geodesic.
    """

    left: Float[Tensor, "*batch p r"]
    right: Float[Tensor, "*batch p r"]
    converged: Bool[Tensor, "*batch"]
    error: Float[Tensor, "*batch"]


@dataclass(frozen=True)
class Shot:
    """The velocity L E Rᵀ + Lₚ X Rᵀ + L (Rₚ Y)ᵀ of the geodesic that arrives at a given matrix.

    Attributes:
        core: E.
        left: X.
        right: Y.
        converged: whether the geodesic arrives, to the tolerance.
        residual: by how much it misses, relative to the distance.
        iterations: how many corrections were made.
    """

    core: Float[Tensor, "*batch r r"]
    left: Float[Tensor, "*batch r r"]
    right: Float[Tensor, "*batch r r"]
    converged: Bool[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]
    iterations: int


def known(condition: Bool[Tensor, "*batch"]) -> bool | None:
    """Whether a condition holds for all items; None under `vmap` and `torch.compile`: unreadable."""
    if torch.compiler.is_compiling():
        return None
    try:
        return bool(condition.all())
    except RuntimeError as unreadable:
        if "vmap" not in str(unreadable):
            raise
        return None


def shoot(core: Float[Tensor, "*batch r r"], grams: Grams, tolerance: float) -> Arrival:
    """Follows a geodesic for time 1.

    The equation is integrated by the extrapolated midpoint rule of order 12 (Gragg, Bulirsch and Stoer) in
    1, 2, 4, 8 or 16 steps until the error estimate is below the tolerance; each item keeps the first result
    that is. The unknown is the displacement, so that a short geodesic has all its digits.

    Args:
        core: E, the part of the velocity within the row and column spaces.
        grams: of the point and of the normal parts of the velocity.
        tolerance: the largest error, relative to the length of the geodesic.
    """
    size = core.shape[-1]
    zero = torch.zeros_like(core)
    eye = torch.eye(size, dtype=core.dtype, device=core.device).expand_as(core)
    metric = torch.stack(
        [
            torch.cat([torch.cat([point, zero], -1), torch.cat([zero, normal], -1)], -2)
            for point, normal in ((grams.left, grams.left_normal), (grams.right, grams.right_normal))
        ],
        -3,
    )
    velocity = torch.stack([torch.cat([part / 2, eye], -2) for part in (core, core.mT)], -3)
    start = torch.cat([torch.cat([eye, zero], -2), torch.cat([zero, zero], -2)], -1).unsqueeze(-3)
    begin = torch.cat([torch.zeros_like(velocity), velocity], -1)

    paths = _Paths(begin, start, metric, torch.stack([grams.right, grams.left], -3))
    with torch.no_grad():
        place, level, errors = paths.detached().follow(tolerance)
    if _tracked(core, grams.left, grams.right, grams.left_normal, grams.right_normal):
        place = paths.followed_again(level)
    place = place[..., :size]
    return Arrival(place[..., 0, :, :], place[..., 1, :, :], level > 0, errors)


@dataclass(frozen=True)
class _Paths:
    """A batch of geodesics of both sides at once: the state is [a − a(0), ȧ] of shape (*batch, 2, 2r, 2r)."""

    begin: Tensor
    start: Tensor
    metric: Tensor
    other: Tensor

    def detached(self) -> "_Paths":
        return _Paths(*(part.detach() for part in (self.begin, self.start, self.metric, self.other)))

    def follow(self, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
        """The end, the number of steps that sufficed (0: none did) and the error, for each item."""
        size = self.begin.shape[-1] // 2
        length = self._length(self.begin[..., size:])
        length = torch.where(length > 0, length, 1.0)
        level = torch.zeros_like(length, dtype=torch.long)
        place, errors = self.begin, torch.full_like(length, torch.inf)
        blind = known(level == 0) is None
        for count in (BLIND_LEVEL,) if blind else LEVELS:
            state, doubts = self._integrated(count)
            error: Any = (
                sum(self._length(d[..., :size]) + self._length(d[..., size:]) / count for d in doubts)
                / length
            )
            fresh = level == 0
            place = torch.where(fresh[..., None, None, None], state, place)
            errors = torch.where(fresh, error, errors)
            level = torch.where(fresh & (error <= tolerance), count, level)
            if known((level > 0) | ~error.isfinite()):
                break
        return place, level, errors

    def followed_again(self, level: Tensor) -> Tensor:
        """The end with its graph, by the number of steps that sufficed; where none did, by the largest."""
        blind = known(level == 0) is None
        counts = (BLIND_LEVEL,) if blind else LEVELS
        level = torch.where(level == 0, counts[-1], level)
        place = self.begin
        for count in counts:
            if blind or bool((level == count).any()):
                place = torch.where(
                    (level == count)[..., None, None, None], self._integrated(count)[0], place
                )
        return place

    def _integrated(self, count: int) -> tuple[Tensor, list[Tensor]]:
        state, doubts = self.begin, []
        for _ in range(count):
            change, doubt = _extrapolated(state, self.start, self.metric, 1 / count)
            state = state + change
            doubts.append(doubt.detach())
        return state, doubts

    def _length(self, moved: Tensor) -> Tensor:
        """The length of a change of a and b, measured as a change of L Rᵀ at the start."""
        total = ((self.metric @ moved) * (moved @ self.other)).sum((-3, -2, -1))
        return torch.where(total > 0, total, total * 0).sqrt()


def _acceleration(state: Tensor, start: Tensor, metric: Tensor) -> Tensor:
    """The derivative of [a, ȧ] for both sides at once; they act on each other through the flip."""
    size = state.shape[-1] // 2
    whole = state + start
    products = whole[..., :size].mT @ (metric @ whole)
    backward = torch.linalg.inv_ex(products[..., :size])[0]
    mixed = products[..., size:]
    turn = torch.flip(mixed.mT @ backward, (-3,))
    bend = torch.cat([backward @ mixed @ turn, -2 * turn], -2)
    return torch.cat([whole[..., size:], whole @ bend], -1)


def _extrapolated(state: Tensor, start: Tensor, metric: Tensor, time: float) -> tuple[Tensor, Tensor]:
    """The change of the state over a time, and the difference to the result of the next lower order."""
    first = _acceleration(state, start, metric)
    change, doubt = torch.zeros_like(state), torch.zeros_like(state)
    for count, weight, lower in zip(
        SUBSTEPS, _weights(SUBSTEPS), (0.0, *_weights(SUBSTEPS[1:])), strict=True
    ):
        step = time / count
        before, now = torch.zeros_like(state), step * first
        for _ in range(count - 1):
            before, now = now, before + 2 * step * _acceleration(state + now, start, metric)
        last = (now + before + step * _acceleration(state + now, start, metric)) / 2
        change = change + weight * last
        doubt = doubt + (weight - lower) * last
    return change, doubt


def _weights(counts: tuple[int, ...]) -> list[float]:
    """The weights of Richardson's extrapolation to step zero in even powers of the step."""
    weights = []
    for count in counts:
        weight = 1.0
        for other in counts:
            if other != count:
                weight *= count**2 / (count**2 - other**2)
        weights.append(weight)
    return weights


def aim(
    target: Float[Tensor, "*batch r r"],
    grams: Grams,
    tolerance: float,
    integration_tolerance: float,
    max_iterations: int,
) -> Shot:
    """The velocity whose geodesic arrives at the matrix Y with P_x(Y − W) = L target Rᵀ + Lₚ Rᵀ + L Rₚᵀ.

    What P_x sees of the miss is added to the velocity until it vanishes, with Anderson's mixing. The search
    keeps no graph; derivatives come from as many plain corrections at its end, where they contract as the
    search did.

    Args:
        target: the part of P_x(Y − W) within the row and column spaces.
        grams: of the point, Lₚ and Rₚ.
        tolerance: the largest miss, relative to ‖P_x(Y − W)‖.
        integration_tolerance: of each geodesic.
        max_iterations: of the search.
    """
    with torch.no_grad():
        fixed = Grams(
            *(part.detach() for part in (grams.left, grams.right, grams.left_normal, grams.right_normal))
        )
        found, converged, residual, iterations = _search(
            target.detach(), fixed, tolerance, integration_tolerance, max_iterations
        )
    if _tracked(target, grams.left, grams.right, grams.left_normal, grams.right_normal):
        found = torch.where(converged[..., None, None, None], found, 0.0)
        for _ in range(iterations + 2):
            found = found + _miss(found, target, grams, integration_tolerance)[0]
    core, left, right = found.unbind(-3)
    return Shot(core, left, right, converged, residual, iterations)


def _search(
    target: Tensor, grams: Grams, tolerance: float, integration_tolerance: float, max_iterations: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The fixed point of the corrections for each item, whether it was reached, the miss, and the count."""
    eye = torch.eye(target.shape[-1], dtype=target.dtype, device=target.device).expand_as(target)
    found = torch.stack([target, eye, eye], -3)
    weights = (
        torch.stack([grams.left, grams.left_normal, grams.right_normal], -3),
        torch.stack([grams.right, grams.right, grams.left], -3),
    )
    goal = _pairing(found, found, weights)
    goal = torch.where(goal > 0, goal, 1.0).sqrt()
    converged = torch.zeros_like(goal, dtype=torch.bool)
    residual = torch.full_like(goal, torch.inf)
    blind = known(converged) is None
    history: list[tuple[Tensor, Tensor]] = []
    count = 0
    for count in range(1, (BLIND_ITERATIONS if blind else max_iterations) + 1):  # noqa: B007
        miss, arrived = _miss(found, target, grams, integration_tolerance)
        size = _pairing(miss, miss, weights).clamp(min=0).sqrt() / goal
        residual = torch.where(converged, residual, size)
        active = ~converged[..., None, None, None]
        converged = converged | (size <= tolerance) & arrived
        following = _mixed(found, miss, history, weights)
        history = [*history[-WINDOW:], (found, miss)]
        found = torch.where(active, following, found)
        if known(converged | ~following.isfinite().flatten(-3).all(-1)):
            break
    return found, converged, residual, count


def _miss(found: Tensor, target: Tensor, grams: Grams, integration_tolerance: float) -> tuple[Tensor, Tensor]:
    """Target less what P_x sees of the arrival, for (E, X, Y); and whether the geodesic was followed."""
    core, left, right = found.unbind(-3)
    size = core.shape[-1]
    arrival = shoot(core, grams.scaled(left, right), integration_tolerance)
    eye = torch.eye(size, dtype=core.dtype, device=core.device)
    inner_left, inner_right = arrival.left[..., :size, :], arrival.right[..., :size, :]
    outer_left, outer_right = arrival.left[..., size:, :], arrival.right[..., size:, :]
    seen = inner_left + inner_right.mT + inner_left @ inner_right.mT
    miss = [
        target - seen,
        eye - left @ outer_left @ (eye + inner_right).mT,
        eye - right @ outer_right @ (eye + inner_left).mT,
    ]
    return torch.stack(miss, -3), arrival.converged


def _mixed(
    found: Tensor, miss: Tensor, history: list[tuple[Tensor, Tensor]], weights: tuple[Tensor, Tensor]
) -> Tensor:
    """The next guess of Anderson's mixing: the last guesses combined to the smallest miss, and corrected."""
    if not history:
        return found + miss
    moves = torch.stack([found - before for before, _ in history], -4)
    changes = torch.stack([miss - before for _, before in history], -4)
    wide = weights[0].unsqueeze(-4), weights[1].unsqueeze(-4)
    weighted = (wide[0] @ changes @ wide[1]).flatten(-3)
    normal = weighted @ changes.flatten(-3).mT
    scale = normal.diagonal(dim1=-2, dim2=-1).clamp(min=torch.finfo(miss.dtype).tiny).rsqrt()
    normal = scale.unsqueeze(-1) * normal * scale.unsqueeze(-2)
    ridge = 1e3 * torch.finfo(miss.dtype).eps * torch.eye(len(history), dtype=miss.dtype, device=miss.device)
    aligned = scale * (weighted @ miss.flatten(-3).unsqueeze(-1)).squeeze(-1)
    share = scale * (inverse(normal + ridge) @ aligned.unsqueeze(-1)).squeeze(-1)
    share = torch.where(share.isfinite(), share, 0.0)
    return found + miss - (share[..., None, None, None] * (moves + changes)).sum(-4)


def _pairing(first: Tensor, second: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
    """The metric of two triples (E, X, Y) of r × r matrices (*batch)."""
    return ((weights[0] @ first @ weights[1]) * second).sum((-3, -2, -1))


def _tracked(*tensors: Tensor) -> bool:
    """Whether a derivative is being taken by one of the tensors, in reverse or in forward mode."""
    reverse = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if reverse or torch.compiler.is_compiling():
        return reverse
    return any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors)
