"""LoRA (Hu et al. 2021): ΔW = s B A, in every kind of layer that peft adapts so."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters import experts
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.adapters.settings import alpha_of, scaling_of
from peft_analysis.updates.entry import Layout

LINEAR = ("lora_A.weight", "lora_B.weight")
EMBEDDING = ("lora_embedding_A", "lora_embedding_B")
ROLES = frozenset({*LINEAR, *EMBEDDING, "lora_B.bias"})


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of the weight of one module, and of its bias where the LoRA has one.

    Raises:
        UpdateError: for a factor that is missing, of rank 0, or does not fit the other or the base.
    """
    if experts.are_in(part):
        yield from experts.changes(part, foundation)
        return
    shape, layout = stored_shape(part, foundation)
    scaling = scaling_in(part)
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_product, part, foundation, scaling, layout),
        kind="lora",
        layout=layout,
        details=details(part),
    )
    yield from bias(part, foundation)


def bias(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of the bias, s times that of B, where B has one.

    Raises:
        UpdateError: where the base has no bias to add it to.
    """
    if "lora_B.bias" not in part.tensors:
        return
    if foundation.weights is not None and part.bias not in foundation:
        raise UpdateError(
            f"{part.bias} is not in {foundation.source}, so that the adapter's bias has no place"
        )
    scaling = scaling_in(part)
    yield Change(
        name=part.bias,
        shape=part.tensors["lora_B.bias"].shape,
        delta=partial(_bias, part, foundation, scaling),
        kind="lora",
        layout="other",
        details={"scaling": scaling},
    )


def roles(part: Part) -> tuple[str, str]:
    """The names of A and B: those of embeddings, or those of all other layers."""
    found = EMBEDDING if any(role in part.tensors for role in EMBEDDING) else LINEAR
    part.need(*found)
    return found


def scaling_in(part: Part) -> float:
    """The factor s of a module."""
    rank = part.tensors[roles(part)[0]].shape[0]
    scaling = part.scaling if part.scaling is not None else scaling_of(part.settings, part.patterned, rank)
    return scaling * part.times


def details(part: Part) -> dict[str, Any]:
    """Rank, α and s of a module, for `Entry.details`."""
    if part.layer is not None:
        alpha = float(part.layer.lora_alpha[part.adapter])
    else:
        alpha = alpha_of(part.settings, part.patterned)
    return {"rank": part.tensors[roles(part)[0]].shape[0], "alpha": alpha, "scaling": scaling_in(part)}


def factors(part: Part, foundation: Foundation) -> LowRank:
    """B A as (out, in), the factors of a convolution flattened."""
    down, up = roles(part)
    right = part.read(down, foundation).flatten(1)
    left = part.read(up, foundation).flatten(1)
    wide = torch.promote_types(left.dtype, right.dtype)
    return LowRank(left.to(wide), right.to(wide))


def stored_shape(part: Part, foundation: Foundation) -> tuple[torch.Size, Layout]:
    """How the model stores the adapted weight: as the base says, else as the factors and settings let guess.

    Raises:
        UpdateError: if the factors do not fit each other, the base has no such parameter, or one of another
            shape.
    """
    columns, rows = _sizes(part)
    embedding = EMBEDDING[0] in part.tensors
    if foundation.weights is None:
        turned = bool(part.settings.get("fan_in_fan_out")) and len(columns) == 1
        shape = (*columns, rows) if embedding or turned else (rows, *columns)
        return torch.Size(shape), "other" if embedding else "in_out" if turned else "out_in"
    if part.weight not in foundation:
        raise UpdateError(f"{part.weight} is not in {foundation.source}")
    shape, layout = foundation.weights.shape(part.weight), foundation.weights.layout(part.weight)
    expected = (*columns, rows) if embedding or layout == "in_out" else (rows, *columns)
    if tuple(shape) != expected:
        raise UpdateError(
            f"{part.weight} has shape {tuple(shape)} in {foundation.source}; the adapter's is {expected}"
        )
    return shape, "other" if embedding else layout


def _sizes(part: Part) -> tuple[tuple[int, ...], int]:
    """The inputs of A, with the kernel of a convolution, and the outputs of B."""
    a, b = (part.tensors[role].shape for role in roles(part))
    if min((*a, *b), default=0) == 0 or len(a) < 2 or len(b) < 2:
        raise UpdateError(
            f"{part.path}: factors of shapes {tuple(a)} and {tuple(b)}: rank 0, or saved while they were "
            "sharded over devices; such an adapter changes nothing"
        )
    if b[1] != a[0] and len(a) > 2 and a[0] % b[1] == 0:
        raise UpdateError(
            f"{part.path}: a LoRA on a grouped convolution mixes the inputs of all groups, which no change "
            "of the grouped kernel does; peft does not merge it either"
        )
    if b[1] != a[0]:
        raise UpdateError(f"{part.path}: factors of shapes {tuple(a)} and {tuple(b)} do not multiply")
    return tuple(a[1:]), b[0]


def _product(
    part: Part, foundation: Foundation, scaling: float, layout: Layout, current: Read, start: Read
) -> LowRank:
    product = factors(part, foundation) * scaling
    return product.mT if layout == "in_out" or EMBEDDING[0] in part.tensors else product


def _bias(part: Part, foundation: Foundation, scaling: float, current: Read, start: Read) -> Tensor:
    return part.read("lora_B.bias", foundation) * scaling
