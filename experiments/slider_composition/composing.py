"""Two, three and five sliders at once: is the effect of the sum the sum of the effects?"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np

from experiments.slider_composition.lab import Lab, mean
from geoedit.algebra import Interference, compose, interference
from geoedit.errors import EditError
from geoedit.sliders.slider import Slider
from geoedit.testbeds.shapes.world import ATTRIBUTES

log = logging.getLogger(__name__)
NAMES = tuple(ATTRIBUTES)


def alone(lab: Lab) -> list[dict[str, Any]]:
    """Each slider by itself: what it moves of every attribute from −scale to scale."""
    s = lab.settings.scale
    labels = list(lab.sliders)
    changes, residuals = lab.effects(lab.sliders, [{label: at} for label in labels for at in (-s, s)])
    records = []
    for place, label in enumerate(labels):
        attribute = lab.settings.twin[0] if label == "twin" else label
        low, high = changes[2 * place], changes[2 * place + 1]
        ends = mean(high - low, 0)
        own = NAMES.index(attribute)
        records.append(
            {
                "slider": label,
                "attribute": attribute,
                "range": float(ends[own]),
                "both_ends_right": float(np.mean((high[:, own] > 0) & (low[:, own] < 0))),
                "effects": dict(zip(NAMES, map(float, ends), strict=True)),
                "residual": float(mean(residuals[2 * place : 2 * place + 2])),
            }
        )
    return records


def groups(lab: Lab) -> list[dict[str, float]]:
    """Every pair with equal and with opposite signs, triples and all together."""
    labels, s = lab.settings.labels, lab.settings.scale
    found = [{a: s, b: sign * s} for a, b in combinations(labels, 2) for sign in (1, -1)]
    signs = ((1, 1, 1), (1, -1, 1), (-1, 1, 1))
    for number, members in enumerate(combinations(labels, 3)):
        found.append({m: sign * s for m, sign in zip(members, signs[number % 3], strict=True)})
    if len(labels) > 3:
        found.append(dict.fromkeys(labels, s))
        found.append({label: s * (-1) ** place for place, label in enumerate(labels)})
    return found


def composed(lab: Lab, first_order: Interference) -> list[dict[str, Any]]:
    """All groups by all methods; a record for each."""
    sliders = {label: lab.sliders[label] for label in lab.settings.labels}
    s = lab.settings.scale
    single, _ = lab.effects(sliders, [{label: at} for label in sliders for at in (-s, s)])
    each = {
        (label, at): single[2 * place + (at > 0)] for place, label in enumerate(sliders) for at in (-s, s)
    }
    ranges = {
        label: abs(float(mean(each[label, s] - each[label, -s], 0)[NAMES.index(label)])) for label in sliders
    }
    members = groups(lab)
    made: dict[str, Slider] = {}
    rows: list[dict[str, float]] = []
    told: list[tuple[str, dict[str, float]]] = []
    for number, group in enumerate(members):
        for method, slider in _made(lab, sliders, group, first_order).items():
            made[f"{number} {method}"] = slider
            rows.append({f"{number} {method}": 1.0})
            told.append((method, group))
    changes, residuals = lab.effects(made, rows)
    records = []
    for (method, group), change, residual in zip(told, changes, residuals, strict=True):
        places = [NAMES.index(label) for label in group]
        apart = sum(each[label, at] for label, at in group.items())
        own = np.stack(
            [each[label, at][:, place] for (label, at), place in zip(group.items(), places, strict=True)], -1
        )
        scale = np.array([ranges[label] for label in group])
        together = change[:, places]
        records.append(
            {
                "sliders": group,
                "size": len(group),
                "method": method,
                "additivity": float(mean(np.abs(together - apart[:, places]) / scale)),
                "additivity_of_means": float(np.mean(np.abs(mean(together - apart[:, places], 0)) / scale)),
                "from_own": float(mean(np.abs(together - own) / scale)),
                "from_own_of_means": float(np.mean(np.abs(mean(together - own, 0)) / scale)),
                "all_right": float(np.mean((np.sign(together) == np.sign(list(group.values()))).all(-1))),
                "residual": float(mean(residual)),
                "not_read": float(np.mean(np.isnan(change).any(-1))),
            }
        )
    return records


def _made(
    lab: Lab, sliders: Mapping[str, Slider], group: Mapping[str, float], first_order: Interference
) -> dict[str, Slider]:
    """The group's composition by each method that is defined for it."""
    terms = [sliders[label] @ at for label, at in group.items()]
    made = {
        "exact": compose(terms),
        "truncate": compose(terms, method="truncate", rank=lab.settings.rank),
    }
    try:
        made["orthogonalise"] = compose(terms, method="orthogonalise")
    except EditError as error:  # a module too narrow for all of them
        log.info("%s", error)
    labels = list(group)
    part = Interference(
        {label: sliders[label] for label in labels},
        first_order.matrix.loc[labels],
        first_order.error.loc[labels],
        {label: label for label in labels},
        dict.fromkeys(labels, 1),
        first_order.step,
    )
    try:
        apart = part.decouple()
    except EditError:  # sliders that move nothing yet, or the same: there is nothing to take apart
        return made
    return {**made, "decoupled": compose([apart[label] @ at for label, at in group.items()])}


def first_order(lab: Lab) -> Interference:
    """The interference matrix of the sliders, near scale 0."""
    known = lab.settings
    return interference(
        lab.pipe,
        {label: lab.sliders[label] for label in known.labels},
        prompts=known.prompts,
        seeds=known.seeds,
        step=known.step,
        attributes={label: label for label in known.labels},
        steps=known.sampling_steps,
        guidance=known.guidance,
        batch_size=known.rows,
        cache=lab.cache,
    )
