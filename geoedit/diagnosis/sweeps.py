"""A handful of edits at one scale after another: what is predicted, where the state goes, what happened.

A diagnosis judges many edits at the few scales that were asked for. A sweep follows one of them over a grid
of scales, through the same functions; it is run through the network at some of these scales only, and along
the geodesic of the concept's manifold beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.concept import Prompt
from geoedit.diagnosis.off_manifold import RESOLVED
from geoedit.diagnosis.plan import Plan, PlannedEdit
from manifolds import ManifoldError
from manifolds.cloud.geodesics import shortest_path
from manifolds.cloud.learned import ROUGH, LearnedManifold
from manifolds.operations import unchecked

GRID = 33
"""Scales at which a sweep is predicted, evenly spaced, beside those at which it is run."""

RUN_AT = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Scales at which a sweep is run, and those of the plan."""

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
"""Shares of the way along the geodesic at which a sweep is run."""

COPIED = ("site", "edit", "template", "source", "target", "from_value", "to_value")
STEPS = 16
WAYS, WIDE_STEPS, WIDE_TOLERANCE, WIDE_ITERATIONS = 2, 8, 2e-3, 40
"""Sheets and clouds, whose geodesics are relaxed at some cost: how many are followed a site, and how well."""
CHUNK = 128
MOST, MOST_AT_ALL, LEAST_RUNS, SHARE = 8, 320, 200, 0.1


@dataclass(frozen=True)
class Sweep:
    """One edit at many scales: `edits` hold it at each, `run` says at which it is run through the network."""

    edits: tuple[PlannedEdit, ...]
    run: tuple[bool, ...]

    @property
    def scales(self) -> list[float]:
        """The scales, from the lowest to the highest."""
        return [edit.scale for edit in self.edits]

    @property
    def ran(self) -> list[PlannedEdit]:
        """The edits that are run."""
        return [edit for edit, run in zip(self.edits, self.run, strict=True) if run]


@dataclass(frozen=True)
class Route:
    """Where one sweep leads at a site, each row a state, and how far off the concept's manifold that is.

    `vector` is what is added at scale 1; `foot` the points of the manifold that belong to the states of
    `straight`. `off` is in units of the manifold's noise, the root mean square
    distance of its own samples (at least a thousandth of the spread of the class means); NaN where no
    manifold is known. `geodesic` starts with the state as it was
    and ends with the whole way; it has no rows where there is none, and `reason` says why.
    """

    vector: Float[Tensor, " width"]
    straight: Float[Tensor, "scales width"]
    foot: Float[Tensor, "scales width"] | None
    off: Float[Tensor, " scales"]
    geodesic: Float[Tensor, "steps width"]
    geodesic_off: Float[Tensor, " steps"]
    reason: str | None


