"""How far off the concept's manifold an edit leaves the state, expected before it is made.

Near a point of the manifold, in coordinates (x, y) of its tangent and normal space, the manifold is the graph
y = ½ II(x, x) + O(x³). Everything follows from that, to second order:

- **A tangent vector v** at scale t, from the point itself, ends at (t v, 0), over (t v, ½ t² II(v, v)): it is
  off by ½ t² ‖II(v, v)‖. Taken at a point that lies away by s in the direction u, it starts at
  (s u, ½ s² II(u, u)) and the manifold at its end is ½ II(s u + t v, s u + t v) high: off by
  ‖t s II(u, v) + ½ t² II(v, v)‖.
- **A chord**, as the difference of two class means is, ends on the manifold: it is (v, ½ II(v, v)), with a
  height of its own. At scale t, from its own start, it reaches the height ½ t II(v, v), and the manifold is
  ½ t² II(v, v) high there: off by ½ |t (t − 1)| ‖II(v, v)‖, nothing at t = 1. Reused at a point away by s u:
  ‖t s II(u, v) + ½ t (t − 1) II(v, v)‖.

All edits of a diagnosis are chords. Where an edit goes far against the radius of curvature, the expansion
says too much; the distance from the learned manifold itself, `departures`, holds there as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.diagnosis.bends import Bends
from geoedit.diagnosis.geometry import Shape
from geoedit.diagnosis.predict import Edits, Rows, shifts
from manifolds.cloud.learned import LearnedManifold

CHUNK = 128
NEAR = 6
"""How many rows make the metric of an edit's way."""
FLOOR = 1e-2
"""The share of the farthest state's squared distance that no state is nearer than, as weights go."""
RESOLVED = 1e-3
"""The share of the spread of the class means below which noise is taken for none."""


def tangent_departure(
    scale: Float[Tensor, " edits"],
    bend: Float[Tensor, "edits q"],
    turned: Float[Tensor, "edits q"] | float = 0.0,
) -> Float[Tensor, " edits"]:
    """Return ‖t s II(u, v) + ½ t² II(v, v)‖, for tangent vectors v at scale t.

    Args:
        scale: t.
        bend: II(v, v).
        turned: s II(u, v), for a vector that is used away by s in the direction u from where it was taken.
    """
    return torch.linalg.vector_norm(scale[:, None] * (turned + scale[:, None] / 2 * bend), dim=1)


def chord_departure(
    scale: Float[Tensor, " edits"],
    bend: Float[Tensor, "edits q"],
    turned: Float[Tensor, "edits q"] | float = 0.0,
) -> Float[Tensor, " edits"]:
    """Return ‖t s II(u, v) + ½ t (t − 1) II(v, v)‖, for vectors v from one point of the manifold to another.

    Args:
        scale: t.
        bend: II(v, v).
        turned: s II(u, v), for a vector that is used away by s in the direction u from where it was taken.
    """
    return torch.linalg.vector_norm(scale[:, None] * (turned + (scale[:, None] - 1) / 2 * bend), dim=1)


def expected_distance(bends: Bends, edits: Edits, rows: Rows) -> Float[Tensor, " edits"]:
    """Return how far off the manifold each edit ends, by the second fundamental form alone.

    The form is taken at each of the values that the edit involves (its source and target, and the two that
    its vector is made of), and the mean of what it says is returned; NaN where it is known at none.

    Args:
        bends: of the manifold at the values.
        edits: what is to be judged.
        rows: which value each prompt holds.
    """
    source, target = rows.value[edits.source], rows.value[edits.target]
    start, end = edits.from_value, edits.to_value
    scale = edits.scale.to(bends.coefficients)
    total, counted = torch.zeros_like(scale), torch.zeros_like(scale)
    for at in (start, end, source, target):
        vector = bends.steps(at, start, end)
        bend = bends.form(at, vector, vector)
        turned = bends.form(at, bends.steps(at, start, source), vector)
        known = bends.known[at]
        total = total + torch.where(known, chord_departure(scale, bend, turned), 0.0)
        counted = counted + known
    return torch.where(counted > 0, total / counted.clamp_min(1), torch.nan)


def off_columns(
    shape: Shape,
    factor: Float[Tensor, "rows rank width"] | None,
    states: Float[Tensor, "rows width"],
    means: Float[Tensor, "values width"],
    rows: Rows,
    edits: Edits,
) -> dict[str, Float[Tensor, " edits"]]:
    """Return for each edit how far off the concept's manifold it ends; NaN where that is not known.

    Columns: off_manifold, by the second fundamental form, where it is reliable; off_distance, by projection
    on the learned manifold; off_relative, the latter over the manifold's noise (at least a thousandth of the
    spread of the class means, where states hardly vary within a class); off_visible, its part that the rest
    of the network sees, in the units of the metric.

    Args:
        shape: of the concept at the site.
        factor: of the pulled-back metric at every row; None: unknown.
        states: of every row.
        means: of the values.
        rows: what the prompts are.
        edits: what is to be judged.
    """
    empty = torch.full((len(edits.source),), torch.nan, dtype=states.dtype, device=states.device)
    columns = dict.fromkeys(("off_manifold", "off_distance", "off_relative", "off_visible"), empty)
    manifold = shape.concept.manifold
    if manifold is None:
        return columns
    columns["off_manifold"] = expected_distance(shape.bends, edits, rows).to(states.dtype)
    found = departures(manifold, means, shape.places, edits, rows)
    columns["off_distance"] = found.distance
    size = float((means - means.mean(0)).square().sum(1).mean().sqrt())
    columns["off_relative"] = found.distance / max(manifold.noise, RESOLVED * size)
    if factor is not None:
        columns["off_visible"] = visible_part(found, factor, states, shifts(means, edits), edits, rows)
    return columns


