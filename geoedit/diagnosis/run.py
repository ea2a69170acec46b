"""Diagnose a concept in a model: collect, predict, and on request make the edits and look."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from geoedit.activations import collect
from geoedit.activations.inputs import Texts, read_inputs
from geoedit.anatomy import Location, anatomy
from geoedit.concept import Concept, Prompt
from geoedit.diagnosis.calibrate import probability
from geoedit.diagnosis.derivatives import derive
from geoedit.diagnosis.observe import Observed, observe
from geoedit.diagnosis.plan import Plan, PlannedEdit, plan_edits
from geoedit.diagnosis.predict import (
    LANDING,
    Edits,
    Predictions,
    Rows,
    class_means,
    predict,
    predictors,
    shifts,
)
from geoedit.diagnosis.prepare import (
    answer_groups,
    check_answer_places,
    check_counts,
    checked_scales,
    choose_prompts,
    default_sites,
)
from geoedit.diagnosis.readouts import Readouts
from geoedit.diagnosis.result import Diagnosis, Predictor, SiteSummary
from geoedit.diagnosis.sweeps import Sweep, choose_sweeps, follow, sweep_results, sweep_runs, swept_edits
from geoedit.diagnosis.words import describe, notes, versions
from geoedit.errors import EditError
from geoedit.site import Site

GRADIENT_BYTES = 2**30
OTHER = "another word"


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
    tables = [work.table(site, predictions[site], observed.get(site), available[0]) for site in work.places]
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
    summaries = tuple(
        describe(site, depth, work.states[site], work.means[site], work.rows)
        for depth, site in enumerate(work.places)
    )
    planned = len(work.plan.edits)
    swept = [
        work.swept(site, table[planned:], summary, apply)
        for site, table, summary in zip(work.places, tables, summaries, strict=True)
    ]
    return Diagnosis(
        model=name
        or PurePath(getattr(getattr(model, "config", None), "name_or_path", "")).name
        or type(model).__name__,
        concept={**about, "values": list(concept.values), "templates": texts},
        sites=summaries,
        table=pd.concat([table[:planned] for table in tables], ignore_index=True),
        predictors=available,
        settings=settings,
        versions=versions(),
        notes=notes(available[0] is LANDING, apply, work.plan, len(work.templates) < len(concept.templates)),
        sweeps=tuple(entry for found in swept for entry in found),
    )


@dataclass
class _Work:
    """One diagnosis at work: what was prepared and collected, and the steps that use it.

    `edits` are those of the plan, and after them those of the sweeps.
    """

    model: nn.Module
    tokenizer: Any
    concept: Concept
    prompts: list[Prompt]
    templates: list[int]
    groups: list[int]
    source: Texts
    places: dict[Site, Location]
    plan: Plan
    sweeps: tuple[Sweep, ...]
    rows: Rows
    edits: Edits
    states: dict[Site, Float[Tensor, "rows width"]]
    means: dict[Site, Float[Tensor, "values width"]]
    readouts: Readouts
    batch_size: int
    progress: bool | None

    @property
    def mask_token(self) -> int | None:
        return getattr(self.tokenizer, "mask_token_id", None)

    def wanted(self, targets: Sequence[int]) -> Int[Tensor, " edits"]:
        """Token ids of the answers at these rows; diagnose has made sure that there are answers."""
        return torch.tensor([self.readouts.answers[self.groups[row]] for row in targets], dtype=torch.long)

    def bar(self, total: int, description: str, unit: str) -> Any:
        hidden = None if self.progress is None else not self.progress
        return tqdm(total=total, desc=description, unit=unit, disable=hidden)

    def predictions(self) -> tuple[dict[Site, Predictions], tuple[Predictor, ...]]:
        found: dict[Site, Predictions] = {}
        available: tuple[Predictor, ...] = ()
        parts = list(self._parts())
        with self.bar(len(parts) * len(self.prompts), "deriving", "prompt") as bar:
            for part in parts:
                derived = derive(
                    self.model,
                    self.source,
                    range(len(self.prompts)),
                    part,
                    self.readouts,
                    mask_token=self.mask_token,
                    batch_size=self.batch_size,
                    progress=bar.update,
                )
                for site in part:
                    gradients, rows = self.readouts.split(
                        derived.outputs.cpu(), derived.gradients[site].cpu(), self.rows
                    )
                    found[site] = predict(self.states[site], self.means[site], gradients, rows, self.edits)
                    available = predictors(gradients)
        return found, available

    def observations(self) -> dict[Site, Observed]:
        planned = self.plan.edits
        with self.bar(len(self.places) * len(planned), "editing", "edit") as bar:
            return {
                site: self.observe(
                    site,
                    [edit.source for edit in planned],
                    [edit.target for edit in planned],
                    shifts(self.means[site], self.edits)[: len(planned)],
                    bar,
                )
                for site in self.places
            }

    def observe(
        self,
        site: Site,
        sources: Sequence[int],
        targets: Sequence[int],
        shift: Float[Tensor, "edits width"],
        bar: Any,
    ) -> Observed:
        return observe(
            self.model,
            self.source,
            site,
            self.places[site],
            sources,
            shift,
            self.wanted(targets),
            mask_token=self.mask_token,
            batch_size=2 * self.batch_size,
            progress=bar.update,
        )

    def swept(
        self, site: Site, table: pd.DataFrame, summary: SiteSummary, apply: bool
    ) -> list[dict[str, Any]]:
        """Follow the sweeps at one site; run them at a few of their scales if the edits are applied."""
        routes = follow(self.sweeps, self.rows.value, self.states[site], self.means[site], None)
        heard: list[tuple[str, bool]] = []
        if apply:
            edits, shift = sweep_runs(self.sweeps, routes)
            sources, targets = [edit.source for edit in edits], [edit.target for edit in edits]
            with self.bar(len(edits), f"sweeping {site}", "edit") as bar:
                seen = self.observe(site, sources, targets, shift, bar)
            arrived = (seen.token == self.wanted(targets)).tolist()
            heard = list(zip(self.answers(seen), arrived, strict=True))
        return sweep_results(
            self.sweeps,
            routes,
            table,
            heard,
            states=self.states[site],
            means=self.means[site],
            coordinates=summary.coordinates,
            prompts=self.prompts,
        )

    def answers(self, observed: Observed) -> list[str]:
        return [self.tokenizer.decode([token]).strip() for token in observed.token.tolist()]

    def table(
        self, site: Site, predictions: Predictions, observed: Observed | None, default: Predictor
    ) -> pd.DataFrame:
        values, edits = self.concept.values, [*self.plan.edits, *swept_edits(self.sweeps)]
        rivals = [OTHER if row < 0 else self.prompts[row].value for row in predictions.rival.tolist()]
        columns: dict[str, Any] = {
            "site": [str(site)] * len(edits),
            "edit": [edit.kind for edit in edits],
            "template": [self.prompts[edit.source].template_index for edit in edits],
            "source": [self.prompts[edit.source].value for edit in edits],
            "target": [self.prompts[edit.target].value for edit in edits],
            "from_value": [values[edit.from_value] for edit in edits],
            "to_value": [values[edit.to_value] for edit in edits],
            "scale": [edit.scale for edit in edits],
            **{column: numbers.double().numpy() for column, numbers in predictions.columns.items()},
            "probability": probability(predictions.columns[default.column].double().numpy(), default.column),
            "nearest": rivals,
            "success": [pd.NA] * len(edits),
            "answer": [None] * len(edits),
            "log_odds_change": [float("nan")] * len(edits),
        }
        if observed is not None:
            run = slice(len(self.plan.edits))
            wanted = self.wanted([edit.target for edit in self.plan.edits])
            columns["success"][run] = (observed.token == wanted).tolist()
            columns["answer"][run] = self.answers(observed)
            change = observed.log_odds.double() - self.readouts.wanted_odds(self.edits)[run].double()
            columns["log_odds_change"][run] = change.tolist()
        return pd.DataFrame(columns).astype({"success": "boolean"})

    def _parts(self) -> Iterator[Mapping[Site, Location]]:
        """Sites in groups whose gradients together stay within a gigabyte."""
        part: dict[Site, Location] = {}
        used = 0
        for site, place in self.places.items():
            needed = 4 * len(self.prompts) * self.readouts.size * self.states[site].shape[1]
            if part and used + needed > GRADIENT_BYTES:
                yield part
                part, used = {}, 0
            part[site] = place
            used += needed
        yield part


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
) -> _Work:
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
    collected = collect(model, tokenizer, prompts, places, batch_size=batch_size, progress=progress)
    states = {site: _wide(collected[site]) for site in places}
    rows = Rows(
        torch.tensor([concept.index(prompt.value) for prompt in prompts]),
        torch.tensor([prompt.template_index for prompt in prompts]),
        torch.tensor(groups),
        len(concept.values),
    )
    return _Work(
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
        rows=rows,
        edits=_edits([*plan.edits, *swept_edits(sweeps)], groups, bool(ids)),
        states=states,
        means={site: class_means(part, rows.value, rows.values) for site, part in states.items()},
        readouts=Readouts(ids, samples, seed, head),
        batch_size=batch_size,
        progress=progress,
    )


def _edits(edits: Sequence[PlannedEdit], groups: Sequence[int], answered: bool) -> Edits:
    return Edits(
        torch.tensor([edit.source for edit in edits]),
        torch.tensor([edit.target for edit in edits]),
        torch.tensor([edit.from_value for edit in edits]),
        torch.tensor([edit.to_value for edit in edits]),
        torch.tensor([edit.scale for edit in edits]),
        torch.tensor([groups[edit.target] for edit in edits]) if answered else None,
    )


def _wide(states: Tensor) -> Tensor:
    states = states.cpu()
    return states if states.dtype == torch.float64 else states.float()
