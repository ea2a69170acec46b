"""One matrix of an update, measured: a row of the table and what the figures draw of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD, SVDCache
from peft_analysis.directions import direction_change
from peft_analysis.errors import UpdateError
from peft_analysis.intruders import IntruderSide, intruders
from peft_analysis.matrix_verdict import MatrixVerdict, judge_matrix
from peft_analysis.rank_path import effective_rank_slope
from peft_analysis.report.names import place
from peft_analysis.spectrum import Spectrum, measures, spectrum
from peft_analysis.subspaces import Side, overlap, principal_angles
from peft_analysis.updates import WeightUpdate

POINTS = 160  # of a drawn spectrum
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Settings:
    """How matrices are measured; see `peft_analysis.analyse`."""

    max_base_side: int | None = 2048
    top: int = 16
    epsilon: float = 0.5
    k: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what no matrix could be measured with."""
        if self.max_base_side is not None and self.max_base_side < 0:
            raise UpdateError(
                f"max_base_side is {self.max_base_side}; give 0 for none, None for all, or a size"
            )
        for name in ("top", "k"):
            if getattr(self, name) < 1:
                raise UpdateError(
                    f"{name} is {getattr(self, name)}; it counts singular directions: 1 or more"
                )
        if not 0 < self.epsilon <= 1:
            raise UpdateError(f"epsilon is {self.epsilon}; it is a cosine above 0 and at most 1")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


