"""Picking items out of a batch and putting them back, for dataclasses whose tensors have the batch first."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from manifolds.solvers.geometry import spread

D = TypeVar("D")


def take(whole: D, index: Tensor) -> D:
    """The items at the places `index` (k): of every tensor of a dataclass, and of the dataclasses in it.

    A function among the fields is one of all items; the part has None in its place.
    """
    parts: dict[str, Any] = {}
    for field in fields(whole):  # type: ignore[arg-type]
        value = getattr(whole, field.name)
        if isinstance(value, Tensor):
            parts[field.name] = value.index_select(0, index)
        elif is_dataclass(value):
            parts[field.name] = take(value, index)
        elif callable(value):
            parts[field.name] = None
    return replace(whole, **parts)  # type: ignore[type-var]


def put(whole: D, index: Tensor, part: D) -> D:
    """The part with the rest of the whole around it: its items go to the places `index` (k)."""
    return _each(lambda value, new: value.index_copy(0, index, new), whole, part)


def freeze(active: Tensor, new: D, old: D) -> D:
    """The new tensors of a dataclass where items are active (N), the old ones elsewhere."""
    return _each(
        lambda before, after: after if after is before else torch.where(spread(active, after), after, before),
        old,
        new,
    )


def places(chosen: Tensor) -> Tensor:
    """Where a mask (N) is true (k)."""
    return chosen.nonzero().squeeze(1)


def _each(function: Callable[..., Tensor], *things: Any) -> Any:
    """The last of some alike dataclasses, with the function's results as tensors, also within."""
    changed = {}
    for field in fields(things[-1]):
        values = [getattr(thing, field.name) for thing in things]
        if isinstance(values[-1], Tensor):
            changed[field.name] = function(*values)
        elif is_dataclass(values[-1]):
            changed[field.name] = _each(function, *values)
    return replace(things[-1], **changed)
