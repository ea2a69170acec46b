"""The logarithm of the Stiefel manifold, which has no closed form: Newton's method on p×p matrices."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.base import frobenius_norm, sum_point
from manifolds.frames import blocks
from manifolds.matrix_functions import exponential, skew

BERNOULLI = (1 / 12, -1 / 720, 1 / 30240)
"""Coefficients of z², z⁴, z⁶ in z / (1 − exp(−z)) = 1 + z/2 + …; three give Newton's step a few digits."""
INNER = 5
FEWEST = 3
"""Iterations that are always run: each doubles the order to which derivatives are right."""
FAR = 0.5
"""Where Newton's step is zero and the end is not reached, it is off by 2: Xᵀ exp(−S) Y is symmetric there."""
LARGEST = 10.0
"""An iterate with a velocity longer than this many √p has left: no shortest geodesic is that long."""


@dataclass(frozen=True)
class Logarithm:
    """A logarithm found by iteration.

    Attributes:
        vector: the velocity (*batch, n, p), the last iterate where the iteration did not converge.
        converged: for each item, whether the last step was within the tolerance.
        iterations: how many were run for the slowest item.
        residual: for each item, the size of its last step relative to the vector.
    """

    vector: Float[Tensor, "*batch n p"]
    converged: Bool[Tensor, "*batch"]
    iterations: int
    residual: Float[Tensor, "*batch"]


def solve(
    x: Float[Tensor, "*#batch n p"],
    y: Float[Tensor, "*#batch n p"],
    bend: float,
    tolerance: float | None = None,
    max_iterations: int = 40,
) -> tuple[Tensor, Tensor, int, Tensor]:
    """The velocity u with exp_x(u) = y, by Newton's method from u = y − x.

    Let K = Xᵀ(Y − X) and N = (I − X Xᵀ)(Y − X). The geodesic stays in the span of X and N, so that U = X
    A + N C with p×p matrices A (skew) and C, whatever the rank of N: in the basis [X N] vectors are 2p×p,
    and the rotation of `Flow` is the exponential of S = [[2(1−κ) A, −Cᵀ NᵀN], [C, 0]]. One iteration
    takes what is missing at the end of the geodesic back to x by that rotation, and inverts there the
    derivative of the exponential, which is a power series in commutators with S, inverted with a few
    corrections. It uses neither QR nor SVD, so that derivatives hold where N is rank deficient (n < 2p),
    and they converge along with the values: the whole iteration is differentiated. Everything is formed
    from y − x without adding I, so that tiny distances keep full relative precision.

    Returns the fields of `Logarithm`.

    Args:
        x: points to start from.
        y: points to reach.
        bend: 0 for the Euclidean metric, ½ for the canonical one, as in `Flow`.
        tolerance: the relative size of the last step; 64 ε of the dtype if not given.
        max_iterations: after so many, an item counts as not converged. Under `vmap` and `torch.compile`,
            where convergence cannot be read, so many are always run.

    Source: the basis and the family of metrics after Zimmermann and Hüper, "Computing the Riemannian
    logarithm on the Stiefel manifold: metrics, methods, and performance" (2022); the iteration is our own.
    """
    x, y = torch.broadcast_tensors(x, y)
    p = x.shape[-1]
    limit = 64 * torch.finfo(x.dtype).eps if tolerance is None else tolerance
    rest = 1 - 2 * bend
    across = x.mT @ (y - x)
    normal = (y - x) - x @ across
    scale = frobenius_norm(normal.detach(), 2, True)
    scale = torch.where(scale > 0, scale, 1.0)
    normal = normal / scale
    gram = normal.mT @ normal
    identity = torch.eye(p, dtype=x.dtype, device=x.device).expand_as(across)
    target = torch.cat([across, scale * identity], -2)

    turn, lift = skew(across), scale * identity
    done = torch.zeros(x.shape[:-2], dtype=torch.bool, device=x.device)
    lost = done
    residual = torch.full(x.shape[:-2], math.inf, dtype=x.dtype, device=x.device)
    count = 0
    while count < max_iterations:
        count += 1
        step_turn, step_lift, off = _step(turn, lift, gram, target, bend, rest)
        with torch.no_grad():
            found = _size(step_turn, step_lift, gram) / _size(turn, lift, gram).clamp_min(
                torch.finfo(x.dtype).tiny
            )
            lost = lost | ~(_size(turn + step_turn, lift + step_lift, gram) <= LARGEST * p**0.5)
            live = (~(done | lost))[..., None, None]
            residual = torch.where(done | lost, residual, found)
            done = done | (~lost & (found <= limit) & (off < FAR)) if count >= FEWEST else done
        turn = turn + torch.where(live, step_turn, 0.0)
        lift = lift + torch.where(live, step_lift, 0.0)
        if all_known(done | lost, unknown=False):
            break
    return x @ turn + normal @ lift, done, count, residual


