"""What peft's sum of factors misses."""

import math
from collections.abc import Sequence

from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.merging.shares import Share, alike, shares_of
from peft_analysis.updates.weight_update import WeightUpdate


def linear_merge_error(
    updates: Sequence[WeightUpdate], weights: Sequence[float | int] | Tensor | None = None
) -> dict[str, float]:
    """How far peft's `combination_type="linear"` is from the sum of LoRAs, relative to the sum, by parameter.

    It adds the factors, (Σ √|cᵢ| Bᵢ)(Σ ±√|cᵢ| Aᵢ) with cᵢ = wᵢ sᵢ and s the scaling. That has a cross term
    for every pair of adapters beside Σ cᵢ Bᵢ Aᵢ: for two adapters with nothing in common it is about as large
    as the sum. `merge` does not offer it.

    Scalings are those of `Entry.details["scaling"]`, and 1 where that is not known. They make a difference
    only where they are not the same in all updates.

    Raises:
        UpdateError: a matrix that is dense, or of another stored rank than in another update, which peft
            refuses; weights that do not fit; NaN.
    """
    shares = shares_of(updates, weights)
    names = dict.fromkeys(name for update in updates for name in update.matrices())
    return {name: _error(name, [share for share in shares if name in share]) for name in names}


def _error(name: str, shares: Sequence[Share]) -> float:
    lefts, rights, parts = [], [], []
    for share in shares:
        share.read(name)
        value, entry = share.update.matrix(name), share.update.entries[name]
        if not isinstance(value, LowRank):
            raise UpdateError(f"{name} is dense in {share}; peft's linear merge is one of LoRAs")
        scaling = float(entry.details.get("scaling", 1.0))
        size, plus = math.sqrt(abs(share.weight * scaling)), math.copysign(1.0, share.weight * scaling)
        bare = value / scaling if scaling else value * 0.0
        if entry.layout == "other":  # an embedding is stored with its columns first
            bare = LowRank(value.left, value.right / scaling if scaling else value.right * 0.0)
        lefts.append(bare.left * size)
        rights.append(bare.right * (plus * size))
        parts.append(value * share.weight)
    ranks = [part.rank for part in parts]
    if len(set(ranks)) > 1:
        raise UpdateError(f"{name} has stored ranks {ranks}; peft's linear merge needs equal ones")
    factors = alike([LowRank(left, right) for left, right in zip(lefts, rights, strict=True)], name)
    added = LowRank(
        sum((part.left for part in factors[1:]), factors[0].left),
        sum((part.right for part in factors[1:]), factors[0].right),
    )
    exact = LowRank.concatenate(alike(parts, name))
    size_of_sum = float(exact.norm())
    return float((added - exact.to(added.dtype)).norm()) / size_of_sum if size_of_sum else math.nan
