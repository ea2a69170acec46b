"""The update between two full checkpoints: tuned minus base, parameter by parameter."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_analysis.errors import UpdateError
from peft_analysis.updates.anatomy import quantised_dtype
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.names import Chosen, listed, prefix_between
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights

ROWS = re.compile(r"(^|[._])(wte|wpe|embed\w*|embeddings?|lm_head|embed_out|output|decoder)\.(weight|bias)$")


def read_pair(base: Weights, tuned: Weights, *, chosen: Chosen | None = None) -> WeightUpdate:
    """The differences tuned − base of two checkpoints of one architecture.

    The two may lie in other shards and dtypes; the difference is taken in float32, or in float64 where either
    is stored so. A prefix that all names of one have more ('model.') does not matter: names are the base's.
    Embeddings of different lengths are compared in the rows they have in common, which their entry's
    `details` say.

    Raises:
        UpdateError: names that only one has, other shapes, quantised weights; all of them are listed.
    """
    chosen = chosen or Chosen()
    names = _matched(base, tuned, chosen)
    entries, wrong = {}, []
    for name, theirs in names.items():
        reason = _quantised(name, base.dtype(name), tuned.dtype(theirs))
        if reason:
            wrong.append(reason)
            continue
        details: dict[str, Any] = {}
        if base.shape(name) != tuned.shape(theirs):
            if not _resized(name, theirs, base, tuned):
                wrong.append(f"{name}: {tuple(tuned.shape(theirs))}, in the base {tuple(base.shape(name))}")
                continue
            details = _rows(base.shape(name)[0], tuned.shape(theirs)[0])
        entries[name] = Entry(
            base.shape(name),
            partial(_difference, name, partial(base.__getitem__, name), partial(tuned.__getitem__, theirs)),
            kind="difference",
            layout=base.layout(name),
            rounded=tuned.dtype(theirs),
            base_rounded=base.dtype(name),
            details=details,
        )
    if wrong:
        raise UpdateError(
            f"{tuned.source} does not fit {base.source} in {len(wrong)} parameters: {listed(wrong, '; ')}. "
            "Is it a tuned copy of this base?"
        )
    return WeightUpdate(entries, base=base, source=f"{tuned.source} − {base.source}")


def _matched(base: Weights, tuned: Weights, chosen: Chosen) -> dict[str, str]:
    """The tuned checkpoint's name of each parameter, by the base's name."""
    to_base = prefix_between(list(tuned), list(base))
    by_name = {to_base(name): name for name in tuned}
    also = {to_base(other): name for other, name in tuned.tied.items()}
    names: dict[str, str] = {}
    only_base = []
    for name in chosen.of(base):
        if name in by_name:
            names[name] = by_name[name]
        elif name in also:
            names[name] = also[name]
        else:
            only_base.append(name)
    used = set(names.values())
    left = [name for name in chosen.of(by_name) if by_name[name] not in used and name not in names]
    only_tuned = []
    for name in left:
        if name not in base:
            only_tuned.append(name)
        elif not _same(tuned, by_name[name], names.get(base.name_of(name))):
            names[name] = by_name[name]  # tied in the base, no longer in the tuned model
    if only_base or only_tuned:
        parts = [
            f"only {source} has {listed(found)}"
            for source, found in ((base.source, only_base), (tuned.source, only_tuned))
            if found
        ]
        raise UpdateError(
            f"the names differ: {'; '.join(parts)}. Give checkpoints of one architecture, or leave "
            "names out with only= or without="
        )
    if not names:
        raise UpdateError(f"{base.source} and {tuned.source} have no parameter in common that was asked for")
    return names


def _same(weights: Weights, name: str, other: str | None) -> bool:
    return other is not None and torch.equal(weights[name], weights[other])


def _quantised(name: str, *dtypes: torch.dtype) -> str | None:
    for dtype in dtypes:
        if quantised_dtype(dtype):
            return f"{name} is stored as {dtype}, in codes and not in numbers; dequantise it first"
        if dtype.is_complex:
            return f"{name} is complex ({dtype}), which is not read"
    return None


def _resized(name: str, theirs: str, base: Weights, tuned: Weights) -> bool:
    """Whether a parameter has a row for each token, and all such parameters grew alike."""
    ours, other = base.shape(name), tuned.shape(theirs)
    if len(ours) != len(other) or not ours or ours[1:] != other[1:]:
        return False
    known = base.embeddings | {base.name_of(found) for found in base.embeddings}
    return name in known or theirs in tuned.embeddings or (not known and bool(ROWS.search(name)))


def _rows(before: int, after: int) -> dict[str, Any]:
    more = after - before
    reason = (
        f"the first {min(before, after)} rows are compared; "
        f"the tuned model has {abs(more)} {'more' if more > 0 else 'fewer'}"
    )
    return {
        "rows": min(before, after),
        "new_rows": max(more, 0),
        "lost_rows": max(-more, 0),
        "reason": reason,
    }


def _difference(name: str, base: Callable[[], Tensor], tuned: Callable[[], Tensor]) -> Tensor:
    before, after = base(), tuned()
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    after = after.to(before.device)
    if before.shape == after.shape:
        found = after.to(wide, copy=True).sub_(before.to(wide))
    else:
        found = torch.zeros(before.shape, dtype=wide, device=before.device)
        rows = min(before.shape[0], after.shape[0])
        found[:rows] = after[:rows].to(wide).sub_(before[:rows].to(wide))
    if not torch.isfinite(found.sum()) and not torch.isfinite(found).all():
        found = _without_equal_infinities(name, found, before, after)
    return found


def _without_equal_infinities(name: str, found: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Masks hold −∞ in both models, and nothing changed there; anything else is damage."""
    if before.shape == after.shape:
        found = torch.where(before == after, torch.zeros_like(found), found)
    if torch.isfinite(found).all():
        return found
    counts = {side: int((~torch.isfinite(v)).sum()) for side, v in (("base", before), ("tuned", after))}
    where = " and ".join(f"{count} values of the {side} weights" for side, count in counts.items() if count)
    raise UpdateError(
        f"{name}: {where or 'the difference'} are NaN or infinite; the checkpoint is damaged, or "
        "training diverged"
    )
