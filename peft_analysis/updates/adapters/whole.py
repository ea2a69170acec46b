"""Values that an adapter keeps whole: modules to save, biases, embeddings, rows of tokens."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.files import Stored


def changes(
    tensors: Mapping[str, Stored], foundation: Foundation, settings: Mapping[str, Any]
) -> Iterator[Change]:
    """The differences of values that were stored whole.

    Raises:
        UpdateError: for a name that is not in the base, or of another shape than there.
    """
    for stored_name, stored in tensors.items():
        name = base_name(stored_name)
        shape = stored.shape
        details: dict[str, Any] = {}
        layout = "out_in" if len(shape) >= 2 else "other"
        if foundation.weights is not None:
            name = foundation.name(name)
            if name not in foundation:
                raise UpdateError(f"{name} is not in {foundation.source}")
            shape, layout = foundation.weights.shape(name), foundation.weights.layout(name)
            if stored.shape != shape:
                raise UpdateError(
                    f"{name} has shape {tuple(shape)} in {foundation.source} and {tuple(stored.shape)} in the adapter"
                )
        yield Change(
            name=name,
            shape=shape,
            delta=partial(_difference, stored, foundation),
            kind=kind_of(stored_name, settings),
            layout=layout,
            needs_base=True,
            rounded=stored.dtype,
            details=details,
            moves_start=True,
        )


def base_name(name: str) -> str:
    """The name in the base: without what peft puts between a module and its parameter."""
    words = [word for word in name.split(".") if word not in ("base_layer", "modules_to_save")]
    return ".".join(words)


def kind_of(name: str, settings: Mapping[str, Any]) -> str:
    """Why an adapter keeps a value whole: "modules_to_save", "bias" or "embedding"."""
    path = base_name(name).rpartition(".")[0]
    if any(path == saved or f".{saved}." in f".{path}." for saved in settings.get("modules_to_save") or ()):
        return "modules_to_save"
    if name.endswith("bias") and settings.get("bias", "none") != "none":
        return "bias"
    return "embedding"


def _difference(stored: Stored, foundation: Foundation, current: Read, start: Read) -> Tensor:
    base = current()
    value = foundation.placed(stored.read())
    wide = torch.promote_types(value.dtype, base.dtype)
    return value.to(wide) - base.to(wide)
