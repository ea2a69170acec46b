"""What the rest of the network makes of the states at a site: outputs, and their gradients there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from geoedit.activations.calls import call_arguments, reading
from geoedit.activations.inputs import Batch, Texts
from geoedit.activations.reading import value_mask
from geoedit.anatomy import Location
from geoedit.errors import EditError
from geoedit.hooks import Function, Handle, intercept
from geoedit.passes import Pass
from geoedit.site import Site

Readout = Callable[[Tensor, Sequence[int]], Tensor]
"""From the output at the answer's place (batch, size) and the rows' numbers to what is derived (batch, k)."""


@dataclass(frozen=True)
class Derivatives:
    """Readouts of the rows, and their gradients at each site.

    Attributes:
        outputs: (rows, k).
        gradients: for each site (rows, k, width): how each readout changes with the state, everything after
            the site computed anew and all other tokens' states at the site held.
    """

    outputs: Float[Tensor, "rows k"]
    gradients: dict[Site, Float[Tensor, "rows k width"]]


def same_length_batches(source: Texts, rows: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Give the places in `rows` in batches of one length, so that no padding is needed."""
    lengths: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        lengths.setdefault(source.lengths[row], []).append(place)
    for places in lengths.values():
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


def run(model: nn.Module, batch: Batch) -> Tensor:
    """Run a batch and return its output (batch, tokens, size): logits, or without a head the last states.

    Raises:
        EditError: the model gives neither.
    """
    found = model(**call_arguments(model, batch.inputs, ready=False))
    for name in ("logits", "last_hidden_state"):
        value = getattr(found, name, None)
        if isinstance(value, Tensor) and value.dim() == 3:
            return value
    raise EditError(
        f"{type(model).__name__} gives neither logits nor last_hidden_state with one row a token; "
        "diagnose reads language models and encoders."
    )


def answer_place(batch: Batch, mask_token: int | None) -> Int[Tensor, " batch"]:
    """Where the answer is read: at the mask token where there is one, else at the last real token."""
    ids, real = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    wanted = real
    if mask_token is not None:
        masks = ids == mask_token
        wanted = torch.where(masks.any(1, keepdim=True), masks, real)
    return columns.masked_fill(~wanted, -1).amax(1)


def at_place(
    output: Float[Tensor, "batch tokens size"], place: Int[Tensor, " batch"]
) -> Float[Tensor, "batch size"]:
    """The rows of the output where the answer is read."""
    return output[torch.arange(len(output), device=output.device), place.to(output.device)]


def attach(model: nn.Module, site: Site, location: Location, function: Function) -> Handle:
    """Intercept a site; value tokens are found by the tokenizer's offsets, not by searching ids."""
    watched = site.with_token("all") if site.token == "value" else site
    return intercept(model, watched, function, location=location)


def one_token(
    site: Site, batch: Batch, selected: Bool[Tensor, "batch tokens"]
) -> Bool[Tensor, "batch tokens"]:
    """The mask of the single token that a site means in each row.

    Raises:
        EditError: the site means several tokens, or none, in a row.
    """
    if site.token == "value":
        selected = value_mask(site, batch, selected)
    counts = selected.sum(1)
    if not bool((counts == 1).all()):
        raise EditError(
            f"the site {site} means {int(counts.max())} tokens of a prompt; a diagnosis needs one state a "
            "prompt: use 'last', 'value' or an integer."
        )
    return selected


def derive(
    model: nn.Module,
    source: Texts,
    rows: Sequence[int],
    places: Mapping[Site, Location],
    readout: Readout,
    *,
    mask_token: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int], Any] | None = None,
) -> Derivatives:
    """Compute readouts of the output and their gradients at all sites together.

    One forward a batch and one backward a readout, whatever the number of sites. Results are in float32
    (float64 where the model is).

    Args:
        model: in any mode; it is run in evaluation mode and left as it was.
        source: all prompts, as tokens.
        rows: which of them.
        places: the sites, and where they are.
        readout: what to derive.
        mask_token: id of the mask token of a masked language model.
        batch_size: prompts in one forward.
        progress: called with the number of prompts done.

    Raises:
        EditError: a site means several tokens, does not reach the output, or gradients are not finite.
    """
    taps = {site: _Tap(site) for site in places}
    outputs: dict[int, Tensor] = {}
    gradients: dict[Site, dict[int, Tensor]] = {site: {} for site in places}
    with ExitStack() as stack:
        stack.enter_context(reading(model))
        stack.enter_context(torch.enable_grad())
        for site, location in places.items():
            stack.enter_context(attach(model, site, location, taps[site]))
        for chosen in same_length_batches(source, rows, batch_size):
            batch = source.batch([rows[place] for place in chosen])
            for tap in taps.values():
                tap.batch = batch
            whole = run(model, batch)
            values = readout(at_place(whole, answer_place(batch, mask_token)), chosen)
            for site, part in _backward(values, taps).items():
                gradients[site].update(zip(chosen, part, strict=True))
            outputs.update(zip(chosen, values.detach(), strict=True))
            if progress is not None:
                progress(len(chosen))
    order = range(len(rows))
    found = Derivatives(
        torch.stack([outputs[place] for place in order]),
        {site: torch.stack([parts[place] for place in order]) for site, parts in gradients.items()},
    )
    for site, part in found.gradients.items():
        if not bool(torch.isfinite(part).all()):
            raise EditError(
                f"the gradients at the site {site} are not finite: the model overflows there; load it in "
                "float32 (dtype), or leave the site out."
            )
    return found


def _backward(values: Float[Tensor, "batch k"], taps: Mapping[Site, _Tap]) -> dict[Site, Tensor]:
    whole = [tap.states for tap in taps.values()]
    parts: dict[Site, list[Tensor]] = {site: [] for site in taps}
    for number in range(values.shape[1]):
        found = torch.autograd.grad(
            values[:, number].sum(), whole, retain_graph=number + 1 < values.shape[1], allow_unused=True
        )
        for (site, tap), gradient in zip(taps.items(), found, strict=True):
            dense = torch.zeros_like(tap.states) if gradient is None else gradient
            kept = dense[tap.selected.to(dense.device)]
            parts[site].append(kept if kept.dtype == torch.float64 else kept.float())
    return {site: torch.stack(rows, 1) for site, rows in parts.items()}


class _Tap:
    """Keeps the states at a site as they pass, as a part of the graph."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.batch = Batch((), {})
        self.states = self.selected = torch.zeros(0)

    def __call__(self, states: Tensor, selected: Tensor, this_pass: Pass) -> Tensor:
        if not states.requires_grad:
            states = states.detach().requires_grad_(True)
        self.states, self.selected = states, one_token(self.site, self.batch, selected)
        return states
