"""What the edits of one concept at one site stand on: states, means, the manifold, and what judges them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from experiments.curvature_predicts_editing.laboratory import Laboratory
from experiments.curvature_predicts_editing.moves import Task
from experiments.curvature_predicts_editing.reference import SentenceManifold, left_out_distances
from experiments.curvature_predicts_editing.sentences import Pairs, Sentences
from geoedit.diagnosis.derivatives import derive
from geoedit.diagnosis.metric import sampled_factor
from geoedit.shapes import concept_manifold, group_means
from geoedit.site import Site
from manifolds.cloud.learned import LearnedManifold

PROBES = 8
"""Random combinations of the answers that the pulled-back metric is estimated from."""

SAME = 1e-5
"""Two states that differ by less than this part of their length are the same state."""


@dataclass(frozen=True)
class Ground:
    """One concept at one site of one model.

    Attributes:
        laboratory: the model.
        sentences: the concept's prompts and their halves.
        pairs: the edits to make.
        site: where.
        labels: "value" or "answer": which of the two the states there tell apart better.
        label: the number of each prompt's value, or of its answer; -1 where it is neither.
        states: of the concept's prompts.
        means: of each value over the learned half.
        manifold: of the concept, learned from that half.
        metric: the same in the pulled-back metric of the answers; None where that was not asked for.
        widest: the largest distance of a learned state from the manifold.
        own: the manifold of each sentence of the other half; empty for concepts without order.
        off_unit: the median distance of a state of the other half from the manifold through the rest of its
            sentence; NaN for concepts without order.
        near_unit: the median distance of such a state from the nearest other one of that half.
    """

    laboratory: Laboratory
    sentences: Sentences
    pairs: Pairs
    site: Site
    labels: str
    label: Int[np.ndarray, " prompts"]
    states: Float[Tensor, "prompts width"]
    means: Float[Tensor, "values width"]
    manifold: LearnedManifold
    metric: LearnedManifold | None
    widest: float
    own: Mapping[int, SentenceManifold]
    off_unit: float
    near_unit: float

    def task(self, family_step: bool, controls: bool) -> Task:
        """The pairs' sentences, or their controls, with what the edits know of each."""
        pairs = self.pairs
        # Where no step can be reused, the pair is left out later.
        found = family_step & (pairs.start >= 0)
        ends = (np.where(found, pairs.start, pairs.source), np.where(found, pairs.end, pairs.target))
        start, end = (self.means[torch.tensor(self.label[places])] for places in ends)
        states = (
            self.laboratory.states[self.site][torch.tensor(self.pairs.controls)]
            if controls
            else self.states[torch.tensor(self.pairs.source)]
        )
        # The edits are called on states; which token they stand at is no matter there.
        return Task(states, start, end, self.site.with_token("all"), self.manifold, self.metric)

    def off(self, states: Float[Tensor, "*scales pairs width"]) -> Float[Tensor, "*scales pairs"]:
        """How far edited states are from the manifold of their own sentence, over what unedited ones are."""
        found = torch.full(states.shape[:-1], torch.nan, dtype=torch.float64)
        template = self.sentences.template[self.pairs.source]
        for number, manifold in self.own.items():
            chosen = torch.tensor(np.flatnonzero(template == number))
            part = states[..., chosen, :]
            found[..., chosen] = manifold.distance(part.reshape(-1, part.shape[-1])).reshape(part.shape[:-1])
        return found / self.off_unit

    def near(self, states: Float[Tensor, "*scales pairs width"]) -> Float[Tensor, "*scales pairs"]:
        """How far edited states are from the nearest real one of the other half, over what real ones are.

        The state that the edit began with does not count, and neither does the same in another sentence.
        """
        real = self.states[torch.tensor(~self.sentences.learned)]
        same = other_distances(self.states[torch.tensor(self.pairs.source)], real) == torch.inf
        return (
            torch.cdist(states.double(), real.double()).masked_fill(same, torch.inf).amin(-1) / self.near_unit
        )


def survey(
    laboratory: Laboratory, sentences: Sentences, pairs: Pairs, site: Site, *, metric: bool
) -> Ground | str:
    """Learn a concept at a site from one half of its sentences and prepare the other half to judge.

    Returns:
        The ground, or why there is none.
    """
    states = laboratory.states[site][torch.tensor(sentences.rows)]
    labels, label = choose_labels(sentences, states)
    concept = sentences.concept
    learned = torch.tensor(np.flatnonzero(sentences.learned & (label >= 0)))
    number = torch.tensor(label)[learned]
    if len(number.unique()) < len(concept.values):
        return "the learned sentences do not show every value"
    # That the days of the week go round is part of what is known of the concept.
    closed = {"cycle": True, "line": False}.get(concept.kind)
    shape = concept_manifold(
        states[learned], number, concept, sentences=torch.tensor(sentences.template)[learned], closed=closed
    )
    if shape.manifold is None:
        return shape.reason
    carried = shape.manifold
    if metric:
        carried = in_metric(laboratory, sentences, site, shape.manifold)
    own, unit = sentence_manifolds(sentences, states, label)
    others = states[torch.tensor(~sentences.learned)]
    return Ground(
        laboratory=laboratory,
        sentences=sentences,
        pairs=pairs,
        site=site,
        labels=labels,
        label=label,
        states=states,
        means=group_means(states[learned].double(), number).float(),
        manifold=shape.manifold,
        metric=carried if metric else None,
        widest=float(shape.manifold.project(states[learned]).distance.max()),
        own=own,
        off_unit=unit,
        near_unit=float(other_distances(others, others).amin(1).median()),
    )


