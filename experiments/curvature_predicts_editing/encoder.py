"""The same question for a real sentence encoder: all-MiniLM-L6-v2, where the extra ``real`` is installed.

An edit moves the state of the value's token; it succeeds if the sentence's embedding (the mean of the last
states, normalised) is then nearest to that of the target's sentence, among the sentences of the same
template. So the values' sentences stand where answers stand in a language model: their scores are cosines
times 20, the scale that sentence-transformers trains with, and every number that foretells an edit is
computed as for answers, with the gradients of these scores.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.modeling_outputs import MaskedLMOutput

from experiments.curvature_predicts_editing.cells import cells, draw_edits
from experiments.curvature_predicts_editing.judge import BASELINES, held_out, with_departure, within_sites
from experiments.curvature_predicts_editing.learn import Learning
from experiments.curvature_predicts_editing.settings import Settings
from experiments.curvature_predicts_editing.statistics import (
    Interval,
    Ranks,
    area,
    draws,
    interval,
    spearman,
)
from experiments.real_months import PACKAGE, model_folder
from geoedit.activations import collect
from geoedit.activations.calls import reading
from geoedit.activations.inputs import Batch, Texts, read_inputs
from geoedit.anatomy import Location, anatomy
from geoedit.concept import Concept, concept
from geoedit.diagnosis.derivatives import attach, derive, one_token, same_length_batches
from geoedit.diagnosis.derivatives import run as run_batch
from geoedit.diagnosis.features import FEATURES, edit_features
from geoedit.diagnosis.geometry import learn_shape
from geoedit.diagnosis.odds import Odds
from geoedit.diagnosis.off_manifold import off_columns
from geoedit.diagnosis.predict import Edits, Gradients, Rows, class_means, metric_factors, predict, shifts
from geoedit.diagnosis.prepare import choose_prompts, default_sites
from geoedit.diagnosis.scores import calibration
from geoedit.diagnosis.work import as_tensors
from geoedit.errors import EditError
from geoedit.passes import Pass
from geoedit.site import Site

log = logging.getLogger(__name__)
CONCEPTS = ("months", "weekdays", "seasons", "numbers", "temperatures", "sizes", "colours", "planets")
SHARPNESS = 20.0
"""What cosines are multiplied by: the scale of sentence-transformers' ranking loss."""
ELSE = -30.0
"""The logarithm of the odds that none of the sentences is meant: as good as never."""
BATCH = 64


@dataclass(frozen=True)
class EncoderScore:
    """How well one predictor foretells the edits of the encoder.

    Attributes:
        name: of the predictor. label: for people.
        auroc: over all edits. within_site: mean AUROC within a concept's site. rho: Spearman correlation of
            the mean prediction with the rate, over cells. error: expected calibration error; NaN for what is
            no probability.
    """

    name: str
    label: str
    auroc: Interval
    within_site: float
    rho: Interval
    error: float


