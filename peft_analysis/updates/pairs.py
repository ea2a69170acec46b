"""The update between two full checkpoints: tuned minus base, parameter by parameter."""

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from peft_analysis.errors import UpdateError
from peft_analysis.updates.anatomy import UNSAVED, quantised_dtype
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.names import Chosen, listed, prefix_between
from peft_analysis.updates.vocabularies import check_vocabularies
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights

BLOCK = 2**24  # entries that are widened at a time
ROWS = re.compile(r"(^|[._])(wte|wpe|embed\w*|embeddings?|lm_head|embed_out|output|decoder)\.(weight|bias)$")


def weights_of_pair(base: Any, tuned: Any) -> tuple[Weights, Weights]:
    """Both checkpoints; one without a config is named and laid out as the other's model."""
    ours = Weights.of(base)
    theirs = Weights.of(tuned, like=ours)
    if ours.model is None and theirs.model is not None:
        ours = Weights.of(base, like=theirs)
    return ours, theirs


def read_pair(base: Weights, tuned: Weights, *, chosen: Chosen | None = None) -> WeightUpdate:
    """The differences tuned − base of two checkpoints of one architecture.

    The two may lie in other shards and dtypes; the difference is taken in float32, or in float64 where either
    is stored so. A prefix that all names of one have more ('model.') does not matter: names are the base's.
    Embeddings of different lengths are compared in the rows they have in common, which their entry's
    `details` say. Buffers that count or mask are in `skipped`.

    Raises:
        UpdateError: names that only one has, other shapes, quantised weights; all of them are listed.
    """
    names, skipped = matched(base, tuned, chosen or Chosen())
    entries, wrong = {}, []
    _check_tokens(base, tuned, names)
    for name, theirs in names.items():
        shapes, dtypes = (base.shape(name), tuned.shape(theirs)), (base.dtype(name), tuned.dtype(theirs))
        details: dict[str, Any] = {}
        if shapes[0] != shapes[1]:
            if not _has_token_rows(name, theirs, base, tuned):
                wrong.append(f"{name} has shape {tuple(shapes[1])}, in the base {tuple(shapes[0])}")
                continue
            details = _rows(shapes[0][0], shapes[1][0])
        if any(quantised_dtype(dtype) or dtype.is_complex for dtype in dtypes):
            if _same_codes(name, theirs, base, tuned):
                skipped[name] = f"numbers of {dtypes[0]}, the same in both"
            else:
                wrong.append(f"{name} is stored as {_both(*dtypes)}, which is no plain number")
            continue
        read = partial(_difference, base, tuned, name, theirs)
        entries[name] = Entry(
            shapes[0],
            read,
            kind="difference",
            layout=base.layout(name),
            rounded=dtypes[1],
            base_rounded=dtypes[0],
            details=details,
        )
    if wrong:
        raise UpdateError(
            f"{tuned.source} does not fit {base.source} in {len(wrong)} parameters: {listed(wrong, '; ')}. "
            "Give a tuned copy of this base; dequantise what is quantised"
        )
    return WeightUpdate(entries, base=base, source=f"{tuned.source} − {base.source}", skipped=skipped)


def matched(base: Weights, tuned: Weights, chosen: Chosen) -> tuple[dict[str, str], dict[str, str]]:
    """The tuned checkpoint's name of each parameter, by the base's name; and what is no parameter."""
    to_base = prefix_between([*tuned, *tuned.tied], [*base, *base.tied])
    theirs = {to_base(name): name for name in tuned}
    also = {to_base(other): name for other, name in tuned.tied.items()}
    names: dict[str, str] = {}
    skipped: dict[str, str] = {}
    left_over: dict[str, list[str]] = {base.source: [], f"{tuned.source} (tuned)": []}
    of_base, of_tuned = left_over.values()
    passed = {to_base(name): reason for name, reason in tuned.skipped.items()}
    skipped.update((name, reason) for name, reason in {**passed, **base.skipped}.items() if reason != UNSAVED)
    for name in chosen.of(base):
        if name in theirs or name in also:
            names[name] = theirs[name] if name in theirs else also[name]
        elif reason := passed.get(name) or tuned.why_skipped(name):
            skipped[name] = reason
        else:
            of_base.append(name)
    used = set(names.values())
    for name in chosen.of(theirs):
        if name in names or theirs[name] in used:
            continue
        if reason := base.why_skipped(name):
            skipped[name] = reason
        elif name not in base:
            of_tuned.append(theirs[name])
        elif not _same(tuned, theirs[name], names.get(base.name_of(name))):
            names[name] = theirs[name]  # tied in the base, no longer in the tuned model
    parts = [f"only {source} has {listed(found)}" for source, found in left_over.items() if found]
    if parts:
        raise UpdateError(
            f"the names differ: {'; '.join(parts)}. Give checkpoints of one architecture, or leave names out "
            "with without="
        )
    if not names:
        raise UpdateError(f"{base.source} and {tuned.source} have no parameter in common that was asked for")
    return names, skipped


def _same(weights: Weights, name: str, other: str | None) -> bool:
    return other is not None and torch.equal(weights[name], weights[other])


def _same_codes(name: str, theirs: str, base: Weights, tuned: Weights) -> bool:
    """Whether integers say the same in both: entry by entry, or a count, which is no weight."""
    if base.dtype(name) != tuned.dtype(theirs) or base.shape(name) != tuned.shape(theirs):
        return False
    return base.shape(name).numel() == 1 or torch.equal(base[name], tuned[theirs])


def _both(one: torch.dtype, other: torch.dtype) -> str:
    return str(one) if one == other else f"{one} in the base and {other}"


def _has_token_rows(name: str, theirs: str, base: Weights, tuned: Weights) -> bool:
    """Whether a parameter has a row for each token, so that the rows of two lengths mean the same."""
    ours, other = base.shape(name), tuned.shape(theirs)
    if len(ours) != len(other) or not ours or ours[1:] != other[1:]:
        return False
    if base.embeddings or tuned.embeddings:
        return name in base.embeddings or theirs in tuned.embeddings
    return bool(ROWS.search(name))


def _check_tokens(base: Weights, tuned: Weights, names: Mapping[str, str]) -> None:
    """Raises where the rows of embeddings that are compared are those of other tokens."""
    rows = [
        min(base.shape(name)[0], tuned.shape(theirs)[0])
        for name, theirs in names.items()
        if name in base.tokens
    ]
    if rows:
        check_vocabularies(base.source, tuned.source, max(rows))


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


def _difference(base: Weights, tuned: Weights, name: str, theirs: str) -> Tensor:
    """Tuned minus base in the rows in common, block by block, so that only the result is there as a whole."""
    shape = base.shape(name)
    wide = torch.float32
    for dtype in (base.dtype(name), tuned.dtype(theirs)):
        wide = torch.promote_types(wide, dtype)
    if not shape:
        found = tuned[theirs].to(base[name].device, wide) - base[name].to(wide)
    else:
        count = max(1, BLOCK // max(1, shape[1:].numel()))
        begin, whole = 0, None
        for before, after in zip(base.rows(name, count), tuned.rows(theirs, count), strict=False):
            if whole is None:
                whole = torch.zeros(shape, dtype=wide, device=before.device)
            rows = min(len(before), len(after))
            whole[begin : begin + rows].copy_(after[:rows]).sub_(before[:rows].to(wide))
            begin += rows
            del before, after
        found = torch.zeros(shape, dtype=wide, device=base[name].device) if whole is None else whole
    if not torch.isfinite(found.sum()) and not torch.isfinite(found).all():
        found = _without_equal_infinities(name, found, base[name], tuned[theirs].to(found.device))
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
