"""Exponential and logarithm of symmetric matrices, twice differentiable at repeated eigenvalues too.

For f(A) = Q diag(f(λ)) Qᵀ the first and second derivatives are (Daleckii and Krein)

    Df(A)[E] = Q (f[λᵢ, λⱼ] Êᵢⱼ) Qᵀ,
    D²f(A)[E, F] = Q (Σₖ f[λᵢ, λₖ, λⱼ] (Êᵢₖ F̂ₖⱼ + F̂ᵢₖ Êₖⱼ)) Qᵀ,   Ê = Qᵀ E Q,

with divided differences f[·, ·], f[·, ·, ·] that are smooth where their arguments meet. The second
derivative forms an array of n³ numbers an item. A third derivative raises: the solvers need two.

Sources: Higham, "Functions of Matrices" (2008), theorem 3.11; Daleckii and Krein (1965).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function

from manifolds.errors import ManifoldError
from manifolds.matrix_functions import eigh_finite, sym

TERMS = 12
"""How many terms a series takes where three arguments are close."""
CLOSE = {"exp": 0.5, "log1p": 0.05}
"""Up to which spread (for log1p: relative to 1 + λ) the series is taken, its error being below rounding."""


def expm_symmetric(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The exponential of a symmetric matrix: symmetric positive definite."""
    return _spectral("exp", matrix)


