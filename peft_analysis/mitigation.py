"""Scaling the intruder dimensions of an update, as a new update."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD, SVDCache
from peft_analysis.errors import UpdateError
from peft_analysis.intruders import check_settings, decomposed, fitting, judged
from peft_analysis.rotated import top_triplets
from peft_analysis.subspaces import Side
from peft_analysis.updates import WeightUpdate


def mitigate(
    update: WeightUpdate,
    factor: float | int = 0.75,
    *,
    epsilon: float | int = 0.5,
    k: int = 10,
    side: Side = "left",
    cache: SVDCache | None = None,
) -> WeightUpdate:
    """An update whose intruder dimensions are scaled (Shuttleworth et al. 2024, on causes of forgetting).

    Formula: ΔW' = ΔW + (λ − 1) Σⱼ σⱼ uⱼ vⱼᵀ over the intruders j of W + ΔW. The new difference is exact: a
    `LowRank` gains one rank for each intruder, where peft's `reduce_intruder_dimension` cuts it back to the
    old rank. Matrices are read, scanned and changed when they are asked for; give a cache if that will be
    more than once. Vectors, and matrices without intruders, stay as they are to the bit.

    Args:
        update: with its base.
        factor: λ: 1 leaves all as it is, 0 takes the intruders out of the tuned matrix.
        epsilon: the threshold of `intruders`.
        k: how many leading singular vectors to examine.
        side: whose singular vectors decide, "left" as in the paper, or "right".
        cache: keeps decompositions of the base.

    Raises:
        UpdateError: the update has no base; `factor` is not a finite number; as for `intruders`.
    """
    if not math.isfinite(factor):
        raise UpdateError(f"factor is {factor}; it is a finite number, 1 to change nothing, 0 to remove")
    if update.base is None:
        raise UpdateError("intruders are measured against the base; give it: read_update(base, tuned)")
    check_settings(epsilon, k, side)
    settings: dict[str, Any] = {"epsilon": epsilon, "k": k, "side": side}
    entries = dict(update.entries)
    for name in update.matrices():
        entry = entries[name]
        details = {**entry.details, "mitigated": {"factor": factor, **settings}}
        read = partial(_mitigated, update, name, factor, settings, cache)
        entries[name] = replace(entry, read=read, details=details, magnitude=None)
    return WeightUpdate(entries, base=update.base, source=f"{update.source}, intruders × {factor:g}")


def intruder_part(
    base_matrix: Tensor,
    update_matrix: Tensor | LowRank,
    epsilon: float | int = 0.5,
    k: int = 10,
    *,
    side: Side = "left",
    base_svd: BaseSVD | None = None,
    cache: SVDCache | None = None,
) -> LowRank:
    """What the intruders make of a tuned matrix (m, n): Σⱼ σⱼ uⱼ vⱼᵀ, of rank the number of intruders.

    Arguments and errors are those of `intruders`.
    """
    check_settings(epsilon, k, side)
    base_matrix, update_matrix = fitting(base_matrix, update_matrix)
    base = decomposed(base_matrix, base_svd, cache)
    found = top_triplets(base, update_matrix, min(k, base.S.numel()))
    chosen = judged(base, found, epsilon, side).indices
    dtype = torch.promote_types(base_matrix.dtype, torch.promote_types(update_matrix.dtype, torch.float32))
    weight, change = base_matrix.to(dtype), update_matrix.to(dtype)
    if base.shape[0] >= base.shape[1]:  # the right vectors lie in the span of V: u σ = (W + ΔW) v
        right = base.V.to(dtype) @ found.right[:, chosen].to(dtype)
        return LowRank(weight @ right + change @ right, right.mT)
    left = base.U.to(dtype) @ found.left[:, chosen].to(dtype)
    return LowRank(left, (weight.mT @ left + change.mT @ left).mT)


def _mitigated(
    update: WeightUpdate, name: str, factor: float | int, settings: dict[str, Any], cache: SVDCache | None
) -> LowRank | Tensor:
    """The difference of one parameter in its stored layout, with its intruders scaled."""
    value, entry = update[name], update.entries[name]
    part = intruder_part(update.base_matrix(name), update.matrix(name), cache=cache, **settings)
    if not part.rank:
        return value
    part = (part * (factor - 1)).to(value.dtype)
    part = part.mT if entry.layout == "in_out" else part
    if isinstance(value, LowRank):
        return value + part
    return value + part.dense().reshape(value.shape)
