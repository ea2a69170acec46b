"""The rows of one sentence at one site, and the paths that straight edits take between them.

Row w is the state x_w that a value leaves, with outputs f_w and their Jacobian J_w. An edit of row a by v
walks along x(t) = x_a + t v. Distances are plain, or in the metric `g_w = J_w^T C J_w / k` that the rest of
the network pulls back to the site (C: the centring over the answers).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

EXACT = "donot_use_mm_for_euclid_dist"
STEPS = 8
"""The path of an edit is looked at in so many steps."""


class Sentence:
    """The rows of one sentence, and what every pair of them says about the network between them.

    Attributes:
        states: x_w, less their mean, which is `centre`. jacobians: J_w.
        group: rows of one group give the same answer.
        outputs: f_w, or None where there are no answers.
        there: `J_w (x_a - x_w)` for all a, w. images: `J_v` on the states. home: `J_w` on the centre.
        squared: `|x_a - x_w|^2` in the metric at w.
        fisher: distance of every two rows, in the mean of both metrics. plain: the plain one.
        share: see `FEATURES`; 0 where no two rows differ.
        typical_fisher, typical_plain: median distance from a row to the nearest of another group.
        detour_fisher, detour_plain: see `FEATURES`, for every two rows.
    """

    def __init__(
        self,
        states: Float[Tensor, "rows width"],
        jacobians: Float[Tensor, "rows k width"],
        group: Int[Tensor, " rows"],
        outputs: Float[Tensor, "rows k"] | None = None,
    ) -> None:
        self.centre = states.mean(0)
        self.states = states - self.centre
        self.jacobians, self.group, self.outputs = jacobians, group, outputs
        self.images = torch.einsum("vkd,wd->vwk", jacobians, self.states)
        self.home = jacobians @ self.centre
        own = self.images.diagonal().T
        self.there = self.images.transpose(0, 1) - own[None]
        self.squared = self.norm(self.there).square()
        self.fisher = ((self.squared + self.squared.T) / 2).sqrt()
        self.plain = torch.cdist(self.states, self.states, compute_mode=EXACT)
        other = group[:, None] != group[None, :]
        self.typical_fisher = typical(self.fisher, other)
        self.typical_plain = typical(self.plain, other)
        self.detour_fisher = ratio(shortest_ways(self.fisher), self.fisher)
        self.detour_plain = ratio(shortest_ways(self.plain), self.plain)
        self.share = states.new_zeros(())
        if outputs is not None:
            self.change = outputs[None] - outputs[:, None]
            self.differ = self.norm(self.change)
            compared = other & (self.differ > 0)
            if bool(compared.any()):
                self.share = (self.fisher[compared] / self.differ[compared]).clamp(max=1).median()

    def seen(self, outputs: Float[Tensor, "*many k"]) -> Float[Tensor, "*many r"]:
        """The part of a change of the outputs that the metric sees, scaled so that its norm is the length."""
        if self.outputs is None:
            return outputs / outputs.shape[-1] ** 0.5
        answers = outputs[..., :-1]
        return (answers - answers.mean(-1, keepdim=True)) / answers.shape[-1] ** 0.5

    def norm(self, outputs: Float[Tensor, "*many k"]) -> Float[Tensor, "*many"]:
        """Length of a change of the outputs."""
        return self.seen(outputs).square().sum(-1).sqrt()


@dataclass(frozen=True)
class Paths:
    """Some edits of one sentence, and how far the points of their paths are from its rows.

    Attributes:
        source: the row that is edited. target: the row hoped for. shift: v.
        response: `J_w v` for every row w.
        ends: `|x_a + t v - x_w|^2` as a polynomial in t (three coefficients), in the ends' mean metric.
        rows: the same with each row in its own metric.
        plain: plain distance from the landing point to every row.
    """

    source: Int[Tensor, " edits"]
    target: Int[Tensor, " edits"]
    shift: Float[Tensor, "edits width"]
    response: Float[Tensor, "edits rows k"]
    ends: tuple[Tensor, Tensor, Tensor]
    rows: tuple[Tensor, Tensor, Tensor]
    plain: Float[Tensor, "edits rows"]

    @classmethod
    def of(
        cls,
        sentence: Sentence,
        source: Int[Tensor, " edits"],
        target: Int[Tensor, " edits"],
        shift: Float[Tensor, "edits width"],
    ) -> Paths:
        """Measure the paths of edits, given by their rows within the sentence and their vectors."""
        response = torch.einsum("vkd,ed->evk", sentence.jacobians, shift)
        return cls._measured(sentence, source, target, shift, response)

    def on_sphere(self, sentence: Sentence) -> Paths:
        """The same edits with the landing point scaled to the mean norm of source and target.

        The norm layers of a network read a state's direction, so that a state pushed far out is much like the
        one on the sphere below it: `y |x| / |y|`.
        """
        start = sentence.states[self.source] + sentence.centre
        landed, end = start + self.shift, sentence.states[self.target] + sentence.centre
        factor = ratio((start.norm(dim=1) + end.norm(dim=1)) / 2, landed.norm(dim=1)).nan_to_num(1.0)
        own = sentence.images[:, self.source].transpose(0, 1) + sentence.home
        response = factor[:, None, None] * (own + self.response) - own
        shift = factor[:, None] * landed - start
        return self._measured(sentence, self.source, self.target, shift, response)

    @classmethod
    def _measured(
        cls, sentence: Sentence, source: Tensor, target: Tensor, shift: Tensor, response: Tensor
    ) -> Paths:
        seen = sentence.seen(response)
        there = sentence.seen(sentence.there[source])
        rows = (
            sentence.squared[source],
            2 * (there * seen).sum(-1),
            seen.square().sum(-1),
        )
        ends = [torch.zeros_like(rows[0]) for _ in range(3)]
        every = torch.arange(len(source), device=source.device)
        for end in (source, target):
            image = sentence.images[end]
            away = sentence.seen(image[every, source][:, None] - image)
            moved = seen[every, end][:, None]
            ends[0] = ends[0] + away.square().sum(-1) / 2
            ends[1] = ends[1] + (away * moved).sum(-1)
            ends[2] = ends[2] + moved.square().sum(-1) / 2
        landed = sentence.states[source] + shift
        plain = torch.cdist(landed, sentence.states, compute_mode=EXACT)
        return cls(source, target, shift, response, (ends[0], ends[1], ends[2]), rows, plain)

    def distances(self, t: float, own: bool = False) -> Float[Tensor, "edits rows"]:
        """Distance from x(t) to every row, in the ends' mean metric or in each row's own."""
        constant, linear, square = self.rows if own else self.ends
        return (constant + t * linear + t * t * square).clamp_min(0).sqrt()

    def of_rows(self, table: Float[Tensor, "rows rows"]) -> Float[Tensor, " edits"]:
        """The entry of source and target in a table of all pairs of rows."""
        return table[self.source, self.target]

    def response_at(self, row: Int[Tensor, " edits"]) -> Float[Tensor, "edits k"]:
        """`J v` with the Jacobian of one row for each edit."""
        return self.response[torch.arange(len(row), device=row.device), row]


def weights(distances: Float[Tensor, "*many rows"], power: int = 2) -> Float[Tensor, "*many rows"]:
    """Return weights by inverse powers of distances, with sum one; a row that is met has nearly all."""
    longest = distances.amax(-1, keepdim=True)
    relative = distances / torch.where(longest > 0, longest, torch.ones_like(longest))
    inverse = 1 / (relative**power + 1e-3**power)
    return inverse / inverse.sum(-1, keepdim=True)


def entry(table: Float[Tensor, "edits rows k"], row: Int[Tensor, " edits"]) -> Float[Tensor, "edits k"]:
    """Pick one row's entry for each edit."""
    return table[torch.arange(len(row), device=row.device), row]


