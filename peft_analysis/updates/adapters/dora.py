"""DoRA (Liu et al. 2024): W' = m (W + s B A) / ‖W + s B A‖, the norm of each output's row."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters import lora
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation, wide
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.entry import Layout

MAGNITUDE = ("lora_magnitude_vector.weight", "lora_magnitude_vector")
ROLES = lora.ROLES | frozenset(MAGNITUDE)


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of one module: dense, because every row is scaled; with the trained magnitude.

    An embedding's magnitude belongs to the columns of the table (tokens, dim), as peft has it.

    Raises:
        UpdateError: for a factor or a magnitude that is missing or does not fit.
    """
    role = next((role for role in MAGNITUDE if role in part.tensors), None)
    if role is None:
        raise UpdateError(f"{part.path}: lora_magnitude_vector is missing")
    shape, layout = lora.stored_shape(part, foundation)
    embedding = lora.EMBEDDING[0] in part.tensors
    out = shape[1] if embedding or layout == "in_out" else shape[0]
    if part.tensors[role].shape.numel() != out:
        raise UpdateError(
            f"{part.path}: the magnitude has {part.tensors[role].shape.numel()} numbers for {out} outputs"
        )
    scaling = lora.scaling_in(part)
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_delta, part, foundation, role, scaling, layout),
        kind="dora",
        layout=layout,
        needs_base=True,
        details=lora.details(part),
        magnitude=partial(_magnitude, part, foundation, role),
    )
    yield from lora.bias(part, foundation)


def _delta(
    part: Part,
    foundation: Foundation,
    role: str,
    scaling: float,
    layout: Layout,
    current: Read,
    start: Read,
) -> Tensor:
    turned = layout == "in_out" or lora.EMBEDDING[0] in part.tensors
    product = (lora.factors(part, foundation) * scaling).dense()

    def rows(weight: Tensor) -> Tensor:
        return (weight.mT if turned else weight.flatten(1)).to(product.dtype)

    base = start()
    weight = current()
    norm = (rows(base) + product).norm(dim=1)
    magnitude = _magnitude(part, foundation, role).to(product.dtype)
    factor = (magnitude / norm).unsqueeze(1)
    if not bool(torch.isfinite(factor).all()):
        raise UpdateError(f"{part.weight}: W + s B A has a row of zeros, whose direction is not defined")
    # (f − 1) W + f s B A keeps the digits of a small change, which f (W + s B A) − W would lose.
    change = (factor - 1) * rows(weight) + factor * product
    return change.mT if turned else change.reshape(weight.shape)


def _magnitude(part: Part, foundation: Foundation, role: str) -> Tensor:
    return wide(part.read(role, foundation)).flatten()
