"""What sliders do to each other's attributes: overlaps of weights, first-order effects, and their removal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.algebra.composition import compose
from geoedit.algebra.terms import read_terms
from geoedit.errors import EditError
from geoedit.sliders.slider import Scaled, Slider
from manifolds import LowRank
from peft_analysis.updates import WeightUpdate

LARGEST_CONDITION = 30.0
"""Effects whose matrix is worse conditioned than this move the same things, and are not taken apart."""


def overlap(operands: Sequence[Slider | Scaled | WeightUpdate]) -> Float[Tensor, "k k"]:
    r"""Cosines between changes of weights: \(\langle A, B \rangle / \lVert A \rVert \lVert B \rVert\).

    Inner products and norms are summed over all modules, in factors. A scale counts with its sign alone.
    NaN for a change that is zero.

    Raises:
        EditError: operands of other bases or kinds, values that are not finite.
    """
    terms = read_terms(operands, "overlap")
    for term in terms:
        for name in term.update:
            value = term.update[name]
            parts = (value.left, value.right) if isinstance(value, LowRank) else (value,)
            if not all(bool(part.isfinite().all()) for part in parts):
                raise EditError(f"overlap: {name} of {term.name!r} holds NaN or infinity")
    signs = [math.copysign(1.0, term.factor) if term.factor else 0.0 for term in terms]
    found = torch.zeros(len(terms), len(terms), dtype=torch.float64)
    for i, one in enumerate(terms):
        for j, other in enumerate(terms[: i + 1]):
            inner = (
                _inner(one.update[name], other.update[name]) for name in one.update if name in other.update
            )
            found[i, j] = found[j, i] = signs[i] * signs[j] * sum(inner)
    norms = found.diagonal().sqrt()
    return torch.where(norms > 0, found / norms / norms[:, None], math.nan)


@dataclass(frozen=True)
class Interference:
    """How sliders move attributes, to first order: natural standard deviations for each unit of scale.

    Attributes:
        sliders: by label.
        matrix: a row for each slider, a column for each attribute: the mean over images.
        error: standard errors of those means over images; NaN for a single image.
        own: by label the attribute that the slider is about, where anything tells.
        signs: by label 1, or −1 for a slider that is to lower its attribute.
        step: the scale at which derivatives were taken, by central differences.
    """

    sliders: Mapping[str, Slider]
    matrix: pd.DataFrame
    error: pd.DataFrame
    own: Mapping[str, str]
    signs: Mapping[str, int]
    step: float

    @property
    def relative(self) -> pd.DataFrame:
        """What each slider moves of another's attribute, over what it moves of its own: signed, own = 1."""
        labels = list(self.own)
        table = self.matrix.loc[labels, [self.own[label] for label in labels]]
        own = np.array([self.matrix.loc[label, self.own[label]] for label in labels])
        return table.div(own, axis=0)

    def predict(self, scales: Mapping[str, float | int]) -> pd.Series:
        """Every attribute's change, in natural standard deviations, for sliders at scales together.

        Raises:
            EditError: a label that is not there.
        """
        unknown = [label for label in scales if label not in self.sliders]
        if unknown:
            raise EditError(f"there is no slider {unknown[0]!r}; there are {', '.join(self.sliders)}")
        rows = self.matrix.loc[list(scales)]
        return rows.mul(pd.Series(scales), axis=0).sum(axis=0)

    def decouple(self, *, significance: float | int = 2.0) -> dict[str, Slider]:
        r"""Sliders that move their own attribute as before, and to first order none of the others' own ones.

        With the square matrix J of the sliders' effects on their own attributes, slider j becomes
        \(J_{jj} \sum_i (J^{-1})_{ji}\) times slider i, an exact composition.

        Args:
            significance: entries of J off the diagonal within so many standard errors of zero count as zero.

        Raises:
            EditError: a slider's own attribute is not known or shared with another slider, is not moved, or
                the sliders move so nearly the same that they cannot be told apart.
        """
        labels = list(self.sliders)
        unknown = [label for label in labels if label not in self.own]
        if unknown:
            raise EditError(f"nothing tells which attribute {unknown[0]!r} moves; give attributes=")
        columns = [self.own[label] for label in labels]
        if len(set(columns)) < len(columns):
            raise EditError(f"sliders share an attribute: {dict(self.own)}; take one for each attribute")
        effects = self.matrix.loc[labels, columns].to_numpy(copy=True)
        errors = self.error.loc[labels, columns].to_numpy()
        apart = ~np.eye(len(labels), dtype=bool)
        effects[apart & (np.abs(effects) <= significance * np.nan_to_num(errors))] = 0.0
        own = np.diag(effects)
        still = [label for label, value in zip(labels, own, strict=True) if not abs(value) > 0]
        if still or not np.isfinite(effects).all():
            label = (still or labels)[0]
            raise EditError(
                f"{label!r} does not move {self.own[label]}, as far as it could be measured; take more "
                "seeds, a larger step, or another slider"
            )
        condition = float(np.linalg.cond(effects / own[:, None]))
        if condition > LARGEST_CONDITION:
            raise EditError(
                f"the sliders {', '.join(labels)} move nearly the same attributes (condition "
                f"{condition:.3g}), and cannot be told apart; leave one out"
            )
        mix = own[:, None] * np.linalg.inv(effects)
        return {
            label: compose(
                [self.sliders[other] @ float(mix[j, i]) for i, other in enumerate(labels) if mix[j, i]],
                name=f"{label}, decoupled",
            )
            for j, label in enumerate(labels)
        }


