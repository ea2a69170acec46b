"""Where a model was changed, how much and of what rank; and whether the places are those of an edit."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.noise import RankEstimate, true_rank
from peft_analysis.spectrum import singular_values
from peft_analysis.updates import Entry, WeightUpdate

GAP = 0.01
"""So much smaller than the last component must be what is called an error of float32."""

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class Place:
    """One changed matrix.

    Attributes:
        parameter: its name. block: the first number in the name, None without one. role: the name with that
            number replaced by a star.
        norm: Frobenius norm of the difference. relative: over the base's, NaN without a base.
        rank: of the difference, with its interval. full: min(m, n).
    """

    parameter: str
    block: int | None
    role: str
    norm: float
    relative: float
    rank: RankEstimate
    full: int


def role_of(parameter: str) -> tuple[str, int | None]:
    """A name with its first number replaced by a star, and that number.

    >>> role_of("transformer.h.3.mlp.c_proj.weight")
    ('transformer.h.*.mlp.c_proj.weight', 3)
    """
    found = NUMBER.search(parameter)
    if found is None:
        return parameter, None
    return parameter[: found.start()] + "*" + parameter[found.end() :], int(found[0])


def places(update: WeightUpdate, generator: torch.Generator | None = None) -> list[Place]:
    """Every matrix whose difference is not zero, read one after the other."""
    found = []
    for name in update.matrices():
        difference = update.matrix(name)
        norm = float(difference.norm())
        if norm == 0:
            continue
        has_base = update.base is not None and name in update.base
        base = update.base_matrix(name) if has_base else None
        entry = update.entries[name]
        rank = _rank(difference, base, entry, generator)
        size = float(base.double().norm()) if base is not None else float("nan")
        role, block = role_of(name)
        relative = norm / size if size > 0 else float("nan")
        found.append(Place(name, block, role, norm, relative, rank, min(difference.shape)))
    return found


def _rank(
    difference: LowRank | Tensor, base: Tensor | None, entry: Entry, generator: torch.Generator | None
) -> RankEstimate:
    """The rank, without a simulation of rounding where there is none to be seen.

    An edit that was computed in float32 has components of the size of float32's own errors; where nothing
    else is left of the spectrum, and two or more of them, what stands above is the rank. (Noise of a square
    matrix has one tiny singular value by itself.)
    """
    if isinstance(difference, Tensor):
        values = singular_values(difference)
        floor = max(difference.shape) * torch.finfo(torch.float32).eps * float(values[0])
        count = int((values > floor).sum())
        if count + 2 <= len(values) and float(values[count]) < GAP * float(values[count - 1]):
            reason = "all other components are as small as float32's own errors"
            return RankEstimate(count, count, count, floor, True, reason, "float arithmetic")
    return true_rank(
        difference,
        base=base.to(difference.device) if base is not None and isinstance(difference, Tensor) else None,
        rounded=entry.rounded,
        base_rounded=entry.base_rounded,
        generator=generator,
    )


def changed_vectors(update: WeightUpdate) -> list[str]:
    """Biases, norms and other vectors whose difference is not zero."""
    matrices = set(update.matrices())
    return [name for name in update if name not in matrices and bool((update.dense(name) != 0).any())]


def spread(found: Sequence[Place], vectors: Sequence[str], update: WeightUpdate) -> str:
    """Why the places are not those of an edit of facts; empty if they are.

    Editors change one kind of matrix in one block or in a few: ROME 1 of 48, MEMIT 5 of 48 or 6 of 28.
    """
    if not found:
        return "no matrix was changed"
    if vectors:
        return f"{len(vectors)} vectors were changed too (such as {vectors[0]}); editors of facts leave them"
    roles = sorted({place.role for place in found})
    if len(roles) > 1:
        return (
            f"{len(roles)} kinds of matrices were changed ({', '.join(roles[:3])}); editors change one kind"
        )
    like = [name for name in update.matrices() if role_of(name)[0] == roles[0]]
    known = list(update.base) if update.base is not None else like
    alike = [name for name in known if role_of(name)[0] == roles[0]]
    if len(alike) > 2 and len(found) > 0.6 * len(alike):
        return f"{len(found)} of {len(alike)} matrices {roles[0]} were changed; editors change a few"
    return ""


def dense(difference: LowRank | Tensor) -> Tensor:
    """A difference as a tensor, in float32 or wider."""
    value = difference.dense() if isinstance(difference, LowRank) else difference
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
