"""What a run changed, read from the weights alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_analysis.base_svd import SVDCache
from peft_analysis.intruders import intruders
from peft_analysis.rank_path import rank_path
from peft_analysis.spectrum import spectrum
from peft_analysis.updates import Weights, WeightUpdate
from peft_analysis.verdict import verdict

EPSILON, TOP = 0.5, 10
PATH = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
MEANS = (
    "relative_norm", "effective_rank", "stable_rank", "energy_rank_90", "intruders_left", "intruders_right",
)  # fmt: skip
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def difference(
    base: Weights, folder: Path, stored: str, only: Sequence[str] | None = None, base_stored: str = "float16"
) -> WeightUpdate:
    """The update of a run as a checkpoint of a dtype gives it, with the states before each restart as stages.

    Args:
        base: the model before the run.
        folder: of the run.
        stored: the dtype in which the tuned model and its stages are taken to be saved.
        only: names of parameters; all that the run trained if not given.
        base_stored: the dtype of the base's file.
    """
    facts: dict[str, Any] = {"rounded": STORED[stored], "base_rounded": getattr(torch, base_stored)}
    paths = [*sorted(folder.glob("stage-*.safetensors")), folder / "tuned.safetensors"]
    states = [_rounded(load_file(path), STORED[stored]) for path in paths]
    names = [name for name in states[-1] if only is None or name in only]
    whole = {name: states[-1][name] - base[name].float() for name in names}
    stages = []
    for place, state in enumerate(states if len(states) > 1 else []):
        before = states[place - 1] if place else {name: base[name].float() for name in names}
        known = facts if place == 0 else {**facts, "base_rounded": STORED[stored]}
        start = base if place == 0 else _weights(before, base)
        stages.append(
            WeightUpdate.from_tensors({n: state[n] - before[n] for n in names}, base=start, **known)
        )
    found = WeightUpdate.from_tensors(whole, base=base, **facts)
    return WeightUpdate(found.entries, base=base, source=str(folder.name), stages=stages)


def read_run(base: Weights, folder: Path, names: Sequence[str], cache: SVDCache) -> dict[str, Any]:
    """The matrices of a run, and their means.

    Args:
        base: the model before the run.
        folder: of the run.
        names: the matrices to read: those that every method trains.
        cache: of the base's decompositions.
    """
    update = difference(base, folder, "float32", names)
    matrices = [_matrix(update, name, cache) for name in names]
    paths = [one["path"] for one in matrices]
    return {
        "matrices": matrices,
        **{name: statistics.fmean(one[name] for one in matrices) for name in MEANS},
        "rank_path": [round(statistics.fmean(p[at] - p[0] for p in paths), 4) for at in range(len(PATH))],
        "rank_slope": statistics.fmean(one["slope"] for one in matrices),
        "loses_rank": statistics.fmean(path[PATH.index(1.0)] < path[0] for path in paths),
    }


def judge_run(base: Weights, folder: Path, names: Sequence[str], *, whole: bool) -> dict[str, Any]:
    """The verdicts on a run saved in float32 and in bfloat16: on all that it trained, or on `names` alone."""
    only = None if whole else names
    return {"verdicts": {kind: _verdict(difference(base, folder, kind, only), names) for kind in STORED}}


def _matrix(update: WeightUpdate, name: str, cache: SVDCache) -> dict[str, Any]:
    value, base = update.matrix(name), update.base_matrix(name).float()
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is no dense difference")
    seen = spectrum(value, base=base)
    new = intruders(base, value, EPSILON, TOP, cache=cache)
    path = rank_path(base, value, PATH, cache=cache)
    left, right = new.left, new.right
    return {
        "parameter": name,
        "shape": list(value.shape),
        "relative_norm": seen.frobenius / float(torch.linalg.matrix_norm(base)),
        "relative_spectral": seen.relative["spectral"] if seen.relative else None,
        "effective_rank": seen.effective_rank,
        "stable_rank": seen.stable_rank,
        "energy_rank_90": seen.energy_ranks[0.9],
        "intruders_left": left.count if left else 0,
        "intruders_right": right.count if right else 0,
        "least_similarity": float(left.similarities.min()) if left else None,
        "path": [round(float(rank), 4) for rank in path.effective_rank],
        "slope": round(float(path.slope[0]), 4),
    }


def _verdict(update: WeightUpdate, names: Sequence[str]) -> dict[str, Any]:
    found = verdict(update)
    ranks = [found.matrices[name] for name in names]
    return {
        "statement": found.statement,
        "origin": found.origin,
        "rank": found.rank,
        "stages": found.stages,
        "p_value": found.p_value,
        "statements": dict(Counter(one.statement for one in ranks)),
        "ranks": [[one.rank, one.rank_low, one.rank_high] for one in ranks],
        "evidence": list(found.evidence),
    }


def _rounded(state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to(dtype).float() for name, value in state.items()}


def _weights(state: dict[str, Tensor], like: Weights) -> Weights:
    """The state before a stage, with the layouts of the base."""
    return Weights(
        {name: value.clone for name, value in state.items()},
        shapes={name: value.shape for name, value in state.items()},
        dtypes={name: value.dtype for name, value in state.items()},
        layouts={name: like.layout(name) for name in state},
        source="the stage before",
    )
