"""One case: edit, store, trace, and compare what was found with what was done."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import geoedit
from experiments.edit_forensics.controls import control
from experiments.edit_forensics.editors import METHODS, Editor, covariances, last_of_mlp, texts_of
from experiments.edit_forensics.requests import Request, draw_requests, tokens_of
from experiments.edit_forensics.settings import Settings
from peft_analysis.forensics import EditTrace, trace

LAYERS = range(3)


@dataclass(frozen=True)
class Subjects:
    """A model with its tokenizer and world, and C as the editor and as the tracer know it."""

    name: str
    model: nn.Module
    tokenizer: Any
    world: Any
    editor: dict[int, Tensor]
    tracer: dict[int, Tensor]

    @classmethod
    def load(cls, name: str, settings: Settings) -> Subjects:
        """The built-in model of this name."""
        model, tokenizer, world = geoedit.testbeds.load(name)
        model.requires_grad_(False)
        moments = [
            covariances(model, tokenizer, texts_of(world, part, settings.texts), LAYERS) for part in (0, 1)
        ]
        return cls(name, model, tokenizer, world, moments[0], moments[1])


def edit_cases(at: Subjects, settings: Settings, done: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every editing case of a model that is not done yet: its key and its record."""
    for count, sets in settings.runs:
        for index in range(sets):
            requests = draw_requests(at.world, count, 1000 * settings.seed + 100 * count + index)
            wanted = None
            for method in settings.methods:
                keys = {dtype: f"{at.name}, {method}, {count}, {index}, {dtype}" for dtype in settings.dtypes}
                if done >= set(keys.values()):
                    continue
                editor = Editor(at.model, at.tokenizer, at.editor, settings.editing)
                if method == "ROME":
                    METHODS[method](editor, requests)
                else:
                    if wanted is None:
                        wanted = editor.targets(requests, settings.editing.layers[-1])
                    METHODS[method](editor, requests, wanted)  # type: ignore[call-arg]
                changes = changed(at.model, editor.model)
                for dtype, key in keys.items():
                    if key in done:
                        continue
                    base, edited = stored(at.model, changes, getattr(torch, dtype))
                    kept = kept_answers(at, edited, requests)
                    record = traced(at, base, edited, settings, requests)
                    yield (
                        key,
                        {
                            "model": at.name,
                            "method": method,
                            "edits": count,
                            "set": index,
                            "dtype": dtype,
                            **kept,
                            **record,
                        },
                    )


