"""LoRA pairs in a module, found by how they are built, not by the names of models or of PEFT's classes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

SLOTS = (("lora_B", "lora_A"), ("lora_embedding_B", "lora_embedding_A"))


@dataclass(frozen=True)
class Pair:
    """Two trainable factors of one update W = scaling · B A.

    Attributes:
        name: of the module and the adapter.
        left: B, of shape (out, r), or (out, r, 1, …) for a convolution.
        right: A, of shape (r, in), or (r, in, k, …).
        scaling: the number that multiplies B A in the forward pass.
    """

    name: str
    left: nn.Parameter
    right: nn.Parameter
    scaling: float


def lora_pairs(module: nn.Module, adapter: str | None = None) -> list[Pair]:
    """The trainable LoRA pairs of a module, in the order of its submodules.

    A submodule has pairs if it has `lora_A` and `lora_B` (or `lora_embedding_A` and `lora_embedding_B`):
    dictionaries by adapter, single layers, or parameters; with A of shape (r, in, …) and B of shape (out,
    r, 1, …), r no larger than either side. `scaling` is read from the submodule where it has one. Pairs
    that are frozen, in part or whole, and factors that several submodules share are left out.

    Args:
        module: a PEFT model or any other module.
        adapter: only the pairs of this adapter.
    """
    found = [pair for name, part in module.named_modules() for pair in _pairs_of(name, part, adapter)]
    uses: dict[int, int] = {}
    for pair in found:
        for factor in (pair.left, pair.right):
            uses[id(factor)] = uses.get(id(factor), 0) + 1
    return [pair for pair in found if uses[id(pair.left)] == uses[id(pair.right)] == 1]


def as_matrix(factor: Tensor) -> Tensor:
    """A factor of a convolution with its kernel flattened; a matrix as it is."""
    return factor.flatten(1)


def _pairs_of(name: str, part: nn.Module, adapter: str | None) -> Iterator[Pair]:
    for left_slot, right_slot in SLOTS:
        lefts, rights = (_by_adapter(getattr(part, slot, None)) for slot in (left_slot, right_slot))
        for key in (
            lefts.keys() & rights.keys() if adapter is None else {adapter} & lefts.keys() & rights.keys()
        ):
            left, right = lefts[key], rights[key]
            if left.requires_grad and right.requires_grad and _fit(left, right):
                scaling = getattr(part, "scaling", 1.0)
                number = scaling.get(key, 1.0) if isinstance(scaling, Mapping) else scaling
                yield Pair(f"{name}.{key}" if key else name, left, right, float(number))


def _by_adapter(holder: object) -> dict[str, nn.Parameter]:
    """The weights of a dictionary by its keys; of a single layer or parameter under the empty key."""
    items: list[tuple[str, object]] = [("", holder)]
    if isinstance(holder, nn.ModuleDict | nn.ParameterDict):
        items = list(holder.items())
    weights = {key: getattr(item, "weight", item) for key, item in items}
    return {key: weight for key, weight in weights.items() if isinstance(weight, nn.Parameter)}


def _fit(left: Tensor, right: Tensor) -> bool:
    """Whether B A is a product of matrices of rank at most r; a kernel of B must have size one."""
    return (
        left.ndim >= 2
        and right.ndim >= 2
        and left.dtype == right.dtype
        and left.is_floating_point()
        and left.shape[1] == right.shape[0]
        and left.shape[2:].numel() == 1
        and left.shape[1] <= min(left.shape[0], right.shape[1:].numel())
        and left.device == right.device
        and left.device.type != torch.device("meta").type
    )
