"""Functions of small matrices whose derivatives hold at repeated eigenvalues and singular values.

`torch.linalg.eigh` and `torch.linalg.svd` divide by gaps of the spectrum in their backward pass, so that a
square root or a polar factor written with them has the derivative NaN where two eigenvalues meet, although
the function itself is smooth there. The functions here get their values from these decompositions and their
derivatives from Sylvester equations, which have no gaps. They are differentiable to every order, in forward
and reverse mode, under `vmap` and `torch.compile`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function


def sym(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The symmetric part, (A + Aᵀ) / 2."""
    return (matrix + matrix.mT) / 2


def skew(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The skew-symmetric part, (A − Aᵀ) / 2."""
    return (matrix - matrix.mT) / 2


def solve_sylvester(
    positive: Float[Tensor, "*#batch n n"], right: Float[Tensor, "*#batch n n"]
) -> Float[Tensor, "*batch n n"]:
    """X with H X + X H = C for a symmetric H whose eigenvalues sum to more than zero in every pair.

    Formula: with H = Q diag(λ) Qᵀ, X = Q [(Qᵀ C Q)ᵢⱼ / (λᵢ + λⱼ)] Qᵀ.
    """
    shape = torch.broadcast_shapes(positive.shape, right.shape)
    return _choose(_Sylvester, _SylvesterForward).apply(positive.expand(shape), right.expand(shape))


def sqrtm_spd(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The symmetric square root of a symmetric positive definite matrix.

    Formula: A = Q diag(λ) Qᵀ gives A^½ = Q diag(λ^½) Qᵀ; its derivative solves Y dY + dY Y = dA.
    A matrix with a negative eigenvalue gives NaN.
    """
    return _choose(_SquareRoot, _SquareRootForward).apply(sym(matrix))


def inverse_sqrtm_spd(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The inverse of the symmetric square root of a symmetric positive definite matrix."""
    return torch.linalg.inv_ex(sqrtm_spd(matrix))[0]


def polar(matrix: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
    """The orthonormal polar factor Y of X = Y H (m ≥ n, full column rank): the nearest orthonormal matrix.

    Formula: X = U Σ Vᵀ gives Y = U Vᵀ and H = V Σ Vᵀ. Its derivative is
    dY = Y Ω + (I − Y Yᵀ) dX H⁻¹ with H Ω + Ω H = Yᵀ dX − dXᵀ Y.
    """
    return _choose(_Polar, _PolarForward).apply(matrix)


def nearest_rotation(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The rotation (determinant +1) nearest to a square matrix X in the Frobenius norm.

    Formula: X = U Σ Vᵀ with decreasing σ gives R = U diag(1, …, 1, det(U Vᵀ)) Vᵀ. Its derivative is R Ω,
        where the
    symmetric H = Rᵀ X gives H Ω + Ω H = Rᵀ dX − dXᵀ R. Where det X ≤ 0 and σₙ₋₁ = σₙ several rotations are
    nearest: one is returned, and the derivative is not finite; nor is it at det X = 0.

    Source: Kabsch, "A solution for the best rotation to relate two sets of vectors" (1976).
    """
    return _choose(_Rotation, _RotationForward).apply(matrix)


def eigh_finite(
    matrix: Float[Tensor, "*batch n n"],
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch n n"]]:
    """Increasing eigenvalues, and eigenvectors, of symmetric matrices; NaN for values where not finite."""
    finite = matrix.isfinite().all(-1).all(-1).unsqueeze(-1)
    values, vectors = torch.linalg.eigh(torch.where(finite.unsqueeze(-1), matrix, 0.0))
    return torch.where(finite, values, torch.nan), vectors


def exponential(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The matrix exponential, to rounding for one matrix as for many.

    torch 2.13's `matrix_exp` takes another path for a single matrix, with Taylor polynomials of too low a
    degree: it is off by up to 2e-10 in float64 and 3e-5 in float32, in its derivatives, too. Two copies take
    the good one.
    """
    if matrix.shape[:-2].numel() != 1:
        return torch.linalg.matrix_exp(matrix)
    flat = matrix.reshape(1, *matrix.shape[-2:])
    return torch.linalg.matrix_exp(torch.cat([flat, flat.detach()]))[:1].reshape(matrix.shape)


@contextmanager
def forward_rule(ctx: Any) -> Iterator[tuple[Tensor, ...]]:
    """The saved tensors of an autograd function, for the body of its `jvp`: a `jvp` around it is then right.

    torch 2.13 runs the rule with forward mode switched off at every level, so that `jvp` of `jvp` comes out
    wrong without a word. Here it is switched on again, and the tangent of the innermost level, which the rule
    itself is about, is taken off what was saved.
    """
    with torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        yield tuple(torch.autograd.forward_ad.unpack_dual(saved, level=0)[0] for saved in ctx.saved_tensors)


def _choose(plain: type[Function], forward: type[Function]) -> Any:
    """The variant with a forward-mode rule; where `torch.compile` traces, which takes none, the other."""
    return plain if torch.compiler.is_compiling() else forward


def mapped_first(info: Any, in_dims: tuple[Any, ...], *tensors: Tensor) -> list[Tensor]:
    """The tensors of an autograd function's `vmap`, the mapped dimension first, made where there is none."""
    found = []
    for dim, tensor in zip(in_dims, tensors, strict=True):
        found.append(tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0))
    return found


class _Sylvester(Function):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], positive: Tensor, right: Tensor) -> tuple[Tensor, int]:
        return solve_sylvester(*mapped_first(info, in_dims, positive, right)), 0

    @staticmethod
    def forward(positive: Tensor, right: Tensor) -> Tensor:
        values, vectors = eigh_finite(positive)
        inner = vectors.mT @ right @ vectors
        return vectors @ (inner / (values.unsqueeze(-1) + values.unsqueeze(-2))) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        positive, solution = ctx.saved_tensors
        of_right = solve_sylvester(positive, gradient)
        return -(of_right @ solution.mT + solution.mT @ of_right), of_right


class _SylvesterForward(_Sylvester):
    @staticmethod
    def jvp(ctx: Any, d_positive: Tensor, d_right: Tensor) -> Tensor:
        with forward_rule(ctx) as (positive, solution):
            return solve_sylvester(positive, d_right - d_positive @ solution - solution @ d_positive)


class _SquareRoot(Function):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], matrix: Tensor) -> tuple[Tensor, int]:
        return sqrtm_spd(*mapped_first(info, in_dims, matrix)), 0

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        values, vectors = eigh_finite(matrix)
        return vectors @ (values.sqrt().unsqueeze(-1) * vectors.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return solve_sylvester(sym(root), gradient)


class _SquareRootForward(_SquareRoot):
    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor) -> Tensor:
        with forward_rule(ctx) as (root,):
            return solve_sylvester(sym(root), d_matrix)


