"""LoHa (Hyeon-Woo et al. 2022, FedPara): ΔW = s (B₁A₁) ∘ (B₂A₂), entry by entry."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part, stored_as
from peft_analysis.updates.adapters.settings import scaling_of

FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
ROLES = frozenset({*FACTORS, "hada_t1", "hada_t2"})


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of one module; low rank, of rank r², where that is less than full.

    Raises:
        UpdateError: for a factor that is missing or does not fit.
    """
    part.need(*FACTORS, *(("hada_t1", "hada_t2") if "hada_t1" in part.tensors else ()))
    kernel = "hada_t1" in part.tensors
    first, last = part.tensors["hada_w1_a"].shape, part.tensors["hada_w1_b"].shape
    rank, out = (first[0], first[1]) if kernel else (first[1], first[0])
    inputs = last[1] * part.tensors["hada_t1"].shape[2:].numel() if kernel else last[1]
    if min(rank, out, inputs) == 0 or any(rank not in part.tensors[role].shape for role in FACTORS):
        shapes = [tuple(part.tensors[role].shape) for role in FACTORS]
        raise UpdateError(f"{part.path}: factors of shapes {shapes} have no common rank of 1 or more")
    shape, layout = stored_as(part, foundation, out, inputs)
    scaling = (
        part.scaling
        if part.scaling is not None
        else scaling_of(part.settings, part.patterned, rank, key="alpha")
    )
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_delta, part, foundation, scaling, shape),
        kind="loha",
        layout=layout,
        details={"rank": rank, "scaling": scaling},
    )


def _delta(
    part: Part, foundation: Foundation, scaling: float, shape: torch.Size, current: Read, start: Read
) -> LowRank | Tensor:
    left, right = _pair(part, foundation, "1")
    other_left, other_right = _pair(part, foundation, "2")
    if left.shape[1] * other_left.shape[1] < min(left.shape[0], right.shape[1]):
        # (B₁A₁) ∘ (B₂A₂) is one product: of the row-wise Kronecker products, and the column-wise ones.
        return LowRank(
            scaling * (left.unsqueeze(2) * other_left.unsqueeze(1)).flatten(1),
            (right.unsqueeze(1) * other_right.unsqueeze(0)).flatten(0, 1),
        )
    return (scaling * (left @ right) * (other_left @ other_right)).reshape(shape)


def _pair(part: Part, foundation: Foundation, which: str) -> tuple[Tensor, Tensor]:
    """B and A of one of the two products; a convolution's kernel goes with A."""
    first, last = (part.read(f"hada_w{which}_{end}", foundation) for end in "ab")
    if f"hada_t{which}" not in part.tensors:
        return first, last
    kernel = part.read(f"hada_t{which}", foundation)
    return first.mT, torch.einsum("pqkl,qi->pikl", kernel, last).flatten(1)