@dataclass(frozen=True)
class Result:
    """What the encoder's edits showed.

    Attributes:
        scores: of every predictor.
        counts: of edits, cells, successes.
        by_concept: rates, and the AUROC of the landing margin.
        about: model, versions, seconds.
    """

    scores: tuple[EncoderScore, ...]
    counts: dict[str, int]
    by_concept: tuple[dict[str, Any], ...]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Give all of it as plain JSON values."""
        return asdict(self)


@contextmanager
def pooling(encoder: nn.Module) -> Iterator[None]:
    """Let an encoder give the sentence's embedding at every token: its last states' mean, of length one.

    It stands in the place of logits, so that all that derives logits derives it.
    """

    def pool(module: nn.Module, given: Any, named: dict[str, Any], output: Any) -> MaskedLMOutput:
        states = output.last_hidden_state
        real = named["attention_mask"][..., None].to(states)
        mean = (states * real).sum(1, keepdim=True) / real.sum(1, keepdim=True)
        return MaskedLMOutput(logits=nn.functional.normalize(mean, dim=-1).expand_as(states))

    handle = encoder.register_forward_hook(pool, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def run(settings: Settings | None = None, concepts: Sequence[str] = CONCEPTS) -> Result:
    """Predict and make the edits of the real encoder.

    Args:
        settings: the study's: pairs, sentences, scales, seed, resamples.
        concepts: built-in ones.

    Raises:
        EditError: the extra ``real`` is not installed.
    """
    settings = settings or Settings()
    folder, begun = model_folder(), time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval().requires_grad_(False)
    parts = []
    for name in concepts:
        parts.append(concept_edits(model, tokenizer, concept(name), settings))
        log.info("%s: %d edits, %.3f succeed", name, len(parts[-1]), parts[-1]["success"].mean())
    edits = pd.concat(parts, ignore_index=True)
    edits.insert(0, "model", PACKAGE)
    about = {"model": PACKAGE, "torch": torch.__version__, "transformers": transformers.__version__}
    return judge(edits, settings, about | {"seconds": round(time.perf_counter() - begun)})


def concept_edits(model: nn.Module, tokenizer: Any, chosen: Concept, settings: Settings) -> pd.DataFrame:
    """Return one row for each edit of one concept: what was known before, and whether it succeeded."""
    prompts, _ = choose_prompts(chosen, False, settings.max_prompts, settings.seed)
    source = read_inputs(model, tokenizer, prompts)
    if not isinstance(source, Texts):
        raise EditError("the study reads prompts as text.")
    groups = [chosen.index(prompt.value) for prompt in prompts]
    planned = draw_edits(chosen, prompts, groups, settings)
    edits = as_tensors(planned, groups, True)
    known = anatomy(model)
    places = {site: known.locate(site) for site in default_sites(known, False)}
    rows = Rows(
        torch.tensor(groups),
        torch.tensor([prompt.template_index for prompt in prompts]),
        torch.tensor(groups),
        len(chosen.values),
    )
    embeddings = embed(model, source)
    bank = sentence_bank(embeddings, rows)
    scores = scored(embeddings, bank[rows.template])
    rows = Rows(rows.value, rows.template, rows.group, rows.values, scores)

    def readout(output: Tensor, chosen_rows: Sequence[int]) -> Tensor:
        return scored(output, bank[rows.template[list(chosen_rows)]])

    with pooling(model):
        derived = derive(model, source, range(len(source)), places, readout, batch_size=BATCH)
    states = collect(model, tokenizer, prompts, places, batch_size=BATCH, progress=False)
    parts = []
    for depth, (site, place) in enumerate(places.items()):
        at_site = states[site].float()
        means = class_means(at_site, rows.value, rows.values)
        gradients = Gradients(answers=derived.gradients[site])
        numbers = edit_features(at_site, means, gradients, rows, edits)
        single = predict(at_site, means, gradients, rows, edits).columns
        shape = learn_shape(at_site, rows, chosen)
        factor = next(iter(metric_factors(gradients).values()))
        off = off_columns(shape, factor, at_site, means, rows, edits)
        moved = embed(model, source, edits.source.tolist(), (site, place), shifts(means, edits))
        dimension = shape.dimension["value"]
        part = {
            "concept": chosen.name,
            "shape": chosen.kind,
            "site": str(site),
            "depth": depth,
            "kind": [edit.kind for edit in planned],
            "scale": [edit.scale for edit in planned],
            "source": [prompts[edit.source].value for edit in planned],
            "target": [prompts[edit.target].value for edit in planned],
            "success": landed(moved, bank, rows, edits).numpy(),
            **{name: column.numpy() for name, column in numbers.items()},
            **{f"alone_{name}": column.numpy() for name, column in (single | off).items()},
            "alone_dimension": float("nan") if dimension is None else float(dimension),
        }
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def sentence_bank(
    embeddings: Float[Tensor, "rows width"], rows: Rows
) -> Float[Tensor, "templates values width"]:
    """Return the embedding of each value's sentence in each template, of its first form if it has several.

    A value without a sentence in a template gets zeros, which nothing is nearest to.
    """
    count = int(rows.template.max()) + 1
    bank = torch.zeros(count, rows.values, embeddings.shape[1], dtype=embeddings.dtype)
    for row in reversed(range(len(embeddings))):
        bank[rows.template[row], rows.value[row]] = embeddings[row]
    return bank


def scored(
    embeddings: Float[Tensor, "rows width"], bank: Float[Tensor, "rows values width"]
) -> Float[Tensor, "rows k"]:
    """Log-probabilities of the values' sentences by their cosines; the last column is none of them."""
    cosines = torch.einsum("rw,rvw->rv", embeddings, bank.to(embeddings))
    found = (SHARPNESS * cosines).log_softmax(1)
    return torch.cat([found, torch.full_like(found[:, :1], ELSE)], 1)


def landed(
    embeddings: Float[Tensor, "edits width"],
    bank: Float[Tensor, "templates values width"],
    rows: Rows,
    edits: Edits,
) -> Bool[Tensor, " edits"]:
    """Whether the target's sentence is the nearest of its template."""
    cosines = torch.einsum("ew,evw->ev", embeddings, bank[rows.template[edits.source]])
    return cosines.argmax(1) == rows.value[edits.target]


@torch.no_grad()
def embed(
    model: nn.Module,
    source: Texts,
    rows: Sequence[int] | None = None,
    at: tuple[Site, Location] | None = None,
    shift: Float[Tensor, "edits width"] | None = None,
) -> Float[Tensor, "edits width"]:
    """Embed sentences, each with its own vector added at a site, if one is given."""
    rows = range(len(source)) if rows is None else rows
    found: dict[int, Tensor] = {}
    with reading(model), pooling(model):
        for chosen in same_length_batches(source, rows, 4 * BATCH):
            batch = source.batch([rows[place] for place in chosen])
            if at is None or shift is None:
                output = run_batch(model, batch)
            else:
                adder = _Adder(at[0], batch, shift[torch.tensor(chosen)])
                with attach(model, at[0], at[1], adder):
                    output = run_batch(model, batch)
            found.update(zip(chosen, output[:, 0], strict=True))
    return torch.stack([found[place] for place in range(len(rows))])