class _Polar(Function):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], matrix: Tensor) -> tuple[Tensor, int]:
        return polar(*mapped_first(info, in_dims, matrix)), 0

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
        left, _, right = torch.linalg.svd(torch.where(finite, matrix, 0.0), full_matrices=False)
        return torch.where(finite, left @ right, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        matrix, factor = ctx.saved_tensors
        return _polar_derivative(matrix, factor, gradient)


class _PolarForward(_Polar):
    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor) -> Tensor:
        with forward_rule(ctx) as (matrix, factor):
            return _polar_derivative(matrix, factor, d_matrix)


def _polar_derivative(matrix: Tensor, factor: Tensor, change: Tensor) -> Tensor:
    """The derivative of the polar factor. It is self-adjoint, so that it serves both modes."""
    stretch = sym(factor.mT @ matrix)
    inner = factor.mT @ change
    outside = change - factor @ inner
    turn = solve_sylvester(stretch, inner - inner.mT)
    return factor @ turn + torch.linalg.solve_ex(stretch, outside, left=False)[0]


class _Rotation(Function):
    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], matrix: Tensor) -> tuple[Tensor, int]:
        return nearest_rotation(*mapped_first(info, in_dims, matrix)), 0

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        finite = matrix.isfinite().all(-1).all(-1)[..., None, None]
        left, _, right = torch.linalg.svd(torch.where(finite, matrix, 0.0))
        sign = torch.linalg.det(left @ right).sign()[..., None, None]
        last = torch.arange(matrix.shape[-1], device=matrix.device) == matrix.shape[-1] - 1
        return torch.where(finite, (left * torch.where(last, sign, 1.0)) @ right, torch.nan)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        matrix, rotation = ctx.saved_tensors
        return _turn(matrix, rotation, gradient)


class _RotationForward(_Rotation):
    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor) -> Tensor:
        with forward_rule(ctx) as (matrix, rotation):
            return _turn(matrix, rotation, d_matrix)


def _turn(matrix: Tensor, rotation: Tensor, change: Tensor) -> Tensor:
    """The derivative of the nearest rotation; self-adjoint, so that it serves both modes."""
    inner = rotation.mT @ change
    return rotation @ solve_sylvester(sym(rotation.mT @ matrix), inner - inner.mT)