def log1pm_symmetric(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """log(I + A) of a symmetric matrix A, to full relative precision where A is small.

    An eigenvalue of −1 or less gives NaN.
    """
    return _spectral("log1p", matrix)


def logm_spd(matrix: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The logarithm of a symmetric positive definite matrix."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    return log1pm_symmetric(matrix - identity)


def _spectral(name: str, matrix: Tensor) -> Tensor:
    symmetric = sym(matrix)
    values, vectors = eigh_finite(symmetric.detach())
    return _choose(_Value, _ValueForward).apply(symmetric, values, vectors, name)


def _choose(plain: type[Function], forward: type[Function]) -> Any:
    return plain if torch.compiler.is_compiling() else forward


# Divided differences


def _first_difference(name: str, a: Tensor, b: Tensor) -> Tensor:
    """f[a, b], without cancellation at any distance of a and b."""
    if name == "exp":
        return torch.exp((a + b) / 2) * _ratio(torch.sinh, (a - b) / 2)
    total = 2 + a + b
    return 2 / total * _ratio(torch.atanh, (a - b) / total)


def _ratio(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """f(z) / z for an odd function with slope one at zero."""
    zero = z == 0
    safe = torch.where(zero, 1.0, z)
    return torch.where(zero, 1.0, function(safe) / safe)


def _second_difference(name: str, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """f[a, b, c]: first differences over the widest gap, or a series where all three are close."""
    low = torch.minimum(torch.minimum(a, b), c)
    high = torch.maximum(torch.maximum(a, b), c)
    middle = a + b + c - low - high
    centre = (a + b + c) / 3
    unit = torch.ones_like(centre) if name == "exp" else 1 + centre
    gap = (high - low) / unit
    close = gap < CLOSE[name]
    gap = torch.where(close, unit, high - low)
    quotient = (_first_difference(name, high, middle) - _first_difference(name, middle, low)) / gap
    return torch.where(close, _series(name, centre, unit, (low, middle, high)), quotient)


def _series(name: str, centre: Tensor, unit: Tensor, points: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Σₖ f⁽ᵏ⁺²⁾(m) / (k + 2)! hₖ(a − m, b − m, c − m), hₖ the complete homogeneous polynomials."""
    limit = CLOSE[name]
    p, q, r = (((point - centre) / unit).clamp(-limit, limit) for point in points)
    power = torch.ones_like(p)
    two = torch.ones_like(p)
    three = torch.ones_like(p)
    total = _coefficient(name, 2) * three
    for k in range(1, TERMS):
        power = power * p
        two = two * q + power
        three = three * r + two
        total = total + _coefficient(name, k + 2) * three
    return total * torch.exp(centre) if name == "exp" else total / unit**2


def _coefficient(name: str, k: int) -> float:
    """The k-th Taylor coefficient of the function, of log in units of its argument."""
    return 1 / math.factorial(k) if name == "exp" else (-1) ** (k - 1) / k


# Value and derivatives


class _Value(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, values: Tensor, vectors: Tensor, name: str) -> Tensor:
        mapped = torch.exp(values) if name == "exp" else torch.log1p(values)
        return sym(vectors @ (mapped.unsqueeze(-1) * vectors.mT))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.save_for_forward(*inputs[:3])
        ctx.name = inputs[3]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        matrix, values, vectors = ctx.saved_tensors
        return _first(matrix, values, vectors, ctx.name, gradient), None, None, None


class _ValueForward(_Value):
    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor, *unused: Any) -> Tensor:
        matrix, values, vectors = ctx.saved_tensors
        return _first(matrix, values, vectors, ctx.name, d_matrix)


def _first(matrix: Tensor, values: Tensor, vectors: Tensor, name: str, change: Tensor) -> Tensor:
    return _choose(_First, _FirstForward).apply(matrix, sym(change), values, vectors, name)


class _First(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, change: Tensor, values: Tensor, vectors: Tensor, name: str) -> Tensor:
        differences = _first_difference(name, values.unsqueeze(-1), values.unsqueeze(-2))
        return sym(vectors @ (differences * (vectors.mT @ change @ vectors)) @ vectors.mT)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.save_for_forward(*inputs[:4])
        ctx.name = inputs[4]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        matrix, change, values, vectors = ctx.saved_tensors
        of_matrix = _second(matrix, change, gradient, values, vectors, ctx.name)
        return of_matrix, _first(matrix, values, vectors, ctx.name, gradient), None, None, None


class _FirstForward(_First):
    @staticmethod
    def jvp(ctx: Any, d_matrix: Tensor | None, d_change: Tensor | None, *unused: Any) -> Tensor:
        matrix, change, values, vectors = ctx.saved_tensors
        found = torch.zeros_like(change)
        if d_change is not None:
            found = found + _first(matrix, values, vectors, ctx.name, d_change)
        if d_matrix is not None:
            found = found + _second(matrix, change, d_matrix, values, vectors, ctx.name)
        return found


def _second(matrix: Tensor, one: Tensor, other: Tensor, values: Tensor, vectors: Tensor, name: str) -> Tensor:
    return _choose(_Second, _SecondForward).apply(matrix, sym(one), sym(other), values, vectors, name)


class _Second(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        matrix: Tensor, one: Tensor, other: Tensor, values: Tensor, vectors: Tensor, name: str
    ) -> Tensor:
        i, k, j = values[..., :, None, None], values[..., None, :, None], values[..., None, None, :]
        differences = _second_difference(name, *torch.broadcast_tensors(i, k, j))
        e, f = (vectors.mT @ each @ vectors for each in (one, other))
        inner = torch.einsum("...ikj,...ik,...kj->...ij", differences, e, f)
        return vectors @ (inner + inner.mT) @ vectors.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:5])
        ctx.save_for_forward(*inputs[:5])
        ctx.name = inputs[5]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:
            return (None,) * 6
        if ctx.needs_input_grad[0]:
            raise ManifoldError(_THIRD)
        matrix, one, other, values, vectors = ctx.saved_tensors
        of_one = _second(matrix, other, gradient, values, vectors, ctx.name)
        of_other = _second(matrix, one, gradient, values, vectors, ctx.name)
        return None, of_one, of_other, None, None, None


class _SecondForward(_Second):
    @staticmethod
    def jvp(ctx: Any, d_matrix: Any, d_one: Any, d_other: Any, *unused: Any) -> Any:
        if d_matrix is not None:
            raise ManifoldError(_THIRD)
        matrix, one, other, values, vectors = ctx.saved_tensors
        found = torch.zeros_like(one)
        if d_one is not None:
            found = found + _second(matrix, other, sym(d_one), values, vectors, ctx.name)
        if d_other is not None:
            found = found + _second(matrix, one, sym(d_other), values, vectors, ctx.name)
        return found


_THIRD = (
    "exponential and logarithm of symmetric matrices have two derivatives here, and a third was asked for; "
    "take it by finite differences of the second"
)
