"""Which sentences the edits are learned from, which are edited, and from which value to which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from experiments.curvature_predicts_editing.laboratory import Laboratory
from geoedit.concept import SLOT, Concept
from geoedit.errors import EditError

ATTEMPTS = 50


@dataclass(frozen=True)
class Pairs:
    """Edits to make: sentences and the values that they go between, the same at every site.

    Attributes:
        source: the prompt that is edited. target: the same sentence with the wanted value.
        target: see `source`.
        start: where a reused step was measured: a prompt's place in the same sentence with another value, so
            far from `end` as source is from target; -1 where no step can be reused. end: see `start`.
        end: see `start`.
        controls: for each a prompt of another concept that the edit is applied to as well; a row of the
            laboratory, while the others are places among the concept's own prompts.
    """

    source: Int[np.ndarray, " pairs"]
    target: Int[np.ndarray, " pairs"]
    start: Int[np.ndarray, " pairs"]
    end: Int[np.ndarray, " pairs"]
    controls: Int[np.ndarray, " pairs"]

    def __len__(self) -> int:
        """How many there are."""
        return len(self.source)


@dataclass(frozen=True)
class Sentences:
    """A concept's prompts: rows of the laboratory, their values and answers as numbers, and the halves.

    Attributes:
        concept: the concept.
        rows: of its prompts in the laboratory. All other arrays have one entry a prompt.
        value: the number of its value.
        answer: the number of its answer among the concept's values; -1 where the answer is none of them.
        template: its sentence.
        learned: whether edits may learn from its sentence; the others are edited.
        right: whether it is answered right unedited.
        token: the first token of its answer, -1 without one.
    """

    concept: Concept
    rows: Int[np.ndarray, " prompts"]
    value: Int[np.ndarray, " prompts"]
    answer: Int[np.ndarray, " prompts"]
    template: Int[np.ndarray, " prompts"]
    learned: Bool[np.ndarray, " prompts"]
    right: Bool[np.ndarray, " prompts"]
    token: Int[np.ndarray, " prompts"]

    @classmethod
    def of(cls, laboratory: Laboratory, concept: Concept, seed: int) -> Sentences:
        """Read a concept's prompts and split its sentences in halves; both halves of a line reach its ends.

        Of the seeds from `seed` on, the first is taken whose learned half has every answer.
        """
        rows = laboratory.rows[concept.name]
        prompts = [laboratory.prompts[row] for row in rows]
        names = {value: number for number, value in enumerate(concept.values)}
        template = np.array([prompt.template_index for prompt in prompts])
        answer = np.array([names.get(prompt.answer or "", -1) for prompt in prompts])
        texts = [each.text for each in concept.templates]
        for attempt in range(ATTEMPTS):
            learned = np.isin(template, learned_templates(texts, seed + attempt))
            if len(np.unique(answer[learned])) == len(np.unique(answer)):
                break
        return cls(
            concept=concept,
            rows=rows,
            value=np.array([names[prompt.value] for prompt in prompts]),
            answer=answer,
            template=template,
            learned=learned,
            right=laboratory.right[rows],
            token=laboratory.answers[rows].numpy(),
        )

    @property
    def coordinates(self) -> Float[np.ndarray, "values q"] | None:
        """Where values lie: their number on a cycle or line, their place on a grid; None without order."""
        if self.concept.kind in ("cycle", "line"):
            return np.arange(len(self.concept.values), dtype=float)[:, None]
        if self.concept.kind in ("grid", "map") and self.concept.coordinates is not None:
            return np.array(self.concept.coordinates, dtype=float)
        return None

    def draw_pairs(self, count: int, controls: Int[np.ndarray, " pool"], seed: int) -> Pairs:
        """Draw sentences of the half that no edit learned from, answered right with both values.

        Raises:
            EditError: there are no two such prompts in any sentence.
        """
        generator = np.random.default_rng(seed)
        usable = [
            np.flatnonzero((self.template == template) & self.right & (self.token >= 0))
            for template in np.unique(self.template[~self.learned])
        ]
        usable = [places for places in usable if len(np.unique(self.token[places])) > 1]
        if not usable:
            raise EditError(
                f"concept {self.concept.name!r}: no held-out sentence is answered right with two values."
            )
        source: list[int] = []
        target: list[int] = []
        start: list[int] = []
        end: list[int] = []
        for number in range(count):
            # Sentences in turn, so that none dominates.
            places = usable[number % len(usable)]
            a = int(generator.choice(places))
            b = int(generator.choice(places[self.token[places] != self.token[a]]))
            c, d = self._parallel(a, b, generator)
            for kept, place in zip((source, target, start, end), (a, b, c, d), strict=True):
                kept.append(place)
        drawn = generator.choice(controls, count)
        return Pairs(np.array(source), np.array(target), np.array(start), np.array(end), drawn)

    def _parallel(self, a: int, b: int, generator: np.random.Generator) -> tuple[int, int]:
        """Two prompts of the same sentence that lie as a and b do, elsewhere; -1 where there are none."""
        coordinates = self.coordinates
        if coordinates is None:
            return -1, -1
        own = np.flatnonzero((self.template == self.template[a]) & (self.token >= 0))
        points = coordinates[self.value[own]]
        step = coordinates[self.value[b]] - coordinates[self.value[a]]
        around = len(self.concept.values) if self.concept.kind == "cycle" else None
        ends = points + step if around is None else (points + step) % around
        places = {tuple(point): int(place) for point, place in zip(points, own, strict=True)}
        found = [
            (int(place), places[tuple(stop)])
            for place, stop in zip(own, ends, strict=True)
            if place != a and tuple(stop) in places
        ]
        return found[int(generator.integers(len(found)))] if found else (-1, -1)


def learned_templates(texts: Sequence[str], seed: int) -> list[int]:
    """About half of the templates; two that begin alike up to the value are always in the same half.

    In a model that reads from left to right they leave the same state at the value, so that one would give
    the other away.

    Raises:
        EditError: all templates begin alike.
    """
    groups: dict[str, list[int]] = {}
    for number, text in enumerate(texts):
        groups.setdefault(text[: text.index(SLOT)], []).append(number)
    if len(groups) < 2:
        raise EditError(
            f"all {len(texts)} templates begin alike up to the value, so that none can be held out; "
            "give some that begin otherwise."
        )
    ordered = list(groups.values())
    chosen: list[int] = []
    for place in np.random.default_rng(seed).permutation(len(ordered)):
        # The first is always taken, the last never.
        if not chosen or (len(chosen) + len(ordered[place]) / 2 <= len(texts) / 2):
            chosen += ordered[place]
    return sorted(chosen)