def interference(
    pipe: Any,
    sliders: Slider | Sequence[Slider] | Mapping[str, Slider],
    *,
    prompts: str | Sequence[str] | None = None,
    seeds: int | Sequence[int] = 5,
    step: float | int = 0.5,
    measure: Any = None,
    attributes: Mapping[str, str] | None = None,
    steps: int = 20,
    guidance: float | int | None = None,
    start: float | int = 0.0,
    stop: float | int = 1.0,
    batch_size: int = 32,
    cache: str | Path | None = None,
) -> Interference:
    """Measure how sliders move every attribute near scale 0, each image against itself.

    Effects are (value at +step − value at −step) / (2 step), in natural standard deviations for a unit of
    scale; of angles the shorter way round. Compositions at scales where sliders do not saturate do what
    `Interference.predict` says. Images that the measure cannot read are left out.

    Args:
        pipe: a diffusers pipeline.
        sliders: one, several, or a mapping from labels.
        prompts: what is drawn; as for `geoedit.sliders.evaluate`.
        seeds: of the noise; a number n stands for 0 … n − 1.
        step: in each slider's own units.
        measure: what reads images; as for `geoedit.sliders.evaluate`.
        attributes: by label the attribute that a slider is about, with a minus before one that should fall;
            else as the slider's spec or name tells.
        steps: sampling steps.
        guidance: classifier-free guidance; the pipeline's own if None.
        start: share of the way at which sliders begin to act.
        stop: share at which they end.
        batch_size: images in one pass.
        cache: a folder for pictures.

    Raises:
        EditError: a step that is not above 0, or as `geoedit.sliders.evaluate`.
    """
    from geoedit.sliders.evaluation.drawing import Row
    from geoedit.sliders.evaluation.prepare import prepare

    if not (math.isfinite(step) and step > 0):
        raise EditError(f"interference: step is {step}; give a number above 0")
    work, claims = prepare(
        pipe,
        sliders,
        prompts=prompts,
        seeds=seeds,
        measure=measure,
        attributes=attributes,
        steps=steps,
        guidance=guidance,
        start=start,
        stop=stop,
        batch_size=batch_size,
        cache=cache,
    )
    labels, names = list(work.painter.sliders), list(work.tool.attributes)
    rows = [
        Row(prompt, seed, {label: scale})
        for label in labels
        for scale in (step, -step)
        for prompt, seed in work.rows
    ]
    values = work.measured(work.painter.draw(rows))
    means, errors = np.empty((len(labels), len(names))), np.empty((len(labels), len(names)))
    for column, name in enumerate(names):
        ends = values[name].reshape(len(labels), 2, -1)
        change = ends[:, 0] - ends[:, 1]
        if name in work.tool.period:
            period = work.tool.period[name]
            change = (change + period / 2) % period - period / 2
        slopes = change / (2 * step * work.tool.natural_sd[name])
        for row, slope in enumerate(slopes):
            means[row, column], errors[row, column] = _mean(slope[np.isfinite(slope)])
    return Interference(
        dict(work.painter.sliders),
        pd.DataFrame(means, labels, names),
        pd.DataFrame(errors, labels, names),
        {label: own.attribute for label, own in claims.items()},
        {label: own.sign for label, own in claims.items()},
        float(step),
    )


def _mean(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """The mean and its standard error, NaN where there are too few values to tell."""
    if not len(values):
        return math.nan, math.nan
    spread = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(values.mean()), spread


def _inner(one: LowRank | Tensor, other: LowRank | Tensor) -> float:
    """⟨A, B⟩ in float64, in factors where there are any."""
    if isinstance(one, Tensor):
        one, other = other, one
    if isinstance(one, Tensor):
        return float((one.double() * other.double()).sum()) if isinstance(other, Tensor) else math.nan
    dense = other.double().flatten(1) if isinstance(other, Tensor) else other.to(torch.float64)
    return float(one.to(torch.float64).inner(dense))
