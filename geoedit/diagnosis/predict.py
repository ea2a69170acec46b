"""The numbers that foretell an edit, at one site: none of them runs the edited model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from sklearn.covariance import ledoit_wolf_shrinkage
from torch import Tensor

from geoedit.diagnosis.landing import (
    Margin,
    chord_cosines,
    euclidean_distances,
    linear_outputs,
    margins,
    output_margin,
    pulled_back_distances,
)
from geoedit.diagnosis.metric import answer_factor, sampled_factor, whitening_factor
from geoedit.diagnosis.result import Predictor

LANDING = Predictor(
    "landing",
    "landing",
    "Logit of the target's answer minus the largest other, in nats, where the rest of the network, "
    "straightened between source and target, carries the edited state: z = f(x) + (J_source + J_target)/2 · "
    "v.",
)
FISHER = Predictor(
    "fisher",
    "Fisher, answers",
    "Where the edited state lies among the states of the same sentence: distance to the nearest other value "
    "minus distance to the target, in the Fisher metric with the concept's answers as labels, all alike, so "
    "that it keeps sight where the model is sure. Mean of the metrics at source and target.",
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
        found += [LANDING, FISHER]
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
    distances: dict[Predictor, Callable[[_Frame], Float[Tensor, "edits rows"]]] = {
        EUCLIDEAN: lambda frame: euclidean_distances(frame.states, frame.source, frame.shift)
    }
    for predictor, factor in _factors(gradients).items():
        distances[predictor] = lambda frame, factor=factor: pulled_back_distances(  # type: ignore[misc]
            factor[frame.rows], frame.states, frame.source, frame.target, frame.shift
        )
    default = predictors(gradients)[0]
    columns = {
        predictor.column: torch.full((len(shift),), torch.nan, dtype=states.dtype)
        for predictor in predictors(gradients)
    }
    rival = torch.full((len(shift),), -1, dtype=torch.long)
    for template in rows.template[edits.source].unique():
        frame = _Frame.of(template, states, shift, rows, edits)
        for predictor, distance in distances.items():
            margin = margins(distance(frame), frame.group, frame.target)
            columns[predictor.column][frame.edits] = margin.gap
            if predictor is default or (default is LANDING and predictor is FISHER):
                rival[frame.edits] = frame.rows[margin.rival]
        columns[COSINE.column][frame.edits] = chord_cosines(
            frame.states, frame.source, frame.target, frame.shift
        )
    columns[NORM.column] = shift.norm(dim=1)
    columns[MAHALANOBIS.column] = _mahalanobis(states, means, shift, rows, edits).gap
    if gradients.answers is not None and rows.answers is not None and edits.answer is not None:
        landed = linear_outputs(rows.answers, gradients.answers, edits.source, edits.target, shift)
        columns[LANDING.column], best = output_margin(landed, edits.answer)
        rival = _value_of_answer(best, rows, edits)
    return Predictions(columns, rival)


def _factors(gradients: Gradients) -> dict[Predictor, Float[Tensor, "rows rank width"]]:
    found = {}
    if gradients.answers is not None:
        found[FISHER] = answer_factor(gradients.answers[:, :-1])
    if gradients.sampled is not None:
        found[FISHER_SAMPLED] = sampled_factor(gradients.sampled)
    if gradients.output is not None:
        found[GAUSSIAN] = sampled_factor(gradients.output)
    return found


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


def _value_of_answer(answer: Int[Tensor, " edits"], rows: Rows, edits: Edits) -> Int[Tensor, " edits"]:
    """The first row of the edit's template whose answer this is; -1 where none has it."""
    first: dict[tuple[int, int], int] = {}
    keys: Sequence[tuple[int, int]] = list(zip(rows.template.tolist(), rows.group.tolist(), strict=True))
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    templates = rows.template[edits.source].tolist()
    return torch.tensor(
        [first.get(key, -1) for key in zip(templates, answer.tolist(), strict=True)], dtype=torch.long
    )
