"""One diagnosis at work: what was prepared and collected, and the steps that use it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from geoedit.activations.inputs import Texts
from geoedit.anatomy import Location
from geoedit.concept import Concept, Prompt
from geoedit.diagnosis.calibrate import probability
from geoedit.diagnosis.derivatives import derive
from geoedit.diagnosis.features import edit_features
from geoedit.diagnosis.geometry import Shape, learn_shape
from geoedit.diagnosis.observe import Observed, observe
from geoedit.diagnosis.odds import Odds
from geoedit.diagnosis.off_manifold import off_columns
from geoedit.diagnosis.plan import Plan, PlannedEdit
from geoedit.diagnosis.predict import (
    ODDS,
    Edits,
    Gradients,
    Predictions,
    Rows,
    metric_factors,
    predict,
    predictors,
    shifts,
)
from geoedit.diagnosis.readouts import Readouts
from geoedit.diagnosis.result import FEATURE, Predictor, SiteSummary
from geoedit.diagnosis.safe_scale import GRID, Scaled, safe_interval
from geoedit.diagnosis.straightness import functional_curvature, sample_edits
from geoedit.diagnosis.sweeps import Sweep, follow, sweep_results, sweep_runs, swept_edits
from geoedit.site import Site

GRADIENT_BYTES = 2**30
OTHER = "another word"
CERTAIN = 1e-9
"""No probability comes nearer than this to 0 or 1."""


@dataclass
class Work:
    """One diagnosis at work: what was prepared and collected, and the steps that use it.

    `edits` are those of the plan, after them those of the sweeps, and then those over the grid of scales.
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
    scaled: Scaled
    rows: Rows
    edits: Edits
    states: dict[Site, Float[Tensor, "rows width"]]
    means: dict[Site, Float[Tensor, "values width"]]
    readouts: Readouts
    batch_size: int
    progress: bool | None
    shapes: dict[Site, Shape] = field(default_factory=dict)
    odds: Odds = field(default_factory=Odds.load)
    off: dict[Site, dict[str, Float[Tensor, " edits"]]] = field(default_factory=dict)
    features: dict[Site, dict[str, Float[Tensor, " edits"]]] = field(default_factory=dict)

    @property
    def mask_token(self) -> int | None:
        """The id of the mask token, if the tokenizer has one."""
        return getattr(self.tokenizer, "mask_token_id", None)

    def wanted(self, targets: Sequence[int]) -> Int[Tensor, " edits"]:
        """Token ids of the answers at these rows; diagnose has made sure that there are answers."""
        return torch.tensor([self.readouts.answers[self.groups[row]] for row in targets], dtype=torch.long)

    def bar(self, total: int, description: str, unit: str) -> Any:
        """A progress bar, hidden where none was asked for."""
        hidden = None if self.progress is None else not self.progress
        return tqdm(total=total, desc=description, unit=unit, disable=hidden)

    def predictions(self) -> tuple[dict[Site, Predictions], tuple[Predictor, ...]]:
        """What each predictor says of each edit at each site, and which predictors there are."""
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
                    margins = predict(self.states[site], self.means[site], gradients, rows, self.edits)
                    available = (ODDS, *predictors(gradients))
                    self.features[site] = edit_features(
                        self.states[site], self.means[site], gradients, rows, self.edits
                    )
                    odds = torch.logit(self.chances(site, margins.columns[available[1].column], available[1]))
                    found[site] = replace(margins, columns={ODDS.column: odds, **margins.columns})
                    self.look_at_shape(site, gradients)
        return found, available

    def look_at_shape(self, site: Site, gradients: Gradients) -> None:
        """Learn the concept's manifold at a site, and how far off it each edit ends."""
        shape = learn_shape(self.states[site], self.rows, self.concept)
        factor = next(iter(metric_factors(gradients).values()), None)
        self.shapes[site] = shape
        judged = self.edits.first(len(self.edits.source) - len(self.scaled.edits))
        self.off[site] = off_columns(shape, factor, self.states[site], self.means[site], self.rows, judged)

    def straightness(self, seed: int) -> dict[Site, dict[str, Any]]:
        """The functional curvature from each site to the output, over the same drawn edits."""
        lengths = [len(ids) for ids in self.source.ids]
        edits = sample_edits(self.plan.edits, lengths, seed=seed)
        with self.bar(len(self.places), "bending", "site") as bar:
            found = {}
            for site in self.places:
                found[site] = functional_curvature(
                    self.model,
                    self.tokenizer,
                    site,
                    self.prompts,
                    lengths,
                    edits,
                    self.states[site],
                    self.means[site],
                    self.readouts.answers,
                )
                bar.update()
        return found

    def observations(self) -> dict[Site, Observed]:
        """What the model says after each of the plan's edits, at each site."""
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
        """What the model says after these vectors at one site."""
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
        shape = self.shapes[site]
        routes = follow(
            self.sweeps,
            self.rows.value,
            shape.states,
            self.means[site],
            shape.concept.manifold,
            shape.concept.reason or None,
        )
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
            states=shape.states,
            means=self.means[site],
            coordinates=summary.coordinates,
            prompts=self.prompts,
        )

    def answers(self, observed: Observed) -> list[str]:
        """The words that the model said."""
        return [self.tokenizer.decode([token]).strip() for token in observed.token.tolist()]

    def table(self, site: Site, predictions: Predictions, observed: Observed | None) -> pd.DataFrame:
        """One row for each of `edits`, with all that was predicted and, for the plan's, what was seen."""
        values = self.concept.values
        edits = [*self.plan.edits, *swept_edits(self.sweeps), *self.scaled.edits]
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
            "probability": predictions.columns[ODDS.column].sigmoid().numpy(),
            "nearest": rivals,
            **{column: _padded(numbers, len(edits)) for column, numbers in self.off[site].items()},
            **{f"{FEATURE}{name}": numbers.numpy() for name, numbers in self.features[site].items()},
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

    def chances(
        self, site: Site, margin: Float[Tensor, " edits"], fallback: Predictor
    ) -> Float[Tensor, " edits"]:
        """The probability that each edit succeeds: the learned odds of its features, in float64.

        Where the features that these need are not known, it is a fixed logistic of the margin that `fallback`
        names. Certainty is cut at one in 10⁹.
        """
        learned = self.odds.probability(self.features[site]).double()
        otherwise = torch.from_numpy(probability(margin.double().numpy(), fallback.column))
        return torch.where(learned.isnan(), otherwise, learned).clamp(CERTAIN, 1 - CERTAIN)

    def planned(self, table: pd.DataFrame) -> pd.DataFrame:
        """The plan's edits of a site's table, with the scales up to which each is expected to succeed."""
        first = len(table) - len(self.scaled.edits)
        chances = table["probability"].to_numpy(dtype=float)[first:].reshape(-1, len(GRID))
        low, high = safe_interval(np.array(GRID), chances)
        which = self.scaled.which
        return table[: len(self.plan.edits)].assign(
            safe_low=np.where(which >= 0, low[which], np.nan),
            safe_scale=np.where(which >= 0, high[which], np.nan),
        )

    def followed(self, table: pd.DataFrame) -> pd.DataFrame:
        """The swept edits of a site's table."""
        return table[len(self.plan.edits) : len(table) - len(self.scaled.edits)]

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


def as_tensors(edits: Sequence[PlannedEdit], groups: Sequence[int], answered: bool) -> Edits:
    """The edits of a plan as tensors; without answers, none is wanted."""
    return Edits(
        torch.tensor([edit.source for edit in edits]),
        torch.tensor([edit.target for edit in edits]),
        torch.tensor([edit.from_value for edit in edits]),
        torch.tensor([edit.to_value for edit in edits]),
        torch.tensor([edit.scale for edit in edits]),
        torch.tensor([groups[edit.target] for edit in edits]) if answered else None,
    )


def _padded(numbers: Float[Tensor, " some"], count: int) -> Float[np.ndarray, " edits"]:
    """Numbers of the first edits, and NaN for the others."""
    found = np.full(count, np.nan)
    found[: len(numbers)] = numbers.double().numpy()
    return found
