"""Gather the states of a model at some sites for some prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.activations.inputs import Tensors, Texts, read_inputs
from geoedit.activations.processes import Processes
from geoedit.activations.reading import locate_all, plan, read_states
from geoedit.activations.store import (
    INDEX,
    Activations,
    Memory,
    Shards,
    in_order,
    open_folder,
    read_index,
    request_of,
    write_index,
)
from geoedit.anatomy import Location
from geoedit.concept import Prompt
from geoedit.errors import EditError
from geoedit.fingerprint import Fingerprint, fingerprint, weights_digest
from geoedit.passes import being_watched
from geoedit.site import Site

Prompts = Sequence[str] | Sequence[Prompt] | Mapping[str, Tensor]


def collect(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    sites: Iterable[Site] | Site,
    *,
    values: Sequence[str] | None = None,
    batch_size: int = 32,
    out: str | Path | None = None,
    progress: bool | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 2**28,
) -> Activations:
    """Gather the states at the sites, one row a prompt (or one a token), in the order of the prompts.

    One forward a batch for all sites together, stopped after the last site that it needs; prompts of like
    length share a batch. What stands at a prompt does not depend on the batch, on the side of the padding or
    on the number of processes. Nothing of model or tokenizer stays changed. Under `accelerate launch` every
    process calls this with the same arguments; the prompts are split and every process gets all rows.

    Args:
        model: any model that `anatomy` reads; also one placed on several devices.
        tokenizer: its tokenizer, which adds its special tokens as ever; None with ready tensors.
        prompts: texts, `concept.prompts()`, or a mapping of ready tensors (n, …) that the model takes by
            name.
        sites: where. An encoder-decoder model gets the prompts in its encoder, the start token in its
            decoder.
        values: with plain texts, the value that each holds (where it stands last), for sites at "value".
        batch_size: prompts in one forward.
        out: a folder for shards, which the result reads from. The same call takes up a run that was cut off.
        progress: show a bar; None: on a terminal only.
        dtype: of the result; None: the model's own.
        shard_bytes: a shard is closed once it holds this much; about that much memory is used.

    Raises:
        EditError: before the first forward for a site that does not exist, an empty or too long prompt, a
            value that is not in its prompt, a token that a prompt does not have, a folder with another
            collection; after it for states that are not finite, naming prompt and site.
    """
    if batch_size < 1:
        raise EditError(f"batch_size is {batch_size}; it must be at least 1.")
    places = locate_all(model, sites)
    source = read_inputs(model, tokenizer, prompts, values)
    source.check(model, tuple(places))
    mark = fingerprint(model)
    if out is not None:
        return _to_folder(model, source, places, mark, Path(out), batch_size, progress, dtype, shard_bytes)
    processes = Processes.current()
    sink = Memory(tuple(places), dtype)

    def work() -> None:
        fitted, batches = plan(model, source, batch_size_for(source, batch_size, processes))
        read_states(model, fitted, places, processes.share(batches), sink, progress=progress)

    processes.together(work)
    states, owners = {}, {}
    for place, site in enumerate(places):
        own, rows = sink.take(place)
        owners[site], states[site] = in_order(processes.concatenated(own), processes.concatenated(rows))
    return Activations(source.texts, source.values, mark, states, owners)


def batch_size_for(source: Texts | Tensors, batch_size: int, processes: Processes) -> int:
    """Smaller batches where there would be fewer of them than processes."""
    return max(1, min(batch_size, -(-len(source) // processes.world)))


def _to_folder(
    model: nn.Module,
    source: Texts | Tensors,
    places: Mapping[Site, Location],
    mark: Fingerprint,
    folder: Path,
    batch_size: int,
    progress: bool | None,
    dtype: torch.dtype | None,
    shard_bytes: int,
) -> Activations:
    if isinstance(source, Tensors):
        raise EditError("out= needs prompts as text, which the index keeps; ready tensors have none.")
    if any(being_watched(module) for module in model.modules()):
        raise EditError(
            "out= while an edit is attached: the folder would hold edited states under the model's own name. "
            "Remove the edit, or collect without out= and save what comes back."
        )
    sites, processes = tuple(places), Processes.current()
    request = request_of(
        source.texts,
        source.values,
        sites,
        (mark.to_dict(), weights_digest(model), dtype, source.ids, source.value_tokens),
    )
    if (folder / INDEX).exists():
        if read_index(folder)["request"] == request:
            return open_folder(folder)
        raise EditError(f"{folder}: holds another collection; give an empty folder, or delete this one.")
    if folder.exists() and not folder.is_dir():
        raise EditError(f"{folder}: is a file; out= names a folder.")

    shards = processes.together(lambda: Shards(folder, sites, request, dtype, shard_bytes, processes.rank))

    def work() -> None:
        fitted, batches = plan(model, source, batch_size_for(source, batch_size, processes))
        missing = [[i for i in batch if i not in shards.done] for batch in batches]
        batches = [batch for batch in missing if batch]
        read_states(model, fitted, places, processes.share(batches), shards, progress=progress)
        shards.flush()

    processes.together(work)
    if processes.rank == 0:
        write_index(folder, sites, source.texts, source.values, mark, request)
    processes.objects(None)
    return open_folder(folder)
