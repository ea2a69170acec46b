"""What an update is, and where it comes from: an adapter, a merged LoRA, a fine-tune, ReLoRA, an edit."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.matrix_verdict import MatrixVerdict, Statement, judge_matrix
from peft_analysis.origin import Origin, origin_of
from peft_analysis.remainder import spacing
from peft_analysis.updates import WeightUpdate

__all__ = ["MatrixVerdict", "Verdict", "combined", "verdict"]


@dataclass(frozen=True)
class Verdict:
    """What an update is as a whole.

    Attributes:
        statement: "low rank", "full rank", "none" or "unknown".
        origin: "adapter", "merged LoRA", "ReLoRA", "edit", "full fine-tune", "none" or "unknown": what the
            evidence fits best.
        p_value: of what the statement denies, all matrices that say so together (`combined`).
        rank: the one rank that fits most of the low-rank matrices' intervals, or None.
        stages: how many merges it was made of, where that shows; else None.
        matrices: by parameter name.
        evidence: what speaks for the origin, and what else it could be, in words.
    """

    statement: Statement
    origin: Origin
    p_value: float
    rank: int | None
    stages: int | None
    matrices: Mapping[str, MatrixVerdict]
    evidence: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        """How many matrices each statement is made of."""
        return dict(Counter(one.statement for one in self.matrices.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with None for what is not known."""
        return {
            "statement": self.statement,
            "origin": self.origin,
            "p_value": self.p_value if math.isfinite(self.p_value) else None,
            "rank": self.rank,
            "stages": self.stages,
            "counts": self.counts,
            "evidence": list(self.evidence),
            "matrices": {name: one.to_dict() for name, one in self.matrices.items()},
        }

    def __str__(self) -> str:
        rank = f" (rank {self.rank})" if self.rank else ""
        p = self.p_value
        chance = "no test" if math.isnan(p) else "p < 1e-16" if p < 1e-16 else f"p = {p:.2g}"
        lines = [f"{self.origin}: {self.statement}{rank}, {chance}"]
        return "\n".join([*lines, *(f"- {line}" for line in self.evidence)])


def verdict(
    update: WeightUpdate,
    *,
    level: float = 0.01,
    generator: torch.Generator | None = None,
    known: Mapping[str, MatrixVerdict] | None = None,
) -> Verdict:
    """Say whether an update is of low or full rank, and what made it.

    Each matrix is tested against two nulls: *of the rank found, and rounding* (what is left after the
    leading singular directions follows the grid of the dtype), and *going on under the noise* (the leading
    values' own power law). Where neither is refused the matrix is "unknown": the noise hides it. The origin
    follows from the statements, from how far one rank fits all matrices, from which matrices changed, and
    from how many roundings the remainder holds: a weight that was merged and rounded k times carries k.

    Args:
        update: with its base, where there is one: without it the size of rounding is not known, and less can
            be told.
        level: of each test.
        generator: of the simulated noise; seed 0 if not given.
        known: verdicts of matrices that have been reached before, by name.

    Raises:
        UpdateError: the update is empty, or a difference is not finite.

    Example:
        >>> from manifolds import LowRank
        >>> factors = LowRank.from_factors(torch.ones(6, 1), torch.ones(1, 5))
        >>> found = verdict(WeightUpdate.from_tensors({"a.weight": factors}, kind="lora"))
        >>> found.statement, found.origin, found.rank, found.p_value
        ('low rank', 'adapter', 1, 0.0)
    """
    if not len(update):
        raise UpdateError(f"{update.source} holds no parameter; a verdict needs at least one")
    if not 0 < level < 0.5:
        raise UpdateError(f"level is {level}; it is the level of a test, between 0 and 0.5")
    generator = generator or torch.Generator().manual_seed(0)
    known = known or {}
    matrices = {
        name: known[name] if name in known else judge_matrix(update, name, level=level, generator=generator)
        for name in update.matrices()
    }
    stages = [
        {
            name: judge_matrix(stage, name, level=level, generator=generator)
            for name in stage.matrices()
            if name in matrices and matrices[name].statement != "none"
        }
        for stage in update.stages
    ]
    vectors = [name for name in update if name not in matrices and _moved(update, name)]
    found = origin_of(update, matrices, vectors, stages)
    judged = [*matrices.values(), *(one for stage in stages for one in stage.values())]
    said = [one.p_value for one in judged if one.statement == found.statement]
    return Verdict(
        statement=found.statement,
        origin=found.origin,
        p_value=combined(said),
        rank=found.rank,
        stages=found.stages,
        matrices=matrices,
        evidence=tuple(found.evidence),
    )


def combined(p_values: Sequence[float]) -> float:
    """One p-value of several that may depend on one another: the Cauchy combination (Liu and Xie, 2020).

    NaN where none is known.

    >>> round(combined([0.3, 0.3]), 6), combined([0.5, 1e-12]) < 1e-11
    (0.3, True)
    """
    given = [p for p in p_values if not math.isnan(p)]
    if not given:
        return math.nan
    if min(given) == 0:
        return 0.0
    if min(given) < 1e-15:  # where tan(π(1/2 − p)) is 1 / (π p)
        return min(1.0, len(given) / sum(1 / max(p, 1e-300) for p in given))
    mean = sum(math.tan(math.pi * (0.5 - min(p, 1 - 1e-12))) for p in given) / len(given)
    return 0.5 - math.atan(mean) / math.pi


def _moved(update: WeightUpdate, name: str) -> bool:
    """Whether a vector changed by more than one rounding of its base."""
    value, rounded = update[name], update.entries[name].rounded
    if isinstance(value, LowRank):
        return True
    if not bool(torch.isfinite(value).all()):
        raise UpdateError(f"{name}: the difference has values that are not finite")
    if update.base is None or name not in update.base or rounded is None:
        return bool((value != 0).any())
    base = update.base[name].to(value)
    if base.shape != value.shape:
        return bool((value != 0).any())
    off = (base.to(rounded).double() - base.double() - value.double()).abs()
    return bool((off > spacing(base, torch.float32)).any())
