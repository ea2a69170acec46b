"""How the effective rank of a matrix moves as an update is added: W + tΔW."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD, SVDCache
from peft_analysis.errors import UpdateError
from peft_analysis.intruders import decomposed, fitting
from peft_analysis.rotated import rotated_matrix


@dataclass(frozen=True)
class RankPath:
    """The effective rank of W + tΔW along t.

    Attributes:
        t: where it was taken (s,).
        effective_rank: Roy and Vetterli's, of W + tΔW (s,).
        slope: its derivative in t (s,); infinite where the update fills directions in which W + tΔW is zero.
    """

    t: Float[Tensor, " s"]
    effective_rank: Float[Tensor, " s"]
    slope: Float[Tensor, " s"]

    @property
    def change(self) -> float:
        """The effective rank at the last t minus that at the first."""
        return float(self.effective_rank[-1] - self.effective_rank[0])

    @property
    def lowest(self) -> float:
        """The t at which the effective rank is least, of those that were taken."""
        return float(self.t[self.effective_rank.argmin()])


def rank_path(
    base_matrix: Tensor,
    update_matrix: Tensor | LowRank,
    t: Sequence[float | int] | Tensor = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    base_svd: BaseSVD | None = None,
    cache: SVDCache | None = None,
) -> RankPath:
    """The effective rank of W + tΔW and its derivative, at each t.

    Formula: with p = σ / Σσ and H = −Σ p log p, erank = exp H (Roy and Vetterli 2007), and from σ̇ᵢ = uᵢᵀΔW vᵢ
    d erank / dt = −erank Σᵢ (log pᵢ + H) uᵢᵀ ΔW vᵢ / Σσ: an update that strengthens values with
    pᵢ > exp(−H) lowers the rank. Where a value is zero, the derivative is that for rising t: +∞ if ΔW acts
    between the null spaces, else it has no part. (A matrix of deficient rank that was rounded has small
    values there, no zeros; its slope is that of the rounded matrix.) One decomposition a step.

    Args:
        base_matrix: W (m, n) as (out, in); more dimensions are flattened to (m, ·).
        update_matrix: ΔW, a `LowRank` or dense, of the same shape.
        t: how much of the update is added.
        base_svd: the base's decomposition, where it is known.
        cache: keeps the base's decomposition.

    Raises:
        UpdateError: shapes differ; NaN; t is empty or not finite; W + tΔW is zero.
    """
    steps = [float(step) for step in t]
    if not steps or not all(math.isfinite(step) for step in steps):
        raise UpdateError(f"t is {steps}; at least one finite number is needed")
    base, change = _rotated(base_matrix, update_matrix, base_svd, cache)
    zero = _zero(base)
    start = torch.zeros_like(change)
    start[: len(base.S)] = base.S.double().diag()
    taken = [_step(start, change, step, zero) for step in steps]
    ranks, slopes = (torch.stack(values) for values in zip(*taken, strict=True))
    return RankPath(start.new_tensor(steps), ranks, slopes)


def effective_rank_slope(
    base_matrix: Tensor,
    update_matrix: Tensor | LowRank,
    *,
    base_svd: BaseSVD | None = None,
    cache: SVDCache | None = None,
) -> Float[Tensor, ""]:
    """The derivative of the effective rank of W + tΔW at t = 0, from the base's decomposition alone.

    See `rank_path` for the formula. With a cached base and a `LowRank` of rank r this is (m + n) r p work.

    Raises:
        UpdateError: as for `rank_path`.
    """
    base_matrix, update_matrix = fitting(base_matrix, update_matrix)
    base = decomposed(base_matrix, base_svd, cache)
    U, V, values = base.U, base.V, base.S.double()
    if isinstance(update_matrix, LowRank):
        inner, outer = U.mT @ update_matrix.left.to(U.dtype), update_matrix.right.to(U.dtype) @ V
        moves = (inner.double() * outer.mT.double()).sum(1)
    else:
        moves = (U * (update_matrix.to(U.dtype) @ V)).double().sum(0)
    null = values <= _zero(base) * values[0]
    fills = False
    if bool(null.any()):
        size = float(update_matrix.norm())
        outside = update_matrix.to(U.dtype) @ V[:, null]
        outside = outside - U[:, ~null] @ (U[:, ~null].mT @ outside)
        fills = float(outside.norm()) > 1e-6 * size
    return _slope(values, moves, null, fills)[1]


def _zero(base: BaseSVD) -> float:
    """Values this small, over the largest, are zeros: a small value has a slope, a zero has none."""
    return max(base.shape) * torch.finfo(torch.float64).eps


def _rotated(
    base_matrix: Tensor, update_matrix: Tensor | LowRank, base_svd: BaseSVD | None, cache: SVDCache | None
) -> tuple[BaseSVD, Tensor]:
    """The base's decomposition with as many rows as columns or more, and the update in its basis (q, p)."""
    base_matrix, update_matrix = fitting(base_matrix, update_matrix)
    base = decomposed(base_matrix, base_svd, cache)
    if base.shape[0] < base.shape[1]:
        base, update_matrix = BaseSVD(base.V, base.S, base.U, base.key), update_matrix.mT
    whole = rotated_matrix(base, update_matrix)
    whole[: len(base.S)] -= base.S.double().diag()
    return base, whole


def _step(start: Tensor, change: Tensor, t: float, zero: float) -> tuple[Tensor, Tensor]:
    """The effective rank of start + t change (q, p), and its derivative."""
    left, values, right = torch.linalg.svd(start + t * change, full_matrices=False)
    turned = change @ right.mT
    size = change.norm()
    null = values <= zero * torch.maximum(start[0, 0], abs(t) * size)
    fills = False
    if bool(null.any()):
        outside = turned[:, null] - left[:, ~null] @ (left[:, ~null].mT @ turned[:, null])
        fills = float(outside.norm()) > 1e-6 * float(size)
    return _slope(values, (left * turned).sum(0), null, fills)


def _slope(values: Tensor, moves: Tensor, null: Tensor, fills: bool) -> tuple[Tensor, Tensor]:
    """Exp H and its derivative, from singular values, their derivatives, and what happens at the zeros."""
    if bool(null.all()):
        raise UpdateError("W + tΔW is zero; a zero matrix has no effective rank")
    values, moves = values[~null], moves[~null]
    share = values / values.sum()
    entropy = -(share * share.log()).sum()
    rank = entropy.exp()
    slope = -rank * ((share.log() + entropy) * moves).sum() / values.sum()
    return rank, slope if not fills else torch.full_like(slope, torch.inf)
