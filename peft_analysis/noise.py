"""The edge of rounding noise in a spectrum, and the rank that stands above it."""

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.noise_nulls import (
    CLEAR,
    GAP,
    LEFT,
    MARGIN,
    Expected,
    Parts,
    RoundingNull,
    SignNull,
    balanced,
    repeated,
    search,
    several_roundings,
    what_was_rounded,
    with_own_rounding,
)
from peft_analysis.spectrum import check_matrix, singular_values


@dataclass(frozen=True)
class NoiseEdge:
    """Where the noise of rounding ends in the spectrum of a difference.

    All is in the units of the difference itself. Where rows or columns carry noise of unequal size, the rank
    was found in another matrix of the same rank, with rows and columns multiplied so that the noise is even;
    what was seen there is in `balanced`. Components of the difference itself may then lie below its edge.

    Attributes:
        edge: the largest singular value that noise alone is expected to give, beside the components above it.
            0 where there is no noise.
        interval: the edge is believed between these.
        count: how many components stand above the noise.
        method: "exact" (factors), "simulated rounding" (base known), "random signs" (the difference alone),
            "random signs (2 roundings)" (base known, the noise that of two merges one upon another), or
            "float arithmetic" (nothing below the components but errors of the last digit).
        first_noise: the largest singular value of the difference after the first `count`.
        last_signal: the smallest of those; NaN if there is none.
        hidden: energy of the difference below the edge beyond what noise explains, in units of edge²; NaN
            where the noise's own energy is not known.
        hidden_error: its standard error.
        unmoved: the share of entries that did not change.
        values: all singular values of the difference (p,).
        balanced: the edge of the matrix in which the rank was found, where that is not the difference itself.
    """

    edge: float
    interval: tuple[float, float]
    count: int
    method: str
    first_noise: float
    last_signal: float
    hidden: float
    hidden_error: float
    unmoved: float
    values: Tensor
    balanced: "NoiseEdge | None" = None

    def to_dict(self) -> dict[str, Any]:
        """All but the singular values, in plain Python."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "values"}
        return found | {"balanced": self.balanced.to_dict() if self.balanced is not None else None}


@dataclass(frozen=True)
class RankEstimate:
    """The rank of an update, read from a difference that carries rounding noise.

    Attributes:
        rank: the most likely rank: how many singular values are above the noise.
        low: the true rank is at least this.
        high: and at most this; min(m, n) where nothing can be said.
        edge: the noise edge, as a singular value.
        reliable: whether low … high is more than the count and its absence of an upper bound.
        reason: what the answer rests on, or why it is not known.
        method: as in `NoiseEdge`.
    """

    rank: int
    low: int
    high: int
    edge: float
    reliable: bool
    reason: str
    method: str

    def to_dict(self) -> dict[str, Any]:
        """The same in plain Python."""
        return asdict(self)


def noise_edge(
    difference: LowRank | Tensor,
    *,
    base: Tensor | None = None,
    tuned: Tensor | None = None,
    rounded: torch.dtype | None = None,
    base_rounded: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> NoiseEdge:
    """The edge of the rounding noise in the spectrum of a difference, and what is above it.

    With the base, a rank k is tried: the update of rank k is fitted that reads as the difference when base +
    update is rounded; its components with random signs are added to the base and rounded again; and the
    largest singular value beyond the k leading ones of what is then read is the edge that rank k predicts.
    The rank is the smallest k whose next singular value does not exceed that edge. Rows, columns and single
    entries of very different size, updates larger or smaller than the spacing of the dtype, and the
    components that rounding itself makes of a structured update are all in the simulation. Where the spacing
    of the stored numbers differs from row to row or column to column, rows and columns are first multiplied
    by powers of two that make it even, which keeps the rank; see `balance`.

    Without the base nothing can be rounded again. Then the residual beyond k components has its entries'
    signs drawn anew (parallel analysis): noise keeps its spectrum, structure loses it.

    Cost: one eigendecomposition of the smaller Gram matrix; for each rank that is tried (about 2 log₂ of the
    rank) some products of the matrix with k and with 48 vectors. No further decomposition of the matrix.

    Args:
        difference: (m, n): tuned − base.
        base: the base's matrix.
        tuned: the tuned matrix; base + difference if not given.
        rounded: the dtype that the tuned values were stored in; a coarser one that holds them all is found.
        base_rounded: the dtype that the base's values were stored in, likewise.
        generator: for signs and starts; a generator of seed 0 if not given.

    Raises:
        UpdateError: for matrices that are not finite, real, two-dimensional and of one shape.
    """
    shape = _check(difference, base, tuned)
    if isinstance(difference, LowRank):
        return _exact(difference)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    if base is None and tuned is not None:
        base = tuned.double() - difference.double()
    model = (
        what_was_rounded(difference.detach(), base, tuned, rounded, base_rounded)
        if base is not None
        else None
    )
    wanted = difference.detach().to(model[1].base.dtype if model is not None else torch.float64)
    parts = Parts(wanted, generator)
    floor = float(parts.values[0]) * max(shape) * torch.finfo(torch.float32).eps if parts.count else 0.0
    unmoved = float((wanted == 0).double().mean()) if wanted.numel() else 1.0
    if not parts.count or float(parts.values[0]) == 0:
        return NoiseEdge(0.0, (0.0, 0.0), 0, "exact", 0.0, math.nan, 0.0, 0.0, unmoved, parts.values)
    if model is None:
        signs = SignNull(parts)
        count = search(parts, signs)
        found = signs(count)
        method = "float arithmetic" if found.edge <= floor else signs.method
        return _told(parts, count, found, method, unmoved)
    plain = RoundingNull(parts, *model)
    even = balanced(wanted, *model)
    null = plain if even is None else RoundingNull(Parts(even[0], generator), model[0], even[1])
    null, count = with_own_rounding(null, search(null.parts, null))
    found, method = null(count), null.method
    several = several_roundings(null.parts, null, count)
    if several is not None:
        count, found = several[:2]
        method = f"random signs ({several[2]} roundings)"
    edge = _told(null.parts, count, found, method, unmoved)
    if even is None:
        return edge
    plain.own = null.own
    found = plain(count) if several is None else repeated(parts, plain, count, several[2])
    return replace(_told(parts, count, found, method, unmoved), balanced=edge)


def _told(parts: Parts, count: int, found: Expected, method: str, unmoved: float) -> NoiseEdge:
    return NoiseEdge(
        edge=found.edge,
        interval=(found.edge * (1 - MARGIN), found.edge * (1 + MARGIN)),
        count=count,
        method=method,
        first_noise=float(parts.values[count]) if count < parts.count else 0.0,
        last_signal=float(parts.values[count - 1]) if count else math.nan,
        hidden=found.hidden,
        hidden_error=found.hidden_error,
        unmoved=unmoved,
        values=parts.values,
    )


def true_rank(
    difference: LowRank | Tensor,
    *,
    base: Tensor | None = None,
    tuned: Tensor | None = None,
    rounded: torch.dtype | None = None,
    base_rounded: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> RankEstimate:
    """The rank of the update behind a difference, with an interval; see `noise_edge`.

    A `LowRank` has its numerical rank, exactly. For a dense difference `rank` counts the singular values
    above the noise. A component weaker than the noise cannot be seen; `high` is the rank itself where nothing
    speaks for hidden components: the energy below the edge is what rounding explains, and the last component
    stands clear of the edge. Where the energy says that there is more, `high` is min(m, n).

    Args:
        difference: (m, n): tuned − base.
        base: the base's matrix.
        tuned: the tuned matrix; base + difference if not given.
        rounded: the dtype that the tuned values were stored in.
        base_rounded: the dtype that the base's values were stored in.
        generator: for signs and starts; a generator of seed 0 if not given.

    Example:
        >>> import torch
        >>> from peft_analysis.noise import true_rank
        >>> draw = torch.Generator().manual_seed(0)
        >>> base, B, A = (torch.randn(size, generator=draw) for size in ((200, 160), (200, 3), (3, 160)))
        >>> tuned = (base + 0.01 * B @ A).bfloat16()
        >>> difference = tuned.float() - base
        >>> int(torch.linalg.matrix_rank(difference)), true_rank(difference, base=base, tuned=tuned).rank
        (160, 3)
    """
    edge = noise_edge(
        difference, base=base, tuned=tuned, rounded=rounded, base_rounded=base_rounded, generator=generator
    )
    return judge(edge, min(difference.shape[-2:]))


def judge(edge: NoiseEdge, full: int) -> RankEstimate:
    """The rank and its interval from a noise edge; `full` is min(m, n)."""
    if edge.balanced is not None:
        return replace(judge(edge.balanced, full), edge=edge.edge)
    rank = edge.count
    if edge.method == "exact":
        reason = "no entry differs" if rank == 0 else "the update is known in factors"
        return RankEstimate(rank, rank, rank, edge.edge, True, reason, edge.method)
    low = int((edge.values[:rank] > edge.edge * (1 + CLEAR)).sum())
    clear = rank > 0 and edge.last_signal > GAP * edge.edge
    many = f"{edge.unmoved:.0%} of the entries did not move" if edge.unmoved > 0.5 else ""
    if rank == full:
        why, high = "every singular value is above the noise", full
    elif full - rank < LEFT * full:
        why, high = "too few values are left below the edge to tell noise from an update of full rank", full
    elif edge.hidden > 2.5 * edge.hidden_error + 0.25:
        why, high = f"below the edge lies {edge.hidden:.1f} edge² more than rounding explains", full
    elif rank == 0:
        why = "no component stands above the rounding noise"
        if math.isnan(edge.hidden):
            why = "the entries look independent: noise or a full-rank update; the base would tell them apart"
        high = full
    elif clear:
        why, high = "the last component is clear of the noise, and rounding explains the rest", rank
    elif math.isnan(edge.hidden):
        why, high = "the spectrum fades into noise of unknown size; give the base for a bound", full
    else:
        why = "the spectrum fades into the rounding noise; weaker components may hide there"
        high = min(full, rank + _faded(edge))
    reason = "; ".join(part for part in (why, many) if part)
    return RankEstimate(rank, low, high, edge.edge, high < full or rank == full, reason, edge.method)


def _faded(edge: NoiseEdge) -> int:
    """How many more components would follow below the edge if the spectrum went on falling as it did."""
    values = edge.values[: edge.count]
    ratio = float(values[-1] / values[0]) ** (1 / (edge.count - 1)) if edge.count > 1 else 0.5
    ratio = min(max(ratio, 0.1), 0.99)
    budget = (max(edge.hidden, 0.0) + 2.5 * edge.hidden_error + 0.25) * edge.edge**2
    found, value = 0, float(values[-1]) * ratio
    while value > 0.03 * edge.edge and budget > 0:
        budget -= value**2
        found, value = found + 1, value * ratio
    return max(found, 1)


def _exact(difference: LowRank) -> NoiseEdge:
    values = singular_values(difference)
    limit = max(*difference.shape, 1) * torch.finfo(difference.dtype).eps
    count = int((values > limit * values[:1]).sum())
    last = float(values[count - 1]) if count else math.nan
    edge = float(limit * values[0]) if values.numel() else 0.0
    first = float(values[count]) if count < values.numel() else 0.0
    return NoiseEdge(edge, (edge, edge), count, "exact", first, last, 0.0, 0.0, math.nan, values)


def _check(difference: LowRank | Tensor, base: Tensor | None, tuned: Tensor | None) -> tuple[int, int]:
    if difference.ndim != 2:
        raise UpdateError(
            f"noise_edge: shape {tuple(difference.shape)}; give one matrix (m, n); see update.matrix"
        )
    for name, matrix in {"difference": difference, "base": base, "tuned": tuned}.items():
        if matrix is None or isinstance(matrix, LowRank):
            continue
        check_matrix(matrix, f"noise_edge: {name}")
        if matrix.shape != difference.shape:
            raise UpdateError(
                f"noise_edge: {name} is {tuple(matrix.shape)}, the difference {tuple(difference.shape)}"
            )
    return int(difference.shape[0]), int(difference.shape[1])
