"""Spectra of a product of two thin factors, with derivatives that do not pass through a decomposition.

The derivative of a QR factorisation fails where the factor loses rank, and that of a singular value
decomposition where singular values meet, although the norm, the sum of the singular values or the best
approximation of lower rank are smooth there. The functions here take values from detached decompositions
and attach derivatives of first and second order by products of matrices.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function


def thin_svd(
    left: Float[Tensor, "*#batch m k"], right: Float[Tensor, "*#batch n k"]
) -> tuple[Float[Tensor, "*batch m p"], Float[Tensor, "*batch p"], Float[Tensor, "*batch n p"]]:
    """The thin singular value decomposition U, σ, V of left rightᵀ, with p = min(m, n, k).

    Formula: left = Q₁ R₁, right = Q₂ R₂ and R₁ R₂ᵀ = U' diag(σ) V'ᵀ give U = Q₁ U', V = Q₂ V'.
    """
    left_basis, left_core = torch.linalg.qr(left)
    right_basis, right_core = torch.linalg.qr(right)
    inner_left, values, inner_right = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    return left_basis @ inner_left, values, right_basis @ inner_right.mT


def core(factor: Float[Tensor, "*batch m k"]) -> Float[Tensor, "*batch p k"]:
    """A matrix C of min(m, k) rows with CᵀC = FᵀF, differentiable twice also where F has lost rank.

    Formula: with a frozen orthonormal basis Q of the columns, A = Qᵀ F and Z = F − Q A (zero in value),
    C = A + ½ A⁺ᵀ ZᵀZ.
    """
    if factor.shape[-2] <= factor.shape[-1]:
        return factor
    basis = _choose(_FrozenBasis, _FrozenBasisForward)(factor)
    inside = basis.mT @ factor
    outside = factor - basis @ inside
    return inside + _choose(_FrozenInverse, _FrozenInverseForward)(inside).mT @ (outside.mT @ outside) / 2


def product_norm(
    left: Float[Tensor, "*#batch m k"], right: Float[Tensor, "*#batch n k"]
) -> Float[Tensor, "*batch"]:
    """‖left rightᵀ‖, the Frobenius norm. Its derivative at zero is zero.

    The value comes from the QR factors, because the trace of the product of Gram matrices loses half of the
    digits where terms cancel; the derivative comes from that trace q = tr(leftᵀ left rightᵀ right), as ‖·‖
    = √q.
    """
    left_scale, right_scale = (_entry_scale(factor) for factor in (left, right))
    left, right = left / left_scale, right / right_scale
    product = _choose(_FrozenProduct, _FrozenProductForward)(left, right)
    scale = product.abs().amax((-2, -1), keepdim=True) if product.numel() else product.sum((-2, -1), True)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    size = (product / scale).square().sum((-2, -1)).sqrt() * scale[..., 0, 0]
    squared = ((left.mT @ left) * (right.mT @ right)).sum((-2, -1))
    nonzero = size != 0
    safe = torch.where(nonzero, size, 1.0)
    change = torch.where(nonzero, (squared - frozen(squared)) / safe / safe, 0.0)
    return size * (1 + change).sqrt() * left_scale[..., 0, 0] * right_scale[..., 0, 0]


def _entry_scale(factor: Float[Tensor, "*batch m k"]) -> Float[Tensor, "*batch 1 1"]:
    """The largest entry of each matrix, frozen, or one: for squares that neither overflow nor vanish."""
    largest = frozen(factor).abs()
    largest = largest.amax((-2, -1), keepdim=True) if factor.shape[-1] else largest.sum((-2, -1), True)
    return torch.where((largest > 0) & largest.isfinite(), largest, 1.0)


def nearest_of_rank(
    left: Float[Tensor, "*#batch m k"], right: Float[Tensor, "*#batch n k"], rank: int
) -> tuple[Float[Tensor, "*batch m r"], Float[Tensor, "*batch n r"]]:
    """The matrix of a rank nearest to X = left rightᵀ, as factors L Rᵀ with LᵀL = RᵀR = diag(σ).

    Derivatives of first and second order of L Rᵀ are exact where the singular values at the cut differ,
    however the others coincide; those of L and R alone depend on the choice of their bases. Two steps of
    Newton's method for X R = L RᵀR and XᵀL = R LᵀL, with the inverse Jacobian frozen at the solution, carry
    them: along a kept pair (uᵢ, vᵢ) and a cut pair (uⱼ, vⱼ) the step is (σᵢ eₗ + σⱼ eᵣ) / (σᵢ² − σⱼ²).
    """
    u, values, v = _choose(_FrozenSVD, _FrozenSVDForward)(left, right)
    kept, cut = values[..., None, :rank], values[..., rank:, None]
    frames = u[..., :rank], v[..., :rank], u[..., rank:], v[..., rank:]
    root = kept.sqrt()
    safe = torch.where(kept > 0, kept, 1.0)
    gap = kept**2 - cut**2
    inverse_gap = torch.where(gap > 0, 1 / torch.where(gap > 0, gap, 1.0), 0.0)
    found_left, found_right = frames[0] * root, frames[1] * root
    for _ in range(2):
        error_left = left @ (right.mT @ found_right) - found_left @ (found_right.mT @ found_right)
        error_right = right @ (left.mT @ found_left) - found_right @ (found_left.mT @ found_left)
        error_left, error_right = error_left - frozen(error_left), error_right - frozen(error_right)
        cut_left, cut_right = frames[2].mT @ error_left, frames[3].mT @ error_right
        step_left = error_left - frames[0] @ (frames[0].mT @ error_left) / 2
        step_right = error_right - frames[1] @ (frames[1].mT @ error_right) / 2
        found_left = found_left + (step_left - frames[2] @ cut_left) / safe
        found_right = found_right + (step_right - frames[3] @ cut_right) / safe
        found_left = found_left + frames[2] @ ((kept * cut_left + cut * cut_right) * inverse_gap)
        found_right = found_right + frames[3] @ ((kept * cut_right + cut * cut_left) * inverse_gap)
    return found_left, found_right


def frozen(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The value with derivative zero at every level of `torch.func`; `detach` cuts only the innermost."""
    found: Tensor = _choose(_Frozen, _FrozenForward)(value)
    return found