def _step(
    turn: Tensor, lift: Tensor, gram: Tensor, target: Tensor, bend: float, rest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Newton's correction of A and C, its series cut off, and how far the end is off."""
    p = turn.shape[-1]
    identity = torch.eye(p, dtype=turn.dtype, device=turn.device).expand_as(turn)
    generator = blocks(2 * (1 - bend) * turn, -lift.mT @ gram, lift, torch.zeros_like(turn))
    first = torch.cat([identity, torch.zeros_like(identity)], -2)
    reached = _exponential_less_one(generator, first)
    if rest:
        forth, back = exponential(rest * turn), exponential(-rest * turn)
        reached = reached @ back
        less = _exponential_less_one(-rest * turn, identity)
        reached = reached + torch.cat([less, torch.zeros_like(less)], -2)
    missing = exponential(-generator) @ (target - reached)
    if rest:
        missing = missing @ forth
    upper, lower = skew(missing[..., :p, :]), missing[..., p:, :]

    step_turn, corner = upper, torch.zeros_like(upper)
    step_lift = lower
    for _ in range(INNER):
        head = upper + rest * _right_derivative(rest * turn, step_turn) if rest else upper
        whole = _inverse_derivative(generator, blocks(head, -lower.mT @ gram, lower, corner))
        change = whole[..., :p, :p] - 2 * (1 - bend) * step_turn
        if rest:
            change = (change + forth @ change @ back) / 2
        step_turn = step_turn + change
        step_lift = whole[..., p:, :p]
        corner = corner - whole[..., p:, p:]
    return skew(step_turn), step_lift, missing[..., :p, :].detach().abs().amax((-2, -1))


def _exponential_less_one(matrix: Tensor, right: Tensor) -> Tensor:
    """(exp(S) − I) B to full relative precision, as a block of one exponential."""
    size, columns = right.shape[-2:]
    upper = torch.cat([matrix, matrix @ right], -1)
    whole = torch.cat([upper, torch.zeros_like(upper[..., :1, :]).expand(*upper.shape[:-2], columns, -1)], -2)
    return exponential(whole)[..., :size, size:]


def _commutator(a: Tensor, b: Tensor) -> Tensor:
    return a @ b - b @ a


def _inverse_derivative(generator: Tensor, change: Tensor) -> Tensor:
    """The operator ad / (1 − exp(−ad)) applied to a change, with ad = [S, ·]: undoes exp(−S) d exp(S)."""
    term = _commutator(generator, change)
    found = change + term / 2
    for coefficient in BERNOULLI:
        term = _commutator(generator, term)
        found = found + coefficient * term
        term = _commutator(generator, term)
    return found


def _right_derivative(generator: Tensor, change: Tensor) -> Tensor:
    """The operator (1 − exp(−ad)) / ad applied to a change, with ad = [S, ·]."""
    found = term = change
    for order in range(2, 10):
        term = -_commutator(generator, term) / order
        found = found + term
    return found


def _size(turn: Tensor, lift: Tensor, gram: Tensor) -> Tensor:
    """‖X A + N C‖."""
    square = sum_point(turn * turn, 2) + sum_point(lift * (gram @ lift), 2)
    return square.clamp_min(0).sqrt()


def all_known(flags: Tensor, *, unknown: bool) -> bool:
    """Whether all flags are set; `unknown` under `vmap` and `torch.compile`, where flags cannot be read."""
    if torch.compiler.is_compiling():
        return unknown
    try:
        return bool(flags.all())
    except RuntimeError as unreadable:
        if "vmap" not in str(unreadable):
            raise
        return unknown
