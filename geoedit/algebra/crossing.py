"""What one slider writes, joined to what another reads."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args, overload

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.algebra.composition import one_name
from geoedit.algebra.terms import (
    as_edit_errors,
    check_rank,
    common_names,
    read_terms,
    rebuilt,
)
from geoedit.errors import EditError
from geoedit.sliders.slider import Scaled, Slider
from manifolds import LowRank
from peft_analysis.updates import WeightUpdate

Gauge = Literal["nearest", "spectrum"]


@overload
def cross(
    a: Slider | Scaled, b: Slider | Scaled, *, gauge: Gauge = ..., rank: int | None = ...
) -> Slider: ...
@overload
def cross(
    a: WeightUpdate, b: WeightUpdate, *, gauge: Gauge = ..., rank: int | None = ...
) -> WeightUpdate: ...
def cross(a: Any, b: Any, *, gauge: str = "nearest", rank: int | None = None) -> Slider | WeightUpdate:
    r"""The left factors of one slider with the right factors of another: writes as a, where b looks.

    A change \(\Delta = L R\) has many factors, \(L Q\) and \(Q^{-1} R\) for every invertible Q, and a product
    of factors of two changes depends on the choice. Here both are balanced, \(L = U \Sigma^{1/2}\) and
    \(R = \Sigma^{1/2} V^\top\), which leaves an orthogonal Q, and the gauge chooses it:

    - "nearest": b's factors are turned onto a's. Q minimises \(\|L_a Q - L_b\|^2 + \|Q^\top R_a - R_b\|^2\),
      the distance of both on the manifold of matrices of one rank by their balanced factors: the polar factor
      of \(L_a^\top L_b + R_a R_b^\top\). The result is \(L_a Q R_b\).
    - "spectrum": the i-th singular direction of a goes with the i-th of b, with the sign that "nearest" would
      give to this pair alone.

    Both depend on the matrices alone, not on how they are stored, and `cross(a, a)` is a. A scale multiplies:
    ``cross(a @ s, b @ t)`` is ``cross(a, b)`` times sign(f g) √|f g| with the factors f and g of s and t.
    Of modules that only one of them changes nothing is left.

    Args:
        a: gives the left factors: what is written.
        b: gives the right factors: what is read.
        gauge: one of those above.
        rank: to which both are cut first; of unequal ranks the result has the smaller one.

    Raises:
        EditError: operands of other bases, with no module in common, whose values are not finite; a gauge
            that is not defined, because the overlap of both has lost rank or singular values coincide.

    Source: for the distance by balanced factors Massart and Absil, "Quotient geometry with simple geodesics
    for the manifold of fixed-rank positive-semidefinite matrices" (2020).

    >>> import torch
    >>> from geoedit.sliders import ModuleChange
    >>> def slider(name, left, right):
    ...     return Slider(name, {"unet": {"to_q": ModuleChange(LowRank(left, right))}})
    >>> a = slider("age", torch.tensor([[4.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    >>> b = slider("smile", torch.tensor([[3.0], [4.0]]), torch.tensor([[0.0, 0.2]]))
    >>> joined = cross(a, b).changes["unet"]["to_q"].matrix.dense()  # writes the first row, reads the second
    >>> joined[0, 1] == joined.abs().max(), round(joined.norm().item(), 4)
    (tensor(True), 2.0)
    """
    if gauge not in get_args(Gauge):
        raise EditError(f"cross: no gauge is called {gauge!r}; there are {', '.join(get_args(Gauge))}")
    check_rank(rank, "cross")
    one, other = read_terms([a, b], "cross")
    names = [name for name in common_names([one, other], "cross") if len(one.update.entries[name].shape) >= 2]
    if not names:
        raise EditError("cross: the operands have only vectors in common, which have no factors")
    factor = one.factor * other.factor
    size = math.copysign(math.sqrt(abs(factor)), factor)
    values: dict[str, LowRank | Tensor] = {}
    for name in names:
        with as_edit_errors(f"cross: {name}"):
            joined = crossed(one.matrix(name), other.matrix(name), gauge=gauge, rank=rank, where=name) * size
        values[name] = joined.mT if one.update.entries[name].layout == "in_out" else joined
    called = f"{one_name(one)} × {one_name(other)}"
    details = {"method": f"cross: {gauge}", **({} if rank is None else {"rank": rank})}
    return rebuilt([one, other], values, called, details)  # type: ignore[return-value]


def crossed(
    a: LowRank, b: LowRank, *, gauge: str = "nearest", rank: int | None = None, where: str = "the module"
) -> LowRank:
    """The left factors of one matrix with the right factors of another; see `cross`.

    Raises:
        EditError: shapes that differ, or a gauge that is not defined.
    """
    if a.shape != b.shape:
        raise EditError(
            f"{where}: matrices of shapes {tuple(a.shape)} and {tuple(b.shape)} cannot be crossed"
        )
    dtype = torch.promote_types(a.dtype, b.dtype)
    digits = 16 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    (left_a, right_a), (left_b, right_b) = (balanced(matrix, rank) for matrix in (a, b))
    if not left_a.shape[-1] or not left_b.shape[-1]:
        return LowRank.zeros(*a.shape, dtype=dtype, device=a.device)
    if gauge == "spectrum":
        width = min(left_a.shape[-1], left_b.shape[-1])
        left_a, right_a, left_b, right_b = (
            left_a[:, :width],
            right_a[:width],
            left_b[:, :width],
            right_b[:width],
        )
        _check_apart(left_a.norm(dim=0), digits, "the first", where)
        _check_apart(left_b.norm(dim=0), digits, "the second", where)
        signs = (left_a * left_b).sum(0) + (right_a * right_b).sum(-1)
        _check_known(signs.abs(), left_a.norm(dim=0) * left_b.norm(dim=0), where)
        return LowRank(left_a * signs.sign(), right_b).to(dtype)
    overlap = left_a.mT @ left_b + right_a @ right_b.mT
    u, values, v = torch.linalg.svd(overlap, full_matrices=False)
    # The least component of either is what a direction of the overlap can be about.
    _check_known(values, left_a.norm(dim=0).min() * left_b.norm(dim=0).min(), where)
    return LowRank(left_a @ (u @ v), right_b).to(dtype)


def balanced(matrix: LowRank, rank: int | None = None) -> tuple[Float[Tensor, "m r"], Float[Tensor, "r n"]]:
    """U √Σ and √Σ Vᵀ in float64, of the numerical rank or a smaller one."""
    kept = int(matrix.numerical_rank())
    kept = kept if rank is None else min(kept, rank)
    left, values, right = matrix.to(torch.float64).svd()
    root = values[:kept].sqrt()
    return left[:, :kept] * root, root[:, None] * right[:kept]


def _check_known(overlaps: Float[Tensor, " r"], scale: Tensor, where: str) -> None:
    """Refuse a gauge that rounding would choose; the factors count as exact, the arithmetic is float64's."""
    least = float((overlaps / scale).min())
    if not least > max(overlaps.shape[-1], 16) * torch.finfo(overlaps.dtype).eps:
        raise EditError(
            f"{where}: the factors of both do not overlap in some direction (least overlap {least:.1g}), so "
            "that nothing says how to turn one onto the other; cut both to a lower rank: rank="
        )


def _check_apart(values: Float[Tensor, " r"], digits: float, whose: str, where: str) -> None:
    """Refuse singular values that coincide, whose order means nothing."""
    gaps = values[:-1] - values[1:]
    if len(gaps) and not bool(gaps.min() > digits * values[0]):
        raise EditError(
            f"{where}: {whose} has singular values that coincide, so that their order means nothing; use "
            'gauge="nearest"'
        )
