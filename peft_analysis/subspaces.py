"""Angles between the spaces that matrices span, and how much of one lies in the other."""

from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD, check_matrix
from peft_analysis.errors import UpdateError

Side = Literal["left", "right"]
Matrix: TypeAlias = Tensor | LowRank | BaseSVD


def principal_angles(
    a: Matrix, b: Matrix, *, side: Side = "left", top: int | tuple[int | None, int | None] | None = None
) -> Float[Tensor, " q"]:
    """The principal angles between the spaces that two matrices span, in radians, largest first.

    Formula: with orthonormal bases Q and P of both spaces, cos θᵢ = σᵢ(QᵀP); below 45° from
    sin θᵢ = σᵢ(P − Q QᵀP), which keeps the digits of small angles (Knyazev and Argentati 2002). The spaces
    are those of the numerical rank: singular values above max(m, n) ε σ₁. q is the smaller of both ranks.
    Same as `scipy.linalg.subspace_angles` on column spaces (scipy mixes up which angles are small where only
    some are, and gives √ε for zero there). A `LowRank` is not multiplied out.

    Args:
        a: matrix (m, n), dense, a `LowRank`, or a `BaseSVD`.
        b: another one, with the same m for column spaces, the same n for row spaces.
        side: "left" compares column spaces (left singular vectors), "right" row spaces.
        top: only that many of the largest singular directions of both, or of each: (of a, of b).

    Raises:
        UpdateError: the spaces lie in different dimensions; NaN; `top` is more than the rank.

    Example:
        >>> import torch
        >>> principal_angles(torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0], [1.0]]))
        tensor([0.7854])
    """
    tops = top if isinstance(top, tuple) else (top, top)
    p, q = _pair(a, b, side, tops)
    if p.shape[1] < q.shape[1]:
        p, q = q, p
    inner = p.mT @ q
    if not inner.shape[1]:
        return inner.new_zeros(0)
    cosines = torch.linalg.svdvals(inner).clamp(max=1)
    sines = torch.linalg.svdvals(q - p @ inner).clamp(max=1).flip(0)
    angles = torch.where(cosines.square() >= 0.5, sines.asin(), cosines.acos())
    return angles.flip(0)


def overlap(a: Matrix, b: Matrix, i: int, j: int, *, side: Side = "left") -> Float[Tensor, ""]:
    """How much of the top-i singular space of one matrix lies in the top-j space of another, 0 to 1.

    Formula: φ(i, j) = ‖U_aⁱᵀ U_bʲ‖² / min(i, j), LoRA's Eq. 4 (Hu et al. 2021, section 7.2); 1 where one
    space holds the other.

    Args:
        a: matrix (m, n), dense, a `LowRank`, or a `BaseSVD`.
        b: another one.
        i: how many singular vectors of a, from 1 to its rank.
        j: how many of b.
        side: "left" for left singular vectors, "right" for right ones (LoRA's figure shows those of its A).

    Raises:
        UpdateError: i or j is not between 1 and the rank; the spaces lie in different dimensions; NaN.
    """
    p, q = _pair(a, b, side, (i, j))
    return (p.mT @ q).square().sum() / min(i, j)


def overlap_grid(a: Matrix, b: Matrix, *, side: Side = "left") -> Float[Tensor, "i j"]:
    """φ(i, j) of `overlap` for every i and j up to the ranks: entry [i − 1, j − 1].

    Raises:
        UpdateError: the spaces lie in different dimensions; NaN.
    """
    p, q = _pair(a, b, side, (None, None))
    mass = (p.mT @ q).square().cumsum(0).cumsum(1)
    i, j = (torch.arange(1, size + 1, device=mass.device) for size in mass.shape)
    return mass / torch.minimum(i[:, None], j)


def singular_basis(matrix: Matrix, *, side: Side = "left", top: int | None = None) -> Float[Tensor, "m r"]:
    """Singular vectors of a matrix as columns, by falling singular value, as many as its numerical rank.

    Args:
        matrix: dense (m, n), a `LowRank`, or a `BaseSVD`.
        side: "left" (m, r) or "right" (n, r).
        top: only the first so many.

    Raises:
        UpdateError: `top` is below 1 or above the rank; NaN; a side that there is not.
    """
    if side not in ("left", "right"):
        raise UpdateError(f"side is {side!r}; it is 'left' (columns) or 'right' (rows)")
    if isinstance(matrix, BaseSVD):
        vectors, rank = (matrix.U if side == "left" else matrix.V), matrix.rank
    else:
        vectors, values, shape = _decompose(matrix, side)
        limit = max(*shape, 1) * torch.finfo(values.dtype).eps
        rank = int((values > limit * values[:1]).sum())
    if top is not None and not 1 <= top <= rank:
        raise UpdateError(
            f"{top} singular vectors are asked for; the matrix {tuple(matrix.shape)} has rank {rank}"
        )
    return vectors[:, : rank if top is None else top]


def _decompose(matrix: Tensor | LowRank, side: Side) -> tuple[Tensor, Tensor, torch.Size]:
    """Singular vectors of one side, singular values, and the shape (for the tolerance of the rank)."""
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    if isinstance(matrix, LowRank):
        if len(matrix.shape) != 2:
            raise UpdateError(f"a LowRank of shape {tuple(matrix.shape)} is a batch; give one matrix")
        if not bool(matrix.left.isfinite().all() and matrix.right.isfinite().all()):
            raise UpdateError(f"{matrix} holds NaN or infinity in its factors")
        left, values, right = matrix.to(dtype).svd()
    elif matrix.ndim == 2 and matrix.is_floating_point() and not matrix.numel():
        rows, columns = matrix.shape
        left, right = matrix.new_zeros(rows, 0, dtype=dtype), matrix.new_zeros(0, columns, dtype=dtype)
        values = left.new_zeros(0)
    else:
        check_matrix(matrix, "the matrix")
        left, values, right = torch.linalg.svd(matrix.to(dtype), full_matrices=False)
    return (left if side == "left" else right.mT), values, matrix.shape


def _pair(a: Matrix, b: Matrix, side: Side, tops: tuple[int | None, int | None]) -> tuple[Tensor, Tensor]:
    """Bases of both, checked to lie in one space, in one dtype."""
    p, q = (singular_basis(matrix, side=side, top=top) for matrix, top in zip((a, b), tops, strict=True))
    if len(p) != len(q) or p.device != q.device:
        where = "rows" if side == "left" else "columns"
        raise UpdateError(
            f"matrices of {len(p)} and {len(q)} {where} on {p.device} and {q.device} span no common space"
        )
    dtype = torch.promote_types(p.dtype, q.dtype)
    return p.to(dtype), q.to(dtype)
