"""The largest singular values of a Jacobian and their directions, by randomized block Krylov iteration."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.pulled_back.derivatives import Linearization, basis_like, over_vectors

Weight = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class SingularDirections:
    """The k directions at each point that the metric sees most: an edit basis.

    Attributes:
        values: singular values σ of M^½ J (*batch, k), falling: the length in the output metric of each unit
            step. They are differentiable in the point and in what the map holds, once each.
        vectors: right singular vectors (*batch, k, *point), orthonormal in the coordinates of the point.
            Signs, and the basis of a space of equal singular values, are as they come.
        images: J v for each vector (*batch, k, *out): the change of the output for a unit step; its length in
            the output metric is σ.
        converged: for each point, whether `angle` came under the tolerance, or the residual under rounding
            error (which is the most that can be had where the k-th and the next singular value agree).
        angle: a bound in radians on the largest principal angle to the exact space of the first k directions
            (*batch): ‖R‖ / (σ_k² − σ_{k+1}²) with the residual R of the k Ritz pairs and the computed gap.
        residual: ‖R‖ / σ_1² (*batch).
        iterations: products with JᵀMJ, of a block each.
    """

    values: Float[Tensor, "*batch k"]
    vectors: Float[Tensor, "..."]
    images: Float[Tensor, "..."]
    converged: Bool[Tensor, "*batch"]
    angle: Float[Tensor, "*batch"]
    residual: Float[Tensor, "*batch"]
    iterations: int


@dataclass(frozen=True)
class Ritz:
    """The best k directions in a subspace, values (items, k) and vectors (items, size, k)."""

    values: Tensor
    vectors: Tensor
    residual: Tensor
    angle: Tensor
    converged: Tensor


def block_krylov(
    at: Linearization,
    weight: Weight | None,
    k: int,
    *,
    oversampling: int,
    tolerance: float,
    max_iterations: int,
    generator: torch.Generator | None,
) -> tuple[Ritz, int]:
    """The k largest singular values of M^½ J and their right vectors.

    With G = JᵀMJ and a Gaussian block Π of k + oversampling columns, the best approximations in the span of
    Π, GΠ, G²Π, … are taken. The basis is kept orthonormal; the singular values are those of M^½ J on the
    basis, not roots of eigenvalues of G, so that small ones keep their digits. A block that adds nothing, the
    range of G being exhausted, goes on with noise. Where the basis would fill half of the space, the whole
    space is taken, and the answer is exact. Items that have converged keep what they have.

    Source: Musco and Musco, "Randomized block Krylov methods for stronger and faster approximate singular
    value decomposition" (2015).
    """
    x = at.x
    items, size = x.shape[0], x[0].numel()
    block = min(k + oversampling, size)
    if size <= max(2 * block, 32):
        return _ritz(at, weight, basis_like(x).flatten(2).mT, k, tolerance), 1
    noise = torch.randn(items, size, block, dtype=x.dtype, device=x.device, generator=generator)
    basis = torch.linalg.qr(noise).Q
    pushed, pulled = _products(at, weight, basis)
    best: Ritz | None = None
    for iteration in range(1, max_iterations + 1):
        found = _rayleigh_ritz(basis, pushed, pulled, _gram(at, weight, pushed), k, tolerance)
        best = found if best is None else _keep(best, found)
        if bool(best.converged.all()) or iteration == max_iterations:
            return best, iteration
        if basis.shape[-1] + block > size // 2:
            whole = _ritz(at, weight, basis_like(x).flatten(2).mT, k, tolerance)
            return _keep(best, whole), iteration + 1
        fresh = _extend(basis, pulled[..., -block:], noise)
        more_pushed, more_pulled = _products(at, weight, fresh)
        basis = torch.cat([basis, fresh], -1)
        pushed, pulled = torch.cat([pushed, more_pushed], -1), torch.cat([pulled, more_pulled], -1)
    raise AssertionError("unreachable")


def _products(at: Linearization, weight: Weight | None, basis: Tensor) -> tuple[Tensor, Tensor]:
    """J Q (items, outputs, m) and G Q (items, size, m)."""
    vectors = basis.mT.reshape(*basis.shape[:1], basis.shape[-1], *at.x.shape[1:])
    pushed = at.push(vectors)
    weighed = pushed if weight is None else _weigh(at, weight, pushed)
    return pushed.mT, at.pull(weighed).flatten(2).mT


def _weigh(at: Linearization, weight: Weight, rows: Tensor) -> Tensor:
    return over_vectors(lambda v: weight(at.value, v), rows)


def _gram(at: Linearization, weight: Weight | None, pushed: Tensor) -> Tensor | None:
    return None if weight is None else pushed.mT @ _weigh(at, weight, pushed.mT).mT


def _extend(basis: Tensor, block: Tensor, noise: Tensor) -> Tensor:
    """An orthonormal basis of what the block adds; noise where it adds nothing."""
    scale = block.norm(dim=-2, keepdim=True)
    unit = block / torch.where(scale > 0, scale, 1.0)
    fresh = unit + torch.finfo(block.dtype).eps / math.sqrt(block.shape[-2]) * noise
    for _ in range(3):
        fresh = torch.linalg.qr(fresh - basis @ (basis.mT @ fresh)).Q
    return fresh


def _ritz(at: Linearization, weight: Weight | None, basis: Tensor, k: int, tolerance: float) -> Ritz:
    pushed, pulled = _products(at, weight, basis)
    return _rayleigh_ritz(basis, pushed, pulled, _gram(at, weight, pushed), k, tolerance)


def _rayleigh_ritz(
    basis: Tensor, pushed: Tensor, pulled: Tensor, gram: Tensor | None, k: int, tolerance: float
) -> Ritz:
    if gram is None:
        small = torch.linalg.qr(pushed).R if pushed.shape[-2] > pushed.shape[-1] else pushed
        _, values, right = torch.linalg.svd(small, full_matrices=True)
        coefficients = right.mT
        missing = coefficients.shape[-1] - values.shape[-1]
        values = torch.nn.functional.pad(values, (0, missing))
    else:
        squares, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
        values, coefficients = squares.clamp_min(0).sqrt().flip(-1), vectors.flip(-1)
    top, coefficients = values[..., :k], coefficients[..., :k]
    vectors = basis @ coefficients
    squares = top.square()
    residual = (pulled @ coefficients - vectors * squares.unsqueeze(-2)).flatten(1).norm(dim=-1)
    largest = squares[..., 0]
    following = values[..., k] if values.shape[-1] > k else torch.zeros_like(largest)
    gap = squares[..., -1] - following.square()
    everything = k == basis.shape[-2]
    rounding = 30 * torch.finfo(basis.dtype).eps * math.sqrt(k) * largest
    angle = torch.where(gap > 0, residual / torch.where(gap > 0, gap, 1.0), math.inf)
    angle = torch.zeros_like(angle) if everything else torch.atan(angle)
    relative = residual / torch.where(largest > 0, largest, 1.0)
    return Ritz(top, vectors, relative, angle, (angle <= tolerance) | (residual <= rounding))


def _keep(best: Ritz, found: Ritz) -> Ritz:
    done = best.converged
    return Ritz(
        torch.where(done[:, None], best.values, found.values),
        torch.where(done[:, None, None], best.vectors, found.vectors),
        torch.where(done, best.residual, found.residual),
        torch.where(done, best.angle, found.angle),
        done | found.converged,
    )
