"""How far an update changes the lengths of a matrix's vectors, and how far their directions."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import LowRank
from peft_analysis.base_svd import check_matrix
from peft_analysis.errors import UpdateError
from peft_analysis.updates import WeightUpdate

Along = Literal["output", "input"]


@dataclass(frozen=True)
class DirectionChange:
    """Changes of the vectors of one matrix; see `direction_change`.

    Attributes:
        magnitude: ΔM, the mean change of length.
        direction: ΔD, the mean of 1 − cosine; NaN if no vector has a direction before and after.
        relative_magnitude: the mean change of length over the mean length before; NaN over a zero base.
        lengths: the length after minus the length before, of each vector (v,).
        turns: 1 − cosine of each vector (v,); NaN where there is no direction before or after.
        undefined: how many turns are NaN.
    """

    magnitude: float
    direction: float
    relative_magnitude: float
    lengths: Float[Tensor, " v"]
    turns: Float[Tensor, " v"]
    undefined: int


@dataclass(frozen=True)
class DirectionCorrelation:
    """ΔM and ΔD of an update's matrices, and whether they rise together.

    Attributes:
        names: the parameters.
        magnitudes: ΔM of each.
        directions: ΔD of each.
        correlation: Pearson's, over the matrices; NaN where it cannot be known.
        low: lower end of its 95 % interval (Fisher's z).
        high: upper end.
        reliable: whether the interval excludes zero.
        reason: why the correlation or its interval is NaN, or "".
    """

    names: tuple[str, ...]
    magnitudes: tuple[float, ...]
    directions: tuple[float, ...]
    correlation: float
    low: float
    high: float
    reliable: bool
    reason: str


def direction_change(
    base_matrix: Tensor, update_matrix: Tensor | LowRank, *, along: Along = "output"
) -> DirectionChange:
    """DoRA's ΔM and ΔD of any update (Liu et al. 2024, section 3.2, eq. 3 and 4).

    Formula: ΔM = meanₙ |‖w'ₙ‖ − ‖wₙ‖| and ΔD = meanₙ (1 − cos(w'ₙ, wₙ)), with w' = w + δ. From the part of δ
    across w, 1 − cos = sin² / (1 + cos) keeps the digits of small turns; so does
    ‖w'‖ − ‖w‖ = (2⟨w, δ⟩ + ‖δ‖²) / (‖w'‖ + ‖w‖). A `LowRank` is not multiplied out.

    Args:
        base_matrix: W (m, n) as (out, in); more dimensions are flattened to (m, ·).
        update_matrix: ΔW of the same shape.
        along: "output" takes the rows of (out, in), one vector for each output, as DoRA's code and peft do
            (the paper calls them columns); "input" takes the columns.

    Raises:
        UpdateError: shapes or devices differ; NaN or infinity; an unknown `along`.

    Example:
        >>> import torch
        >>> W = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        >>> change = direction_change(W, torch.tensor([[3.0, 4.0], [-1.0, 1.0]]))
        >>> change.magnitude, change.direction  # one row doubles, the other turns by 90°
        (2.5, 0.5)
    """
    if along not in ("output", "input"):
        raise UpdateError(f"along is {along!r}; it is 'output' or 'input'")
    base = base_matrix.flatten(1) if base_matrix.ndim > 2 else base_matrix
    update = update_matrix
    if isinstance(update, Tensor) and update.ndim > 2:
        update = update.flatten(1)
    check_matrix(base, "the base matrix")
    if base.shape != update.shape or base.device != update.device:
        raise UpdateError(
            f"the base has shape {tuple(base.shape)} on {base.device}, the update {tuple(update.shape)} on "
            f"{update.device}; both as (out, in): update.base_matrix(name) and update.matrix(name) fit"
        )
    if along == "input":
        base, update = base.mT, update.mT
    kept = torch.promote_types(base.dtype, torch.promote_types(update.dtype, torch.float32))
    before, inner, outer = _products(base.detach().to(kept), update.detach().to(kept))
    if not bool(inner.isfinite().all() and outer.isfinite().all()):
        raise UpdateError("the update holds NaN or infinity, or its squares overflow")
    unit = torch.where(before > 0, before, 1.0)
    ahead = before + inner / unit
    across = (outer - (inner / unit).square()).clamp(min=0)
    after = torch.where(before > 0, (ahead.square() + across).sqrt(), outer.sqrt())
    after = torch.where(after > 4e-8 * (before + outer.sqrt()), after, 0.0)  # squares hold half the digits
    both = before + after
    lengths = (2 * inner + outer) / torch.where(both > 0, both, 1.0)
    there = (before > 0) & (after > 0)
    size = torch.where(there, after, 1.0)
    cosine, sine = ahead / size, across / size.square()
    turns = torch.where(cosine > 0, sine / (1 + cosine), 1 - cosine)
    turns = torch.where(there, turns, torch.nan)
    known = turns[there]
    return DirectionChange(
        magnitude=float(lengths.abs().mean()),
        direction=float(known.mean()) if known.numel() else math.nan,
        relative_magnitude=float(lengths.abs().mean() / before.mean()) if bool(before.any()) else math.nan,
        lengths=lengths.to(kept),
        turns=turns.to(kept),
        undefined=int((~there).sum()),
    )


def direction_correlation(update: WeightUpdate, *, along: Along = "output") -> DirectionCorrelation:
    """Pearson's correlation of ΔM and ΔD over the matrices of an update, as in DoRA's figure 2.

    The paper finds full fine-tuning to correlate negatively and LoRA positively. Fewer than four matrices
    have no interval; matrices that all change alike have no correlation.

    Raises:
        UpdateError: the update has no base, or holds no matrix.
    """
    names = tuple(update.matrices())
    if not names:
        raise UpdateError(f"{update.source} changes no matrix; there is nothing to correlate")
    found = [direction_change(update.base_matrix(name), update.matrix(name), along=along) for name in names]
    lengths, turns = ([getattr(one, what) for one in found] for what in ("magnitude", "direction"))
    correlation, low, high, reason = _pearson(lengths, turns)
    return DirectionCorrelation(
        names, tuple(lengths), tuple(turns), correlation, low, high, low > 0 or high < 0, reason
    )


def _products(base: Tensor, update: Tensor | LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """‖w‖, ⟨w, δ⟩ and ‖δ‖² of each row, in float64."""
    before = torch.linalg.vector_norm(base, dim=1, dtype=torch.float64)
    if isinstance(update, Tensor):
        inner = (base.double() * update.double()).sum(1)
        return before, inner, torch.linalg.vector_norm(update, dim=1, dtype=torch.float64).square()
    left, right = update.left.double(), update.right.double()
    inner = (base.double() @ right.mT * left).sum(1)
    return before, inner, (left @ torch.linalg.qr(right.mT, mode="r")[1].mT).square().sum(1)


def _pearson(x: list[float], y: list[float]) -> tuple[float, float, float, str]:
    """The correlation, its 95 % interval, and why there is none."""
    pairs = torch.tensor([x, y], dtype=torch.float64)
    if not bool(pairs.isfinite().all()):
        return math.nan, math.nan, math.nan, "a matrix has no direction before or after"
    if pairs.shape[1] < 3:
        return math.nan, math.nan, math.nan, f"{pairs.shape[1]} matrices are too few; 3 are needed"
    centred = pairs - pairs.mean(1, keepdim=True)
    sizes = centred.norm(dim=1)
    if bool((sizes <= 1e-12 * pairs.norm(dim=1)).any()):
        return math.nan, math.nan, math.nan, "all matrices change alike; there is no spread to correlate"
    value = max(-1.0, min(1.0, float(centred[0] @ centred[1] / sizes.prod())))
    if pairs.shape[1] < 4:
        return value, math.nan, math.nan, "3 matrices have a correlation but no interval; 4 are needed"
    if abs(value) == 1:
        return value, value, value, ""
    middle, half = math.atanh(value), 1.959963984540054 / math.sqrt(pairs.shape[1] - 3)
    return value, math.tanh(middle - half), math.tanh(middle + half), ""
