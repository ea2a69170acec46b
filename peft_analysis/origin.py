"""Where an update comes from: what its matrices have in common, and what else it could be."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

from peft_analysis.matrix_verdict import MatrixVerdict, Statement
from peft_analysis.updates import WeightUpdate

Origin = Literal["adapter", "merged LoRA", "ReLoRA", "edit", "full fine-tune", "none", "unknown"]
FACTORED = "low rank"
PLAIN = ("difference", FACTORED, "bias", "sequence")
"""Kinds of entries that say nothing of what made them."""
FEW_RANKS, FEW_LAYERS, PART = 2, 8, 0.5
"""An edit: of at most that rank, or in one kind of matrix in at most so many blocks; in half or fewer."""
MOSTLY = 3.0
"""Statements of one sort outweigh those of the other from this ratio on."""
COMMON = 0.8
STEP_LEVEL = 1e-3


@dataclass
class Found:
    """An origin with its evidence."""

    statement: Statement
    origin: Origin
    rank: int | None = None
    stages: int | None = None
    evidence: list[str] = field(default_factory=list)


def origin_of(
    update: WeightUpdate,
    matrices: Mapping[str, MatrixVerdict],
    vectors: Sequence[str],
    stages: Sequence[Mapping[str, MatrixVerdict]],
) -> Found:
    """Weigh the statements about the matrices, which of them changed, and what is known of the files."""
    changed = {name: one for name, one in matrices.items() if one.statement != "none"}
    count = Counter(one.statement for one in changed.values())
    kinds = sorted({update.entries[name].kind for name in update} - set(PLAIN))
    told = [_counted(count, len(matrices))]
    if vectors:
        told.append(f"{len(vectors)} vectors (biases, norms) changed too, as {vectors[0]}")
    if kinds:
        return _adapter(kinds, changed, count, told)
    if not changed:
        return _unchanged(matrices, vectors, told)
    low, full = count["low rank"], count["full rank"]
    if len(stages) > 1:
        return _staircase(changed, stages, told)
    if low and low >= MOSTLY * full:
        return _low(update, changed, matrices, vectors, told)
    if full and full >= low:
        if low:
            told.append(f"{low} matrices look low rank; their tails may lie under the noise")
        return Found("full rank", "full fine-tune", evidence=told)
    if not low and not full:
        told += sorted({one.reason for one in changed.values()})[:2]
        return _hidden(changed, told)
    told.append("matrices of both sorts in like numbers: no one origin fits")
    return Found("unknown", "unknown", evidence=told)


def _counted(count: Counter[Statement], total: int) -> str:
    parts = [f"{number} {statement}" for statement, number in count.most_common()]
    same = total - sum(count.values())
    return f"of {total} matrices: " + ", ".join([*parts, *([f"{same} unchanged"] if same else [])])


def _adapter(
    kinds: list[str], changed: Mapping[str, MatrixVerdict], count: Counter[Statement], told: list[str]
) -> Found:
    told.append(f"read from an adapter's own files: {', '.join(kinds)}")
    rank, share = common_rank([one for one in changed.values() if one.statement == "low rank"])
    if rank is not None:
        told.append(f"rank {rank} in {share:.0%} of the low-rank matrices")
    statement: Statement = count.most_common(1)[0][0] if changed else "none"
    return Found(statement, "adapter", rank if statement == "low rank" else None, None, told)


def _unchanged(matrices: Mapping[str, MatrixVerdict], vectors: Sequence[str], told: list[str]) -> Found:
    if vectors:
        told.append("no matrix changed, but vectors did: biases, norms or scales were tuned")
        return Found("unknown", "unknown", evidence=told)
    rounded = sum(one.moved > 0 for one in matrices.values())
    if rounded:
        told.append(f"{rounded} matrices differ by one rounding of the base and by nothing else")
    return Found("none", "none", evidence=told)


def common_rank(low: Sequence[MatrixVerdict]) -> tuple[int | None, float]:
    """The rank that lies in most of the intervals (the commonest estimate among equals), and their share."""
    return _common(low) if low else (None, 0.0)


def _common(low: Sequence[MatrixVerdict]) -> tuple[int, float]:
    estimates = Counter(one.rank for one in low)
    fits = {rank: sum(one.rank_low <= rank <= one.rank_high for one in low) for rank in estimates}
    best = max(fits, key=lambda rank: (fits[rank], estimates[rank]))
    return best, fits[best] / len(low)


def _low(
    update: WeightUpdate,
    changed: Mapping[str, MatrixVerdict],
    matrices: Mapping[str, MatrixVerdict],
    vectors: Sequence[str],
    told: list[str],
) -> Found:
    low = [one for one in changed.values() if one.statement == "low rank"]
    rank, share = _common(low)
    full = [name for name, one in changed.items() if one.statement == "full rank"]
    if full:
        told.append(f"full rank in {', '.join(full[:3])}: perhaps saved whole beside a LoRA")
    few = is_few(update, changed, matrices)
    if few and not vectors:
        told.append(f"{few}; ranks {spelled(low)}")
        told.append("a LoRA on these matrices alone would look the same")
        return Found("low rank", "edit", rank, None, told)
    if share >= COMMON:
        told.append(f"rank {rank} fits {share:.0%} of the low-rank matrices")
    else:
        told.append(f"ranks {spelled(low)}: no common one, as with AdaLoRA or a pattern of ranks")
    merges = merged(low, told)
    if merges is None:
        merges = steps(low, rank, told)
    if merges is not None and merges > 1:
        if rank % merges == 0:
            told.append(f"rank {rank} is {merges} × {rank // merges}")
        return Found("low rank", "ReLoRA", rank, merges, told)
    return Found("low rank", "merged LoRA", rank, None, told)


def spelled(low: Sequence[MatrixVerdict]) -> str:
    """The ranks that were found: "8" or "3 … 12"."""
    ranks = sorted({one.rank for one in low})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} … {ranks[-1]}"


def place(name: str) -> tuple[str, int | None]:
    """A parameter's name without the number of its block, and that number.

    >>> place("transformer.h.11.mlp.c_proj.weight")
    ('transformer.h.#.mlp.c_proj.weight', 11)
    """
    number = re.search(r"(?<=\.)\d+(?=\.)", f".{name}.")
    if number is None:
        return name, None
    start, end = number.start() - 1, number.end() - 1
    return f"{name[:start]}#{name[end:]}", int(number.group())


def is_few(
    update: WeightUpdate, changed: Mapping[str, MatrixVerdict], matrices: Mapping[str, MatrixVerdict]
) -> str:
    """In words, how few and how small the changed matrices are, if they are as few as an edit's; else ""."""
    names = set(matrices) | (
        {name for name in update.base if len(update.base.shape(name)) >= 2} if update.base else set()
    )
    everywhere = Counter(place(name)[0] for name in names)
    kinds = Counter(place(name)[0] for name in changed)
    whole = sum(everywhere[kind] for kind in kinds)
    ranks = [one.rank_low for one in changed.values()]
    alone = len(names) == len(changed) == 1
    if not alone and len(changed) > PART * whole and not (len(changed) == 1 and len(names) > 2):
        return ""
    if max(ranks) <= FEW_RANKS or (not alone and len(kinds) == 1 and len(changed) <= FEW_LAYERS):
        kind = "its kind" if len(kinds) == 1 else "their kinds"
        return "one matrix was given" if alone else f"{len(changed)} of {whole} matrices of {kind} changed"
    return ""


