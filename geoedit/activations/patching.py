"""Run a model with given states in place of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from geoedit.activations.calls import call_arguments, reading
from geoedit.activations.collect import Prompts
from geoedit.activations.inputs import Batch, Tensors, read_inputs
from geoedit.activations.reading import locate_all, plan, value_mask
from geoedit.activations.store import convert
from geoedit.anatomy import Location
from geoedit.errors import EditError
from geoedit.hooks import Handle, intercept
from geoedit.passes import Pass
from geoedit.site import Site


def run_with(
    model: nn.Module,
    tokenizer: Any,
    prompts: Prompts,
    states: Mapping[Site, Tensor],
    *,
    values: Sequence[str] | None = None,
    batch_size: int = 32,
    output: str = "logits",
    progress: bool | None = None,
) -> Float[Tensor, "prompts *rest"]:
    """Run prompts with given states in place of the model's own; return the output at their last token.

    Args:
        model: as for `collect`, like tokenizer, prompts, values, batch_size and progress.
        tokenizer: see `collect`.
        prompts: see `collect`.
        states: for each site (prompts, width), a row for each prompt in their order, or (width,) for all of
            them; a site that selects several tokens writes the prompt's row to each of these.
        values: see `collect`.
        batch_size: see `collect`.
        output: the field of the model's output to return. A field with one row a token, (batch, tokens, …),
            is read at the last real token of each prompt.
        progress: see `collect`.

    Returns:
        (prompts, …) on the CPU, in the order of the prompts. No states give the plain outputs.

    Raises:
        EditError: a site that does not exist, states of another number or width, states that are not finite,
            an output that the model does not have.
    """
    places = locate_all(model, states) if states else {}
    source = read_inputs(model, tokenizer, prompts, values)
    source.check(model, tuple(places))
    given = {site: _checked(site, places[site], rows, len(source)) for site, rows in states.items()}
    source, batches = plan(model, source, batch_size)
    parts: list[Tensor] = []
    order: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(reading(model))
        writers = [_Writer(site, rows) for site, rows in given.items()]
        handles = [stack.enter_context(writer.attach(model, places[writer.site])) for writer in writers]
        hidden = None if progress is None else not progress
        for indices in tqdm(batches, desc="running", unit="batch", disable=hidden):
            batch = source.batch(indices)
            for writer in writers:
                writer.batch = batch
            before = [handle.calls for handle in handles]
            found = model(**call_arguments(model, batch.inputs, ready=isinstance(source, Tensors)))
            for handle, count in zip(handles, before, strict=True):
                if handle.calls == count:
                    raise EditError(
                        f"the module at the site {handle.site} never ran, so no state was put there."
                    )
            parts.append(_last(model, found, output, batch))
            order.extend(indices)
    result = torch.cat(parts)
    back = torch.empty(len(order), dtype=torch.long)
    back[torch.tensor(order)] = torch.arange(len(order))
    return result[back]


def _checked(site: Site, location: Location, rows: Tensor, count: int) -> Tensor:
    wide = rows.shape[-1] if rows.dim() else 0
    fits = rows.dim() == 1 or (rows.dim() == 2 and rows.shape[0] == count)
    if not fits or wide != (location.width or wide):  # a module path may not tell its width beforehand
        raise EditError(
            f"states for the site {site} have shape {tuple(rows.shape)}; they must be ({location.width},) "
            "or "
            f"({count}, {location.width}), one row for each prompt."
        )
    if not bool(torch.isfinite(rows).all()):
        raise EditError(f"states for the site {site} hold NaN or infinite numbers; mend them first.")
    return rows.expand(count, -1)


class _Writer:
    """Puts the rows of the prompts that are running in place of the model's states."""

    def __init__(self, site: Site, rows: Float[Tensor, "prompts width"]) -> None:
        self.site, self.rows = site, rows
        self.batch = Batch((), {})

    def attach(self, model: nn.Module, location: Location) -> Handle:
        watched = self.site.with_token("all") if self.site.token == "value" else self.site
        return intercept(model, watched, self.write, location=location)

    def write(self, states: Tensor, selected: Tensor, this_pass: Pass) -> Tensor:
        if self.site.token == "value":
            selected = value_mask(self.site, self.batch, selected)
        rows = self.rows[list(self.batch.indices)].to(device=states.device, dtype=states.dtype)
        chosen = selected.to(states.device)[:, :, None]
        return torch.where(chosen, rows[:, None, :], states)


def _last(model: nn.Module, found: Any, output: str, batch: Batch) -> Tensor:
    value = found.get(output) if hasattr(found, "get") else getattr(found, output, None)
    if not isinstance(value, Tensor):
        names = ", ".join(found) if hasattr(found, "keys") else type(found).__name__
        raise EditError(f"{type(model).__name__} gives no output {output!r}; it gives: {names}.")
    mask = batch.inputs.get("attention_mask")
    if value.dim() == 3 and mask is not None and value.shape[1] == mask.shape[1]:
        columns = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        last = columns.masked_fill(mask == 0, -1).amax(1).to(value.device)
        value = value[torch.arange(len(last), device=value.device), last]
    elif value.dim() == 3:
        value = value[:, -1]
    return convert(value, None)