def _choose(plain: type[Function], forward: type[Function]) -> Any:
    """The variant with a forward-mode rule, or the one without it where `torch.compile` traces."""
    return plain.apply if torch.compiler.is_compiling() else forward.apply


class _Frozen(Function):
    """A function whose derivatives are all zero; subclasses give the function."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor) -> Any:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.single = not isinstance(output, tuple)
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        zeros = tuple(torch.zeros_like(value) for value in ctx.saved_tensors)
        return zeros[0] if len(zeros) == 1 else zeros


class _FrozenForward(_Frozen):
    @staticmethod
    def jvp(ctx: Any, *changes: Tensor) -> Any:
        zeros = tuple(torch.zeros_like(value) for value in ctx.saved_tensors)
        return zeros[0] if ctx.single else zeros


class _FrozenBasis(_Frozen):
    @staticmethod
    def forward(factor: Tensor) -> Tensor:
        return torch.linalg.qr(factor)[0]


class _FrozenBasisForward(_FrozenBasis, _FrozenForward):
    pass


class _FrozenInverse(_Frozen):
    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        return torch.linalg.pinv(matrix)


class _FrozenInverseForward(_FrozenInverse, _FrozenForward):
    pass


class _FrozenProduct(_Frozen):
    @staticmethod
    def forward(left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return torch.linalg.qr(left, mode="r")[1] @ torch.linalg.qr(right, mode="r")[1].mT


class _FrozenProductForward(_FrozenProduct, _FrozenForward):
    pass


class _FrozenSVD(_Frozen):
    @staticmethod
    def forward(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        return thin_svd(left, right)


class _FrozenSVDForward(_FrozenSVD, _FrozenForward):
    pass