def merged(low: Sequence[MatrixVerdict], told: list[str]) -> int | None:
    """How often the weights were merged and rounded, by the remainders; None if that does not show.

    A base off the tuned grid is rounded once by being brought to it; that is taken off where more than one
    rounding is seen.
    """
    known = [one for one in low if one.roundings_error < 0.2 and not one.exact]
    if not known:
        return None
    often = statistics.median(one.roundings for one in known)
    error = 1.5 * statistics.median(one.roundings_error for one in known) / math.sqrt(len(known))
    told.append(
        f"what is left has the energy of {often:.2f} ± {max(error, 0.01):.2f} roundings of the weights"
    )
    on_grid = statistics.median(one.same_grid for one in known) >= 0.5
    count = max(round(often), 1)
    if not on_grid and count > 1:
        told.append("one of them is taken for that of the base, brought to the tuned dtype before merging")
        count -= 1
    return count


def steps(low: Sequence[MatrixVerdict], rank: int, told: list[str]) -> int | None:
    """How many steps of equal width the spectra have, by the gaps between neighbours; None if none shows.

    The gaps log σᵢ − log σᵢ₊₁ at multiples of a stage's rank are compared with all others by Mann and
    Whitney's test, over the matrices of the common rank.
    """
    from scipy.stats import mannwhitneyu

    spectra = [one.singular_values for one in low if len(one.singular_values) == rank]
    gaps = [[math.log(a / b) for a, b in pairwise(values)] for values in spectra if values and values[-1] > 0]
    choices = [count for count in range(2, min(rank, 16) + 1) if rank % count == 0 and rank // count > 1]
    best: tuple[float, int] | None = None
    for count in choices:
        width = rank // count
        at = [gap for row in gaps for i, gap in enumerate(row, 1) if i % width == 0]
        other = [gap for row in gaps for i, gap in enumerate(row, 1) if i % width]
        if not at or not other:
            continue
        p = float(mannwhitneyu(at, other, alternative="greater").pvalue) * len(choices)
        if p < STEP_LEVEL and (best is None or p < best[0]):
            best = (p, count)
    if best is None:
        return None
    told.append(f"the spectra fall in {best[1]} steps of {rank // best[1]} values (p = {best[0]:.1g})")
    return best[1]


def _staircase(
    changed: Mapping[str, MatrixVerdict], stages: Sequence[Mapping[str, MatrixVerdict]], told: list[str]
) -> Found:
    """A sequence of updates: the ranks of the stages and of their sum."""
    each = [[one for one in stage.values() if one.statement != "none"] for stage in stages]
    full = sum(one.statement == "full rank" for stage in each for one in stage)
    low = sum(one.statement == "low rank" for stage in each for one in stage)
    ranks = [common_rank([one for one in stage if one.statement == "low rank"])[0] for stage in each]
    told.append(
        f"ranks of the {len(stages)} stages: {', '.join('?' if r is None else str(r) for r in ranks)}"
    )
    if full > low:
        told.append("the stages themselves are full rank: checkpoints along a fine-tune")
        return Found("full rank", "full fine-tune", None, len(stages), told)
    rank, _ = common_rank([one for one in changed.values() if one.statement == "low rank"])
    whole = sum(r or 0 for r in ranks)
    if rank is not None:
        told.append(f"the sum has rank {rank}; the stages' ranks add up to {whole}")
    return Found("low rank" if low else "unknown", "ReLoRA" if low else "unknown", rank, len(stages), told)


def _hidden(changed: Mapping[str, MatrixVerdict], told: list[str]) -> Found:
    """Every changed matrix is unknown."""
    ranks = Counter(one.rank for one in changed.values() if one.rank > 0)
    if ranks:
        rank, often = ranks.most_common(1)[0]
        told.append(f"the commonest number of values above the noise is {rank}, in {often} matrices")
    return Found("unknown", "unknown", evidence=told)
