"""The numbers that foretell an edit, at one site: none of them runs the edited model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from geoedit.diagnosis.landing import (
    Margin,
    carried_share,
    chord_cosines,
    euclidean_distances,
    interpolated_outputs,
    linear_outputs,
    margins,
    output_margin,
    pulled_back_distances,
)
from geoedit.diagnosis.metric import categorical_factor, sampled_factor, whitening_factor
from geoedit.diagnosis.result import Predictor

ODDS = Predictor(
    "odds",
    "learned odds",
    "Log-odds of success (nats) that trees of the edit's features give, learned on edits of the built-in "
    "models; where no such features are known, a logistic of the next predictor.",
)
LANDING = Predictor(
    "landing",
    "landing",
    "Logit of the target's answer minus the largest other (any other word included), in nats, where the "
    "edited state lands: outputs and gradients of all values' prompts in the same sentence, carried over to "
    "it and weighed by inverse squares of their distance in the Fisher metric of the answers, counting only "
    "the share of the change that passes through the site.",
)
LINEAR = Predictor(
    "linear",
    "one straight step",
    "The same logit margin from source and target alone: the outputs at the source plus the mean of both "
    "gradients times the vector.",
)
FISHER = Predictor(
    "fisher",
    "Fisher, answers",
    "Where the edited state lies among the states of the same sentence: distance to the nearest other value "
    "minus distance to the target, in the Fisher metric of the concept's answers weighed alike, so that it "
    "keeps sight where the model is sure. Mean of the metrics at source and target.",
)
FISHER_SAMPLED = Predictor(
    "fisher_sampled",
    "Fisher, sampled",
    "The same margin in the Fisher metric estimated from labels drawn from the model's own output. Where "
    "the model is sure, it always draws the same label and sees next to nothing.",
)
GAUSSIAN = Predictor(
    "gaussian",
    "pullback of the output",
    "The same margin in the metric that the model's final state at the last token pulls back (the Fisher "
    "metric of a Gaussian around it), from random projections of it. Used because these templates have no "
    "answers and the model gives no logits.",
)
EUCLIDEAN = Predictor("euclidean", "Euclidean", "The same margin in plain distance between states.")
MAHALANOBIS = Predictor(
    "mahalanobis",
    "within-class",
    "Margin to the class means in Mahalanobis distance, with the Ledoit-Wolf estimate of the spread within "
    "classes.",
)
COSINE = Predictor(
    "cosine",
    "cosine with chord",
    "Cosine between the vector and the step from source to target state in that sentence.",
)
NORM = Predictor(
    "norm", "length of vector", "Length of the vector that is added; a baseline that knows no target."
)
ALWAYS = (EUCLIDEAN, MAHALANOBIS, COSINE, NORM)


@dataclass(frozen=True)
class Edits:
    """The edits of one plan as tensors: prompts, the vector's classes, scale, the wanted answer's place."""

    source: Int[Tensor, " edits"]
    target: Int[Tensor, " edits"]
    from_value: Int[Tensor, " edits"]
    to_value: Int[Tensor, " edits"]
    scale: Float[Tensor, " edits"]
    answer: Int[Tensor, " edits"] | None

    def first(self, count: int) -> Edits:
        """The first so many of them."""
        return Edits(
            self.source[:count],
            self.target[:count],
            self.from_value[:count],
            self.to_value[:count],
            self.scale[:count],
            None if self.answer is None else self.answer[:count],
        )


@dataclass(frozen=True)
class Rows:
    """The prompts: number of value, of template and of answer group; and what is read off the output there.

    `answers`: log-probabilities (rows, answers + 1), the last column everything that is no answer; None
    without answers.
    """

    value: Int[Tensor, " rows"]
    template: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    values: int
    answers: Float[Tensor, "rows k"] | None = None


@dataclass(frozen=True)
class Gradients:
    """Gradients at one site: of answers' log-probabilities, of drawn labels', of output projections."""

    answers: Float[Tensor, "rows k width"] | None = None
    sampled: Float[Tensor, "rows samples width"] | None = None
    output: Float[Tensor, "rows probes width"] | None = None


@dataclass(frozen=True)
class Predictions:
    """For each predictor its numbers, one an edit; and the row of the rival that comes nearest.

    `rival` is -1 where that rival is no value at all (some other word).
    """

    columns: dict[str, Float[Tensor, " edits"]] = field(default_factory=dict)
    rival: Int[Tensor, " edits"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


def predictors(gradients: Gradients) -> tuple[Predictor, ...]:
    """Which predictors these gradients allow; the first is the default."""
    found: list[Predictor] = []
    if gradients.answers is not None:
        found += [LANDING, LINEAR, FISHER]
    if gradients.sampled is not None:
        found.append(FISHER_SAMPLED)
    if gradients.output is not None:
        found.append(GAUSSIAN)
    return (*found, *ALWAYS)


def class_means(
    states: Float[Tensor, "rows width"], value: Int[Tensor, " rows"], count: int
) -> Float[Tensor, "values width"]:
    """Return the mean state of each value, summed in float64."""
    sums = torch.zeros(count, states.shape[1], dtype=torch.float64, device=states.device)
    sums.index_add_(0, value, states.double())
    return (sums / torch.bincount(value, minlength=count)[:, None]).to(states.dtype)


def shifts(means: Float[Tensor, "values width"], edits: Edits) -> Float[Tensor, "edits width"]:
    """Return the vector of each edit: `scale (m_to - m_from)`."""
    return edits.scale[:, None].to(means.dtype) * (means[edits.to_value] - means[edits.from_value])


def predict(
    states: Float[Tensor, "rows width"],
    means: Float[Tensor, "values width"],
    gradients: Gradients,
    rows: Rows,
    edits: Edits,
) -> Predictions:
    """Compute every predictor that the gradients allow for every edit, template by template.

    Args:
        states: of all prompts at the site.
        means: of all values at the site.
        gradients: at the site.
        rows: what the prompts are.
        edits: what is to be judged.
    """
    shift = shifts(means, edits)
    available = predictors(gradients)
    columns = {entry.column: torch.full((len(shift),), torch.nan, dtype=states.dtype) for entry in available}
    rival = torch.full((len(shift),), -1, dtype=torch.long)
    factors = metric_factors(gradients)
    for template in rows.template[edits.source].unique():
        frame = _Frame.of(template, states, shift, rows, edits)
        distances = {EUCLIDEAN: euclidean_distances(frame.states, frame.source, frame.shift)}
        for predictor, factor in factors.items():
            distances[predictor] = pulled_back_distances(
                factor[frame.rows], frame.states, frame.source, frame.target, frame.shift
            )
        for predictor, found in distances.items():
            margin = margins(found, frame.group, frame.target)
            columns[predictor.column][frame.edits] = margin.gap
            if predictor is available[0]:
                rival[frame.edits] = frame.rows[margin.rival]
        columns[COSINE.column][frame.edits] = chord_cosines(
            frame.states, frame.source, frame.target, frame.shift
        )
        if FISHER in distances and rows.answers is not None and gradients.answers is not None:
            landed = _landed(frame, distances[FISHER], factors[FISHER], rows.answers, gradients.answers)
            wanted = frame.group[frame.target]
            columns[LANDING.column][frame.edits], best = output_margin(landed, wanted)
            rival[frame.edits] = frame.row_of(best)
    if rows.answers is not None and gradients.answers is not None and edits.answer is not None:
        straight = linear_outputs(rows.answers, gradients.answers, edits.source, edits.target, shift)
        columns[LINEAR.column] = output_margin(straight, edits.answer)[0]
    columns[NORM.column] = shift.norm(dim=1)
    columns[MAHALANOBIS.column] = _mahalanobis(states, means, shift, rows, edits).gap
    return Predictions(columns, rival)


def metric_factors(gradients: Gradients) -> dict[Predictor, Float[Tensor, "rows rank width"]]:
    """Return the factors F of the metrics `g = F^T F` at every row, for each predictor that uses one."""
    found = {}
    if gradients.answers is not None:
        answers = gradients.answers[:, :-1]
        alike = torch.zeros(answers.shape[:2], dtype=answers.dtype, device=answers.device)
        found[FISHER] = categorical_factor(answers, alike, float("inf"))
    if gradients.sampled is not None:
        found[FISHER_SAMPLED] = sampled_factor(gradients.sampled)
    if gradients.output is not None:
        found[GAUSSIAN] = sampled_factor(gradients.output)
    return found


def _landed(
    frame: _Frame, distances: Tensor, factor: Tensor, answers: Tensor, gradients: Tensor
) -> Float[Tensor, "edits k"]:
    outputs = answers[frame.rows]
    centred = outputs[:, :-1] - outputs[:, :-1].mean(1, keepdim=True)
    share = carried_share(centred, factor[frame.rows], frame.states, frame.group)
    return interpolated_outputs(
        outputs, gradients[frame.rows], frame.states, distances, share, frame.source, frame.shift
    )


@dataclass(frozen=True)
class _Frame:
    """One template: its prompts, and its edits with source and target counted among these prompts."""

    rows: Int[Tensor, " rows"]
    states: Float[Tensor, "rows width"]
    group: Int[Tensor, " rows"]
    edits: Int[Tensor, " edits"]
    source: Int[Tensor, " edits"]
    target: Int[Tensor, " edits"]
    shift: Float[Tensor, "edits width"]

    @classmethod
    def of(cls, template: Tensor, states: Tensor, shift: Tensor, rows: Rows, edits: Edits) -> _Frame:
        inside = ((rows.template == template) & (rows.group >= 0)).nonzero()[:, 0]
        place = torch.full((len(rows.template),), -1, dtype=torch.long)
        place[inside] = torch.arange(len(inside))
        chosen = (rows.template[edits.source] == template).nonzero()[:, 0]
        source, target = place[edits.source[chosen]], place[edits.target[chosen]]
        return cls(inside, states[inside], rows.group[inside], chosen, source, target, shift[chosen])

    def row_of(self, group: Int[Tensor, " edits"]) -> Int[Tensor, " edits"]:
        """The first prompt of the template in each of these groups; -1 where none is."""
        same = self.group[None, :] == group[:, None]
        return torch.where(same.any(1), self.rows[same.int().argmax(1)], -1)


def _mahalanobis(states: Tensor, means: Tensor, shift: Tensor, rows: Rows, edits: Edits) -> Margin:
    residuals = states - means[rows.value]
    if float(residuals.abs().max()) == 0:
        return margins(
            torch.cdist(states[edits.source] + shift, means),
            torch.arange(rows.values),
            rows.value[edits.target],
        )
    shrinkage = max(float(ledoit_wolf_shrinkage(residuals.double().numpy(), assume_centered=True)), 1e-6)
    factor, ceiling = whitening_factor(residuals.double(), shrinkage)
    landed = (states[edits.source] + shift).double()
    squared = ceiling * torch.cdist(landed, means.double()).square()
    squared = squared - torch.cdist(landed @ factor.T, means.double() @ factor.T).square()
    found = margins(squared.clamp_min(0).sqrt(), torch.arange(rows.values), rows.value[edits.target])
    return Margin(found.gap.to(states.dtype), found.relative.to(states.dtype), found.rival)