def measure(
    update: WeightUpdate,
    name: str,
    settings: Settings,
    *,
    cache: SVDCache | None = None,
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """One matrix's row.

    Args:
        update: the update.
        name: one of `update.matrices()`.
        settings: what to measure and how.
        cache: decompositions of base matrices, kept between calls.
        device: where to compute; where the values are, if None.

    Raises:
        UpdateError: values are NaN or infinite, or the base does not fit.
    """
    entry = update.entries[name]
    found = place(name)
    try:
        difference = update.matrix(name)
        known = update.base is not None and name in update.base
        base = update.base_matrix(name) if known else None
        if device is not None:
            difference, base = difference.to(device), None if base is None else base.to(device)
        judged = judge_matrix(update, name, generator=torch.Generator().manual_seed(settings.seed))
        row = {
            "parameter": name,
            **asdict(found),
            "rows": int(difference.shape[0]),
            "columns": int(difference.shape[1]),
            "origin": entry.kind,
            "details": _plain(entry.details),
            **_judged(judged),
            **_measured(difference, base, judged, settings, cache),
        }
    except UpdateError as error:
        raise UpdateError(str(error) if name in str(error) else f"{name}: {error}") from error
    return row


def _measured(
    difference: LowRank | Tensor,
    base: Tensor | None,
    judged: MatrixVerdict,
    settings: Settings,
    cache: SVDCache | None,
) -> dict[str, Any]:
    seen = spectrum(difference)
    row = {**_sizes(seen), "curves": {"singular": curve(seen.singular_values)}}
    above = measures(seen.singular_values[: judged.rank])
    row["effective_rank_above"] = above["effective_rank"] if judged.rank else None
    if base is None:
        return row | {"left_out": {"base": "the base's weights were not given"}}
    if tuple(base.shape) != tuple(difference.shape):
        raise UpdateError(
            f"the difference is {tuple(difference.shape)} and the base's matrix {tuple(base.shape)}; "
            "is this the base that was tuned?"
        )
    wide = base.float() if base.dtype in HALF else base
    size = float(torch.linalg.vector_norm(wide, dtype=torch.float64))
    row["relative_norm"] = seen.frobenius / size if size else None
    turned = direction_change(base, difference)
    row |= {"delta_magnitude": turned.magnitude, "delta_direction": _number(turned.direction)}
    side = min(base.shape)
    if judged.statement == "none":
        return (
            row
            if seen.frobenius == 0
            else row | {"left_out": {"base svd": "the difference is rounding alone"}}
        )
    if not size:
        return row | {"left_out": {"base svd": "the base's matrix is zero"}}
    if settings.max_base_side is not None and side > settings.max_base_side:
        reason = f"its smaller side is above max_base_side = {settings.max_base_side}"
        return row | {"left_out": {"base svd": reason}}
    decomposed = (SVDCache(memory=0) if cache is None else cache)(base)
    row["relative_spectral"] = seen.spectral / float(decomposed.S[0])
    row["curves"]["base"] = curve(decomposed.S)
    row["rank_slope"] = _number(float(effective_rank_slope(base, difference, base_svd=decomposed)))
    if judged.rank:
        _aligned(row, strongest(difference, min(settings.top, judged.rank)), decomposed, settings.top)
    found = intruders(base, difference, settings.epsilon, settings.k, base_svd=decomposed)
    row["curves"]["intruders"] = {
        side: _intruding(row, side, one)
        for side, one in (("left", found.left), ("right", found.right))
        if one is not None
    }
    return row


def _intruding(row: dict[str, Any], side: str, found: IntruderSide) -> list[dict[str, Any]]:
    """Which of the tuned matrix's directions of a side are intruders; their number goes into the row."""
    row[f"intruders_{side}"] = found.count
    doubtful = int(found.ambiguous.sum())
    if doubtful:
        name = {"left": "output", "right": "input"}[side]
        row.setdefault("notes", []).append(
            f"Of {doubtful} of the tuned matrix's {name} directions it cannot be told whether they are "
            "intruders: the base repeats singular values, or the similarity is at the threshold."
        )
    return [
        {"index": int(at), "similarity": float(found.similarities[at]), "match": int(found.matches[at])}
        for at in found.indices.tolist()
    ]


def _judged(found: MatrixVerdict) -> dict[str, Any]:
    return {
        "rank": found.rank,
        "rank_low": found.rank_low,
        "rank_high": found.rank_high,
        "noise_edge": _number(found.edge),
        "verdict": found.statement,
        "p_value": _number(found.p_value),
        "judged": _plain(found.to_dict()),
    }


def verdict_of(row: Mapping[str, Any]) -> MatrixVerdict:
    """The verdict that a row was made from."""
    facts = {key: value for key, value in row["judged"].items() if key != "p_value"}
    for field in fields(MatrixVerdict):
        if facts[field.name] is None:
            facts[field.name] = math.nan
        elif isinstance(facts[field.name], list):
            facts[field.name] = tuple(facts[field.name])
    return MatrixVerdict(**facts)


def _sizes(seen: Spectrum) -> dict[str, Any]:
    return {
        "norm": seen.frobenius,
        "spectral": seen.spectral,
        "nuclear": seen.nuclear,
        "effective_rank": seen.effective_rank,
        "stable_rank": seen.stable_rank,
        "participation_ratio": seen.participation_ratio,
        "energy_rank_90": seen.energy_ranks[0.9],
        "energy_rank_99": seen.energy_ranks[0.99],
        "entropy": seen.entropy,
        "alpha": _number(seen.power_law.alpha),
        "alpha_ks": _number(seen.power_law.ks),
        "mp_spikes": seen.marchenko_pastur.spikes,
    }


def strongest(difference: LowRank | Tensor, count: int) -> LowRank:
    """The strongest singular directions of a difference, in factors."""
    if isinstance(difference, LowRank):
        return difference.truncate(count)
    wide = difference.float() if difference.dtype in HALF else difference
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    return LowRank.from_svd(left[:, :count], values[:count], right[:count])


def _aligned(row: dict[str, Any], directions: LowRank, base: BaseSVD, top: int) -> None:
    """Angles and overlap of the update's strongest directions with the base's, on both sides."""
    wanted = min(top, base.rank)
    angles = {}
    sides: tuple[tuple[Side, int], ...] = (("left", base.shape[0]), ("right", base.shape[1]))
    for side, width in sides:
        found = principal_angles(directions, base, side=side, top=(None, wanted)).flip(0)
        angles[side] = [float(angle) for angle in found]
        row[f"angle_{side}"] = angles[side][0]
        row[f"overlap_{side}"] = float(overlap(directions, base, directions.rank, wanted, side=side))
        row[f"chance_{side}"] = max(directions.rank, wanted) / width
    row["curves"]["angles"] = angles


def curve(values: Tensor, points: int = POINTS) -> dict[str, list[Any]]:
    """Singular values to draw: all of few, of many those at places that lie evenly on a logarithmic axis."""
    count = len(values)
    if count <= points:
        index = list(range(1, count + 1))
    else:
        steps = (math.exp(math.log(count) * k / (points - 1)) for k in range(points))
        index = sorted({min(count, max(1, round(step))) for step in steps})
    chosen = values[torch.tensor(index, device=values.device, dtype=torch.long) - 1] if index else values
    return {"index": index, "value": [float(f"{value:.6g}") for value in chosen.tolist()]}


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _plain(value: Any) -> Any:
    """JSON values; what is none becomes text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _number(value)
    return value if value is None or isinstance(value, str | int | bool) else str(value)
