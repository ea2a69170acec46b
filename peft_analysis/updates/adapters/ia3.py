"""(IA)³ (Liu et al. 2022): outputs, or inputs of feed-forward layers, times a trained vector."""

import re
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.entry import Layout

ROLES = frozenset({"ia3_l"})


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of one module: W (l − 1), and of its bias where the outputs are scaled.

    Raises:
        UpdateError: without a base, or for a vector that does not fit it.
    """
    stored = part.tensors["ia3_l"]
    if foundation.weights is None:
        raise UpdateError(f"{part.weight}: (IA)³ scales given weights; give the base")
    if part.weight not in foundation:
        raise UpdateError(f"{part.weight} is not in {foundation.source}")
    shape, layout = foundation.weights.shape(part.weight), foundation.weights.layout(part.weight)
    outputs = scales_outputs(part)
    _along(stored.shape.numel(), shape, layout, outputs, part)
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_weight, part, foundation, layout, outputs),
        kind="ia3",
        layout=layout,
        needs_base=True,
        details={"scaled": "outputs" if outputs else "inputs"},
    )
    if outputs and part.bias in foundation:
        yield Change(
            name=part.bias,
            shape=torch.Size((stored.shape.numel(),)),
            delta=partial(_bias, part, foundation),
            kind="ia3",
            layout="other",
            needs_base=True,
        )


def scales_outputs(part: Part) -> bool:
    """Whether the vector scales a layer's outputs; a feed-forward layer's scales the inputs."""
    if part.layer is not None:
        return not part.layer.is_feedforward
    feedforward = part.settings.get("feedforward_modules") or []
    if isinstance(feedforward, str):
        return re.fullmatch(feedforward, part.path) is None
    return not any(part.path.endswith(name) for name in feedforward)


def _along(numbers: int, shape: torch.Size, layout: Layout, outputs: bool, part: Part) -> torch.Size:
    """The shape in which the vector multiplies the stored weight."""
    side = 0 if outputs == (layout != "in_out") else 1
    groups = numbers // shape[side] if shape[side] else 0
    if numbers != shape[side] * max(groups, 1) or (groups != 1 and (outputs or len(shape) < 3)):
        raise UpdateError(
            f"{part.weight} has shape {tuple(shape)}; the adapter's vector has {numbers} numbers"
        )
    ones = [1] * len(shape)
    ones[side] = shape[side]
    return torch.Size(ones)


def _weight(
    part: Part, foundation: Foundation, layout: Layout, outputs: bool, current: Read, start: Read
) -> Tensor:
    weight = current()
    vector = part.read("ia3_l", foundation).flatten()
    view = _along(vector.numel(), weight.shape, layout, outputs, part)
    if vector.numel() == view.numel():
        return weight * (vector.reshape(view) - 1)
    # A grouped convolution's kernel holds the inputs of one group, each group for its share of the outputs.
    groups = vector.numel() // weight.shape[1]
    rows = vector.reshape(groups, weight.shape[1]).repeat_interleave(weight.shape[0] // groups, 0)
    return weight * (rows.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2)) - 1)


def _bias(part: Part, foundation: Foundation, current: Read, start: Read) -> Tensor:
    bias = current()
    return bias * (part.read("ia3_l", foundation).reshape(bias.shape) - 1)