def shortest_ways(distances: Float[Tensor, "rows rows"]) -> Float[Tensor, "rows rows"]:
    """Return lengths of the shortest ways between points, by steps no longer than joining them all needs.

    The longest step allowed is the longest edge of the minimum spanning tree, so that there is no number of
    neighbours to choose. Where the points lie along a curve, this is its arc; where they are all alike far
    from each other, it is the straight distance. Floyd's algorithm, cubic in the points.
    """
    widest = distances.clone()
    for middle in range(len(distances)):
        step = torch.maximum(widest[:, middle, None], widest[middle, None, :])
        widest = torch.minimum(widest, step)
    longest = widest.max() * (1 + 1e-5) if len(distances) else distances.new_zeros(())
    ways = torch.where(distances <= longest, distances, torch.inf)
    for middle in range(len(distances)):
        ways = torch.minimum(ways, ways[:, middle, None] + ways[middle, None, :])
    return ways


def typical(distances: Float[Tensor, "rows rows"], other: Bool[Tensor, "rows rows"]) -> Float[Tensor, ""]:
    """Return the median distance from a point to the nearest of its others; NaN where none has any."""
    nearest = torch.where(other, distances, torch.inf).amin(1)
    nearest = nearest[torch.isfinite(nearest)]
    return nearest.median() if len(nearest) else distances.new_full((), torch.nan)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """The quotient; NaN where the divisor is zero or so small that the quotient is not finite."""
    found = above / torch.where(below == 0, torch.nan, below)
    return torch.where(torch.isfinite(found), found, torch.nan)
