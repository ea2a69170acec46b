"""Low rank or full rank: what one matrix of an update is, with the odds that it is the other."""

import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.matrix_noise import MERGED, edge_and_rest, goes_on, simulated
from peft_analysis.noise import NoiseEdge, RankEstimate, judge, noise_edge
from peft_analysis.remainder import MOST, Remainder, continued, grid, remainder, spacing
from peft_analysis.spectrum import check_matrix, singular_values
from peft_analysis.updates import WeightUpdate

Statement = Literal["low rank", "full rank", "none", "unknown"]
MODEL_ERROR = 0.01
"""An excess of this share of one rounding's energy is not told from none. Doubled for each of several merges:
what a weight was between them, and so the grid it was rounded to, is not known.
"""
SLACK = 0.33
"""The same of a simulated rounding, in units of the energy of one value at the edge."""
HIDES = 0.5
"""A spectrum that goes on leaves at least this share of its power law's energy."""
CUT = 0.25
"""Below this share of its power law's energy a spectrum has ended, though some of it lies under the noise."""
MANY = 0.25
"""Directions that the remainder needs, over those seen: with fewer, a low rank may fade into the noise."""
DEAD = 0.4
"""Where fewer entries moved on a common grid, an excess may be the rounding's own."""
SPARSE = 0.95
"""Where fewer entries moved on a common grid, rounding is simulated rather than taken as uniform."""
SHOWN = 256
"""At most so many leading singular values are kept."""


