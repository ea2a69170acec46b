"""What an adapter does to one parameter, as a function of the weight that it stands on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
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
        rounded: the dtype of values that were stored whole in place of the base's; None for those of an
            adapter.
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
    steps = tuple(sorted(changes, key=lambda change: not change.moves_start))
    last = steps[-1]
    base = foundation.weights
    known = base is not None and last.name in base
    needs_base = any(step.needs_base for step in steps)
    details = {key: value for step in steps for key, value in step.details.items()}
    if len(steps) > 1:
        details["steps"] = [step.kind for step in steps]
    if needs_base and base is None:
        details["needs_base"] = True
    return Entry(
        shape=last.shape,
        read=partial(_difference, steps, foundation),
        kind=last.kind,
        layout=last.layout,
        rounded=next((step.rounded for step in reversed(steps) if step.rounded is not None), None),
        base_rounded=base.dtype(last.name) if base is not None and known and needs_base else None,
        details=details,
        magnitude=next((step.magnitude for step in reversed(steps) if step.magnitude is not None), None),
    )


def _difference(steps: Sequence[Change], foundation: Foundation) -> LowRank | Tensor:
    """The sum of the steps, each taken from where those before it lead."""
    first, *others = steps
    read = partial(foundation.read, first.name)
    total = first.delta(read, read)
    begun = total if first.moves_start else None
    for step in others:
        total = _sum(total, step.delta(_weight(read, total), _weight(read, begun)))
        if step.moves_start:
            begun = total
    return total


def _weight(read: Read, change: LowRank | Tensor | None) -> Read:
    return read if change is None else lambda: _added(read(), change)


def _added(weight: Tensor, change: LowRank | Tensor) -> Tensor:
    dense = change.dense().reshape(weight.shape) if isinstance(change, LowRank) else change
    return weight + dense.to(weight.device)


def _sum(first: LowRank | Tensor, second: LowRank | Tensor) -> LowRank | Tensor:
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        wider = torch.promote_types(first.dtype, second.dtype)
        return first.to(wider) + second.to(wider)
    if isinstance(first, LowRank):
        first, second = second, first
    return _added(first, second)  # type: ignore[arg-type]
