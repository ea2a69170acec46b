"""A LoRA on a parameter that stacks the matrices of several experts: ΔWₑ = s Bₑ Aₑ."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part

DOWN, UP = "lora_A.weight", "lora_B.weight"


def are_in(part: Part) -> bool:
    """Whether a part is for several experts at once, as peft's `target_parameters` makes them."""
    return getattr(part.layer, "num_experts", 1) > 1


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of all experts as one dense tensor, (expert, in, out) or (expert, out, in) as it is stored.

    A stacks the experts' factors by rows, expert by expert; the columns of B run through the experts first.

    Raises:
        UpdateError: for factors that do not fit each other or the base.
    """
    part.need(DOWN, UP)
    experts = part.layer.num_experts
    (rows, inputs), (out, columns) = (part.tensors[role].shape for role in (DOWN, UP))
    if part.weight not in foundation or foundation.weights is None:
        raise UpdateError(f"{part.weight} is not in {foundation.source}")
    shape = foundation.weights.shape(part.weight)
    turned = bool(part.layer._did_swap_in_out_features)
    expected = (experts, out, inputs) if turned else (experts, inputs, out)
    if rows != columns or rows % experts or tuple(shape) != expected:
        raise UpdateError(
            f"{part.weight} has shape {tuple(shape)} in {foundation.source}; the adapter's is {expected}, "
            f"with {rows} rows in A and {columns} columns in B"
        )
    scaling = float(part.scaling if part.scaling is not None else 1.0)
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_delta, part, foundation, scaling, turned),
        kind="lora",
        layout="out_in",
        details={"rank": rows // experts, "scaling": scaling, "experts": experts},
    )


def _delta(
    part: Part, foundation: Foundation, scaling: float, turned: bool, current: Read, start: Read
) -> Tensor:
    experts = part.layer.num_experts
    down = part.read(DOWN, foundation).unflatten(0, (experts, -1))
    up = part.read(UP, foundation).unflatten(1, (-1, experts))
    return scaling * torch.einsum("ore,eri->eoi" if turned else "ore,eri->eio", up, down)
