"""What an adapter does to one parameter, as a function of the weight that it stands on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.entry import Entry, Layout

Read = Callable[[], Tensor]


@dataclass(frozen=True)
class Change:
    """One step from a weight to the next.

    Attributes:
        name: of the parameter in the base.
        shape: of the parameter as the model stores it.
        delta: gives the step from `current`, the weight so far, and `start`, the weight before any adapter;
            both are read when called. What is only added ignores them.
        kind: as in `Entry`.
        layout: as in `Entry`.
        needs_base: whether `delta` reads a weight.
        rounded: the dtype of whole values that were stored in place of the base's; None for an adapter's own.
        details: as in `Entry`.
        magnitude: as in `Entry`.
        moves_start: whether this replaces what the adapters stand on (a bias that was trained in place),
            instead of being one of them. Such steps come first.
    """

    name: str
    shape: torch.Size
    delta: Callable[[Read, Read], LowRank | Tensor]
    kind: str
    layout: Layout = "out_in"
    needs_base: bool = False
    rounded: torch.dtype | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    magnitude: Read | None = None
    moves_start: bool = False


def entry(changes: Sequence[Change], foundation: Foundation) -> Entry:
    """The steps of one parameter as one difference: low rank if all of them are."""
    changes = sorted(changes, key=lambda change: not change.moves_start)
    last = changes[-1]
    base = foundation.weights
    known = base is not None and last.name in base
    needs_base = any(change.needs_base for change in changes)
    rounded = next((change.rounded for change in reversed(changes) if change.rounded is not None), None)
    details = {key: value for change in changes for key, value in change.details.items()}
    if len(changes) > 1:
        details["steps"] = [change.kind for change in changes]
    if needs_base and not known:
        details["needs_base"] = True
    return Entry(
        shape=last.shape,
        read=partial(_difference, tuple(changes), foundation),
        kind=last.kind,
        layout=last.layout,
        rounded=rounded,
        base_rounded=base.dtype(last.name) if known and needs_base and base is not None else None,
        details=details,
        magnitude=next((change.magnitude for change in reversed(changes) if change.magnitude), None),
    )


def _difference(changes: Sequence[Change], foundation: Foundation) -> LowRank | Tensor:
    total: LowRank | Tensor | None = None
    start_change: LowRank | Tensor | None = None

    def weight(change: LowRank | Tensor | None, name: str) -> Tensor:
        return _added(foundation.read(name), change)

    for change in changes:
        if start_change is None and not change.moves_start:
            start_change = total
        step = change.delta(
            partial(weight, total, change.name),
            partial(weight, start_change, change.name),
        )
        total = step if total is None else _sum(total, step)
    if total is None:
        raise UpdateError("an entry has no changes; this is a mistake in the reader")
    return total


def _added(weight: Tensor, change: LowRank | Tensor | None) -> Tensor:
    if change is None:
        return weight
    dense = change.dense().reshape(weight.shape) if isinstance(change, LowRank) else change
    return weight + dense


def _sum(first: LowRank | Tensor, second: LowRank | Tensor) -> LowRank | Tensor:
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        wide = torch.promote_types(first.dtype, second.dtype)
        return first.to(wide) + second.to(wide)
    if isinstance(first, LowRank):
        return _added(second, first)
    return _added(first, second)
