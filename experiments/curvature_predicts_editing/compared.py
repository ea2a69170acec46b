"""What the comparison is set to, what it finds, and how that is put into figures for tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.curvature_predicts_editing.equal_success import (
    Average,
    Cell,
    Ratio,
    Rule,
    Sweep,
    ratio_at_equal_success,
)
from experiments.curvature_predicts_editing.measure import FLIPS, KL, NEAR, OFF
from experiments.curvature_predicts_editing.moves import BASELINES, METHODS
from geoedit.site import Site

GATES = ("inside", "near")
GATED = ("linear", "tangent", "geodesic", "linear, reused", "geodesic, carried step")
"""The edits that are also looked at with gates."""


@dataclass(frozen=True)
class Settings:
    """Which models and concepts, how many edits at which scales, and the seed.

    Attributes:
        models: built-in models.
        concepts: whose prompts are edited; controls come from all concepts of the world.
        scales: of every edit, in steps.
        pairs: edits in each cell.
        sites: at most this many for each concept and model, evenly from the first that carries it to the
            last.
        costly_pairs: the same for concepts that are no curve, whose geodesics are relaxed and take a second
            or more each.
        costly_sites: see `costly_pairs`.
        carried: a site carries a concept if the target's own state turns this share of the answers.
        metric: whether geodesics in the pulled-back metric are among the edits.
        seed: of the halves, the pairs, the controls and the bootstrap.
        resamples: of the bootstrap.
    """

    models: tuple[str, ...] = ("almanac-gpt2", "almanac-llama")
    concepts: tuple[str, ...] = (
        "weekdays",
        "months",
        "hours",
        "sizes",
        "temperatures",
        "places",
        "categories",
    )
    scales: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.3, 1.7, 2.3)
    pairs: int = 40
    sites: int = 3
    costly_pairs: int = 12
    costly_sites: int = 1
    carried: float = 0.5
    metric: bool = True
    seed: int = 0
    resamples: int = 300

    @classmethod
    def small(cls) -> Settings:
        """A slice that takes some seconds."""
        return cls(
            models=("almanac-gpt2",),
            concepts=("weekdays",),
            scales=(0.5, 1.0, 2.0),
            pairs=12,
            sites=2,
            metric=False,
            resamples=50,
        )


@dataclass(frozen=True)
class ComparedCell:
    """All edits of one concept at one site of one model.

    Attributes:
        model: its name.
        concept: its name.
        kind: of the concept.
        site: where.
        labels: whether edits lead from value to value or from answer to answer.
        carried: the share of answers that the target's own state turns.
        manifold: its kind, dimension, closed or not, noise, reach, the widest distance of a learned state,
            and the median length of the vector that a linear edit adds.
        inside: for each gate, the share of sentences and of controls that it lets be edited.
        units: what distances are divided by, in units of the states.
        sweeps: for each edit what it did; gated ones as "name [gate]".
        impossible: edits that could not be made, and why.
        not_finite: edits that gave states that are not finite, and how many of those.
    """

    model: str
    concept: str
    kind: str
    site: Site
    labels: str
    carried: float
    manifold: Mapping[str, Any]
    inside: Mapping[str, tuple[float, float]]
    units: Mapping[str, float]
    sweeps: Mapping[str, Sweep]
    impossible: Mapping[str, str]
    not_finite: Mapping[str, int]


@dataclass(frozen=True)
class Left:
    """A concept or site that was left out, and why."""

    model: str
    concept: str
    site: str
    reason: str


@dataclass(frozen=True)
class Line:
    """One line of a table: an edit against another in some cells, by one cost."""

    where: str
    judged: str
    against: str
    cost: str
    average: Average
    rule: Rule
    level: float | None
    ratio: Ratio


@dataclass(frozen=True)
class Result:
    """What came out.

    Attributes:
        settings: of the run.
        cells: all cells.
        left: what was left out.
        lines: of all tables.
        seconds: the run took.
    """

    settings: Settings
    cells: tuple[ComparedCell, ...]
    left: tuple[Left, ...]
    lines: tuple[Line, ...]
    seconds: float

    def line(
        self,
        judged: str,
        against: str,
        cost: str,
        *,
        where: str = "all",
        average: Average = "mean",
        rule: Rule = "first",
        level: float | None = None,
    ) -> Ratio | None:
        """The ratio in one line; None if that was not computed."""
        wanted = (where, judged, against, cost, average, rule, level)
        for line in self.lines:
            if wanted == (
                line.where, line.judged, line.against, line.cost, line.average, line.rule, line.level
            ):  # fmt: skip
                return line.ratio
        return None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: ratios, and the mean of every curve in every cell; unknown is None."""
        cells = []
        for cell in self.cells:
            about = {
                "model": cell.model,
                "concept": cell.concept,
                "kind": cell.kind,
                "site": str(cell.site),
                "labels": cell.labels,
                "carried": cell.carried,
                "manifold": dict(cell.manifold),
                "inside": {name: list(shares) for name, shares in cell.inside.items()},
                "units": dict(cell.units),
                "impossible": dict(cell.impossible),
                "not_finite": dict(cell.not_finite),
            }
            curves = {}
            for name, sweep in cell.sweeps.items():
                curves[name] = {"success": sweep.success.mean(0).tolist()} | {
                    cost: table.mean(0).tolist() for cost, table in sweep.costs.items()
                }
                curves[name]["kl_median"] = np.median(sweep.costs[KL], axis=0).tolist()
            cells.append({**about, "curves": curves})
        lines = [asdict(line) for line in self.lines]
        return _plain(
            {
                "settings": asdict(self.settings),
                "seconds": round(self.seconds, 1),
                "lines": lines,
                "left_out": [asdict(left) for left in self.left],
                "cells": cells,
            }
        )


