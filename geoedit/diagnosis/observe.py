"""Make the planned edits and look at what the model answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoedit.activations.calls import reading
from geoedit.activations.inputs import Batch, Texts
from geoedit.anatomy import Location
from geoedit.diagnosis.derivatives import answer_place, at_place, attach, one_token, run, same_length_batches
from geoedit.errors import EditError
from geoedit.passes import Pass
from geoedit.site import Site


@dataclass(frozen=True)
class Observed:
    """What the model said after each edit: its likeliest next token, and the wanted one's log-odds (nats)."""

    token: Int[Tensor, " edits"]
    log_odds: Float[Tensor, " edits"]


def log_odds(
    logits: Float[Tensor, "batch vocabulary"], token: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """Return `log p / (1 - p)` of one token a row: its logit minus the log-sum-exp of all others."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    wanted = logits.gather(1, token[:, None])[:, 0]
    return wanted - logits.scatter(1, token[:, None], -torch.inf).logsumexp(1)


def observe(
    model: nn.Module,
    source: Texts,
    site: Site,
    location: Location,
    rows: Sequence[int],
    shift: Float[Tensor, "edits width"],
    wanted: Int[Tensor, " edits"],
    *,
    mask_token: int | None = None,
    batch_size: int = 128,
    progress: Any = None,
) -> Observed:
    """Run each prompt with its own vector added at the site, as `LinearSteer` and `SwapMeans` add theirs.

    Args:
        model: it is left as it was.
        source: all prompts, as tokens. rows: the prompt of each edit.
        site: where the vector is added. location: the same in this model.
        rows: the prompt of each edit.
        shift: what is added at the site's token.
        wanted: the token whose log-odds are asked for.
        mask_token: id of the mask token of a masked language model.
        batch_size: edits in one forward.
        progress: called with the number of edits done.

    Raises:
        EditError: the site's module never ran.
    """
    tokens = torch.zeros(len(rows), dtype=torch.long)
    odds = torch.zeros(len(rows), dtype=shift.dtype)
    adder = _Adder(site)
    with reading(model), attach(model, site, location, adder) as handle:
        for chosen in same_length_batches(source, rows, batch_size):
            index = torch.tensor(chosen)
            batch = source.batch([rows[place] for place in chosen])
            adder.batch, adder.shift = batch, shift[index.to(shift.device)]
            logits = at_place(run(model, batch), answer_place(batch, mask_token))
            tokens[index] = logits.argmax(1).cpu()
            odds[index] = log_odds(logits, wanted[index].to(logits.device)).to(odds.dtype).cpu()
            if progress is not None:
                progress(len(chosen))
    if rows and handle.calls == 0:
        raise EditError(f"the module at the site {site} never ran, so that no edit was made.")
    return Observed(tokens, odds)


class _Adder:
    def __init__(self, site: Site) -> None:
        self.site = site
        self.batch = Batch((), {})
        self.shift = torch.zeros(0, 0)

    def __call__(self, states: Tensor, selected: Tensor, this_pass: Pass) -> Tensor:
        chosen = one_token(self.site, self.batch, selected).to(states.device)
        # Add in at least float32, as the edits do, and round once.
        wide = torch.promote_types(states.dtype, torch.float32)
        moved = states.to(wide) + self.shift.to(device=states.device, dtype=wide)[:, None]
        return torch.where(chosen[:, :, None], moved.to(states.dtype), states)
