"""Geodesics between two points: the discretised energy minimised by damped Newton and Gauss–Newton steps."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manifolds.pulled_back.linear_solvers import (
    assembled,
    conjugate_gradients,
    solve_block_tridiagonal,
    solve_constant,
)
from manifolds.pulled_back.paths import Embedding, dense_model, gradient, half_energy, hessian_product

DENSE = 32
"""The most coordinates of a point for which Jacobians are formed; beyond them products suffice."""


@dataclass(frozen=True)
class Geodesic:
    """Shortest paths between pairs of points, as nodes that stand evenly along them.

    Attributes:
        path: the nodes (*batch, steps + 1, *point), both ends among them.
        energy: (*batch), as `Pullback.energy` gives it for the path; no less than `length`².
        length: (*batch), as `Pullback.length` gives it.
        converged: for each pair, whether `residual` came under the tolerance.
        iterations: steps taken for each pair.
        residual: the last Newton decrement by the root of the energy, √(gᵀ H⁻¹ g / F): by what part of the
            path's own length, measured in the metric, the next step would move it. It does not depend on
            coordinates.
    """

    path: Float[Tensor, "..."]
    energy: Float[Tensor, "*batch"]
    length: Float[Tensor, "*batch"]
    converged: Bool[Tensor, "*batch"]
    iterations: Int[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]


@dataclass(frozen=True)
class Minimum:
    """Paths (items, nodes, *point) where the search ended, and how."""

    path: Tensor
    converged: Tensor
    iterations: Tensor
    residual: Tensor


def straight(x: Tensor, y: Tensor, steps: int) -> Tensor:
    """The straight line in coordinates, as steps + 1 nodes (items, nodes, *point)."""
    share = torch.linspace(0, 1, steps + 1, dtype=x.dtype, device=x.device)
    share = share.reshape(-1, *[1] * (x.ndim - 1))
    line = x.unsqueeze(1) + share * (y - x).unsqueeze(1)
    return torch.cat([line[:, :-1], y.unsqueeze(1)], 1)


def minimize_energy(
    embedding: Embedding, path: Float[Tensor, "items nodes *point"], *, tolerance: float, max_iterations: int
) -> Minimum:
    """Minimise the energy of paths over their inner nodes.

    Each step solves (H + μ D) δ = −g with the block tridiagonal Hessian H, where that is positive definite,
    else with its Gauss–Newton part; D is the block diagonal of the latter, so that the damping μ has no unit.
    A step that raises the energy is not taken. Points of at most `DENSE` coordinates have their Jacobians
    formed and the system solved directly; others are solved by conjugate gradients, preconditioned by the
    Laplacian of the path, and ended where they meet negative curvature. Every pair has its own μ and its own
    end.

    Sources: Shao, Kumar and Fletcher, "The Riemannian geometry of deep generative models" (2018) for the
    discrete energy; Nocedal and Wright, Numerical Optimization (2006), chapters 7 and 10 for the steps.
    """
    items, size = path.shape[0], path[0, 0].numel()
    find_step = _dense_step if size <= DENSE else _free_step
    value = half_energy(embedding, path)
    damping = torch.zeros_like(value)
    done = value == 0
    residual = torch.zeros_like(value)
    iterations = torch.zeros(items, dtype=torch.long, device=path.device)
    noise = torch.finfo(path.dtype).eps ** 0.75  # of the energy, by its rounding
    if path.shape[1] == 2:
        return Minimum(path, torch.ones_like(done), iterations, residual)
    for _ in range(max_iterations):
        step, decrease = find_step(embedding, path, damping, residual)
        found = (2 * decrease.clamp_min(0) / torch.where(value > 0, value, 1.0)).sqrt()
        residual = torch.where(done, residual, found)
        done = done | ((residual <= tolerance) & (damping < 1e-3))
        if bool(done.all()):
            break
        moved = torch.cat([path[:, :1], path[:, 1:-1] + step, path[:, -1:]], 1)
        trial = half_energy(embedding, moved)
        ratio = (value - trial) / torch.where(decrease > 0, decrease, 1.0)
        level = (trial - value).abs() <= noise * value
        ratio = torch.where(level, 1.0, ratio)
        better = level | (trial.isfinite() & (ratio > 1e-4))
        taken = better & ~done
        path = torch.where(_like(taken, path), moved, path)
        value = torch.where(taken, trial, value)
        damping = _next_damping(damping, ratio, better)
        iterations = iterations + (~done).long()
    return Minimum(path, done, iterations, residual)


def _next_damping(damping: Tensor, ratio: Tensor, better: Tensor) -> Tensor:
    eased = torch.where(
        ratio > 0.75, damping / 8, torch.where(ratio < 0.25, (2 * damping).clamp_min(1e-2), damping)
    )
    eased = torch.where(eased < 1e-3, 0.0, eased)
    return torch.where(better, eased, (8 * damping).clamp_min(1e-1))


def _like(flag: Tensor, value: Tensor) -> Tensor:
    return flag.reshape(flag.shape + (1,) * (value.ndim - flag.ndim))


def _dense_step(
    embedding: Embedding, path: Tensor, damping: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """The step (items, inner, *point), and by how much it should lower F."""
    model = dense_model(embedding, path)
    scale = _ridged(model.approximate[0])
    more = damping[:, None, None, None] * scale + (scale - model.approximate[0])
    right = -model.gradient.unsqueeze(-1)
    step, positive = solve_block_tridiagonal(model.hessian[0] + more, model.hessian[1], right)
    if not bool(positive.all()):
        other, _ = solve_block_tridiagonal(model.approximate[0] + more, model.approximate[1], right)
        step = torch.where(_like(positive, step), step, other)
    step = torch.where(step.isfinite(), step, 0.0)
    decrease = (right * step).sum((1, 2, 3)) / 2
    return step.squeeze(-1).reshape(path[:, 1:-1].shape), decrease


def _ridged(blocks: Tensor) -> Tensor:
    """The blocks with a trace of the identity, so that a direction the map does not see stays where it is."""
    trace = blocks.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    ridge = torch.finfo(blocks.dtype).eps ** 0.75 * trace
    return blocks + torch.where(ridge > 0, ridge, 1.0) * torch.eye(
        blocks.shape[-1], dtype=blocks.dtype, device=blocks.device
    )


def _free_step(
    embedding: Embedding, path: Tensor, damping: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    slope, product, scale = hessian_product(embedding, path)
    precondition = laplacian_inverse(path)

    def damped(v: Tensor) -> Tensor:
        found = product(v)
        return found + damping[:, None] * scale(v) if bool((damping > 0).any()) else found

    accuracy = torch.where(residual > 0, residual, 0.5).clamp(1e-3, 0.1)
    found = conjugate_gradients(
        damped, -slope, tolerance=accuracy[:, None], max_iterations=100, precondition=precondition
    )
    fallback = precondition(-slope)
    empty = (found.x == 0).all(-1)
    if bool(empty.any()):  # curvature ≤ 0 at once: down the gradient, as far as the scale says
        curvature = (fallback * scale(fallback)).sum(-1)
        length = (fallback * -slope).sum(-1) / torch.where(curvature > 0, curvature, 1.0)
        step = torch.where(empty[:, None], length[:, None] * fallback, found.x)
    else:
        step = found.x
    step = torch.where(step.isfinite(), step, 0.0)
    return step.reshape(path[:, 1:-1].shape), (-slope * step).sum(-1) / 2


def laplacian_inverse(path: Tensor) -> Callable[[Tensor], Tensor]:
    """Products (items, inner·size) with the inverse of the path's second difference, (−1, 2, −1).

    Its entries are known: min(i, j) (n + 1 − max(i, j)) / (n + 1).
    """
    inner = path.shape[1] - 2
    node = torch.arange(1, inner + 1, dtype=path.dtype, device=path.device)
    low, high = torch.minimum(node[:, None], node), torch.maximum(node[:, None], node)
    inverse = low * (inner + 1 - high) / (inner + 1)

    def product(vector: Tensor) -> Tensor:
        return (inverse @ vector.unflatten(-1, (inner, -1))).flatten(1)

    return product


def attach(embedding: Embedding, path: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The minimising path with its derivative in the ends and in what the map holds.

    By the implicit function theorem the inner nodes change by −H⁻¹ dg where g is the gradient and H the
    Hessian at the minimum: the path less H⁻¹ g, of which g carries the graph. It is exact once, not twice.
    """
    found = path.detach()
    if found.shape[1] == 2:
        return torch.stack([x, y], 1)
    inner = found[:, 1:-1]
    ends = torch.cat([x.unsqueeze(1), inner, y.unsqueeze(1)], 1)
    slope = gradient(embedding, ends)
    followed = torch._C._functorch.is_functorch_wrapped_tensor(slope) or forward_ad._current_level >= 0
    if not (slope.requires_grad or followed):
        return ends
    with torch.no_grad():
        solver = _hessian_solver(embedding, found)
    change = solve_constant((slope - slope.detach()).flatten(1), solver).reshape(inner.shape)
    return torch.cat([x.unsqueeze(1), inner - change, y.unsqueeze(1)], 1)


def _hessian_solver(embedding: Embedding, path: Tensor) -> Callable[[Tensor], Tensor]:
    inner = path.shape[1] - 2
    if path[0, 0].numel() <= DENSE:
        model = dense_model(embedding, path)
        diagonal = model.hessian[0] + _ridged(model.approximate[0]) - model.approximate[0]

        def solve(right: Tensor) -> Tensor:
            shaped = right.unflatten(-1, (inner, -1, 1))
            found, positive = solve_block_tridiagonal(diagonal, model.hessian[1], shaped)
            if bool(positive.all()):
                return found.flatten(1)
            whole = assembled(diagonal, model.hessian[1])  # a saddle, or a way past a conjugate point
            return torch.linalg.solve_ex(whole, right.unsqueeze(-1))[0].squeeze(-1)

        return solve
    _, product, _ = hessian_product(embedding, path)
    accuracy = torch.finfo(path.dtype).eps ** 0.75

    def search(right: Tensor) -> Tensor:
        found = conjugate_gradients(
            product, right, tolerance=accuracy, max_iterations=1000, precondition=laplacian_inverse(path)
        )
        return torch.where(found.curved[:, None], math.nan, found.x)

    return search
