"""Collect the study's edits: what was known before each one, and what happened.

An edit is one sentence with one vector added at one site. A cell is what a user would ask about: a site, a
pair of values, a kind of edit and a scale; its rate is the share of its edits, each of another sentence,
after which the likeliest next token begins the target's answer.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import geoedit
from experiments.curvature_predicts_editing.settings import Settings
from geoedit.activations import collect
from geoedit.activations.inputs import Texts, read_inputs
from geoedit.anatomy import anatomy
from geoedit.concept import Concept, Prompt
from geoedit.diagnosis.derivatives import derive
from geoedit.diagnosis.features import edit_features
from geoedit.diagnosis.geometry import learn_shape
from geoedit.diagnosis.observe import observe
from geoedit.diagnosis.off_manifold import off_columns
from geoedit.diagnosis.plan import PlannedEdit, plan_edits
from geoedit.diagnosis.predict import Gradients, Rows, class_means, metric_factors, predict, shifts
from geoedit.diagnosis.prepare import answer_groups, choose_prompts, default_sites
from geoedit.diagnosis.readouts import Readouts
from geoedit.diagnosis.work import as_tensors
from geoedit.errors import EditError

log = logging.getLogger(__name__)
CELL = ["model", "concept", "site", "kind", "scale", "source", "target"]
BATCH = 64
VALUES = 12
MANY = 10**9


def collect_edits(settings: Settings) -> pd.DataFrame:
    """Return one row for each edit, of all models and concepts.

    Columns: those of `CELL`, shape (the concept's kind), template, depth (the number of the site, which no
    predictor sees), success, all features, and the numbers of single predictors (see `judge.BASELINES`).
    `attrs["seconds"]` is how long it took.
    """
    started = time.perf_counter()
    parts = []
    for name in settings.models:
        model, tokenizer, world = geoedit.testbeds.load(name)
        for concept in settings.concepts:
            part = concept_edits(model, tokenizer, world.concepts[concept], settings)
            part.insert(0, "model", name)
            log.info("%s %s: %d edits, %.3f succeed", name, concept, len(part), part["success"].mean())
            parts.append(part)
    found = pd.concat(parts, ignore_index=True)
    found.attrs["seconds"] = time.perf_counter() - started
    return found


def concept_edits(model: Any, tokenizer: Any, concept: Concept, settings: Settings) -> pd.DataFrame:
    """Return one row for each edit of one concept in one model, without a column for the model."""
    prompts, _ = choose_prompts(concept, True, settings.max_prompts, settings.seed)
    source = read_inputs(model, tokenizer, prompts)
    if not isinstance(source, Texts):
        raise EditError("the study reads prompts as text.")
    groups, ids = answer_groups(concept, prompts, tokenizer, True)
    planned = draw_edits(concept, prompts, groups, settings)
    edits = as_tensors(planned, groups, True)
    known = anatomy(model)
    places = {site: known.locate(site) for site in default_sites(known, True)}
    states = collect(model, tokenizer, prompts, places, batch_size=BATCH, progress=False)
    rows = Rows(
        torch.tensor([concept.index(prompt.value) for prompt in prompts]),
        torch.tensor([prompt.template_index for prompt in prompts]),
        torch.tensor(groups),
        len(concept.values),
    )
    readouts = Readouts(ids, 1, settings.seed, True)
    derived = derive(model, source, range(len(prompts)), places, readouts, batch_size=BATCH)
    wanted = torch.tensor(ids)[edits.answer]
    parts = []
    for depth, (site, place) in enumerate(places.items()):
        at_site = states[site].float()
        means = class_means(at_site, rows.value, rows.values)
        gradients, seen = readouts.split(derived.outputs, derived.gradients[site], rows)
        gradients = Gradients(answers=gradients.answers)
        numbers: dict[str, Tensor] = edit_features(at_site, means, gradients, seen, edits)
        single = predict(at_site, means, gradients, seen, edits).columns
        shape = learn_shape(at_site, rows, concept)
        factor = next(iter(metric_factors(gradients).values()))
        off = off_columns(shape, factor, at_site, means, rows, edits)
        moved = observe(
            model,
            source,
            site,
            place,
            edits.source.tolist(),
            shifts(means, edits),
            wanted,
            batch_size=4 * BATCH,
        )
        dimension = shape.dimension["value"]
        part = pd.DataFrame(
            {
                "concept": concept.name,
                "shape": concept.kind,
                "site": str(site),
                "depth": depth,
                "kind": [edit.kind for edit in planned],
                "scale": [edit.scale for edit in planned],
                "source": [prompts[edit.source].value for edit in planned],
                "target": [prompts[edit.target].value for edit in planned],
                "template": rows.template[edits.source].numpy(),
                "success": (moved.token == wanted).numpy(),
                **{name: column.numpy() for name, column in numbers.items()},
                **{f"alone_{name}": column.numpy() for name, column in (single | off).items()},
                "alone_dimension": float("nan") if dimension is None else float(dimension),
            }
        )
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def draw_edits(
    concept: Concept, prompts: list[Prompt], groups: list[int], settings: Settings
) -> list[PlannedEdit]:
    """Draw pairs of values, and for each pair sentences to edit, the same for all kinds and scales.

    The pairs are drawn among a dozen values, so that not all pairs of a hundred values are listed.
    """
    generator = np.random.default_rng(settings.seed)
    value = [concept.index(prompt.value) for prompt in prompts]
    among = set(generator.permutation(len(concept.values))[:VALUES].tolist())
    inside = [group if number in among else -1 for group, number in zip(groups, value, strict=True)]
    plan = plan_edits(concept, prompts, inside, scales=settings.scales, max_edits=MANY, seed=settings.seed)
    sources: dict[tuple[int, int], dict[int, None]] = {}
    for edit in plan.edits:
        sources.setdefault((value[edit.source], value[edit.target]), {})[edit.source] = None
    pairs = list(sources)
    drawn = {
        pairs[number]: set(generator.permutation(list(sources[pairs[number]]))[: settings.sentences].tolist())
        for number in generator.permutation(len(pairs))[: settings.pairs]
    }
    return [
        edit for edit in plan.edits if edit.source in drawn.get((value[edit.source], value[edit.target]), ())
    ]


def cells(edits: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Return one row a cell: its rate, how many edits it holds, and the means of `columns` over them."""
    grouped = edits.groupby(CELL, sort=False, observed=True)
    found = grouped[["success", "shape", "depth"]].agg(
        rate=("success", "mean"),
        edits=("success", "size"),
        shape=("shape", "first"),
        depth=("depth", "first"),
    )
    return found.join(grouped[list(columns)].mean()).reset_index()
