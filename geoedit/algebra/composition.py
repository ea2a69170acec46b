"""Sums of sliders and weight updates: exact, of a lower rank, or of parts out of each other's way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, overload

from torch import Tensor

from geoedit.algebra.orthogonal import orthogonalised
from geoedit.algebra.terms import Term, as_edit_errors, check_rank, read_terms, rebuilt
from geoedit.errors import EditError
from geoedit.sliders.slider import Scaled, Slider
from manifolds import LowRank
from peft_analysis.merging import merge
from peft_analysis.updates import WeightUpdate

Method = Literal["exact", "truncate", "orthogonalise"]


@overload
def compose(
    operands: Sequence[Slider | Scaled],
    *,
    method: Method = ...,
    rank: int | None = ...,
    name: str | None = ...,
) -> Slider: ...
@overload
def compose(
    operands: Sequence[WeightUpdate], *, method: Method = ..., rank: int | None = ..., name: str | None = ...
) -> WeightUpdate: ...
def compose(
    operands: Any,
    *,
    method: str = "exact",
    rank: int | None = None,
    name: str | None = None,
) -> Slider | WeightUpdate:
    r"""One slider out of several: ``compose([age @ 1.5, smile @ -0.7])``.

    With the changes \(\Delta_i\) at factor 1 and the factors \(c_i\) (`Slider.factor` of the scales):

    - "exact": \(\sum c_i \Delta_i\), factors side by side; the stored rank is the sum of theirs. It acts as
      all of them together do.
    - "truncate": the matrix of one rank nearest to that sum, module by module (Eckart and Young), from the
      factors; the sum is never multiplied out.
    - "orthogonalise": \(\sum c_i \tilde\Delta_i\), where the \(\tilde\Delta_i\) have the singular values of
      the \(\Delta_i\) and column and row spaces that are orthogonal to each other's, wherever they fit; see
      `geoedit.algebra.orthogonal.orthogonalised`. Linear in the factors.

    A module that only some of them change is composed from those. The result at scale 1 is the sum; it has no
    calibration of its own, because each term's units went into the sum.

    Args:
        operands: sliders, sliders at a scale, or weight updates; all of one kind and base.
        method: one of those above.
        rank: for "truncate" that of every module, the largest stored rank among its terms if not given; for
            "orthogonalise" the rank that each term is cut to first.
        name: of the result; the terms joined by + if not given.

    Raises:
        EditError: no operand, operands of other bases or shapes, a scale or values that are not finite, an
            option that the method has not, terms that cannot be orthogonalised.

    Source: Hu et al., "LoRA" (2021); Gargiulo et al., "Task singular vectors" (2025).

    >>> import torch
    >>> from geoedit.sliders import ModuleChange
    >>> def slider(name, column):
    ...     matrix = LowRank(torch.eye(3)[:, [column]], torch.tensor([[1.0, 2.0]]))
    ...     return Slider(name, {"unet": {"to_q": ModuleChange(matrix)}})
    >>> both = compose([slider("age", 0) @ 1.5, slider("smile", 2) @ -1])
    >>> both.name, both.changes["unet"]["to_q"].matrix.dense()
    ('age @ 1.5 + smile @ -1', tensor([[ 1.5000,  3.0000],
            [ 0.0000,  0.0000],
            [-1.0000, -2.0000]]))
    """
    if method not in get_args(Method):
        raise EditError(f"compose: no method is called {method!r}; there are {', '.join(get_args(Method))}")
    check_rank(rank, "compose")
    if method == "exact" and rank is not None:
        raise EditError('compose: an exact sum has the rank that it has; use method="truncate" with rank=')
    terms = read_terms(operands, "compose")
    called = name or " + ".join(term.said() if term.slider is not None else term.name for term in terms)
    if method == "orthogonalise":
        values = _orthogonalised(terms, rank)
    else:
        values = _merged(terms, "exact" if method == "exact" else "svd", rank)
    return rebuilt(terms, values, called, {"method": f"compose: {method}", **_known(rank)})  # type: ignore[return-value]


@overload
def difference(one: Slider | Scaled, other: Slider | Scaled) -> Slider: ...
@overload
def difference(one: WeightUpdate, other: WeightUpdate) -> WeightUpdate: ...
def difference(one: Any, other: Any) -> Slider | WeightUpdate:
    """What one slider changes and the other does not: one − other, exact.

    Raises:
        EditError: as `compose`.
    """
    terms = read_terms([one, other], "difference")
    minus = [
        terms[0],
        Term(terms[1].name, terms[1].update, -terms[1].factor, terms[1].slider, -terms[1].scale),
    ]
    values = _merged(minus, "exact", None)
    return rebuilt(minus, values, f"{one_name(terms[0])} − {one_name(terms[1])}", {"method": "difference"})  # type: ignore[return-value]


@overload
def inverse(operand: Slider | Scaled) -> Slider: ...
@overload
def inverse(operand: WeightUpdate) -> WeightUpdate: ...
def inverse(operand: Any) -> Slider | WeightUpdate:
    """What undoes a slider or an update: composed with it, the sum is zero but for rounding.

    Raises:
        EditError: the operand is none, or its scale is not finite.
    """
    term = Term.of(operand)
    if term.slider is None:
        return -term.update
    values = {name: _low(term.update[name]) * -term.factor for name in term.update}
    undone = Term(term.name, term.update, -term.factor, term.slider, -term.scale)
    return rebuilt([undone], values, f"−({one_name(term)})", {"method": "inverse"})  # type: ignore[return-value]


@overload
def average(
    operands: Sequence[Slider | Scaled],
    weights: Sequence[float | int] | None = ...,
    *,
    method: Literal["karcher", "arithmetic"] = ...,
    rank: int | None = ...,
) -> Slider: ...
@overload
def average(
    operands: Sequence[WeightUpdate],
    weights: Sequence[float | int] | None = ...,
    *,
    method: Literal["karcher", "arithmetic"] = ...,
    rank: int | None = ...,
) -> WeightUpdate: ...
def average(
    operands: Any,
    weights: Sequence[float | int] | None = None,
    *,
    method: str = "karcher",
    rank: int | None = None,
) -> Slider | WeightUpdate:
    """The mean of sliders or updates, module by module.

    Args:
        operands: of one kind and base; a slider at a scale counts with its changes at that scale.
        weights: positive; only their ratios count. Equal ones if not given.
        method: "karcher" is the mean along the manifold of matrices of one rank
            (`peft_analysis.karcher_mean`), which is found for sliders near to each other: the same slider
            trained on, or from one start. "arithmetic" is Σ wᵢ Δᵢ / Σ wᵢ, exact, or cut to `rank`.
        rank: "karcher": every part is cut to it first. "arithmetic": of the result.

    Raises:
        EditError: no operand; weights that do not fit; a mean that is not found, with the reason.

    Source: Karcher, "Riemannian center of mass and mollifier smoothing" (1977).
    """
    if method not in ("karcher", "arithmetic"):
        raise EditError(f"average: no method is called {method!r}; there are karcher and arithmetic")
    check_rank(rank, "average")
    terms = read_terms(operands, "average")
    shares = [1.0] * len(terms) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(terms) or not all(0 < share < float("inf") for share in shares):
        raise EditError(f"average: weights {shares} for {len(terms)} operands; give a positive one for each")
    points = [term.update * term.factor for term in terms]
    whole = sum(shares)
    shares = [share / whole for share in shares]
    with as_edit_errors("average"):
        if method == "karcher":
            found = merge(points, shares, method="karcher", rank=rank)
        else:
            found = merge(points, shares, method="exact" if rank is None else "svd", rank=rank)
        values = {name: found[name] for name in found}
    called = f"mean of {', '.join(one_name(term) for term in terms)}"
    return rebuilt(terms, values, called, {"method": f"average: {method}", "weights": shares, **_known(rank)})  # type: ignore[return-value]


def one_name(term: Term) -> str:
    """The operand's name, with its scale where that is not 1."""
    return term.name if term.slider is None or term.scale == 1 else term.said()


