"""The nearest matrix of a rank to one in factors, fast: by Gram matrices in twice the digits."""

import torch

from manifolds import LowRank

HALF_OF_THE_DIGITS = torch.finfo(torch.float64).eps ** 0.5


def nearest(whole: LowRank, rank: int) -> LowRank | None:
    """The nearest matrix of a rank, with √σ in either factor; None where the factors are not finite.

    As `LowRank.truncate`, without derivatives. Formula: with the Cholesky factors LᵀL = C Cᵀ and R Rᵀ = D Dᵀ
    (the triangles of the QR factors) and the small decomposition Cᵀ D = U S Vᵀ, the singular values of L R
    are S, and its leading part is (L D V S^(−½)) (S^(−½) Uᵀ Cᵀ R).

    Gram matrices square the condition, so that float32 factors are multiplied in float64, half of whose
    digits are still more than float32 has. Factors in float64, those that have lost rank, and values below
    half of the digits go through QR.
    """
    if rank >= whole.rank or whole.dtype == torch.float64 or whole.ndim != 2:
        finite = bool(whole.left.isfinite().all() and whole.right.isfinite().all())
        return whole.truncate(rank) if finite else None
    left, right = whole.left.double(), whole.right.double()
    left_gram, right_gram = left.mT @ left, right @ right.mT
    if not bool((left_gram.trace() + right_gram.trace()).isfinite()):
        return None
    (C, lost), (D, gone) = torch.linalg.cholesky_ex(left_gram), torch.linalg.cholesky_ex(right_gram)
    if bool(lost + gone):
        return whole.truncate(rank)
    U, values, Vh = torch.linalg.svd(C.mT @ D)
    kept = values[:rank]
    if not bool(kept[-1] > HALF_OF_THE_DIGITS * values[0]):
        return whole.truncate(rank)
    dtype = torch.promote_types(whole.dtype, torch.float32)
    root = kept.sqrt()
    of_left, of_right = (D @ Vh[:rank].mT / root).to(dtype), (C @ U[:, :rank] / root).mT.to(dtype)
    return LowRank(whole.left.to(dtype) @ of_left, of_right @ whole.right.to(dtype)).to(whole.dtype)
