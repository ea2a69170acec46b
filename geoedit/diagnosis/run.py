"""Diagnose a concept in a model: collect, predict, and on request make the edits and look."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from geoedit.activations import collect
from geoedit.activations.inputs import Texts, read_inputs
from geoedit.anatomy import anatomy
from geoedit.concept import Concept
from geoedit.diagnosis.advice import site_advice
from geoedit.diagnosis.geometry import site_geometry
from geoedit.diagnosis.plan import plan_edits
from geoedit.diagnosis.predict import LANDING, Rows, class_means
from geoedit.diagnosis.prepare import (
    answer_groups,
    check_answer_places,
    check_counts,
    checked_scales,
    choose_prompts,
    default_sites,
)
from geoedit.diagnosis.readouts import Readouts
from geoedit.diagnosis.result import FEATURE, Diagnosis
from geoedit.diagnosis.safe_scale import scaled_edits
from geoedit.diagnosis.sweeps import choose_sweeps, mean_axes, swept_edits
from geoedit.diagnosis.words import describe, notes, versions
from geoedit.diagnosis.work import Work, as_tensors
from geoedit.errors import EditError
from geoedit.site import Site


def diagnose(
    model: nn.Module,
    tokenizer: Any,
    concept: Concept,
    sites: Sequence[Site] | None = None,
    *,
    apply: bool = False,
    scale: float | Sequence[float] = 1.0,
    seed: int = 0,
    max_edits: int = 1200,
    max_prompts: int = 400,
    samples: int = 8,
    batch_size: int = 64,
    progress: bool | None = None,
    name: str | None = None,
) -> Diagnosis:
    """Predict at every site whether straight edits move a concept from each value to each other.

    Two kinds of edit are judged. A mean difference adds `scale (m_target - m_source)`; on cycles, lines and
    grids a reused vector adds `scale (m_d - m_c)` of another pair that lies the same way. A prediction places
    the edited state by what the rest of the network, to first order, makes of it; the edited model is not run
    for it. Nothing is fitted on the concept.

    Args:
        model: a language model, masked language model or encoder from transformers; left as it was.
        tokenizer: its fast tokenizer.
        concept: values, templates, and (to see edits succeed) answers.
        sites: where to look, one token a prompt; None: the embedding and up to 12 blocks' `residual_out` at
            the value's last token, and with answers the blocks also at the prompt's last token.
        apply: also run every edit through the network and record what the model answers.
        scale: how far to push; several scales are judged each.
        seed: of the draws of edits, templates and labels.
        max_edits: edits at each site, the same at all sites, shared between the kinds; of more, a random
            draw.
        max_prompts: no more templates than keep the prompts below this (at least two).
        samples: labels (or, without logits, random projections) drawn a prompt for the sampled metric.
        batch_size: prompts in one forward.
        progress: show bars; None: on a terminal only.
        name: of the model in the result; None: what its config says, without folders.

    Raises:
        EditError: a concept that does not fit the tokenizer, one sample a class, a site that does not exist
            or means several tokens, states or gradients that are not finite, `apply` without answers.
    """
    started = time.perf_counter()
    scales = checked_scales(scale)
    check_counts(max_edits=max_edits, max_prompts=max_prompts, samples=samples, batch_size=batch_size)
    work = _prepare(
        model, tokenizer, concept, sites, scales, seed, max_edits, max_prompts, samples, batch_size, progress
    )
    if apply and not work.readouts.answers:
        raise EditError(
            f"apply: concept {concept.name!r} has no answers, or {type(model).__name__} no unembedding, so "
            "that success can't be seen; give the templates answers, or predict only."
        )
    predictions, available = work.predictions()
    predicted = time.perf_counter()
    observed = work.observations() if apply else {}
    applied = time.perf_counter()
    judged = {site: work.table(site, predictions[site], observed.get(site)) for site in work.places}
    parameter = next(model.parameters())
    settings = {
        "model_class": type(model).__name__,
        "templates": f"{len(work.templates)} of {len(concept.templates)}",
        "prompts": len(work.prompts),
        "edits_per_site": len(work.plan.edits),
        "edits_possible": work.plan.possible,
        "max_edits": max_edits,
        "scales": list(scales),
        "seed": seed,
        "labels_drawn": samples,
        "default_predictor": available[0].label,
        "answered_right_unedited": round(work.readouts.accuracy(work.groups), 4)
        if work.readouts.answers
        else None,
        "seconds_to_predict": round(predicted - started, 1),
        "seconds_to_apply": round(applied - predicted, 1) if apply else None,
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }
    about = {"name": concept.name, "kind": concept.kind, "description": concept.description}
    texts = [concept.templates[number].text for number in work.templates]
    straightness = work.straightness(seed)
    sites_seen = []
    for depth, site in enumerate(work.places):
        summary = describe(site, depth, work.states[site], work.means[site], work.rows)
        axes, centre = mean_axes(work.means[site], summary.coordinates)
        shape = site_geometry(work.shapes[site], straightness[site], axes, centre)
        sites_seen.append(replace(summary, geometry=shape))
    table = pd.concat([work.planned(part) for part in judged.values()], ignore_index=True)
    learned_from = [name for name in table if name.startswith(FEATURE)]
    features, table = table[learned_from], table.drop(columns=learned_from)
    summaries = site_advice(sites_seen, table)
    swept = [
        work.swept(site, work.followed(judged[site]), summary, apply)
        for site, summary in zip(work.places, summaries, strict=True)
    ]
    own_name = PurePath(getattr(getattr(model, "config", None), "name_or_path", "")).name
    return Diagnosis(
        model=name or own_name or type(model).__name__,
        concept={**about, "values": list(concept.values), "templates": texts},
        sites=summaries,
        table=table,
        predictors=available,
        settings=settings,
        versions=versions(),
        notes=notes(
            LANDING in available,
            apply,
            work.plan,
            len(work.templates) < len(concept.templates),
            summaries,
            familiar=work.odds.has_seen(own_name, concept.name),
        ),
        sweeps=tuple(entry for found in swept for entry in found),
        features=features,
    )


def _prepare(
    model: nn.Module,
    tokenizer: Any,
    concept: Concept,
    sites: Sequence[Site] | None,
    scales: tuple[float, ...],
    seed: int,
    max_edits: int,
    max_prompts: int,
    samples: int,
    batch_size: int,
    progress: bool | None,
) -> Work:
    if not isinstance(concept, Concept):
        raise EditError(
            f"concept is {concept!r}; give a geoedit.Concept: one of world.concepts, "
            "geoedit.concept.concept(name), or Concept.from_yaml(path)."
        )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise EditError(
            f"{type(model).__name__} has an encoder and a decoder, which a diagnosis does not read yet; "
            "use a decoder-only language model, a masked one or an encoder."
        )
    known = anatomy(model)
    head = known.unembedding is not None
    answered = head and any(template.answers is not None for template in concept.templates)
    chosen = default_sites(known, answered) if sites is None else list(dict.fromkeys(sites))
    places = {site: known.locate(site) for site in chosen}
    for site in places:
        if site.token == "all":
            raise EditError(
                f"the site {site} means every token; a diagnosis needs one: 'last', 'value' or an integer."
            )
    prompts, templates = choose_prompts(concept, answered, max_prompts, seed)
    concept.check(tokenizer, answers=answered)
    source = read_inputs(model, tokenizer, prompts)
    if not isinstance(source, Texts):
        raise EditError("a diagnosis reads prompts as text.")
    if answered:
        check_answer_places(source, tokenizer, known)
    groups, ids = answer_groups(concept, prompts, tokenizer, answered)
    plan = plan_edits(concept, prompts, groups, scales=scales, max_edits=max_edits, seed=seed)
    sweeps = choose_sweeps(plan, prompts, scales=scales, sites=len(places), seed=seed)
    scaled = scaled_edits(plan, prompts, seed=seed)
    collected = collect(model, tokenizer, prompts, places, batch_size=batch_size, progress=progress)
    states = {site: _wide(collected[site]) for site in places}
    rows = Rows(
        torch.tensor([concept.index(prompt.value) for prompt in prompts]),
        torch.tensor([prompt.template_index for prompt in prompts]),
        torch.tensor(groups),
        len(concept.values),
    )
    return Work(
        model=model,
        tokenizer=tokenizer,
        concept=concept,
        prompts=prompts,
        templates=templates,
        groups=groups,
        source=source,
        places=places,
        plan=plan,
        sweeps=sweeps,
        scaled=scaled,
        rows=rows,
        edits=as_tensors([*plan.edits, *swept_edits(sweeps), *scaled.edits], groups, bool(ids)),
        states=states,
        means={site: class_means(part, rows.value, rows.values) for site, part in states.items()},
        readouts=Readouts(ids, samples, seed, head),
        batch_size=batch_size,
        progress=progress,
    )


def _wide(states: Tensor) -> Tensor:
    states = states.cpu()
    return states if states.dtype == torch.float64 else states.float()
