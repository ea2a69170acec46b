"""Two updates of one base, matrix by matrix: whether they point the same way, and where they act."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.subspaces import principal_angles
from peft_analysis.updates import WeightUpdate
from peft_analysis.updates.names import listed

if TYPE_CHECKING:
    import pandas as pd

TOP = 8
BLOCK = 2**20  # entries of a low rank that are multiplied out at a time, to compare signs


@dataclass(frozen=True)
class MatrixComparison:
    """One parameter of two updates a and b.

    What is not defined is NaN: directions of a zero difference, spaces of a vector.

    Attributes:
        parameter: its name.
        shape: as it is stored.
        norm_a: Frobenius norm of a's difference.
        norm_b: of b's.
        norm_ratio: norm_b / norm_a.
        cosine: ⟨A, B⟩ / (‖A‖ ‖B‖).
        cosine_chance: standard deviation of the cosine of two differences turned at random, 1 / √(m n): what
            a cosine has to be held against.
        sign_agreement: of the entries that neither leaves as they are, the share that both move the same way;
            one half by chance.
        rank_a: how many singular directions of a were compared: its numerical rank, at most `top`.
        rank_b: of b.
        angles_left: principal angles between their column spaces, in degrees, largest first.
        angles_right: between their row spaces.
        overlap_left: φ = ‖UₐᵀU_b‖² / min(rank_a, rank_b) of the column spaces: 1 where one holds the other.
        overlap_right: of the row spaces.
        overlap_chance_left: mean of φ for spaces turned at random, max(rank_a, rank_b) / m.
        overlap_chance_right: the same, / n.
    """

    parameter: str
    shape: tuple[int, ...]
    norm_a: float
    norm_b: float
    norm_ratio: float
    cosine: float
    cosine_chance: float
    sign_agreement: float
    rank_a: int = 0
    rank_b: int = 0
    angles_left: tuple[float, ...] = ()
    angles_right: tuple[float, ...] = ()
    overlap_left: float = math.nan
    overlap_right: float = math.nan
    overlap_chance_left: float = math.nan
    overlap_chance_right: float = math.nan


@dataclass(frozen=True)
class Comparison:
    """Two updates, compared.

    Attributes:
        rows: a `MatrixComparison` by parameter that both have.
        only_a: parameters that only a has.
        only_b: parameters that only b has.
        norm_a: of the whole of a, all its parameters together.
        norm_b: of the whole of b.
        cosine: of the two as wholes; what one has alone counts as zero in the other.
    """

    rows: dict[str, MatrixComparison] = field(repr=False)
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    norm_a: float
    norm_b: float
    cosine: float

    @property
    def norm_ratio(self) -> float:
        """norm_b / norm_a."""
        return _over(self.norm_b, self.norm_a)

    @property
    def table(self) -> pd.DataFrame:
        """A row for each parameter that both have; of the angles, the largest and the smallest."""
        import pandas as pd

        rows = []
        for row in self.rows.values():
            plain = {k: v for k, v in asdict(row).items() if not k.startswith("angles")}
            for side in ("left", "right"):
                angles = getattr(row, f"angles_{side}")
                plain[f"largest_angle_{side}"] = angles[0] if angles else math.nan
                plain[f"smallest_angle_{side}"] = angles[-1] if angles else math.nan
            rows.append(plain)
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file, with None for what is not defined."""
        found: dict[str, Any] = _plain({**asdict(self), "norm_ratio": self.norm_ratio})
        return found


def compare(a: WeightUpdate, b: WeightUpdate, *, top: int = TOP) -> Comparison:
    """Compare two updates of one base, parameter by parameter; memory is that of two matrices.

    Low ranks are compared in their factors; only signs need entries, which are multiplied out in blocks. Of a
    dense difference the leading singular directions are compared, since all of them together span
    everything.

    Args:
        a: an update.
        b: another one of the same base.
        top: the most singular directions of each that are compared.

    Raises:
        UpdateError: no parameter in common; shapes that differ (they are listed); NaN; `top` below 1.

    Example:
        >>> import torch
        >>> from manifolds import LowRank
        >>> a = WeightUpdate.from_tensors({"w": LowRank(torch.eye(4)[:, :1], torch.ones(1, 3))})
        >>> b = WeightUpdate.from_tensors({"w": LowRank(torch.eye(4)[:, 1:2], torch.ones(1, 3) * -2)})
        >>> row = compare(a, b).rows["w"]
        >>> row.norm_ratio, row.cosine, row.angles_left, round(row.angles_right[0])
        (2.0, 0.0, (90.0,), 0)
    """
    if top < 1:
        raise UpdateError(f"top is {top}; compare at least one direction")
    shared = [name for name in a if name in b]
    if not shared:
        raise UpdateError(
            f"the updates have no parameter in common; {a.source} has {listed(a)}, and {b.source} has "
            f"{listed(b)}. Are they of one base?"
        )
    shapes = {name: (tuple(a.entries[name].shape), tuple(b.entries[name].shape)) for name in shared}
    differ = [f"{name}: {one} and {other}" for name, (one, other) in shapes.items() if one != other]
    if differ:
        raise UpdateError(f"shapes differ; are they updates of one base? {listed(differ, '; ')}")
    rows = {name: _compared(_finite(a, name), _finite(b, name), a, name, top) for name in shared}
    only_a, only_b = (tuple(name for name in one if name not in other) for one, other in ((a, b), (b, a)))
    norm_a = math.hypot(*(row.norm_a for row in rows.values()), *(_norm(_finite(a, n)) for n in only_a))
    norm_b = math.hypot(*(row.norm_b for row in rows.values()), *(_norm(_finite(b, n)) for n in only_b))
    inner = math.fsum(
        row.cosine * row.norm_a * row.norm_b for row in rows.values() if row.norm_a and row.norm_b
    )
    return Comparison(rows, only_a, only_b, norm_a, norm_b, _over(inner, norm_a * norm_b))


