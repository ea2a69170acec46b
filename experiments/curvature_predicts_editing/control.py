"""Runs prompts with given states at a site, and measures how far other answers are disturbed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.activations.calls import reading
from geoedit.activations.inputs import Batch, Texts
from geoedit.anatomy import Location
from geoedit.diagnosis.derivatives import answer_place, at_place, attach, one_token, run, same_length_batches
from geoedit.errors import EditError
from geoedit.passes import Pass
from geoedit.site import Site

BATCH = 256


def run_with_states(
    model: nn.Module,
    source: Texts,
    site: Site,
    location: Location,
    rows: Sequence[int],
    states: Float[Tensor, "runs width"],
    use: Callable[[list[int], Float[Tensor, "batch vocabulary"]], Any],
    *,
    batch_size: int = BATCH,
) -> None:
    """Run each prompt with its own state put in at the site's token, as an edit leaves it there.

    Args:
        model: it is left as it was.
        source: all prompts, as tokens.
        site: where a state is put in, one token a prompt. location: the same in this model.
        location: see `site`.
        rows: the prompt of each run.
        states: the state of each run.
        use: called with the places of some runs, and their log-probabilities of the next token in float64;
            they are not kept.
        batch_size: runs in one forward.

    Raises:
        EditError: there are not as many states as rows, or the site's module never ran.
    """
    if len(states) != len(rows):
        raise EditError(f"{len(states)} states for {len(rows)} prompts; give one for each.")
    putter = _Putter(site)
    with reading(model), attach(model, site, location, putter) as handle:
        for chosen in same_length_batches(source, rows, batch_size):
            batch = source.batch([rows[place] for place in chosen])
            putter.batch, putter.states = batch, states[torch.tensor(chosen, device=states.device)]
            logits = at_place(run(model, batch), answer_place(batch, None))
            use(chosen, logits.double().log_softmax(-1))
    if len(rows) and handle.calls == 0:
        raise EditError(f"the module at the site {site} never ran, so that no state was put in.")


def unedited(
    model: nn.Module, source: Texts, *, batch_size: int = BATCH
) -> Float[Tensor, "prompts vocabulary"]:
    """Log-probabilities of the next token after every prompt, in float64."""
    found: list[Tensor] = [torch.zeros(0)] * len(source)
    with reading(model):
        for chosen in same_length_batches(source, range(len(source)), batch_size):
            batch = source.batch(chosen)
            part = at_place(run(model, batch), answer_place(batch, None)).double().log_softmax(-1)
            for place, row in zip(chosen, part, strict=True):
                found[place] = row
    return torch.stack(found)


def disturbance(
    before: Float[Tensor, "*batch vocabulary"], after: Float[Tensor, "*batch vocabulary"]
) -> Float[Tensor, "*batch"]:
    """KL(before ‖ after) = Σ p (log p − log q) in nats, from log-probabilities; never below zero.

    >>> certain, fair = torch.tensor([0.0, -torch.inf]), torch.tensor([0.5, 0.5]).log()
    >>> float(disturbance(certain, fair)), float(disturbance(fair, fair))
    (0.6931471824645996, 0.0)
    """
    terms = before.exp() * (before - after)
    return torch.where(before == -torch.inf, 0.0, terms).sum(-1).clamp_min(0)


class _Putter:
    """Puts states in place of those at a site's token, in the precision of the model."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.batch = Batch((), {})
        self.states = torch.zeros(0, 0)

    def __call__(self, states: Tensor, selected: Tensor, this_pass: Pass) -> Tensor:
        chosen = one_token(self.site, self.batch, selected).to(states.device)
        given = self.states.to(device=states.device, dtype=states.dtype)[:, None]
        return torch.where(chosen[:, :, None], given, states)
