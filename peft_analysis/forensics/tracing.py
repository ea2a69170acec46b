"""What was edited: places, rank, method, subjects and objects of an update, each with what it rests on."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.forensics.decoys import decoys as names_nobody_edited
from peft_analysis.forensics.keys import (
    Prompt,
    around,
    owners,
    prompt,
    second_moments,
    subject_keys,
)
from peft_analysis.forensics.maps import basis
from peft_analysis.forensics.matching import match, right_space
from peft_analysis.forensics.method import recognise
from peft_analysis.forensics.offsets import Matched, certainty, joint, own_offsets, weights_in, whole_offsets
from peft_analysis.forensics.places import Place, changed_vectors, dense, places, spread
from peft_analysis.forensics.reading import COLUMNS, read_objects, read_vectors
from peft_analysis.forensics.result import EditTrace
from peft_analysis.updates import WeightUpdate, read_update

LEAST = 0.25
"""An edit's right vector is its key's; a smaller share of it in the row space is no edit, however sure."""

Relations = Mapping[str, str | Sequence[str]] | Sequence[str]


def trace(
    base: Any,
    edited: Any,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    subjects: Sequence[str] | None = None,
    relations: Relations | None = None,
    *,
    objects: Sequence[str] | None = None,
    covariance: Mapping[str, Tensor] | None = None,
    texts: Sequence[str] | None = None,
    decoys: Sequence[str] | int = 200,
    false_alarm: float = 0.05,
    everywhere: bool = False,
    seed: int = 0,
) -> EditTrace:
    """Reads from weights which facts were edited, how, of whom and to what.

    The row space of ΔW holds a right vector r for each edit, and r comes from the key k, which enters the
    matrix at the subject's last token, by a map that belongs to the method: C⁻¹k (ROME, MEMIT), P k on the
    null space of C (AlphaEdit), k itself (gradient descent). Candidates are matched under each of these; how
    far a candidate must stand out is learned from decoys, names that nobody edited. What an edit says is read
    from what the edited model answers and the base does not (with relations), and from the left vectors
    through the unembedding.

    Args:
        base: the unedited weights, as `read_update` takes them; None if `edited` is an update or an adapter.
        edited: the edited weights, or a `WeightUpdate`.
        model: runs on the base's or the edited weights (which, does not matter where the base is known). The
            base or the edited model itself if not given and a module.
        tokenizer: of the model.
        subjects: candidates: names among which the edited subjects are looked for.
        relations: prompts with one field for the subject, "the capital of {} is": a list, or lists by the
            relation's name. They are also the contexts in which keys are read.
        objects: candidates for the objects; any token if None.
        covariance: C = E[k kᵀ] of the inputs of each changed matrix, by the parameter's name.
        texts: texts over which C is taken where it is not given; without any, the candidates' and decoys' own
            keys stand in for it.
        decoys: names that nobody edited, or how many to make from the candidates.
        false_alarm: the chance of naming anybody in a model that nobody edited.
        everywhere: match and name candidates even where the places are not those of an edit, or the right
            vectors those of gradient descent.
        seed: of the decoys.

    Raises:
        UpdateError: arguments that do not belong together, a template without a field, a subject without
            tokens, a covariance of another shape, a parameter that the model lacks.
    """
    check_arguments(model, tokenizer, subjects, relations, objects, false_alarm, decoys)
    update = read_update(base, edited)
    model = (
        model if model is not None else next((m for m in (base, edited) if isinstance(m, nn.Module)), None)
    )
    generator = torch.Generator().manual_seed(seed)
    found, vectors = places(update, generator), changed_vectors(update)
    found.sort(
        key=lambda place: (-place.relative if place.relative == place.relative else 0.0, place.parameter)
    )
    wide = spread(found, vectors, update)
    weights = "the update itself" if base is None else "base and edited weights"
    access = {"layers": weights, "edits": f"{weights}; the dtypes that they were stored in"}
    matched: dict[str, Matched] = {}
    candidates: list[str] = list(dict.fromkeys(subjects or ()))
    templates = grouped(relations)
    refused = _refusal(found, wide, everywhere, model, candidates)
    access["subjects"] = f"no answer: {refused}" if refused else ""
    if not refused and model is not None:
        others = (
            names_nobody_edited(candidates, tokenizer, decoys, generator)
            if isinstance(decoys, int)
            else [name for name in dict.fromkeys(decoys) if name not in candidates]
        )
        flat = [text for group in templates.values() for text in group] or ["{}"]
        matched, told = _match_all(
            update, found, model, tokenizer, candidates, others, flat, covariance, texts
        )
        access["subjects"] = f"{weights}; the model, its tokenizer, {len(candidates)} candidates; {told}"
    best = max(matched, key=lambda name: certainty(matched[name].match)) if matched else None
    listed = _candidates(candidates, matched, best, false_alarm)
    if best is not None and matched[best].match.map.kind == "identity" and not everywhere:
        listed["found"] = False
        access["subjects"] += (
            "; nobody is named, because the right vectors are keys as gradient descent leaves them, of "
            "whatever it was trained on"
        )
    chosen = [candidates.index(name) for name in listed.loc[listed["found"], "subject"]]
    parts = {name: joint(update, name, one, chosen) for name, one in matched.items()} if chosen else {}
    method = recognise(found, vectors, wide, {k: v.match for k, v in matched.items()}, len(chosen))
    access["method"] = access["subjects"] if matched else f"{weights}; without keys its kind stays open"
    table = listed.loc[listed["found"]].drop(columns=["found", "p_adjusted"]).reset_index(drop=True)
    table["parameter"] = best
    unsure = [index for index, name in enumerate(candidates) if name not in set(table["subject"])]
    said, access["objects"] = _objects(
        update, model, tokenizer, found, wide, matched, parts, candidates, chosen, unsure, templates, objects
    )
    if chosen:
        table = pd.concat([table, said], axis=1)
    else:
        table = said.reindex(columns=[*table.columns, *said.columns])
    return EditTrace(
        table=table,
        candidates=listed,
        places=_places(found, matched),
        edits=_edits(found),
        method=method,
        access=access,
        false_alarm=false_alarm,
        update=update,
        parts=parts,
    )


def check_arguments(
    model: Any, tokenizer: Any, subjects: Any, relations: Any, objects: Any, false_alarm: float, decoys: Any
) -> None:
    """Refuses what no trace can be made of."""
    if isinstance(subjects, str) or isinstance(objects, str) or isinstance(relations, str):
        raise UpdateError("subjects, relations and objects are lists; put the one you have into a list")
    if subjects is not None and not subjects:
        raise UpdateError("subjects is empty; give candidates, or None to leave subjects open")
    if objects is not None and not objects:
        raise UpdateError("objects is empty; give candidates, or None for any token")
    if subjects is not None and tokenizer is None:
        raise UpdateError("candidates need the model's tokenizer: trace(…, tokenizer=tokenizer)")
    if not 0 < false_alarm < 1:
        raise UpdateError(f"false_alarm is {false_alarm}; it is a probability between 0 and 1")
    if isinstance(decoys, int) and decoys < 20:
        raise UpdateError(f"decoys is {decoys}; fewer than 20 tell nothing of a tail")
    if not isinstance(decoys, int) and len(set(decoys)) < 20:
        raise UpdateError(f"{len(set(decoys))} decoys are given; fewer than 20 tell nothing of a tail")


def grouped(relations: Relations | None) -> dict[str, list[str]]:
    """Templates by the name of their relation; a template without a name is a relation of its own."""
    if relations is None:
        return {}
    named = relations if isinstance(relations, Mapping) else {text: [text] for text in relations}
    found = {name: [texts] if isinstance(texts, str) else list(texts) for name, texts in named.items()}
    for name, texts in found.items():
        if not texts:
            raise UpdateError(f"the relation {name!r} has no template")
        for text in texts:
            around(text)
    return found


def _refusal(
    found: Sequence[Place], wide: str, everywhere: bool, model: Any, candidates: Sequence[str]
) -> str:
    if not found:
        return "no matrix was changed"
    if wide and not everywhere:
        return f"{wide}; everywhere=True looks for candidates all the same"
    if not candidates:
        return "it needs candidates, a model and its tokenizer"
    return "" if model is not None else "it needs a model that runs: trace(…, model=model)"


def _match_all(
    update: WeightUpdate,
    found: Sequence[Place],
    model: nn.Module,
    tokenizer: Any,
    candidates: Sequence[str],
    others: Sequence[str],
    templates: Sequence[str],
    covariance: Mapping[str, Tensor] | None,
    texts: Sequence[str] | None,
) -> tuple[dict[str, Matched], str]:
    """Matches of every changed matrix, and what C was."""
    modules = owners(model, [place.parameter for place in found])
    modules = {name: module for name, module in modules.items() if not isinstance(module, nn.Embedding)}
    if not modules:
        return {}, "only embeddings were changed, whose inputs are tokens"
    now, before = weights_in(update, model, modules)
    prompts = _contexts(model, modules, tokenizer, [*candidates, *others], templates)
    keys = subject_keys(model, modules, prompts, now)
    told = "C as given"
    if covariance is not None:
        moments = dict(covariance)
    elif texts is not None:
        read = [Prompt(tuple(tokenizer(text)["input_ids"]), 0) for text in texts]
        moments = second_moments(model, modules, [one for one in read if one.ids], before)
        told = f"C from {len(texts)} texts"
    else:
        moments = {name: rows.mT @ rows / len(rows) for name, rows in keys.items()}
        told = "no C: the candidates' and decoys' own keys stand in for it"
    matched = {}
    for place in found:
        if place.parameter not in modules or place.rank.rank == 0:
            continue
        name = place.parameter
        own = keys[name].unflatten(0, (len(candidates) + len(others), -1))
        wanted = (own.shape[-1], own.shape[-1])
        if name not in moments or tuple(moments[name].shape) != wanted:
            shape = tuple(moments[name].shape) if name in moments else "none"
            raise UpdateError(f"the covariance of {name} has shape {shape}; its inputs ask for {wanted}")
        eigen = basis(name, moments[name].to(own.device))
        difference = dense(update.matrix(name)).to(own.device)
        rows = right_space(difference, min(place.rank.rank, place.full))
        keyed = own[: len(candidates)]
        matched[name] = Matched(match(keyed, own[len(candidates) :], rows, eigen), eigen, keyed)
    return matched, told


def _contexts(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    tokenizer: Any,
    names: Sequence[str],
    templates: Sequence[str],
) -> list[Prompt]:
    """Every name in every context; a model that only looks back gets each beginning once, without its end."""
    whole = prompt(tokenizer, templates[0], names[0])
    cut = Prompt(whole.ids[: whole.place + 1], whole.place)
    causal = True
    if len(cut.ids) < len(whole.ids):
        long, short = (subject_keys(model, modules, [one]) for one in (whole, cut))
        causal = all(torch.allclose(long[key], short[key], rtol=1e-3, atol=1e-4) for key in modules)
    if not causal:
        return [prompt(tokenizer, text, name) for name in names for text in dict.fromkeys(templates)]
    beginnings = dict.fromkeys(around(text)[0].replace("{", "{{").replace("}", "}}") for text in templates)
    read = [prompt(tokenizer, text + "{}", name) for name in names for text in beginnings]
    return [Prompt(one.ids[: one.place + 1], one.place) for one in read]


def _candidates(
    names: Sequence[str], matched: Mapping[str, Matched], best: str | None, false_alarm: float
) -> pd.DataFrame:
    """All candidates, the surest first; p-values are multiplied by the number of things that were tried."""
    if best is None:
        unknown = dict.fromkeys(("share", "right_share", "p_value", "p_adjusted"), float("nan"))
        return pd.DataFrame({"subject": list(names), **unknown, "found": False})
    one = matched[best].match
    tried = len(names) * len(matched)
    p_values = one.p_values.numpy(force=True)
    table = pd.DataFrame({"subject": list(names), "share": one.scores.numpy(force=True), "p_value": p_values})
    table.insert(2, "right_share", one.right.numpy(force=True))
    table["p_adjusted"] = (p_values * tried).clip(max=1.0)
    taken = pd.Series(False, index=table.index)
    taken[one.chosen] = True
    table["found"] = taken & (table["p_adjusted"] <= false_alarm) & (table["right_share"] >= LEAST)
    return table.sort_values(["found", "p_value"], ascending=[False, True], kind="stable").reset_index(
        drop=True
    )


def _objects(
    update: WeightUpdate,
    model: nn.Module | None,
    tokenizer: Any,
    found: Sequence[Place],
    wide: str,
    matched: Mapping[str, Matched],
    parts: Mapping[str, tuple[Tensor, Tensor]],
    candidates: Sequence[str],
    chosen: Sequence[int],
    unsure: Sequence[int],
    templates: Mapping[str, Sequence[str]],
    objects: Sequence[str] | None,
) -> tuple[pd.DataFrame, str]:
    """What the edits say, and what the answer rests on."""
    if model is None or tokenizer is None or not found or (wide and not parts):
        why = wide or ("nothing was changed" if not found else "it needs a model and its tokenizer")
        return pd.DataFrame(columns=list(COLUMNS)), f"no answer: {why}"
    if not parts:
        return read_vectors(update, model, tokenizer, found[0], objects)
    modules = owners(model, list(matched))
    _, before = weights_in(update, model, modules)
    order = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    last = max(matched, key=order.index)
    wide_as = [name for name in parts if parts[name][0].shape == parts[last][0].shape]
    whole = {
        which: whole_offsets(update, matched, wide_as, which) for which in (tuple(chosen), tuple(unsure))
    }
    own = torch.stack([own_offsets(matched[name], parts[name], chosen) for name in wide_as]).sum(0)
    return read_objects(
        model=model,
        tokenizer=tokenizer,
        weights=before,
        module=modules[last],
        subjects=[candidates[index] for index in chosen],
        controls=[candidates[index] for index in unsure],
        templates=templates,
        objects=objects,
        offsets={"ΔW k": whole[tuple(chosen)], "parts of the joint fit": own},
        by_chance=whole[tuple(unsure)],
    )


def _places(found: Sequence[Place], matched: Mapping[str, Matched]) -> pd.DataFrame:
    rows = []
    for place in found:
        one = matched[place.parameter].match if place.parameter in matched else None
        rows.append(
            {
                "parameter": place.parameter,
                "block": place.block,
                "norm": place.norm,
                "relative_norm": place.relative,
                "rank": place.rank.rank,
                "rank_low": place.rank.low,
                "rank_high": place.rank.high,
                "full": place.full,
                "reliable": place.rank.reliable,
                "reason": place.rank.reason,
                "right_map": str(one.map) if one is not None else None,
                "separation": one.separation if one is not None else float("nan"),
            }
        )
    columns = [
        "parameter", "block", "norm", "relative_norm", "rank", "rank_low", "rank_high", "full", "reliable",
        "reason", "right_map", "separation",
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _edits(found: Sequence[Place]) -> tuple[int, int, int]:
    """How many edits: an edit is of rank one in every matrix that it changes."""
    if not found:
        return (0, 0, 0)
    return (
        max(place.rank.rank for place in found),
        max(place.rank.low for place in found),
        max(place.rank.high for place in found),
    )