def comparisons(metric: bool) -> Iterator[tuple[str, str]]:
    """Which edit is measured against which: each against the straight one; gated ones also like with like."""
    for method in METHODS:
        base = BASELINES[method.family]
        if method.metric and not metric:
            continue
        if method.name != base:
            yield method.name, base
        if method.name in GATED:
            for gate in GATES:
                yield f"{method.name} [{gate}]", base
                if method.name != base:
                    yield f"{method.name} [{gate}]", f"{base} [{gate}]"


def summarise(cells: Sequence[ComparedCell], settings: Settings) -> tuple[Line, ...]:
    """All ratios: over all cells, by token, by concept; at the highest common success and at fixed ones."""
    lines = []
    pairs = list(comparisons(settings.metric))
    tokens = sorted({cell.site.token_name for cell in cells})
    names = sorted({cell.concept for cell in cells})
    places = {"all": list(cells)}
    places |= {f"token {token}": [c for c in cells if c.site.token_name == token] for token in tokens}
    places |= {f"concept {name}": [c for c in cells if c.concept == name] for name in names}
    for where, chosen in places.items():
        for judged, against in pairs:
            both = [
                Cell(f"{cell.concept}", cell.sweeps[judged], cell.sweeps[against])
                for cell in chosen
                if judged in cell.sweeps and against in cell.sweeps
            ]
            for cost, average, rule, level in _views(where):
                ratio = ratio_at_equal_success(
                    both, cost, average=average, rule=rule, level=level,
                    resamples=settings.resamples, seed=settings.seed,
                )  # fmt: skip
                lines.append(Line(where, judged, against, cost, average, rule, level, ratio))
    return tuple(lines)


def _views(where: str) -> Iterator[tuple[str, Average, Rule, float | None]]:
    for cost in (OFF, NEAR, KL, FLIPS):
        yield cost, "mean", "first", None
    yield KL, "median", "first", None
    if where == "all":
        for cost in (OFF, NEAR, KL):
            yield cost, "mean", "least", None
            for level in (0.5, 0.8):
                yield cost, "mean", "first", level


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become None and the text "inf"."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        if math.isnan(value):
            return None
        return round(value, 6) if math.isfinite(value) else "inf" if value > 0 else "-inf"
    return value