@dataclass(frozen=True)
class Departures:
    """Where edits leave the manifold: the vector from the foot of each distinct edited mean, and its length.

    Attributes:
        off: from the foot on the manifold to the edited state.
        which: for each edit, its row in `off`.
    """

    off: Float[Tensor, "some width"]
    which: Int[Tensor, " edits"]

    @property
    def distance(self) -> Float[Tensor, " edits"]:
        """How far off the manifold each edit ends."""
        return torch.linalg.vector_norm(self.off, dim=1)[self.which]


def departures(
    manifold: LearnedManifold,
    means: Float[Tensor, "values width"],
    places: Float[Tensor, "values width"],
    edits: Edits,
    rows: Rows,
) -> Departures:
    """Project the edited class means on the learned manifold: no expansion, and no model is run.

    The mean of the source's value is put on the manifold, the vector added, and the result projected. What a
    state holds besides its value moves along and is left out.

    Args:
        manifold: of the concept at the site.
        means: of the values, whose differences are added.
        places: of the values on the manifold, where the edits start.
        edits: what is to be judged.
        rows: which value each prompt holds.
    """
    keys = torch.stack(
        [
            rows.value[edits.source].double(),
            edits.from_value.double(),
            edits.to_value.double(),
            edits.scale.double(),
        ],
        1,
    )
    distinct, which = keys.unique(dim=0, return_inverse=True)
    source, start, end = distinct[:, :3].long().unbind(1)
    feet = manifold.projx(places)
    moved = feet[source] + distinct[:, 3:].to(means) * (means[end] - means[start])
    found = [part - manifold.projx(part) for part in moved.split(CHUNK)]
    return Departures(torch.cat(found), which)


def visible_part(
    found: Departures,
    factor: Float[Tensor, "rows rank width"],
    states: Float[Tensor, "rows width"],
    shift: Float[Tensor, "edits width"],
    edits: Edits,
    rows: Rows,
) -> Float[Tensor, " edits"]:
    """Return how much of the departure the rest of the network sees: its length in a pulled-back metric.

    `sqrt(sum_w a_w |F_w n|²)`, n the vector off the manifold and F_w the factors of the metric at the rows of
    the same sentence that lie nearest to the way of the edit, the segment from x to x + v, weighed by the
    inverse squares of their distances from it: the metric of the whole way, for at its start alone it may be
    blind.

    Args:
        found: from `departures`.
        factor: of the metric at every row.
        states: of every row.
        shift: the vector v of each edit.
        edits: what is to be judged.
        rows: which sentence each prompt is.
    """
    seen = torch.full((len(shift),), torch.nan, dtype=states.dtype, device=states.device)
    sentence = rows.template[edits.source]
    for template in sentence.unique():
        inside = (rows.template == template).nonzero()[:, 0]
        for some in (sentence == template).nonzero()[:, 0].split(CHUNK):
            start, way = states[edits.source[some]], shift[some]
            weights, near = _nearness(start, way, states[inside]).topk(min(NEAR, len(inside)), dim=1)
            weights = weights / weights.sum(1, keepdim=True)
            off = found.off[found.which[some]]
            power = torch.stack(
                [
                    torch.einsum("ekw,ew->ek", factor[inside[row]], off).square().sum(1)
                    for row in near.unbind(1)
                ],
                1,
            )
            seen[some] = (weights * power).sum(1).sqrt()
    return seen


def _nearness(
    start: Float[Tensor, "edits width"],
    way: Float[Tensor, "edits width"],
    states: Float[Tensor, "rows width"],
) -> Float[Tensor, "edits rows"]:
    """Weights of states by the inverse squares of their distances from the segments start + [0, 1] way."""
    length = way.square().sum(1, keepdim=True)
    along = way @ states.mT - (way * start).sum(1, keepdim=True)
    share = (along / torch.where(length > 0, length, 1.0)).clamp(0, 1)
    squared = torch.cdist(start, states).square() - 2 * share * along + share.square() * length
    scale = torch.maximum(squared.amax(1, keepdim=True), length).clamp_min(torch.finfo(states.dtype).eps ** 2)
    return 1 / (squared.clamp_min(0) + FLOOR * scale)
