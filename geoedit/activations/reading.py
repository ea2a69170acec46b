"""One pass over the prompts that reads every asked site and stops each forward after the last of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from geoedit.activations.calls import accepted_arguments, call_arguments, reading, takes_anything
from geoedit.activations.inputs import Batch, Tensors, Texts
from geoedit.activations.padding import fit_padding
from geoedit.activations.processes import Processes
from geoedit.anatomy import Location, anatomy
from geoedit.errors import EditError
from geoedit.hooks import Function, Handle, StopForward, intercept
from geoedit.passes import Pass
from geoedit.site import Site


@runtime_checkable
class Sink(Protocol):
    """Takes what is read, batch by batch."""

    def add(self, place: int, owners: Int[Tensor, " rows"], states: Float[Tensor, "rows width"]) -> None:
        """Take the states at the site `sites[place]`; `owners` says which prompt each row belongs to."""

    def batch_done(self, indices: Sequence[int]) -> None:
        """Every site has been read for these prompts."""


def plan(
    model: nn.Module, source: Texts | Tensors, batch_size: int
) -> tuple[Texts | Tensors, list[list[int]]]:
    """Group the prompts: by length, the longest first (so that a lack of memory shows at once).

    Texts of different lengths share a batch only where the model takes padding without changing its states.
    """
    if isinstance(source, Tensors):
        return source, _chunks(list(range(len(source))), batch_size)
    order = sorted(range(len(source)), key=lambda i: -source.lengths[i])
    batches = _chunks(order, batch_size)
    if all(source.lengths[batch[0]] == source.lengths[batch[-1]] for batch in batches):
        return source, batches
    masked = "attention_mask" in accepted_arguments(model) or takes_anything(model)
    with reading(model):
        fitted = fit_padding(model, source) if masked else None
    if fitted is not None:
        return fitted, batches
    same: dict[int, list[int]] = {}
    for index in order:
        same.setdefault(source.lengths[index], []).append(index)
    return source, [batch for group in same.values() for batch in _chunks(group, batch_size)]


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def locate_all(model: nn.Module, sites: Iterable[Site] | Site) -> dict[Site, Location]:
    """Where the sites are in the model: in their order, each once.

    Raises:
        EditError: there are no sites, or the model does not have one of them.
    """
    known = anatomy(model)
    found = {site: known.locate(site) for site in ([sites] if isinstance(sites, Site) else sites)}
    if not found:
        raise EditError("sites is empty; give at least one, such as Site(block=0).")
    return found


def read_states(
    model: nn.Module,
    source: Texts | Tensors,
    places: Mapping[Site, Location],
    batches: Sequence[Sequence[int]],
    sink: Sink,
    *,
    progress: bool | None = None,
) -> None:
    """Feed the batches to the model and the states at every site to the sink.

    Raises:
        EditError: a site whose module does not run, or runs twice; a state that is not finite; a token that a
            prompt does not have.
    """
    reader = _Reader(source, tuple(places), sink)
    shown = None if progress is None else not progress
    if Processes.current().rank > 0:
        shown = True
    with ExitStack() as stack:
        stack.enter_context(reading(model))
        for place, (site, location) in enumerate(places.items()):
            stack.enter_context(_attach(model, site, location, reader.at(place)))
        for indices in tqdm(batches, desc="reading", unit="batch", disable=shown):
            reader.start(source.batch(indices))
            inputs = call_arguments(model, reader.batch.inputs, ready=isinstance(source, Tensors))
            with suppress(StopForward):
                model(**inputs)
            reader.finish(model)
            sink.batch_done(indices)


def _attach(model: nn.Module, site: Site, location: Location, function: Function) -> Handle:
    # The tokenizer's offsets say where the value's tokens are; a hook could only search the ids for them.
    watched = site.with_token("all") if site.token == "value" else site
    return intercept(model, watched, function, location=location)


class _Reader:
    """What has been read of the batch that is running."""

    def __init__(self, source: Texts | Tensors, sites: Sequence[Site], sink: Sink) -> None:
        self.source, self.sites, self.sink = source, sites, sink
        self.missing = set(range(len(sites)))
        self.batch = Batch((), {})

    def start(self, batch: Batch) -> None:
        self.batch = batch
        self.missing = set(range(len(self.sites)))

    def at(self, place: int) -> Function:
        def read(states: Tensor, selected: Tensor, this_pass: Pass) -> None:
            self._take(place, states, selected)
            if not self.missing:
                raise StopForward

        return read

    def _take(self, place: int, states: Tensor, selected: Bool[Tensor, "batch tokens"]) -> None:
        site = self.sites[place]
        if place not in self.missing:
            raise EditError(
                f"the module at the site {site} runs more than once in one pass (shared between blocks), so "
                "it has no "
                "one state to read; choose a site in a module of its own."
            )
        self.missing.discard(place)
        if site.token == "value":
            selected = value_mask(site, self.batch, selected)
        rows = states[selected.to(states.device)]
        places = torch.as_tensor(self.batch.indices, device=selected.device)
        owners = places[selected.nonzero()[:, 0]].to("cpu")
        if not bool(torch.isfinite(rows).all()):
            bad = int(owners[int((~torch.isfinite(rows)).flatten(1).any(1).nonzero()[0, 0])])
            raise EditError(
                f"{self.source.name(bad)} gives NaN or infinite states at the site {site}; run the model in "
                "a wider "
                "dtype (float32 or bfloat16), or look for broken weights."
            )
        self.sink.add(place, owners, rows)

    def finish(self, model: nn.Module) -> None:
        if self.missing:
            names = ", ".join(str(self.sites[place]) for place in sorted(self.missing))
            raise EditError(
                f"{type(model).__name__} ran to its end without running the module at: {names}. It may be "
                "skipped for "
                "this input (an adapter that is off, the decoder of an encoder's call); choose another site."
            )


def value_mask(site: Site, batch: Batch, real: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
    """The token of each row's value, as a mask.

    Raises:
        EditError: the site does not see the tokens of the prompt.
    """
    if batch.value is None or real.shape != batch.inputs["input_ids"].shape:
        raise EditError(
            f"the site {site} does not see the tokens of the prompt ({tuple(real.shape)} rows and tokens), "
            "so the value has no token there; use the token 'last', or a site in the stack that reads the "
            "prompt."
        )
    places = torch.arange(real.shape[1], device=real.device)
    return places[None, :] == batch.value.to(real.device)[:, None]