class _Adder:
    def __init__(self, site: Site, batch: Batch, shift: Tensor) -> None:
        self.site, self.batch, self.shift = site, batch, shift

    def __call__(self, states: Tensor, selected: Tensor, this_pass: Pass) -> Tensor:
        chosen = one_token(self.site, self.batch, selected).to(states.device)
        return torch.where(chosen[:, :, None], states + self.shift.to(states)[:, None], states)


def judge(edits: pd.DataFrame, settings: Settings, about: dict[str, Any]) -> Result:
    """Score what foretells the edits: the shipped odds, odds learned on other concepts, single numbers."""
    edits = with_departure(edits)
    success = edits["success"].to_numpy(bool)
    features = {name: torch.from_numpy(edits[name].to_numpy(float)) for name in FEATURES}
    edits["p_shipped"] = Odds.load().probability(features).numpy()
    short = Learning(trees=min(100, settings.learning.trees), depth=3, smallest_leaf=50)
    edits["p_learned"] = held_out(edits, list(FEATURES), "concept", short, settings.seed)
    wanted = [
        ("shipped", "the shipped odds, learned on the almanac alone", "p_shipped", 1),
        ("learned", "odds learned on the encoder's other concepts", "p_learned", 1),
        *((name, entry.label, entry.column, entry.sign) for name, entry in BASELINES.items()),
    ]
    by_edits = draws(edits["concept"].tolist(), settings.resamples, settings.seed)
    whole = cells(edits, [])
    by_cells = draws(whole["concept"].tolist(), settings.resamples, settings.seed)
    rates = Ranks(whole["rate"].to_numpy(float))
    scores = []
    for name, label, column, sign in wanted:
        values = sign * edits[column].to_numpy(float)
        known = np.isfinite(values)
        if not known.any():
            continue
        values = np.where(known, values, np.median(values[known]))
        each = cells(edits.assign(prediction=values), ["prediction"])["prediction"].to_numpy(float)
        single, mean = Ranks(values), Ranks(each)
        scores.append(
            EncoderScore(
                name,
                label,
                interval(
                    area(single, success, np.ones(len(values))),
                    [area(single, success, row) for row in by_edits],
                ),
                within_sites(edits, values, success),
                interval(
                    spearman(mean, rates, np.ones(len(each))),
                    [spearman(mean, rates, row) for row in by_cells],
                ),
                calibration(values, success).expected_error if column.startswith("p_") else float("nan"),
            )
        )
    counts = {"edits": len(edits), "cells": len(whole), "successes": int(success.sum())}
    return Result(tuple(scores), counts, tuple(_by_concept(edits)), about)


def _by_concept(edits: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for name, part in edits.groupby("concept", sort=False):
        success = part["success"].to_numpy(bool)
        landing = area(Ranks(part["alone_landing"].fillna(0).to_numpy(float)), success, np.ones(len(part)))
        found.append(
            {
                "concept": str(name),
                "edits": len(part),
                "rate": float(success.mean()),
                "landing_auroc": landing,
            }
        )
    return found


def section(result: Result) -> str:
    """Write the encoder's part of the page as Markdown."""
    counts = result.counts
    lines = [
        "## A real sentence encoder",
        "",
        f"{counts['edits']} edits in {counts['cells']} cells of {result.about['model']}, at the value's "
        f"token in every block; {counts['successes']} succeed: the sentence's embedding is then nearest to "
        "the target's among the sentences of the template. No answer is asked for: cosines with these "
        "sentences stand in its place. Intervals are bootstraps over concepts.",
        "",
        "| predictor | AUROC | within a site | Spearman over cells | calibration error |",
        "|---|---|---|---|---|",
    ]
    for score in result.scores:
        error = "" if np.isnan(score.error) else f"{score.error:.3f}"
        within = "" if np.isnan(score.within_site) else f"{score.within_site:.3f}"
        lines.append(f"| {score.label} | {_shown(score.auroc)} | {within} | {_shown(score.rho)} | {error} |")
    lines += ["", "| concept | edits | succeed | AUROC of the landing margin |", "|---|---|---|---|"]
    for entry in result.by_concept:
        lines.append(
            f"| {entry['concept']} | {entry['edits']} | {entry['rate']:.0%} | {entry['landing_auroc']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def _shown(number: Interval) -> str:
    if np.isnan(number.value):
        return ""
    if np.isnan(number.low):
        return f"{number.value:.3f}"
    return f"{number.value:.3f} ({number.low:.3f} to {number.high:.3f})"