def other_distances(states: Float[Tensor, "n width"], real: Float[Tensor, "m width"]) -> Float[Tensor, "n m"]:
    """Distances, infinite between what is the same state but for rounding.

    Where a model reads from left to right, two sentences that begin alike leave the same state at the value.
    """
    found = torch.cdist(states.double(), real.double(), compute_mode="donot_use_mm_for_euclid_dist")
    size = real.double().norm(dim=1).median()
    return found.masked_fill(found <= SAME * size, torch.inf)


def choose_labels(
    sentences: Sentences, states: Float[Tensor, "prompts width"]
) -> tuple[str, Int[np.ndarray, " prompts"]]:
    """Label states by the value they were given or by the answer they lead to: what tells them apart better.

    Near the end of a network the last token holds the answer and no longer the value. Only sentences that
    edits may learn from are looked at.
    """
    if (sentences.answer[sentences.learned] < 0).all():
        return "value", sentences.value
    shares = {
        name: separation(states, label, sentences.template, sentences.learned)
        for name, label in (("value", sentences.value), ("answer", sentences.answer))
    }
    best = max(shares, key=lambda name: shares[name])
    return best, sentences.value if best == "value" else sentences.answer


def separation(
    states: Float[Tensor, "prompts width"],
    label: Int[np.ndarray, " prompts"],
    template: Int[np.ndarray, " prompts"],
    chosen: np.ndarray,
) -> float:
    """The share of the variance around the sentences' means that the labels' means explain, in [0, 1]."""
    places = torch.tensor(np.flatnonzero(chosen & (label >= 0)))
    rows = states[places].double()
    _, sentence = torch.tensor(template)[places].unique(return_inverse=True)
    _, number = torch.tensor(label)[places].unique(return_inverse=True)
    free = rows - group_means(rows, sentence)[sentence]
    whole = float(free.square().sum())
    return float(group_means(free, number)[number].square().sum()) / whole if whole > 0 else 0.0


def sentence_manifolds(
    sentences: Sentences, states: Float[Tensor, "prompts width"], label: Int[np.ndarray, " prompts"]
) -> tuple[dict[int, SentenceManifold], float]:
    """The manifold of each sentence of the judging half, and how far real states left out of it would be."""
    coordinates = sentences.coordinates
    if coordinates is None:
        return {}, float("nan")
    closed = sentences.concept.kind == "cycle"
    found, left_out = {}, []
    for template in np.unique(sentences.template[~sentences.learned]):
        places = np.flatnonzero((sentences.template == template) & (label >= 0))
        places = places[np.argsort(label[places], kind="stable")]
        own, where = states[torch.tensor(places)], coordinates[label[places]]
        found[int(template)] = SentenceManifold.through(own, where, closed=closed)
        left_out.append(left_out_distances(own, where, closed=closed))
    return found, float(torch.cat(left_out).median())


def in_metric(
    laboratory: Laboratory, sentences: Sentences, site: Site, manifold: LearnedManifold
) -> LearnedManifold:
    """The manifold in the metric that the answers pull back, known at the states of the learned half.

    The metric of the answers weighed alike, `g = Σ_k q_k u_k u_kᵀ` with u_k the gradient of answer k's
    log-probability less the mean over the answers, is estimated by random signs: `F_s = Σ_k ε_sk √q_k u_k`
    has `E F_sᵀF_s = g`, so that a few backward passes do, however many answers there are.
    """
    from manifolds.cloud.sampled_metric import SampledMetric

    places = np.flatnonzero(sentences.learned & (sentences.token >= 0))
    ids = torch.tensor(np.unique(sentences.token[sentences.token >= 0]))
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (PROBES, len(ids)), generator=generator).double() * 2 - 1
    centred = signs - signs.mean(1, keepdim=True)

    def readout(output: Tensor, rows: object) -> Tensor:
        logits = output.log_softmax(-1)[:, ids.to(output.device)]
        return logits @ (centred / len(ids) ** 0.5).T.to(logits)

    derived = derive(
        laboratory.model,
        laboratory.source,
        [int(row) for row in sentences.rows[places]],
        {site: laboratory.places[site]},
        readout,
    )
    anchors = laboratory.states[site][torch.tensor(sentences.rows[places])]
    return manifold.with_metric(SampledMetric(anchors, sampled_factor(derived.gradients[site].cpu())))
