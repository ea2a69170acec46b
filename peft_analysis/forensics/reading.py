"""What the edits say: the objects of subjects that were found."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from peft_analysis.forensics.keys import Prompt, owners, prompt
from peft_analysis.forensics.matching import right_space
from peft_analysis.forensics.objects import Candidates, answers, candidates, gains, lens
from peft_analysis.forensics.places import Place, dense
from peft_analysis.updates import WeightUpdate

COLUMNS = ("relation", "object", "object_gain", "object_p", "object_lens")
CONTROLS = 40
"""Unedited subjects whose answers tell how much an answer changes by itself."""


def read_objects(
    *,
    update: WeightUpdate,
    model: nn.Module | None,
    tokenizer: Any,
    found: Sequence[Place],
    wide: str,
    subjects: Sequence[str],
    controls: Sequence[str],
    templates: Mapping[str, Sequence[str]],
    objects: Sequence[str] | None,
    lefts: Tensor | None,
) -> tuple[pd.DataFrame, str]:
    """One row for each subject, and what the answer rests on.

    Without subjects there is one row for each left singular vector of the update, up to eight, read through
    the unembedding in both signs.
    """
    if model is None or tokenizer is None or not found or wide:
        why = wide or ("nothing was changed" if not found else "it needs a model and its tokenizer")
        return pd.DataFrame(columns=COLUMNS), f"no answer: {why}"
    flat = [(name, text) for name, texts in templates.items() for text in texts]
    if not subjects:
        return _from_vectors(update, model, tokenizer, found, objects)
    said = candidates(tokenizer, objects, _vocabulary(model), flat[0][1] if flat else "{}")
    table = pd.DataFrame(index=range(len(subjects)), columns=COLUMNS, dtype=object)
    first = prompt(tokenizer, flat[0][1] if flat else "{}", subjects[0])
    seen = lens(model, first, lefts) if lefts is not None else None
    if seen is not None:
        table["object_lens"] = [said.names[int(i)] for i in seen[:, said.tokens.to(seen.device)].argmax(1)]
    if not flat:
        table["object"] = table["object_lens"]
        return table, "left vectors of the joint fit through the final norm and the unembedding; no relations"
    best = _answered(update, model, tokenizer, found, subjects, flat, said)
    usual = _answered(update, model, tokenizer, found, list(controls)[:CONTROLS], flat, said)
    others = [entry[2] for entry in usual]
    for row, (relation, name, gain) in enumerate(best):
        chance = (1 + sum(other >= gain for other in others)) / (1 + len(others))
        table.loc[row, ["relation", "object", "object_gain", "object_p"]] = [relation, name, gain, chance]
    what = "any token" if objects is None else f"{len(objects)} objects"
    return table, (
        f"base and edited weights; the model, its tokenizer, {len(flat)} prompts of {len(templates)} "
        f"relations, {what}; {len(others)} subjects that were not found as controls"
    )


def _answered(
    update: WeightUpdate,
    model: nn.Module,
    tokenizer: Any,
    found: Sequence[Place],
    subjects: Sequence[str],
    flat: Sequence[tuple[str, str]],
    said: Candidates,
) -> list[tuple[str, str, float]]:
    """Relation, object and gain of each subject: the mean over the relation's prompts, the largest of all."""
    if not subjects:
        return []
    from peft_analysis.forensics.tracing import weights_in

    prompts = [prompt(tokenizer, text, subject) for subject in subjects for _, text in flat]
    whole = [Prompt(one.ids, one.place) for one in prompts]
    now, before = weights_in(update, model, owners(model, [place.parameter for place in found]))
    change = gains(answers(model, whole, before), answers(model, whole, now))
    change = change[:, said.tokens.to(change.device)].unflatten(0, (len(subjects), -1))
    names = list(dict.fromkeys(name for name, _ in flat))
    groups = torch.tensor([names.index(name) for name, _ in flat], device=change.device)
    by_relation = torch.stack([change[:, groups == index].mean(1) for index in range(len(names))], 1)
    found_rows = []
    for row in by_relation:
        index = int(row.argmax())
        relation, token = divmod(index, row.shape[1])
        found_rows.append((names[relation], said.names[token], float(row.flatten()[index])))
    return found_rows


def _from_vectors(
    update: WeightUpdate,
    model: nn.Module,
    tokenizer: Any,
    found: Sequence[Place],
    objects: Sequence[str] | None,
) -> tuple[pd.DataFrame, str]:
    said = candidates(tokenizer, objects, _vocabulary(model))
    place = found[0]
    difference = dense(update.matrix(place.parameter))
    left = right_space(difference.mT, max(1, min(place.rank.rank, 8))).mT
    first = Prompt(tuple(tokenizer("a")["input_ids"]), 0)
    both = torch.cat([left, -left]).to(next(model.parameters()).device)
    seen = lens(model, first, both) if first.ids else None
    if seen is None:
        return pd.DataFrame(columns=COLUMNS), "no answer: the left vectors do not fit the unembedding"
    scores, tokens = seen[:, said.tokens.to(seen.device)].log_softmax(-1).max(1)
    pairs = scores.view(2, -1).argmax(0)
    chosen = tokens.view(2, -1).gather(0, pairs.unsqueeze(0))[0].tolist()
    names = [said.names[index] for index in chosen]
    table = pd.DataFrame(index=range(len(names)), columns=COLUMNS, dtype=object)
    table["object"] = table["object_lens"] = names
    return table, (
        f"{place.parameter}: left singular vectors through the final norm and the unembedding, the better of "
        "both signs; no subject was found, so that this is a guess"
    )


def _vocabulary(model: nn.Module) -> int:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return int(head.weight.shape[0]) if head is not None else 0
