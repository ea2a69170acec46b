"""Which edits are judged: pairs of values, in which sentence, by which vector; a seeded draw of too many."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geoedit.concept import Concept, Prompt
from geoedit.errors import EditError

MEAN_DIFFERENCE = "mean difference"
REUSED_VECTOR = "reused vector"


@dataclass(frozen=True)
class PlannedEdit:
    """One edit: the sentence at row `source` is to be read as if it held the value of row `target`.

    The vector is `scale * (mean of value `to_value` - mean of value `from_value`)`, values by their place in
    the concept. For a mean difference these are the values of source and target themselves.
    """

    kind: str
    source: int
    target: int
    from_value: int
    to_value: int
    scale: float


@dataclass(frozen=True)
class Plan:
    """The edits to judge, the same at every site, and how many there would have been."""

    edits: tuple[PlannedEdit, ...]
    possible: int


def plan_edits(
    concept: Concept,
    prompts: Sequence[Prompt],
    groups: Sequence[int],
    *,
    scales: Sequence[float],
    max_edits: int,
    seed: int,
) -> Plan:
    """List the edits between every two values in every sentence; of more than `max_edits`, draw.

    Args:
        concept: its kind says where a step can be reused: anywhere on a cycle, inside a line, on a grid or
            map where two points lie the same way from each other. Categories have no steps.
        prompts: all rows.
        groups: for each row the number of its answer (or of its value); two rows of one group are never
            paired, since nothing would have to change. Negative: the row takes no part.
        scales: every edit is judged at each of these.
        max_edits: how many edits to keep, shared between the kinds of edit; each kind keeps its seeded draw.
        seed: for the parallel pairs and the draws.

    Raises:
        EditError: no two rows of any template differ in their group.
    """
    generator = np.random.default_rng(seed)
    value = [concept.index(prompt.value) for prompt in prompts]
    differences: list[PlannedEdit] = []
    reused: list[PlannedEdit] = []
    steps = _Steps(concept)
    for rows in _frames(prompts):
        targets = _first_rows(rows, value)
        for source, target in itertools.product(rows, targets):
            if groups[source] < 0 or groups[target] < 0 or groups[source] == groups[target]:
                continue
            a, b = value[source], value[target]
            if a == b:
                continue
            parallel = steps.parallel(a, b)
            for scale in scales:
                differences.append(PlannedEdit(MEAN_DIFFERENCE, source, target, a, b, scale))
                if parallel:
                    c, d = parallel[int(generator.integers(len(parallel)))]
                    reused.append(PlannedEdit(REUSED_VECTOR, source, target, c, d, scale))
    if not differences:
        raise EditError(
            f"concept {concept.name!r}: no template has two values with different answers, so that there is "
            "nothing to edit; give at least two values, and answers that differ."
        )
    kinds = [edits for edits in (differences, reused) if edits]
    share = max(1, max_edits // len(kinds))
    kept = [edit for edits in kinds for edit in _draw(edits, value, share, generator)]
    return Plan(tuple(kept), sum(len(edits) for edits in kinds))


class _Steps:
    """Pairs of values that lie to one another as a given pair does."""

    def __init__(self, concept: Concept) -> None:
        self.count = len(concept.values)
        self.kind = concept.kind
        self.known: dict[tuple[int, int], list[tuple[int, int]]] = {}
        self.places: dict[tuple[float, ...], int] = {}
        if concept.coordinates is not None:
            self.points = [tuple(float(x) for x in point) for point in concept.coordinates]
            self.places = {point: number for number, point in enumerate(self.points)}

    def parallel(self, a: int, b: int) -> list[tuple[int, int]]:
        """The pairs that lie as a and b do, looked for once whatever the number of sentences."""
        if (a, b) not in self.known:
            self.known[a, b] = self._parallel(a, b)
        return self.known[a, b]

    def _parallel(self, a: int, b: int) -> list[tuple[int, int]]:
        if self.kind == "cycle":
            return [((a + o) % self.count, (b + o) % self.count) for o in range(1, self.count)]
        if self.kind == "line":
            low, high = min(a, b), max(a, b)
            return [(a + o, b + o) for o in range(-low, self.count - high) if o]
        if self.places:
            step = [y - x for x, y in zip(self.points[a], self.points[b], strict=True)]
            ends = (
                (c, self.places.get(tuple(x + dx for x, dx in zip(self.points[c], step, strict=True))))
                for c in range(self.count)
                if c != a
            )
            return [(c, d) for c, d in ends if d is not None]
        return []


def _frames(prompts: Sequence[Prompt]) -> list[list[int]]:
    found: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        found.setdefault(prompt.template_index, []).append(row)
    return list(found.values())


def _first_rows(rows: Sequence[int], value: Sequence[int]) -> list[int]:
    found: dict[int, int] = {}
    for row in rows:
        found.setdefault(value[row], row)
    return list(found.values())


def _draw(
    edits: Sequence[PlannedEdit], value: Sequence[int], count: int, generator: np.random.Generator
) -> list[PlannedEdit]:
    """Draw edits in a random order, one of every pair of values before a second of any."""
    if len(edits) <= count:
        return list(edits)
    order = generator.permutation(len(edits))
    drawn: Counter[tuple[int, int]] = Counter()
    turn = np.zeros(len(edits), dtype=int)
    for number in order:
        pair = value[edits[number].source], value[edits[number].target]
        turn[number] = drawn[pair]
        drawn[pair] += 1
    chosen = sorted(order, key=lambda number: turn[number])[:count]
    return [edits[number] for number in sorted(chosen)]
