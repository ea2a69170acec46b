"""A run that merges again and again (ReLoRA, Lialin et al. 2023), read as one update with its stages."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.names import Chosen
from peft_analysis.updates.pairs import matched, read_pair, weights_of_pair
from peft_analysis.updates.read import is_full, read_update
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights


def read_sequence(base: Any, tuned: Sequence[Any], *, chosen: Chosen | None = None) -> WeightUpdate:
    """The sum of updates that follow one another, each upon the weights that the one before left.

    `stages` keeps them: `stages[i]` is what the i-th step changed. Where the run ends in a full checkpoint,
    the whole is that checkpoint minus the base, with no rounding but its own; else it is the sum of the
    stages, a `LowRank` where all of them are.

    Args:
        base: as in `read_update`; None where every step is an adapter or an update that needs no base.
        tuned: full checkpoints, adapters, updates or their files, in the order of the run.
        chosen: which parameters.

    Raises:
        UpdateError: nothing to read, or a step that cannot be read; the message says which.
    """
    chosen = chosen or Chosen()
    if not tuned:
        raise UpdateError("the sequence is empty; give at least one checkpoint, adapter or update")
    start = state = None if base is None else Weights.of(base)
    stages: list[WeightUpdate] = []
    last: Weights | None = None
    for number, step in enumerate(tuned, start=1):
        try:
            last = None
            if state is not None and is_full(step):
                state, theirs = weights_of_pair(state, step)
                stage = read_pair(state, theirs, chosen=chosen)
                names, _ = matched(state, theirs, chosen)
                last = state = theirs.renamed({other: name for name, other in names.items()})
            else:
                stage = read_update(
                    base if number == 1 else state, step, only=chosen.only, without=chosen.without
                )
                state = None if state is None else state.plus(stage)
        except UpdateError as error:
            raise UpdateError(f"step {number} of {len(tuned)}: {error}") from error
        stages.append(stage)
    source = f"{len(stages)} steps, the last of them {stages[-1].source}"
    if start is not None and last is not None:
        whole = read_pair(start, last, chosen=chosen)
        entries = {name: _noted(entry, stages, name) for name, entry in whole.entries.items()}
        return WeightUpdate(entries, base=start, source=source, stages=stages, skipped=whole.skipped)
    names_of_all = list(dict.fromkeys(name for stage in stages for name in stage))
    entries = {name: _summed(stages, name) for name in names_of_all}
    return WeightUpdate(entries, base=start, source=source, stages=stages)


def _summed(stages: Sequence[WeightUpdate], name: str) -> Entry:
    entries = [stage.entries[name] for stage in stages if name in stage]
    first = entries[0]
    if any(entry.shape != first.shape for entry in entries):
        raise UpdateError(
            f"{name} has the shapes {[tuple(e.shape) for e in entries]} in the steps of one run"
        )
    rounded = [entry.rounded for entry in entries if entry.rounded is not None]
    whole = replace(
        first,
        read=partial(_sum, entries),
        rounded=rounded[-1] if rounded else None,
        base_rounded=next((e.base_rounded for e in entries if e.base_rounded is not None), None),
        details={},
        magnitude=None,
    )
    return _noted(whole, stages, name)


def _noted(entry: Entry, stages: Sequence[WeightUpdate], name: str) -> Entry:
    """The entry of the whole, with what its stages were."""
    found = [stage.entries[name] for stage in stages if name in stage]
    details = {
        **entry.details,
        "stages": [number for number, stage in enumerate(stages) if name in stage],
        "stage_kinds": [part.kind for part in found],
        "stage_ranks": [part.details.get("rank") for part in found],
    }
    return replace(entry, kind="sequence", details=details)


def _sum(entries: Sequence[Entry]) -> LowRank | Tensor:
    values = [entry.read() for entry in entries]
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    values = [value.to(values[0].device, dtype) for value in values]
    if all(isinstance(value, LowRank) for value in values):
        return LowRank.concatenate([value for value in values if isinstance(value, LowRank)])
    shape = entries[0].shape
    total = torch.zeros(shape, dtype=dtype, device=values[0].device)
    for value in values:
        total += value.dense().reshape(shape) if isinstance(value, LowRank) else value
    return total
