"""Which object an edit was made for: the one whose log-probability climbs along the edit's own offset.

Editors of facts find the value of an edit by gradient ascent of log p(object | prompt) in an offset δ of a
matrix's output at the subject's last token, from δ = 0. So δ lies along the gradients of that one
log-probability, whatever else the model says once it is added; far along δ other prompts are answered wildly
too, and with as much certainty.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.forensics.keys import Prompt, batches, evaluating, run

POINTS = (0.0, 0.3)
"""Where along the offset gradients are taken."""
SHORTLIST = 4
"""Tokens a relation that gain most from the whole offset, and as many that gain most from half of it."""
ROWS = 128


@dataclass(frozen=True)
class Aligned:
    """What each offset says: relation and token, the cosine with its gradients, and the lead over others.

    Attributes:
        relation, token: (subjects,) indices.
        cosine: (subjects,) of the offset with the gradient of the token's log-probability, the mean over the
            relation's prompts and over points of the way.
        lead: (subjects,) over the best of any other token.
    """

    relation: Int[Tensor, " subjects"]
    token: Int[Tensor, " subjects"]
    cosine: Float[Tensor, " subjects"]
    lead: Float[Tensor, " subjects"]


def aligned(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    module: nn.Module,
    prompts: Sequence[Sequence[Prompt]],
    relations: Sequence[int],
    offsets: Float[Tensor, "subjects d"],
    tokens: Int[Tensor, " tokens"],
) -> Aligned:
    """Reads offsets of a module's output at the subject's last token.

    Args:
        model: a causal language model; it is run with `weights` in the place of its own: the unedited ones.
        weights: parameters by name.
        module: whose output the offsets are added to.
        prompts: of each subject, the same templates in the same order.
        relations: of each template, its relation's number, from 0.
        offsets: of each subject.
        tokens: that may be said.

    Raises:
        UpdateError: the model gives no logits.
    """
    found = []
    at_once = max(1, ROWS // len(relations))
    with evaluating(model):
        for start in range(0, len(prompts), at_once):
            part = slice(start, start + at_once)
            found.append(_read(model, weights, module, prompts[part], relations, offsets[part], tokens))
    if not found:
        none = torch.zeros(0, dtype=torch.long, device=offsets.device)
        return Aligned(none, none, none.float(), none.float())
    return Aligned(*(torch.cat(pieces) for pieces in zip(*found, strict=True)))


def _read(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    module: nn.Module,
    prompts: Sequence[Sequence[Prompt]],
    relations: Sequence[int],
    offsets: Tensor,
    tokens: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    flat = [one for group in prompts for one in group]
    device = next(model.parameters()).device
    which, ids, mask = next(batches(flat, device, len(flat)))
    order = torch.tensor(which, device=device).argsort()
    ids, mask = ids[order], mask[order]
    places = torch.tensor([one.place for one in flat], device=device)
    rows = torch.arange(len(flat), device=device)
    groups = torch.tensor(relations, device=device)
    way = offsets.to(device).repeat_interleave(len(relations), 0)
    tokens = tokens.to(device)

    def said(offset: Tensor) -> Tensor:
        with added(module, places, offset):
            found = run(model, weights, ids, mask)
        if not hasattr(found, "logits") or found.logits.ndim != 3:
            raise UpdateError(f"{type(model).__name__} gives no logits for each token; objects need them")
        return found.logits[rows, mask.sum(1) - 1].float().log_softmax(-1)

    def pooled(values: Tensor) -> Tensor:
        """Means over the templates of each relation (subjects, relations, …), of (rows, …)."""
        by_subject = values.unflatten(0, (len(prompts), -1))
        return torch.stack([by_subject[:, groups == one].mean(1) for one in groups.unique()], 1)

    with torch.no_grad():
        start = said(0 * way).exp()[:, tokens]
        gains = [pooled(said(part * way).exp()[:, tokens] - start) for part in (1.0, 0.5)]
    few = min(SHORTLIST, len(tokens))
    listed = torch.cat([gain.topk(few, -1).indices for gain in gains], -1)
    asked = tokens[listed][:, groups].flatten(0, 1)
    cosines = torch.zeros(asked.shape, device=device)
    for point in POINTS:
        with torch.enable_grad():
            offset = (point * way).requires_grad_(True)
            likely = said(offset).gather(1, asked).sum(0)
            for column in range(asked.shape[1]):
                (slope,) = torch.autograd.grad(likely[column], offset, retain_graph=True)
                cosines[:, column] += torch.cosine_similarity(slope, way, dim=-1) / len(POINTS)
    scores = pooled(cosines.detach()).flatten(1)
    words = listed.flatten(1)
    best = scores.argmax(1, keepdim=True)
    token = words.gather(1, best)
    rivals = scores.masked_fill(words == token, -1.0).amax(1)
    cosine = scores.gather(1, best)[:, 0]
    return best[:, 0] // listed.shape[-1], token[:, 0], cosine, cosine - rivals


@contextmanager
def added(
    module: nn.Module, places: Int[Tensor, " rows"], offsets: Float[Tensor, "rows d"]
) -> Iterator[None]:
    """Offsets added to a module's output, each at its own place of its row."""

    def change(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        here = torch.arange(output.shape[1], device=output.device) == places.unsqueeze(1)
        return output + here.unsqueeze(-1) * offsets.unsqueeze(1).to(output.dtype)

    handle = module.register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()
