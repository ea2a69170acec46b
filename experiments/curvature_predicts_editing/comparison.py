"""Do edits along a manifold leave it less, and disturb other answers less, than straight ones do?

The question is asked *at equal success*: an edit that moves less always disturbs less, so that edits are
compared at scales where both turn the same share of answers into the wanted one.

**What is edited.** Prompts of the almanac's concepts (cycles, lines, a grid, categories) in both models, at
the sites that carry the concept: where putting in the state that the target's own sentence has there turns
at least half of the answers. That test knows none of the edits. The embedding is left out: a value has one
state there, whatever the sentence. At the last token of late blocks the states tell answers apart and no
longer values; there an edit leads from answer to answer (`ground.choose_labels`).

**What is held out.** The sentences of a concept are split in halves, those that begin alike up to the value
together. One half teaches: class means, manifold, metric, labels, gates. The other half is edited, and
judges.

**The edits.** To a value: the mean difference added (`LinearSteer`); the same and then projected back, with
and without what the state holds besides; `TangentSteer` in its direction, in one step and in eight;
`GeodesicSteer` to the value's mean, with and without the rest, and in the metric that the answers pull back.
A reused step, measured between two other values: added; `TangentSteer`; `GeodesicSteer` along its tangent
part; and the geodesic of that step carried along the manifold to where the state stands. Each over a sweep
of scales from a fifth of the step to beyond twice. Each also with two gates, which leave states alone that
the learned sentences say nothing of: the manifold's own (`outside="leave"`), and "as near as some learned
sentence". A straight edit gets the same gates, so that knowing *where* the manifold is and following it can
be told apart.

**Success.** The likeliest next token begins the target's answer. Only sentences count that are answered
right unedited with both values.

**Distance off the manifold.** Never from the fit that an edit used: from the curve or sheet through the
states that the model leaves in *that very sentence* under every value (`reference.SentenceManifold`), over
the distance that a real state has from the manifold through the others of its sentence (`off`; cycles,
lines, grid). And from the nearest real state of the judging half, over what real ones have (`near`; all
concepts).

**Disturbance.** The same edit at the same token of a prompt of another concept, drawn once for each pair and
the same for all edits and scales: KL(unedited ‖ edited) of the next token in nats, mean and median, and
whether the likeliest token changes.

**Equal success.** `equal_success`: for two edits in one cell (model, concept, site) the highest share of
successes that both reach; the least scale of each that reaches it, by straight lines between measured
scales; the costs there. Since the least scale need not be the nearest to the manifold, the least distance at
*at least* that success is reported beside it. Over cells the median of the ratio; the interval from a
bootstrap over concepts and, within cells, pairs. How many cells count is said, since edits that never
succeed cannot be compared.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np

import geoedit
from experiments.curvature_predicts_editing.compared import (
    GATED,
    ComparedCell,
    Left,
    Result,
    Settings,
    summarise,
)
from experiments.curvature_predicts_editing.comparison_figures import figures
from experiments.curvature_predicts_editing.comparison_page import section
from experiments.curvature_predicts_editing.equal_success import Sweep
from experiments.curvature_predicts_editing.ground import Ground, survey
from experiments.curvature_predicts_editing.laboratory import Laboratory
from experiments.curvature_predicts_editing.measure import gated, gates, only, sweep
from experiments.curvature_predicts_editing.moves import BASELINES, METHODS, STEP
from experiments.curvature_predicts_editing.sentences import Sentences
from geoedit.errors import EditError
from geoedit.shapes import PATHS
from geoedit.site import Site
from manifolds.errors import ManifoldError

log = logging.getLogger(__name__)
__all__ = ["Result", "Settings", "figures", "run", "section"]


def run(settings: Settings | None = None) -> Result:
    """Make every edit at every scale in every cell, and compare them at equal success."""
    settings = settings or Settings()
    started = time.perf_counter()
    cells: list[ComparedCell] = []
    left: list[Left] = []
    for name in settings.models:
        model, tokenizer, world = geoedit.testbeds.load(name)
        concepts = [world.concepts[concept] for concept in settings.concepts]
        laboratory = Laboratory.of(
            name, model, tokenizer, concepts, list(world.concepts.values()), each=24, seed=settings.seed
        )
        for concept in settings.concepts:
            sentences = Sentences.of(laboratory, world.concepts[concept], settings.seed)
            curve = sentences.concept.kind in PATHS
            pairs = sentences.draw_pairs(
                settings.pairs if curve else settings.costly_pairs,
                control_prompts(laboratory, concept, settings.seed),
                settings.seed,
            )
            most = settings.sites if curve else settings.costly_sites
            carried = {
                site: laboratory.carried(site, sentences.rows[pairs.source], sentences.rows[pairs.target])
                for site in laboratory.places
            }
            for site in spread([s for s in carried if carried[s] >= settings.carried], most):
                ground = survey(laboratory, sentences, pairs, site, metric=settings.metric)
                if isinstance(ground, str):
                    left.append(Left(name, concept, str(site), ground))
                    continue
                cells.append(compare(ground, settings, carried[site]))
                log.info("%s %s %s: %.0f s", name, concept, site, time.perf_counter() - started)
    lines = summarise(cells, settings)
    return Result(settings, tuple(cells), tuple(left), lines, time.perf_counter() - started)


def compare(ground: Ground, settings: Settings, carried: float) -> ComparedCell:
    """Run every edit at one site."""
    sweeps: dict[str, Sweep] = {}
    impossible: dict[str, str] = {}
    not_finite: dict[str, int] = {}
    reusable = ground.pairs.start >= 0
    tasks = {
        family: (ground.task(family == STEP, False), ground.task(family == STEP, True))
        for family in BASELINES
    }
    for method in METHODS:
        if (method.metric and ground.metric is None) or (method.family == STEP and not reusable.any()):
            continue
        try:
            found, broken = sweep(ground, method, tasks[method.family], settings.scales)
        except (EditError, ManifoldError) as error:
            impossible[method.name] = str(error)
            continue
        if broken:
            not_finite[method.name] = broken
        every = {method.name: found}
        if method.name in GATED:
            every |= {f"{method.name} [{gate.name}]": gated(found, gate) for gate in gates(ground)}
        if method.family == STEP:
            every = {name: only(part, reusable) for name, part in every.items()}
        sweeps |= every
    manifold = ground.manifold
    return ComparedCell(
        model=ground.laboratory.name,
        concept=ground.sentences.concept.name,
        kind=ground.sentences.concept.kind,
        site=ground.site,
        labels=ground.labels,
        carried=carried,
        manifold={
            "kind": manifold.kind,
            "dimension": manifold.dim,
            "closed": getattr(manifold, "closed", None),
            "noise": manifold.noise,
            "reach": manifold.reach,
            "widest": ground.widest,
            "vector": float(ground.task(False, False).vector.norm(dim=1).median()),
        },
        inside={
            gate.name: (float(gate.sources.mean()), float(gate.controls.mean())) for gate in gates(ground)
        },
        units={"off": ground.off_unit, "near": ground.near_unit},
        sweeps=sweeps,
        impossible=impossible,
        not_finite=not_finite,
    )


def control_prompts(laboratory: Laboratory, concept: str, seed: int) -> np.ndarray:
    """Prompts of all other concepts that are answered right, as many of each as the fewest have."""
    generator = np.random.default_rng(seed)
    right = laboratory.right
    others = [rows[right[rows]] for name, rows in laboratory.rows.items() if name != concept]
    others = [rows for rows in others if len(rows)]
    each = min(map(len, others))
    return np.concatenate([generator.choice(rows, each, replace=False) for rows in others])


def spread(sites: Sequence[Site], most: int) -> list[Site]:
    """At most so many of the sites, evenly from the first to the last."""
    if len(sites) <= most:
        return list(sites)
    return [sites[place] for place in np.linspace(0, len(sites) - 1, most).round().astype(int)]
