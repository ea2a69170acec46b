"""Batches of symmetric positive systems: block tridiagonal ones directly, any by conjugate gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.matrix_functions import forward_rule

Product = Callable[[Tensor], Tensor]
DIRECT = 64
"""The size of a block tridiagonal system below which one Cholesky factorisation is the quickest."""


def solve_block_tridiagonal(
    diagonal: Float[Tensor, "*batch n d d"],
    above: Float[Tensor, "*batch n_less_1 d d"],
    right: Float[Tensor, "*batch n d k"],
) -> tuple[Float[Tensor, "*batch n d k"], Bool[Tensor, "*batch"]]:
    """Solve a symmetric block tridiagonal system, and say which ones are positive definite.

    Row i reads Uᵢ₋₁ᵀ xᵢ₋₁ + Dᵢ xᵢ + Uᵢ xᵢ₊₁ = bᵢ. Every second block is eliminated by its Cholesky factor,
    which leaves a system of the same kind and half the size: about log₂ n steps, each over all blocks and
    items at once. A system is positive definite just if all these factors exist; the solution of another
    means nothing.

    Source: Heller, "Some aspects of the cyclic reduction algorithm for block tridiagonal linear systems"
        (1976).
    """
    count, size = diagonal.shape[-3], diagonal.shape[-1]
    if count == 1 or count * size <= DIRECT:
        factor, failed = torch.linalg.cholesky_ex(assembled(diagonal, above))
        found = torch.cholesky_solve(right.flatten(-3, -2), factor)
        return found.unflatten(-2, (count, size)), failed == 0
    # The blocks 0, 2, 4, … go; each keeps its coupling to the block before (`left`) and after it (`ahead`).
    factor, failed = torch.linalg.cholesky_ex(diagonal[..., ::2, :, :])
    removed, kept = factor.shape[-3], count // 2
    ahead, left = above[..., ::2, :, :], above[..., 1::2, :, :].mT
    gone = torch.cholesky_solve(right[..., ::2, :, :], factor)
    to_ahead = torch.cholesky_solve(ahead, factor[..., : ahead.shape[-3], :, :])
    to_left = torch.cholesky_solve(left, factor[..., 1 : 1 + left.shape[-3], :, :])
    after = removed - 1  # blocks that stand behind a kept one
    reduced = diagonal[..., 1::2, :, :] - ahead[..., :kept, :, :].mT @ to_ahead[..., :kept, :, :]
    rest = right[..., 1::2, :, :] - ahead[..., :kept, :, :].mT @ gone[..., :kept, :, :]
    reduced = _add_front(reduced, -(left.mT @ to_left), after)
    rest = _add_front(rest, -(left.mT @ gone[..., 1:, :, :]), after)
    inner = min(kept - 1, after)
    coupling = -(left[..., :inner, :, :].mT @ to_ahead[..., 1 : 1 + inner, :, :])
    solution, positive = solve_block_tridiagonal((reduced + reduced.mT) / 2, coupling, rest)
    odd = gone - _pad_back(to_ahead @ solution[..., : ahead.shape[-3], :, :], removed)
    odd = odd - _pad_front(to_left @ solution[..., : left.shape[-3], :, :], removed)
    whole = torch.empty_like(right.expand(*solution.shape[:-3], *right.shape[-3:]))
    whole[..., ::2, :, :], whole[..., 1::2, :, :] = odd, solution
    return whole, positive & (failed == 0).all(-1)


def assembled(
    diagonal: Float[Tensor, "*batch n d d"], above: Float[Tensor, "*batch n_less_1 d d"]
) -> Float[Tensor, "*batch nd nd"]:
    """The block tridiagonal matrix itself (*batch, n·d, n·d)."""
    count, size = diagonal.shape[-3], diagonal.shape[-1]
    whole = diagonal.new_zeros(*diagonal.shape[:-3], count, size, count, size)
    node = torch.arange(count, device=diagonal.device)
    whole[..., node, :, node, :] = diagonal.movedim(-3, 0)
    whole[..., node[:-1], :, node[1:], :] = above.movedim(-3, 0)
    whole[..., node[1:], :, node[:-1], :] = above.mT.movedim(-3, 0)
    return whole.reshape(*diagonal.shape[:-3], count * size, count * size)


def _add_front(value: Tensor, more: Tensor, count: int) -> Tensor:
    return torch.cat([value[..., :count, :, :] + more, value[..., count:, :, :]], -3)


def _pad_back(value: Tensor, count: int) -> Tensor:
    missing = count - value.shape[-3]
    return torch.cat([value, value.new_zeros(*value.shape[:-3], missing, *value.shape[-2:])], -3)


def _pad_front(value: Tensor, count: int) -> Tensor:
    missing = count - value.shape[-3]
    return torch.cat([value.new_zeros(*value.shape[:-3], missing, *value.shape[-2:]), value], -3)


@dataclass(frozen=True)
class CGResult:
    """Solutions of a batch of systems.

    Attributes:
        x: the solutions (items, size).
        converged: for each item, whether the residual came under the tolerance.
        curved: for each item, whether a direction of curvature ≤ 0 ended it before.
    """

    x: Float[Tensor, "items size"]
    converged: Bool[Tensor, " items"]
    curved: Bool[Tensor, " items"]


def conjugate_gradients(
    product: Product,
    right: Float[Tensor, "items size"],
    *,
    tolerance: Float[Tensor, "..."] | float,
    max_iterations: int,
    precondition: Product | None = None,
) -> CGResult:
    """Solve A x = b for each item by itself: one that is done, or meets curvature ≤ 0, stays as it is.

    Args:
        product: v ↦ A v, over (items, size).
        right: b.
        tolerance: of ‖b − A x‖ / ‖b‖.
        max_iterations: the most products.
        precondition: v ↦ P v, P about A⁻¹ and positive.
    """
    precondition = precondition or (lambda r: r)
    x, r = torch.zeros_like(right), right
    z = precondition(r)
    p, rho = z, _dot(r, z)
    goal = tolerance * right.norm(dim=-1, keepdim=True)
    curved = torch.zeros_like(rho, dtype=torch.bool)
    for _ in range(max_iterations):
        active = (r.norm(dim=-1, keepdim=True) > goal) & ~curved
        if not bool(active.any()):
            break
        q = product(p)
        curvature = _dot(p, q)
        curved = curved | (active & ~(curvature > 0))
        active = active & (curvature > 0)
        step = torch.where(active, rho / torch.where(active, curvature, 1.0), 0.0)
        x, r = x + step * p, r - step * q
        z = precondition(r)
        fresh = _dot(r, z)
        p = torch.where(active, z + fresh / torch.where(rho > 0, rho, 1.0) * p, p)
        rho = torch.where(active, fresh, rho)
    converged = (r.norm(dim=-1, keepdim=True) <= goal) & ~curved
    return CGResult(x, converged.squeeze(-1), curved.squeeze(-1))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def solve_constant(right: Tensor, solver: Product) -> Tensor:
    """The solution A⁻¹ b for a symmetric A that is held constant, with its derivative, A⁻¹ again."""
    return _Solve.apply(right, solver)


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(right: Tensor, solver: Product) -> Tensor:
        return solver(right)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Product], output: Tensor) -> None:
        ctx.solver = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _Solve.apply(gradient, ctx.solver), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        with forward_rule(ctx):
            return _Solve.apply(tangent, ctx.solver)