def _merged(
    terms: Sequence[Term], method: Literal["exact", "svd"], rank: int | None
) -> dict[str, LowRank | Tensor]:
    """The weighted sum by name; where every factor is zero, the first change that is there, times zero."""
    with as_edit_errors("compose"):
        found = merge(
            [term.update for term in terms], [term.factor for term in terms], method=method, rank=rank
        )
        values = {name: found[name] for name in found}
    for name, value in values.items():
        if isinstance(value, LowRank) and value.rank == 0:
            first = next(term for term in terms if name in term.update)
            values[name] = _low(first.update[name]) * 0.0
    return values


def _orthogonalised(terms: Sequence[Term], rank: int | None) -> dict[str, LowRank | Tensor]:
    values: dict[str, LowRank | Tensor] = {}
    for name in dict.fromkeys(name for term in terms for name in term.update):
        having = [term for term in terms if name in term.update]
        if len(having[0].update.entries[name].shape) < 2:
            biases = [term.update.dense(name) * term.factor for term in having]  # which have no spaces
            values[name] = sum(biases[1:], biases[0])
            continue
        parts = [term.matrix(name) for term in having]
        with as_edit_errors(f"compose: {name}"):
            apart = orthogonalised([part if rank is None else part.truncate(rank) for part in parts], name)
            used = [part * term.factor for part, term in zip(apart, having, strict=True) if term.factor]
            whole = LowRank.concatenate(used) if used else apart[0] * 0.0
        entry = having[0].update.entries[name]
        values[name] = whole.mT if entry.layout == "in_out" else whole
    return values


def _low(value: LowRank | Tensor) -> LowRank:
    if not isinstance(value, LowRank):
        raise EditError(f"a slider's change is a LowRank, not a {type(value).__name__}")
    return value


def _known(rank: int | None) -> dict[str, int]:
    return {} if rank is None else {"rank": rank}
