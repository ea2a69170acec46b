"""Values that an adapter keeps whole: modules to save, biases, embeddings, norms, rows of tokens."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation, wide
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.entry import Layout
from peft_analysis.updates.files import Stored

TOKENS = "trainable_tokens_delta"
BETWEEN = frozenset({"base_layer", "modules_to_save", "token_adapter", "ln_tuning_layers", "original_module"})


def base_name(name: str) -> str:
    """The name in the base: without what peft puts between a module and its parameter."""
    return ".".join(word for word in name.split(".") if word not in BETWEEN)


def changes(stored_name: str, stored: Stored, foundation: Foundation, kind: str) -> Iterator[Change]:
    """The difference between a value that was stored whole and the base's.

    A tied parameter that was stored apart, as a module to save, is one of its own from then on.

    Raises:
        UpdateError: for a name that is not in the base, or of another shape than there.
    """
    name = base_name(stored_name)
    shape, layout = stored.shape, _layout(stored.shape)
    if foundation.weights is not None:
        if name not in foundation:
            raise UpdateError(f"{name} is not in {foundation.source}")
        shape, layout = foundation.weights.shape(name), foundation.weights.layout(name)
        if stored.shape != shape:
            raise UpdateError(
                f"{name} has shape {tuple(shape)} in {foundation.source} and {tuple(stored.shape)} here"
                + (
                    ": the vocabularies differ; resize the base's embeddings first"
                    if stored.shape[1:] == shape[1:]
                    else ""
                )
            )
    yield Change(
        name=name,
        shape=shape,
        delta=partial(_difference, stored, foundation),
        kind=kind,
        layout=layout,
        needs_base=True,
        rounded=stored.dtype,
        moves_start=True,
    )


def kind_of(name: str, settings: Mapping[str, Any]) -> str:
    """Why an adapter keeps a value whole: "modules_to_save", "bias", "ln_tuning" or "embedding"."""
    if ".ln_tuning_layers." in name:
        return "ln_tuning"
    path = base_name(name).rpartition(".")[0]
    if any(f".{saved}." in f".{path}." for saved in settings.get("modules_to_save") or ()):
        return "modules_to_save"
    bias = name.rpartition(".")[2] == "bias" and settings.get("bias", "none") != "none"
    return "bias" if bias else "embedding"


def tokens(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The rows of an embedding that were trained (Trainable Tokens): low rank where they are few.

    Raises:
        UpdateError: for an index that is not in the table, or rows of another width.
    """
    stored = part.tensors[TOKENS]
    indices = _indices(part)
    if len(stored.shape) != 2 or stored.shape[0] != len(indices) or len(set(indices)) != len(indices):
        raise UpdateError(f"{part.path}: rows of shape {tuple(stored.shape)} for {len(indices)} tokens")
    shape = torch.Size((max(indices, default=-1) + 1, stored.shape[1]))
    if foundation.weights is not None:
        if part.weight not in foundation:
            raise UpdateError(f"{part.weight} is not in {foundation.source}")
        shape = foundation.weights.shape(part.weight)
    if shape[1] != stored.shape[1] or any(not 0 <= index < shape[0] for index in indices):
        raise UpdateError(
            f"{part.weight} has shape {tuple(shape)} in {foundation.source}; the adapter has rows "
            f"{min(indices)} to {max(indices)} of width {stored.shape[1]}"
        )
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_rows, part, foundation, tuple(indices)),
        kind="trainable_tokens",
        layout="other",
        needs_base=True,
        rounded=stored.dtype,
        details={"tokens": len(indices)},
    )


def _indices(part: Part) -> Sequence[int]:
    if part.layer is not None:
        return list(part.settings["token_indices"])
    found = part.settings.get("trainable_token_indices") or part.settings.get("token_indices") or ()
    if isinstance(found, Mapping):
        found = next(
            (rows for name, rows in found.items() if f".{part.path}".endswith(f".{name}")),
            (),
        )
    return [int(index) for index in found]


def _difference(stored: Stored, foundation: Foundation, current: Read, start: Read) -> LowRank | Tensor:
    base = current()
    value = wide(stored.read().to(base.device))
    if base.ndim >= 2 and torch.equal(value, base):
        # An embedding that is adapted is saved beside its adapter, and mostly as it was.
        return LowRank.zeros(len(base), base[0].numel(), dtype=base.dtype, device=base.device)
    wider = torch.promote_types(value.dtype, base.dtype)
    return value.to(wider) - base.to(wider)


def _rows(
    part: Part, foundation: Foundation, indices: Sequence[int], current: Read, start: Read
) -> LowRank | Tensor:
    base = current()
    index = torch.tensor(indices, device=base.device)
    rows = part.read(TOKENS, foundation).to(base) - base[index]
    if 2 * len(indices) < min(base.shape):
        chosen = torch.zeros(len(base), len(indices), dtype=base.dtype, device=base.device)
        chosen[index, torch.arange(len(indices), device=base.device)] = 1.0
        return LowRank(chosen, rows)
    return torch.zeros_like(base).index_copy(0, index, rows)


def _layout(shape: torch.Size) -> Layout:
    return "out_in" if len(shape) >= 2 else "other"