def control_cases(at: Subjects, settings: Settings, done: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every control of a model that is not done yet."""
    texts = texts_of(at.world, 2, settings.texts)
    for kind in settings.controls:
        for seed in settings.control_seeds if kind != "rounding" else settings.control_seeds[:1]:
            for dtype in settings.dtypes:
                key = f"{at.name}, {kind}, {seed}, {dtype}"
                if key in done:
                    continue
                base = copy.deepcopy(at.model).to(getattr(torch, dtype))
                tuned = control(
                    kind, base, at.tokenizer, texts, settings.editing.layer, settings.control_steps, seed
                )
                found = trace_of(at, base, tuned, settings)
                forced = trace_of(at, base, tuned, settings, everywhere=True, only=_matrix(at, settings))
                yield (
                    key,
                    {
                        "model": at.name,
                        "control": kind,
                        "seed": seed,
                        "dtype": dtype,
                        "method_found": str(found.method),
                        "found": len(found.candidates.query("found")),
                        "found_everywhere": int(forced.candidates["found"].sum()),
                        "below": float((forced.candidates["p_value"] < 0.05).mean()),
                        "candidates": len(forced.candidates),
                        "edits_found": list(found.edits),
                    },
                )


def _matrix(at: Subjects, settings: Settings) -> str:
    return last_of_mlp(at.model, settings.editing.layer)


def changed(base: nn.Module, edited: nn.Module) -> dict[str, Tensor]:
    """The differences of the parameters that differ."""
    before = dict(base.named_parameters())
    return {
        name: value.detach() - before[name].detach()
        for name, value in edited.named_parameters()
        if not torch.equal(value, before[name])
    }


def stored(model: nn.Module, changes: dict[str, Tensor], dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Base and edited model, stored in a dtype: the base is rounded, the change added, the sum rounded."""
    base = copy.deepcopy(model).to(dtype)
    edited = copy.deepcopy(base)
    with torch.no_grad():
        for name, change in changes.items():
            parameter = edited.get_parameter(name)
            parameter.copy_((parameter.float() + change).to(dtype))
    return base, edited


def trace_of(
    at: Subjects, base: nn.Module, edited: nn.Module, settings: Settings, **options: Any
) -> EditTrace:
    """The trace of one update, with what the study gives the tracer."""
    from peft_analysis.updates import read_update

    only = options.pop("only", None)
    if only is not None:
        update = read_update(base, edited).only([only])
        source: Any = update
    else:
        source = edited
    return trace(
        base,
        source,
        at.model,
        at.tokenizer,
        [entity.name for entity in at.world.entities],
        {one.name: one.templates[: settings.templates] for one in at.world.relations},
        objects=sorted({fact.answer for fact in at.world.facts}),
        covariance={last_of_mlp(at.model, layer): C for layer, C in at.tracer.items()},
        decoys=settings.decoys,
        seed=settings.seed,
        **options,
    )


def traced(
    at: Subjects, base: nn.Module, edited: nn.Module, settings: Settings, requests: Sequence[Request]
) -> dict[str, Any]:
    """What a trace found of these edits."""
    started = time.perf_counter()
    found = trace_of(at, base, edited, settings)
    seconds = time.perf_counter() - started
    true = {one.subject: one for one in requests}
    first = list(found.candidates["subject"])[: len(requests)]
    rows = [row for row in found.table.to_dict("records") if row["subject"] in true]
    said = [(row, true[row["subject"]]) for row in rows]
    right = sum(one.object in str(row["object"]).split(" | ") for row, one in said)
    lens = sum(one.object in str(row["object_lens"]).split(" | ") for row, one in said)
    relation = sum(row["relation"] == one.relation for row, one in said)
    undone = copy.deepcopy(edited).float()
    found.reverse().apply(undone)
    before = dict(base.named_parameters())
    rest = max(float((value - before[name].float()).abs().max()) for name, value in undone.named_parameters())
    return {
        "subject_recall": sum(name in true for name in first) / len(requests),
        "found": len(found.candidates.query("found")),
        "found_right": len(rows),
        "false": len(found.candidates.query("found")) - len(rows),
        "unedited": len(found.candidates) - len(requests),
        "object_recall": right / len(requests),
        "object_lens": lens / len(requests),
        "relation_recall": relation / len(requests),
        "rank": list(found.edits),
        "method_found": str(found.method),
        "relative_norms": [round(float(x), 4) for x in found.places["relative_norm"]],
        "fit": [str(x) for x in found.places["right_map"]],
        "undone_to": rest,
        "seconds": seconds,
    }


def kept_answers(at: Subjects, edited: nn.Module, requests: Sequence[Request]) -> dict[str, float]:
    """How well the edit itself went: objects that the edited model says, and others' facts that it keeps."""
    subjects = {one.subject for one in requests}
    others = [one for one in draw_requests(at.world, 160, 999) if one.subject not in subjects][:60]
    return {
        "success": _says(at, edited, requests, [one.object for one in requests]),
        "kept": _says(at, edited, others, [one.was for one in others]),
    }


def _says(at: Subjects, model: nn.Module, requests: Sequence[Request], answers: Sequence[str]) -> float:
    device = next(model.parameters()).device
    asked = tokens_of(at.tokenizer, [("", one.template, one.subject, "") for one in requests], device)
    with torch.no_grad():
        logits = model(input_ids=asked.ids, attention_mask=asked.mask).logits
    said = logits[torch.arange(len(requests)), asked.mask.sum(1) - 1].argmax(1).tolist()
    wanted = [at.tokenizer(answer)["input_ids"][-len(answer.split())] for answer in answers]
    return sum(a == b for a, b in zip(said, wanted, strict=True)) / len(requests)
