"""What one slider writes with what another reads: whose effect is it?"""

from __future__ import annotations

import logging
from itertools import permutations
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from experiments.slider_composition.composing import NAMES
from experiments.slider_composition.lab import Lab, mean
from geoedit.algebra import cross
from geoedit.algebra.crossing import balanced
from geoedit.errors import EditError
from geoedit.sliders.slider import ModuleChange, Slider
from manifolds import LowRank

log = logging.getLogger(__name__)


def crossings(lab: Lab) -> list[dict[str, Any]]:
    """Every ordered pair in each gauge and in a random one, beside what both do alone."""
    s = lab.settings.scale
    labels, twin = lab.settings.labels, lab.settings.twin[0]
    pairs = [*permutations(labels, 2), (twin, "twin"), ("twin", twin)]
    generator = torch.Generator().manual_seed(lab.settings.seed)
    made: dict[str, Slider] = dict(lab.sliders)
    told: list[tuple[str, str, str]] = []
    for a, b in pairs:
        one, other = lab.sliders[a], lab.sliders[b]
        for gauge, slider in (
            ("nearest", _crossed(one, other, "nearest")),
            ("spectrum", _crossed(one, other, "spectrum")),
            ("random", _random(one, other, generator)),
        ):
            if slider is None:
                continue
            made[f"{a} × {b}, {gauge}"] = slider
            told.append((a, b, gauge))
    rows = [{label: at} for label in made for at in (-s, s)]
    changes, residuals = lab.effects(made, rows)
    ends = {label: changes[2 * i + 1] - changes[2 * i] for i, label in enumerate(made)}
    off = {label: float(mean(residuals[2 * i : 2 * i + 2])) for i, label in enumerate(made)}
    records = []
    for a, b, gauge in told:
        key = f"{a} × {b}, {gauge}"
        effect, left, right = (mean(ends[label], 0) for label in (key, a, b))
        written = NAMES.index(twin if a == "twin" else a)
        read = NAMES.index(twin if b == "twin" else b)
        records.append(
            {
                "writes": a,
                "reads": b,
                "gauge": gauge,
                "like_left": _cosine(effect, left),
                "like_right": _cosine(effect, right),
                "size": _size(effect) / _size(left) if _size(left) else float("nan"),
                "of_left": float(effect[written] / left[written]),
                "of_right": float(effect[read] / right[read]),
                "steady": _steady(ends[key], max(written, 0), left[written]),
                "residual": off[key],
                "effects": dict(zip(NAMES, map(float, effect), strict=True)),
            }
        )
    return records


def _crossed(one: Slider, other: Slider, gauge: Literal["nearest", "spectrum"]) -> Slider | None:
    """A crossing; None where the gauge is undefined, because some factors of the two do not overlap."""
    try:
        return cross(one, other, gauge=gauge)
    except EditError as undefined:
        log.info("%s × %s, %s: left out: %s", one.name, other.name, gauge, undefined)
        return None


def _random(a: Slider, b: Slider, generator: torch.Generator) -> Slider:
    """The same balanced factors joined by a random rotation."""
    changes: dict[str, dict[str, ModuleChange]] = {}
    for component, path, change in a:
        other = b.changes[component][path].matrix
        left, right = balanced(change.matrix)[0], balanced(other)[1]
        draw = torch.randn(left.shape[1], right.shape[0], generator=generator).to(left)
        u, _, v = torch.linalg.svd(draw, full_matrices=False)
        joined = LowRank(left @ (u @ v), right).to(change.matrix.dtype)
        changes.setdefault(component, {})[path] = ModuleChange(joined, change.kernel)
    return Slider(f"{a.name} × {b.name}, random", changes)


def _cosine(one: Float[np.ndarray, " n"], other: Float[np.ndarray, " n"]) -> float:
    known = np.isfinite(one) & np.isfinite(other)
    sizes = np.linalg.norm(one[known]) * np.linalg.norm(other[known])
    return float(one[known] @ other[known] / sizes) if sizes else float("nan")


def _size(effect: Float[np.ndarray, " n"]) -> float:
    return float(np.linalg.norm(effect[np.isfinite(effect)]))


def _steady(ends: Float[np.ndarray, "images n"], place: int, own: float) -> float:
    """The share of images in which the attribute of what is written moves the slider's own way."""
    known = ends[:, place][np.isfinite(ends[:, place])]
    return float(np.mean(np.sign(known) == np.sign(own))) if len(known) else float("nan")
