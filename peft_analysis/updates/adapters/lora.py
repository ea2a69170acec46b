"""LoRA (Hu et al. 2021): ΔW = s B A, in every kind of layer that peft adapts so."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.adapters.settings import scaling_of
from peft_analysis.updates.entry import Layout

ROLES = frozenset(
    {"lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B"}
    | {"lora_magnitude_vector", "lora_magnitude_vector.weight"}
)
Factors = Callable[[], LowRank]


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of the weight of one module, and of its bias where the LoRA has one.

    Raises:
        UpdateError: for a factor that is missing, of rank 0, or does not fit the other or the base.
    """
    down, up = _roles(part)
    rank = part.tensors[down].shape[0]
    columns, rows = _sizes(part, down, up)
    part_path = part.tuned_path or part.path
    scaling = part.scaling if part.scaling is not None else scaling_of(part.settings, part_path, rank)
    scaling *= part.times
    shape, layout = stored_shape(part, foundation, rows, columns)
    details = {"rank": rank, "scaling": scaling}
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_added, partial(factors, part, foundation, scaling, layout)),
        kind="lora",
        layout=layout,
        details=details,
    )
    if "lora_B.bias" in part.tensors:
        yield Change(
            name=part.bias,
            shape=part.tensors["lora_B.bias"].shape,
            delta=partial(_bias, part, foundation, scaling),
            kind="lora",
            layout="other",
            details={"scaling": scaling},
        )


def factors(part: Part, foundation: Foundation, scaling: float, layout: Layout) -> LowRank:
    """S B A in the stored layout: the factors flattened for convolutions, turned for Conv1D and embeddings."""
    down, up = _roles(part)
    wide = torch.promote_types(part.tensors[down].dtype, part.tensors[up].dtype)
    right = foundation.placed(part.read(down).to(wide)).flatten(1)
    left = foundation.placed(part.read(up).to(wide)).flatten(1) * scaling
    product = LowRank(left, right)
    return product.mT if layout == "in_out" or down == "lora_embedding_A" else product


def stored_shape(
    part: Part, foundation: Foundation, rows: int, columns: tuple[int, ...]
) -> tuple[torch.Size, Layout]:
    """How the model stores the adapted weight: as the base says, else as the factors and settings let guess.

    Raises:
        UpdateError: if the base has no such parameter, or one of another shape.
    """
    embedding = "lora_embedding_A" in part.tensors
    if foundation.weights is None:
        turned = bool(part.settings.get("fan_in_fan_out")) and len(columns) == 1
        if embedding:
            return torch.Size((*columns, rows)), "other"
        return torch.Size((*columns, rows) if turned else (rows, *columns)), "in_out" if turned else "out_in"
    if part.weight not in foundation:
        raise UpdateError(f"{part.weight} is not in {foundation.source}")
    shape, layout = foundation.weights.shape(part.weight), foundation.weights.layout(part.weight)
    turned = embedding or layout == "in_out"
    if tuple(shape) != ((*columns, rows) if turned else (rows, *columns)):
        raise UpdateError(
            f"{part.weight} has shape {tuple(shape)} in {foundation.source}; the adapter is for {columns} inputs "
            f"and {rows} outputs"
        )
    return shape, "other" if embedding else layout


def _roles(part: Part) -> tuple[str, str]:
    embedding = any(role.startswith("lora_embedding") for role in part.tensors)
    roles = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    missing = [role for role in roles if role not in part.tensors]
    if missing:
        raise UpdateError(f"{part.path}: {' and '.join(missing)} is missing")
    return roles


def _sizes(part: Part, down: str, up: str) -> tuple[tuple[int, ...], int]:
    """Inputs of A, with the kernel of a convolution, and outputs of B."""
    a, b = part.tensors[down].shape, part.tensors[up].shape
    if min((*a, *b), default=0) == 0 or len(a) < 2 or len(b) < 2:
        raise UpdateError(
            f"{part.path}: factors of shapes {tuple(a)} and {tuple(b)}; rank 0 or empty factors change nothing. "
            "Were they saved while sharded over devices?"
        )
    if b[1] != a[0]:
        grouped = len(a) > 2 and a[0] % b[1] == 0
        raise UpdateError(
            f"{part.path}: factors of shapes {tuple(a)} and {tuple(b)} do not multiply"
            + (
                "; a LoRA on a grouped convolution mixes the inputs of all groups, which is no change of its "
                "kernel (peft does not merge it either)"
                if grouped
                else ""
            )
        )
    return tuple(a[1:]), b[0]


def _added(read: Factors, current: Read, start: Read) -> LowRank:
    return read()


def _bias(part: Part, foundation: Foundation, scaling: float, current: Read, start: Read) -> Tensor:
    return foundation.placed(part.read("lora_B.bias")) * scaling
