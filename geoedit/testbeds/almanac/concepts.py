"""The almanac's concepts: cycles, lines, categories, the grid and facts, with templates and exact answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from geoedit.concept import Concept, Template
from geoedit.testbeds.almanac import names
from geoedit.testbeds.almanac.language import (
    AFTER,
    BEFORE,
    CATEGORY,
    CYCLES,
    GRID_BOTH,
    GRID_ONE,
    MINUS,
    PLUS,
    SCALES,
    fill,
)
from geoedit.testbeds.almanac.world import World

Answer = Callable[[int], str | None]  # of the value at this index


def _template(wording: str, answers: Sequence[str | None], **slots: str) -> Template:
    text, _ = fill(wording, x="{value}", **slots)
    return Template(text, answers)


def _cycle(kind: str) -> Concept:
    values, unit, furthest = CYCLES[kind]
    templates = []
    for n in [n for n in (1, 2, 3, 5) if n <= furthest]:
        slots = {"n": names.COUNT_WORDS[n], "unit": unit if n == 1 else f"{unit}s"}
        for wordings, step in ((AFTER, n), (BEFORE, -n)):
            answers = [values[(i + step) % len(values)] for i in range(len(values))]
            templates += [_template(wordings[which], answers, **slots) for which in (0, 2)]
    return Concept(
        kind, values, templates, "cycle", f"The {len(values)} {kind} of the almanac, {unit} after {unit}."
    )


def _stepped(values: Sequence[str], step: int) -> list[str | None]:
    return [values[i + step] if 0 <= i + step < len(values) else None for i in range(len(values))]


def _numbers() -> Concept:
    templates = []
    for n in (1, 2, 5, 10):
        templates += [_template(wording, _stepped(names.NUMBERS, n), n=str(n)) for wording in PLUS[:2]]
        templates += [_template(wording, _stepped(names.NUMBERS, -n), n=str(n)) for wording in MINUS[:2]]
    return Concept("numbers", names.NUMBERS, templates, "line", "The numbers 0 to 99, one token each.")


def _scale(kind: str) -> Concept:
    values, unit, up, down, _ = SCALES[kind]
    templates = []
    for n in (1, 2):
        slots = {"n": names.COUNT_WORDS[n], "unit": unit if n == 1 else f"{unit}s"}
        templates += [_template(wording, _stepped(values, n), **slots) for wording in up]
        templates += [_template(wording, _stepped(values, -n), **slots) for wording in down]
    return Concept(kind, values, templates, "line", f"Eight {kind} in order.")


def _categories() -> Concept:
    values = tuple(names.CATEGORIES)
    templates = [_template(wording, values) for wording in CATEGORY]
    return Concept(
        "categories",
        values,
        templates,
        "categorical",
        "Eight kinds of things, shown by their members.",
        forms=dict(names.CATEGORIES),
    )


def _places(world: World) -> Concept:
    coordinates = list(world.grid)
    places = [world.grid[key] for key in coordinates]
    templates = []
    for dx, dy in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 2), (-1, 1), (2, -1)):
        answers = [world.grid.get((east + dx, north + dy)) for east, north in coordinates]
        n, ns = names.COUNT_WORDS[abs(dy)], "north" if dy > 0 else "south"
        m, ew = names.COUNT_WORDS[abs(dx)], "east" if dx > 0 else "west"
        if dx and dy:
            templates.append(_template(GRID_BOTH[0], answers, n=n, ns=ns, m=m, ew=ew))
        else:
            n, ns = (m, ew) if dy == 0 else (n, ns)
            templates += [_template(wording, answers, n=n, ns=ns) for wording in GRID_ONE]
    return Concept(
        "places",
        places,
        templates,
        "grid",
        "Forty-nine places on a grid of seven by seven.",
        coordinates=coordinates,
    )


def _facts(world: World, relation_name: str) -> Concept:
    relation = world.relation(relation_name)
    facts = world.facts_of(relation_name, "often")
    answers = [fact.answer for fact in facts]
    templates = [_template(wording, answers) for wording in relation.templates]
    name = f"{relation.subject_kind}-{relation_name}"
    described = f"The {relation_name} of each {relation.subject_kind} that the model was often told of."
    return Concept(name, [fact.subject.name for fact in facts], templates, "categorical", described)


def build_concepts(world: World) -> dict[str, Concept]:
    """Every concept of the almanac by name."""
    concepts = [*map(_cycle, CYCLES), _numbers(), *map(_scale, SCALES), _categories(), _places(world)]
    concepts += [_facts(world, relation.name) for relation in world.relations]
    return {concept.name: concept for concept in concepts}