def _compared(
    value: LowRank | Tensor, other: LowRank | Tensor, a: WeightUpdate, name: str, top: int
) -> MatrixComparison:
    shape = tuple(a.entries[name].shape)
    if value.device != other.device:
        raise UpdateError(f"{name} is on {value.device} in one update and on {other.device} in the other")
    sizes = _norm(value), _norm(other)
    basic: dict[str, Any] = {
        "parameter": name,
        "shape": shape,
        "norm_a": sizes[0],
        "norm_b": sizes[1],
        "norm_ratio": _over(sizes[1], sizes[0]),
        "cosine": _over(_over(_inner(value, other), sizes[0]), sizes[1]),
        "cosine_chance": 1 / math.sqrt(math.prod(shape)) if math.prod(shape) else math.nan,
        "sign_agreement": _agreement(value, other),
    }
    if len(shape) < 2:
        return MatrixComparison(**basic)
    turned = a.entries[name].layout == "in_out"
    bases = [_bases(one.mT if turned else one, top) for one in (value, other)]
    (columns_a, rows_a), (columns_b, rows_b) = bases
    ranks = columns_a.shape[1], columns_b.shape[1]
    least, most = min(ranks), max(ranks)
    spaces: dict[str, Any] = {"rank_a": ranks[0], "rank_b": ranks[1]}
    for side, p, q in (("left", columns_a, columns_b), ("right", rows_a, rows_b)):
        angles = principal_angles(p, q) if least else p.new_zeros(0)
        spaces[f"angles_{side}"] = tuple(angles.rad2deg().tolist())
        spaces[f"overlap_{side}"] = float((p.mT @ q).square().sum()) / least if least else math.nan
        spaces[f"overlap_chance_{side}"] = most / len(p) if least else math.nan
    return MatrixComparison(**basic, **spaces)


def _finite(update: WeightUpdate, name: str) -> LowRank | Tensor:
    """The difference as a matrix or a vector (a number is one of length 1), in float32 or more; no NaN."""
    value = update[name]
    factors = (value.left, value.right) if isinstance(value, LowRank) else (value,)
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise UpdateError(f"{name} holds NaN or infinite values in {update.source}; mend them first")
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(value, LowRank):
        return value
    return value.flatten(1) if value.ndim > 2 else value.reshape(-1) if not value.ndim else value


def _norm(value: LowRank | Tensor) -> float:
    return float(value.norm() if isinstance(value, LowRank) else torch.linalg.vector_norm(value.double()))


def _inner(value: LowRank | Tensor, other: LowRank | Tensor) -> float:
    """⟨A, B⟩ in float64; a low rank is not multiplied out."""
    if isinstance(value, LowRank):
        return float(value.to(torch.float64).inner(other.to(torch.float64)))
    if isinstance(other, LowRank):
        return _inner(other, value)
    return float((value.double() * other.double()).sum())


def _agreement(value: LowRank | Tensor, other: LowRank | Tensor) -> float:
    """Of the entries that are zero in neither, the share with equal signs."""
    same = moved = 0
    for block in _blocks(value.shape):
        product = _rows(value, block).sign() * _rows(other, block).sign()
        same += int((product > 0).sum())
        moved += int((product != 0).sum())
    return same / moved if moved else math.nan


def _blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Rows of a matrix or entries of a vector, as many at a time as hold about `BLOCK` entries."""
    step = max(1, BLOCK // max(1, math.prod(shape[1:])))
    return (slice(start, start + step) for start in range(0, shape[0], step))


def _rows(value: LowRank | Tensor, block: slice) -> Tensor:
    return value.left[block] @ value.right if isinstance(value, LowRank) else value[block]


def _bases(matrix: LowRank | Tensor, top: int) -> tuple[Float[Tensor, "m r"], Float[Tensor, "n r"]]:
    """The leading left and right singular vectors, as many as the numerical rank and `top` allow."""
    left, values, right = (
        matrix.svd() if isinstance(matrix, LowRank) else torch.linalg.svd(matrix, full_matrices=False)
    )
    limit = max(*matrix.shape, 1) * torch.finfo(values.dtype).eps * values[:1]
    rank = min(top, int((values > limit).sum()))
    return left[:, :rank], right[:rank].mT


def _over(number: float, by: float) -> float:
    return number / by if by else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