def choose_sweeps(
    plan: Plan, prompts: Sequence[Prompt], *, scales: Sequence[float], sites: int, seed: int
) -> tuple[Sweep, ...]:
    """Draw edits of the plan to be followed over scales: each kind in turn, no pair of values twice.

    So many that running them costs at most a tenth of running the plan at all `sites`, or 200 edits,
    whichever is more; at least one and at most eight a site.
    """
    runs = len(_run_at(scales)) + len(FRACTIONS)
    budget = max(LEAST_RUNS / sites, SHARE * len(plan.edits))
    wanted = max(1, min(MOST, MOST_AT_ALL // sites, int(budget / runs)))
    order = np.random.default_rng(seed).permutation(len(plan.edits))
    kinds: dict[str, dict[tuple[str, str], PlannedEdit]] = {}
    for edit in (plan.edits[number] for number in order):
        pair = prompts[edit.source].value, prompts[edit.target].value
        kinds.setdefault(edit.kind, {}).setdefault(pair, edit)
    queues = [list(kinds[kind].values()) for kind in dict.fromkeys(edit.kind for edit in plan.edits)]
    taken = [queue[place] for place in range(wanted) for queue in queues if place < len(queue)][:wanted]
    return tuple(_sweep(edit, scales) for edit in taken)


def _sweep(edit: PlannedEdit, scales: Sequence[float]) -> Sweep:
    run = _run_at(scales)
    every = sorted({*run, *(round(float(scale), 6) for scale in np.linspace(min(run), max(run), GRID))})
    return Sweep(tuple(replace(edit, scale=scale) for scale in every), tuple(scale in run for scale in every))


def _run_at(scales: Sequence[float]) -> set[float]:
    return {*RUN_AT, *map(float, scales)}


def swept_edits(sweeps: Sequence[Sweep]) -> list[PlannedEdit]:
    """All edits of all sweeps, one sweep after the other."""
    return [edit for sweep in sweeps for edit in sweep.edits]


def follow(
    sweeps: Sequence[Sweep],
    value: Int[Tensor, " rows"],
    states: Float[Tensor, "rows width"],
    means: Float[Tensor, "values width"],
    manifold: LearnedManifold | None,
    reason: str | None = None,
) -> list[Route]:
    """Return where each sweep leads at one site; no network is run.

    The straight edit goes from the state x to `x + s (m_d - m_c)`. The geodesic one goes to
    `x + γ(s) - γ(0)`, γ the geodesic of the manifold from the foot of x to the foot of the target's mean:
    what x holds besides the concept stays.

    Args:
        sweeps: what to follow.
        value: number of the value of each row.
        states: of the rows, what each sentence adds to all of its states taken out (see
            `geoedit.shapes.without_sentences`).
        means: of the values.
        manifold: of the concept at this site, if one could be learned.
        reason: why there is none.
    """
    source = torch.tensor([sweep.edits[0].source for sweep in sweeps])
    target = value[torch.tensor([sweep.edits[0].target for sweep in sweeps])]
    turns, reasons = _geodesics(manifold, states[source], means[target], reason)
    vectors, straights, alongs = [], [], []
    for sweep, turn in zip(sweeps, turns, strict=True):
        edit = sweep.edits[0]
        vectors.append(means[edit.to_value] - means[edit.from_value])
        scales = torch.tensor(sweep.scales).to(states)[:, None]
        straights.append(states[edit.source] + scales * vectors[-1])
        alongs.append(states[edit.source] + turn)
    # All at once: a projection costs the same for a few states as for many.
    feet, offs = _projected(manifold, [*straights, *alongs], means)
    count = len(sweeps)
    return [
        Route(vector, straight, foot, off, along, along_off, reason)
        for vector, straight, foot, off, along, along_off, reason in zip(
            vectors, straights, feet[:count], offs[:count], alongs, offs[count:], reasons, strict=True
        )
    ]


def _geodesics(
    manifold: LearnedManifold | None, start: Tensor, end: Tensor, reason: str | None
) -> tuple[list[Float[Tensor, "steps width"]], list[str | None]]:
    """The way along the manifold from each start to its end, from zero on; or no rows, and why."""
    nothing = start.new_zeros(0, start.shape[1])
    if manifold is None:
        return [nothing] * len(start), [reason or "no manifold could be learned here"] * len(start)
    curve = manifold.dim == 1
    count = len(start) if curve else min(WAYS, len(start))
    limits = (STEPS + 1, None, 100) if curve else (WIDE_STEPS + 1, WIDE_TOLERANCE, WIDE_ITERATIONS)
    ways: list[Tensor] = [nothing] * len(start)
    reasons: list[str | None] = [f"beyond curves, {WAYS} ways a site are followed"] * len(start)
    with unchecked():  # what projx gives need not be its own foot to the last digit
        feet, ends = manifold.projx(start[:count]), manifold.projx(end[:count])
    for place, (path, residual, problem) in enumerate(_shortest(manifold, feet, ends, *limits)):
        if problem is None and residual <= ROUGH:
            ways[place], reasons[place] = path - path[:1], None
        else:
            reasons[place] = problem or f"no shortest path was found (residual {residual:.1g})"
    return ways, reasons


def _shortest(
    manifold: LearnedManifold, x: Tensor, y: Tensor, points: int, tolerance: float | None, iterations: int
) -> list[tuple[Tensor, float, str | None]]:
    """For each pair the shortest path, its residual, and why there is none."""
    try:
        with unchecked():
            found = shortest_path(
                manifold, x, y, points=points, tolerance=tolerance, max_iterations=iterations
            )
    except ManifoldError as error:
        if len(x) == 1:
            return [(x[:0], float("inf"), str(error))]
        # One that has no way must not take it from the others.
        pairs = zip(x.split(1), y.split(1), strict=True)
        return [_shortest(manifold, *pair, points, tolerance, iterations)[0] for pair in pairs]
    return [
        (path, residual, None) for path, residual in zip(found.path, found.residual.tolist(), strict=True)
    ]


def _projected(
    manifold: LearnedManifold | None, moved: Sequence[Tensor], means: Tensor
) -> tuple[list[Tensor | None], list[Tensor]]:
    """The feet of states on the manifold, and how far off it they are in units of its noise."""
    if manifold is None:
        return [None] * len(moved), [part.new_full((len(part),), torch.nan) for part in moved]
    found = [manifold.project(part) for part in torch.cat(list(moved)).split(CHUNK)]
    sizes = [len(part) for part in moved]
    feet = torch.cat([part.foot for part in found]).split(sizes)
    distances = torch.cat([part.distance for part in found])
    spread = float((means - means.mean(0)).square().sum(1).mean().sqrt())
    unit = max(manifold.noise, RESOLVED * spread) if spread > 0 else float("nan")
    return list(feet), list((distances / unit).split(sizes))


def sweep_runs(
    sweeps: Sequence[Sweep], routes: Sequence[Route]
) -> tuple[list[PlannedEdit], Float[Tensor, "edits width"]]:
    """The edits that are run, and the vector that each adds: a sweep's straight ones, then its others."""
    edits: list[PlannedEdit] = []
    shifts = []
    for sweep, route in zip(sweeps, routes, strict=True):
        edits += sweep.ran
        shifts += [edit.scale * route.vector for edit in sweep.ran]
        for fraction in _fractions(route):
            edits.append(replace(sweep.edits[0], scale=fraction))
            shifts.append(route.geodesic[round(fraction * (len(route.geodesic) - 1))] - route.geodesic[0])
    return edits, torch.stack(shifts)


def _fractions(route: Route) -> tuple[float, ...]:
    return FRACTIONS if len(route.geodesic) else ()


def sweep_results(
    sweeps: Sequence[Sweep],
    routes: Sequence[Route],
    table: pd.DataFrame,
    heard: Sequence[tuple[str, bool]],
    *,
    states: Float[Tensor, "rows width"],
    means: Float[Tensor, "values width"],
    coordinates: Sequence[Sequence[float]],
    prompts: Sequence[Prompt],
) -> list[dict[str, Any]]:
    """Put one site's sweeps together as plain JSON values.

    Each holds site, edit, template, text, source, target, from_value, to_value, wanted (the answer);
    `scales`, and at each `probability`, `off` (in units of the manifold's noise; None: unknown), `position`
    (on the axes of the class means) and `foot` (the point of the manifold that belongs to it; None without a
    manifold); `target_position`; `recorded`, a list of scale, answer and
    success for the scales that were run; `geodesic` with `fractions`, `off`, `position` and `recorded` (None:
    there is none, and `reason` says why).

    Args:
        sweeps: what was followed.
        routes: from `follow`.
        table: one row for each of `swept_edits(sweeps)`, with what was predicted.
        heard: the answer after each of `sweep_runs`, and whether it is the wanted one; empty: none was run.
        states: of the rows, as `follow` was given them.
        means: of the values.
        coordinates: of the means on their principal axes.
        prompts: the rows.
    """
    axes, centre = mean_axes(means, coordinates)
    rows, answers = iter(table.to_dict("records")), iter(heard)

    def recorded(scales: Sequence[float]) -> list[dict[str, Any]]:
        if not heard:
            return []
        seen = [next(answers) for _ in scales]
        return [
            {"scale": scale, "answer": answer, "success": success}
            for scale, (answer, success) in zip(scales, seen, strict=True)
        ]

    found = []
    for sweep, route in zip(sweeps, routes, strict=True):
        mine = [next(rows) for _ in sweep.edits]
        source, target = sweep.edits[0].source, sweep.edits[0].target
        entry = {name: mine[0][name] for name in COPIED} | {
            "text": prompts[source].text,
            "wanted": prompts[target].answer,
            "scales": sweep.scales,
            "probability": _plain([row["probability"] for row in mine]),
            "off": _plain(route.off),
            "position": _placed(route.straight, axes, centre),
            "foot": None if route.foot is None else _placed(route.foot, axes, centre),
            "target_position": _placed(states[target][None], axes, centre)[0],
            "recorded": recorded([edit.scale for edit in sweep.ran]),
            "geodesic": None,
            "reason": route.reason,
        }
        if len(route.geodesic):
            entry["geodesic"] = {
                "fractions": np.linspace(0, 1, len(route.geodesic)).tolist(),
                "off": _plain(route.geodesic_off),
                "position": _placed(route.geodesic, axes, centre),
                "recorded": recorded(FRACTIONS),
            }
        found.append(entry)
    return found


def mean_axes(
    means: Float[Tensor, "values width"], coordinates: Sequence[Sequence[float]]
) -> tuple[Float[Tensor, "axes width"], Float[Tensor, " width"]]:
    """The principal axes on which the class means have these coordinates, and the centre of the means.

    With centred means M = U S Vᵀ and coordinates C = U S: `V = Mᵀ C S⁻²`, so that signs and order are those
    of the coordinates. An axis on which nothing lies is zero.
    """
    centre = means.mean(0)
    placed = torch.tensor(coordinates, dtype=torch.float64)
    size = placed.square().sum(0)
    scaled = torch.where(size > 0, placed / torch.where(size > 0, size, 1.0), 0.0)
    return scaled.mT @ (means - centre).double(), centre.double()


def _placed(states: Tensor, axes: Tensor, centre: Tensor) -> list[list[float]]:
    placed = (states.double() - centre) @ axes.mT
    return [[round(float(x), 6) for x in row] for row in placed]


def _plain(numbers: Sequence[float] | Tensor) -> list[float | None]:
    return [round(float(x), 6) if np.isfinite(float(x)) else None for x in numbers]
