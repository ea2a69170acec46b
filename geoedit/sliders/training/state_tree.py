"""Nested states, such as an optimizer's, as one safetensors file: tensors by name, the rest as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from geoedit.errors import EditError

MARK = "$"
"""First letter of the keys that stand for something JSON does not know."""


def flatten(state: Any, path: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """Part a nested state into what JSON holds and the tensors in it, named by their paths.

    Mappings (with any plain keys), lists, tuples, texts, numbers (infinite ones and NaN too), booleans and
    None come back from `unflatten` as they were, floats to the bit.

    >>> import torch
    >>> flatten({0: {"step": 3, "mean": torch.zeros(2)}})[0]
    {'$map': [[0, {'step': 3, 'mean': {'$tensor': 'state.0.mean'}}]]}

    Raises:
        EditError: there is something else in it; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    return _plain(state, path, tensors), tensors


def unflatten(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Undo `flatten`.

    Raises:
        EditError: a tensor that the plain part names is not there.
    """
    if isinstance(plain, list):
        return [unflatten(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    if len(plain) == 1:
        ((mark, value),) = plain.items()
        if mark == "$tensor":
            if value not in tensors:
                raise EditError(f"the state names a tensor {value!r} that is not in its file")
            return tensors[value]
        if mark == "$tuple":
            return tuple(unflatten(item, tensors) for item in value)
        if mark == "$map":
            return {unflatten(key, tensors): unflatten(item, tensors) for key, item in value}
        if mark == "$float":
            return float(value)
    return {key: unflatten(item, tensors) for key, item in plain.items()}


def to_bytes(state: Any, kind: str) -> bytes:
    """A nested state as the content of a safetensors file, its plain part in the metadata under `kind`.

    Tensors are copied to the CPU; two names of one memory become two copies.
    """
    plain, tensors = flatten(state)
    kept = {name: tensor.detach().clone().contiguous().cpu() for name, tensor in tensors.items()}
    return save(kept, metadata={"format": "pt", kind: json.dumps(plain, allow_nan=False)})


def from_bytes(content: bytes, kind: str) -> Any:
    """Undo `to_bytes`; tensors are on the CPU.

    Raises:
        EditError: the content is cut off, damaged or of another kind.
    """
    try:
        tensors = load(content)
        size = int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8 : 8 + size]).get("__metadata__") or {}
    except (SafetensorError, ValueError) as error:
        raise EditError(f"it is no safetensors file, or one that was cut off ({error})") from error
    if kind not in metadata:
        raise EditError(f"it is a safetensors file without {kind!r} in its metadata")
    try:
        return unflatten(json.loads(metadata[kind]), tensors)
    except (ValueError, TypeError) as error:
        raise EditError(f"its description is damaged ({error})") from error


def _plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, Mapping):
        items = [(key, _plain(item, f"{path}.{key}", tensors)) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith(MARK) for key in value):
            return dict(items)
        return {"$map": [[_plain(key, f"{path}.{key}", tensors), item] for key, item in items]}
    if isinstance(value, (list, tuple)):
        entries = [_plain(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return entries if isinstance(value, list) else {"$tuple": entries}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise EditError(
        f"{path} is a {type(value).__name__}, which a checkpoint cannot hold: use tensors, numbers, texts, "
        "lists, tuples and mappings"
    )
