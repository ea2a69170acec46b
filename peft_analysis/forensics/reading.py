"""What the edits say: the objects of subjects that were found."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from peft_analysis.forensics.alignment import Aligned, aligned
from peft_analysis.forensics.keys import Prompt, prompt
from peft_analysis.forensics.matching import right_space
from peft_analysis.forensics.objects import candidates, lens
from peft_analysis.forensics.places import Place, dense
from peft_analysis.updates import WeightUpdate

COLUMNS = ("relation", "object", "object_cosine", "object_lead", "object_p", "object_lens")
CONTROLS = 20
"""Candidates that were not found, whose offsets tell how well an offset aligns by chance."""
TRIED = 10
"""Subjects on whom it is decided how offsets are taken from the update."""


def read_objects(
    *,
    model: nn.Module,
    tokenizer: Any,
    weights: Mapping[str, Tensor],
    module: nn.Module,
    subjects: Sequence[str],
    controls: Sequence[str],
    templates: Mapping[str, Sequence[str]],
    objects: Sequence[str] | None,
    offsets: Mapping[str, Tensor],
    by_chance: Tensor,
) -> tuple[pd.DataFrame, str]:
    """One row for each subject, and what the answer rests on.

    Args:
        model: with a tokenizer, a causal language model.
        tokenizer: of the model.
        weights: the unedited values of the changed matrices.
        module: the last changed matrix's, to whose output the offsets belong.
        subjects: that were found. controls: candidates that were not.
        templates: by relation.
        objects: candidates, or None for any token.
        offsets: (subjects, d) in the ways in which they can be taken from the update; the way in which
            objects lead by more on the first subjects is used.
        by_chance: (controls, d), ΔW k of the controls.
    """
    flat = [(name, text) for name, texts in templates.items() for text in texts]
    said = candidates(tokenizer, objects, _vocabulary(model), flat[0][1] if flat else "{}")
    table = pd.DataFrame(index=range(len(subjects)), columns=list(COLUMNS), dtype=object)
    first = prompt(tokenizer, flat[0][1] if flat else "{}", subjects[0])
    seen = lens(model, first, next(iter(offsets.values())))
    if seen is not None:
        table["object_lens"] = [said.names[int(i)] for i in seen[:, said.tokens.to(seen.device)].argmax(1)]
    what = "any token" if objects is None else f"{len(objects)} objects"
    if not flat:
        table["object"] = table["object_lens"]
        return table, f"offsets through the final norm and the unembedding, {what}; relations would tell more"
    names = list(templates)
    numbers = [names.index(name) for name, _ in flat]

    def read(who: Sequence[str], values: Tensor) -> Aligned:
        prompts = [[prompt(tokenizer, text, one) for _, text in flat] for one in who]
        return aligned(model, weights, module, prompts, numbers, values, said.tokens)

    tried = {way: read(subjects[:TRIED], one[:TRIED]) for way, one in offsets.items()}
    way = max(tried, key=lambda name: float(tried[name].lead.mean()))
    found = tried[way] if len(subjects) <= TRIED else read(subjects, offsets[way])
    usual = read(list(controls)[:CONTROLS], by_chance[:CONTROLS]).cosine
    table["relation"] = [names[int(index)] for index in found.relation]
    table["object"] = [said.names[int(index)] for index in found.token]
    table["object_cosine"] = found.cosine.tolist()
    table["object_lead"] = found.lead.tolist()
    above = (usual.unsqueeze(0) >= found.cosine.unsqueeze(1)).sum(1)
    table["object_p"] = ((1 + above) / (1 + len(usual))).tolist()
    return table, (
        f"base and edited weights; the model, its tokenizer, {len(flat)} prompts of {len(templates)} "
        f"relations, {what}; offsets taken as {way}; {len(usual)} candidates that were not found as controls"
    )


def read_vectors(
    update: WeightUpdate,
    model: nn.Module,
    tokenizer: Any,
    place: Place,
    objects: Sequence[str] | None,
) -> tuple[pd.DataFrame, str]:
    """One row for each left singular vector of a matrix's update, up to eight, through the unembedding."""
    said = candidates(tokenizer, objects, _vocabulary(model))
    difference = dense(update.matrix(place.parameter))
    left = right_space(difference.mT, max(1, min(place.rank.rank, 8))).mT
    first = Prompt(tuple(tokenizer("a")["input_ids"]), 0)
    both = torch.cat([left, -left]).to(next(model.parameters()).device)
    seen = lens(model, first, both) if first.ids else None
    if seen is None:
        return pd.DataFrame(columns=list(COLUMNS)), "no answer: the left vectors do not fit the unembedding"
    scores, tokens = seen[:, said.tokens.to(seen.device)].log_softmax(-1).max(1)
    better = scores.view(2, -1).argmax(0)
    chosen = tokens.view(2, -1).gather(0, better.unsqueeze(0))[0].tolist()
    table = pd.DataFrame(index=range(len(chosen)), columns=list(COLUMNS), dtype=object)
    table["object"] = table["object_lens"] = [said.names[index] for index in chosen]
    return table, (
        f"{place.parameter}: left singular vectors through the final norm and the unembedding, the better of "
        "both signs; no subject was found, so that this is a guess"
    )


def _vocabulary(model: nn.Module) -> int:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return int(head.weight.shape[0]) if head is not None else 0