@dataclass(frozen=True)
class MatrixVerdict:
    """What one matrix's difference is.

    Attributes:
        parameter: its name.
        statement: "low rank", "full rank", "none" (nothing, or rounding alone) or "unknown".
        p_low_rank: the probability of as large a remainder if the difference were of the rank found, with
            rounding and nothing else (the quantisation-aware null). 0 or 1 where nothing was rounded.
        p_full_rank: the probability of as small a remainder if the spectrum went on under the noise, with at
            least half of the energy of its own power law.
        rank: the singular values above the noise. rank_low: of the interval. rank_high: of the interval.
        shape: of the matrix (out, in).
        roundings: by how many roundings of the weights the remainder is explained; NaN if that is not known.
        roundings_error: its standard error.
        excess: the remainder's energy that rounding does not explain, in units of that of one rounding.
        moved: the share of entries that changed.
        exact: whether nothing was rounded, so that the rank is no estimate.
        same_grid: whether the base lies on the grid that the tuned weights were rounded to.
        singular_values: the leading ones.
        reason: why, in words.
        edge: the largest singular value that the noise of rounding gives; 0 where nothing was rounded.
    """

    parameter: str
    statement: Statement
    p_low_rank: float
    p_full_rank: float
    rank: int
    rank_low: int
    rank_high: int
    shape: tuple[int, int]
    roundings: float
    roundings_error: float
    excess: float
    moved: float
    exact: bool
    same_grid: bool
    singular_values: tuple[float, ...]
    reason: str
    edge: float = 0.0

    @property
    def p_value(self) -> float:
        """The p-value of what the statement denies: of full rank where it says low rank, else of low rank.

        For "unknown" the smaller of both, which was not small enough.
        """
        if self.statement == "unknown":
            return min(self.p_low_rank, self.p_full_rank)
        return self.p_full_rank if self.statement == "low rank" else self.p_low_rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with None for what is not known."""
        found = {**asdict(self), "p_value": self.p_value}
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in found.items()
        }


def judge_matrix(
    update: WeightUpdate, name: str, *, level: float = 0.01, generator: torch.Generator | None = None
) -> MatrixVerdict:
    """Whether one matrix's difference is low rank, full rank, nothing, or hidden by rounding.

    Args:
        update: whose matrix.
        name: of the parameter.
        level: of the tests.
        generator: of the noise that is simulated; a new one of seed 0 if not given.

    Raises:
        UpdateError: the difference is no matrix, or has values that are not finite.
    """
    generator = generator or torch.Generator().manual_seed(0)
    value, entry = update.matrix(name), update.entries[name]
    if isinstance(value, LowRank) or entry.rounded is None:
        return _exact(name, value)
    if not bool(torch.isfinite(value).all()):
        raise UpdateError(f"{name}: the difference has values that are not finite; no rank is defined")
    base = _base(update, name, value)
    rounded, stored = entry.rounded, entry.base_rounded
    if base is not None:
        rounded = grid(value + base.to(value.dtype), rounded)
        stored = grid(base.float(), stored or base.dtype)
        coarse = stored if torch.finfo(stored).eps > torch.finfo(rounded).eps else rounded
        if bool((value == 0).all()) or _only_rounded(value, base, coarse, of_base=coarse != rounded):
            return _nothing(name, value, coarse, of_base=coarse != rounded, same_grid=stored == rounded)
    elif bool((value == 0).all()):
        return _nothing(name, value, rounded, of_base=False, same_grid=True)
    same_grid = base is not None and (stored == rounded or torch.equal(base.to(rounded).to(base), base))
    if base is None:
        edge = noise_edge(value, rounded=rounded, base_rounded=stored, generator=generator)
        return _without_base(name, value, edge, level)
    rest = partial(remainder, value, base, rounded=rounded, same_grid=same_grid, generator=generator)
    half = min(value.shape) // 2
    whole = rest(half)
    if goes_on(whole) and coarse != rounded:  # the base may be a rounded copy of what was tuned
        rest = partial(remainder, value, base, rounded=coarse, same_grid=False, generator=generator)
        whole, same_grid = rest(half), False
    if goes_on(whole):
        full = RankEstimate(min(value.shape), half, min(value.shape), whole.noise, True, "", "remainder")
        return _decided(name, value, full, whole, MODEL_ERROR, same_grid=same_grid, level=level)
    edge, left = edge_and_rest(value, base, whole, rest, (rounded, stored), generator)
    error = MODEL_ERROR * (2 * left.roundings if MERGED < left.roundings <= MOST else 1)
    if same_grid and left.moved < SPARSE and edge.method == "simulated rounding" and edge.count <= half:
        left, unit = simulated(left, edge, value, base, rounded, generator)
        error += 2 * SLACK * unit
    return _decided(name, value, judge(edge, min(value.shape)), left, error, same_grid=same_grid, level=level)


def _decided(
    name: str,
    value: Float[Tensor, "m n"],
    found: RankEstimate,
    left: Remainder,
    error: float,
    *,
    same_grid: bool,
    level: float,
) -> MatrixVerdict:
    """From the rank and the remainder, whose model is good to `error`, to a statement."""
    size = min(value.shape)
    spread = math.hypot(left.excess_error, error / 2)
    p_low = _above(left.excess / spread) if math.isfinite(left.excess) else math.nan
    p_full = math.nan
    if found.rank and math.isfinite(left.excess):
        p_full = _above((HIDES * left.tail - left.excess) / spread)
    kept = min(found.rank, size // 2)
    settled = left.moved >= DEAD or not same_grid
    statement: Statement = "unknown"
    if found.rank > size // 2 and left.roundings + left.excess > 1 + level:
        p_low = _above((left.roundings + left.excess - 1) / math.hypot(spread, left.roundings_error))
    if not math.isfinite(left.excess):
        reason = (
            f"{left.moved:.0%} of the entries moved by a step of the grid: too few to tell an update's rank"
        )
    elif left.roundings > MOST or (p_low < level and kept + left.hidden_rank >= size / 2):
        statement, p_low = "full rank", min(p_low, _above(left.roundings / left.roundings_error))
        reason = (
            f"beyond {kept} directions the remainder has {left.roundings + left.excess:.3g} times the energy "
            "of one rounding"
        )
    elif found.rank > size // 2:
        statement, p_low = "full rank", p_low if p_low < level else math.nan  # counted, not tested
        reason = f"{found.rank} of {size} singular values stand above the noise"
    elif found.rank == 0:
        if p_low >= level and not same_grid and left.roundings < 1.5:
            statement, reason = "none", "no more than one rounding of the base"
        else:
            reason = (
                "it changed, but no direction stands out of the noise, and the noise has room for a low rank"
            )
    elif p_full < level and (p_low >= level or (settled and left.excess < CUT * left.tail)):
        statement = "low rank"
        reason = (
            f"{found.rank} singular values above the noise; a spectrum that went on would leave "
            f"{left.tail:.2g} of a rounding's energy, {max(left.excess, 0.0):.2g} are there"
        )
    elif p_low < level <= p_full and settled and left.hidden_rank >= MANY * found.rank:
        statement = "full rank"
        reason = f"the spectrum goes on below the noise: {left.excess:.2g} of a rounding's energy is left"
    else:
        reason = (
            f"{found.rank} singular values above the noise, which hides whether the spectrum ends there: "
            f"{left.excess:.2g} ± {spread:.1g} of a rounding's energy is left, {left.tail:.2g} if it goes on"
        )
    if found.reason and statement == "unknown":
        reason = f"{reason}; {found.reason}"
    return MatrixVerdict(
        name,
        statement,
        p_low,
        p_full,
        found.rank,
        found.low,
        size if statement == "full rank" else found.high,
        (value.shape[0], value.shape[1]),
        left.roundings,
        left.roundings_error,
        left.excess,
        left.moved,
        False,
        same_grid,
        left.singular_values[:SHOWN],
        reason,
        edge=found.edge,
    )


def _exact(name: str, value: LowRank | Tensor) -> MatrixVerdict:
    """Factors, or a difference that was never rounded: the rank is a fact."""
    if isinstance(value, Tensor):
        check_matrix(value, name)
    found = singular_values(value).double()
    m, n = int(value.shape[-2]), int(value.shape[-1])
    factors = isinstance(value, LowRank)
    least = max(m, n) * torch.finfo(value.dtype).eps * (float(found[0]) if len(found) else 0.0)
    rank = int((found > least).sum())
    full = rank > (min(m, n) - 1 if factors else min(m, n) // 2)
    statement: Statement = "none" if rank == 0 else "full rank" if full else "low rank"
    reason = "from its factors" if factors else "from values that were not rounded"
    return MatrixVerdict(
        name,
        statement,
        float(not full),
        float(full),
        rank,
        rank,
        rank,
        (m, n),
        0.0,
        0.0,
        0.0,
        1.0 if rank else 0.0,
        True,
        False,
        tuple(found[: min(rank, SHOWN)].tolist()),
        f"rank {rank}, {reason}",
    )


def _nothing(
    name: str, value: Tensor, rounded: torch.dtype, *, of_base: bool, same_grid: bool
) -> MatrixVerdict:
    moved = float((value != 0).double().mean())
    of, from_what = ("base's", "tuned one's") if of_base else ("tuned", "base's")
    dtype = str(rounded).removeprefix("torch.")
    reason = f"every {of} value is the {from_what}, rounded to {dtype}" if moved else "no value differs"
    return MatrixVerdict(
        name, "none", 1.0, math.nan, 0, 0, 0, (value.shape[0], value.shape[1]), float(moved > 0), 0.0, 0.0,
        moved, True, same_grid, (), reason,
    )  # fmt: skip


def _without_base(name: str, value: Float[Tensor, "m n"], edge: NoiseEdge, level: float) -> MatrixVerdict:
    """Without the base the size of rounding is not known: the spectrum's own fall is all there is.

    The first value in the noise is compared with where the power law of the leading ones puts it; the spread
    is that of the leading values about their law, at least a tenth.
    """
    found, values = judge(edge, min(value.shape)), edge.values
    size, r = len(values), found.rank
    p_low = p_full = math.nan
    statement: Statement = "unknown"
    reason = "without the base's weights the size of its rounding is not known"
    if r > size // 2:
        statement = "full rank"  # counted, not tested
        reason = f"{r} of {size} singular values stand above the noise's own spectrum"
    elif r:
        share = math.sqrt(continued(values[:r], r + 1)) / float(values[r])
        p_full = _above(math.log(max(share, 1e-300)) / 0.1)
        if p_full < level:
            statement = "low rank"
            reason = f"{r} singular values, then a fall to the noise that their own law does not have"
    return MatrixVerdict(
        name, statement, p_low, p_full, r, found.low, found.high, (value.shape[0], value.shape[1]), math.nan,
        math.inf, math.nan, float((value != 0).double().mean()), False, False,
        tuple(values[: min(r, SHOWN)].tolist()), reason, edge=edge.edge,
    )  # fmt: skip


def _base(update: WeightUpdate, name: str, value: Tensor) -> Tensor | None:
    """The base's matrix in the rows that both have, or None."""
    if update.base is None or name not in update.base:
        return None
    base = update.base_matrix(name)[: len(value)].to(value.device)
    return base.float() if base.shape == value.shape else None


def _only_rounded(value: Tensor, base: Tensor, rounded: torch.dtype, *, of_base: bool) -> bool:
    """Whether one of base and tuned values is the other rounded, but for a few that lie on a tie."""
    if of_base:
        return bool(((base + value).to(rounded).to(base) == base).double().mean() > 0.999)
    off = (base.to(rounded).double() - base.double() - value.double()).abs()
    return bool((off <= spacing(base, torch.float32)).all())


def _above(z: float) -> float:
    """The probability that a standard normal number is larger."""
    return 0.5 * math.erfc(z / math.sqrt(2))
