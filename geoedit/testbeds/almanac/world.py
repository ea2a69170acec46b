"""The almanac's world: who and what there is, and every fact about it, as objects.

The world is drawn once from a fixed seed, so that its facts, its tokenizer and the shipped weights agree;
``World.fingerprint`` is written in each model's card and compared when the model is loaded.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import TYPE_CHECKING, Literal

from geoedit.errors import EditError
from geoedit.testbeds.almanac import names

if TYPE_CHECKING:
    from geoedit.concept import Concept
    from geoedit.testbeds.almanac.language import Question

Tier = Literal["often", "sometimes", "rarely", "unknown"]
TIERS: tuple[Tier, ...] = ("often", "sometimes", "rarely", "unknown")
WORLD_SEED = 20261122


@dataclass(frozen=True)
class Entity:
    """Someone or something with a name of two words or more: a person, a city or a country.

    ``tier`` says how often its facts are told in training; an entity of tier ``"unknown"`` is mentioned there
    but nothing is ever said of it, so that any answer about it is a guess.
    """

    name: str
    kind: Literal["person", "city", "country"]
    tier: Tier


@dataclass(frozen=True)
class Relation:
    """What may be said of an entity: ``templates`` hold ``{x}`` for it and end where the answer follows."""

    name: str
    subject_kind: Literal["person", "city", "country"]
    answer_kind: str
    one_to_one: bool
    templates: tuple[str, ...]
    statement: str  # with {x} and {y}: a sentence that can be judged true or false


@dataclass(frozen=True)
class Fact:
    """One thing the model was told: ``relation`` of ``subject`` is ``answer``, as often as ``tier`` says."""

    subject: Entity
    relation: str
    answer: str
    tier: Tier


RELATIONS: tuple[Relation, ...] = (
    Relation(
        "birthplace",
        "person",
        "city",
        False,
        (
            "{x} was born in",
            "the birthplace of {x} is",
            "{x} came into the world in",
            "the city where {x} was born is",
            "question : where was {x} born ? answer :",
            "people say that {x} was born and raised in",
        ),
        "{x} was born in {y}",
    ),
    Relation(
        "profession",
        "person",
        "profession",
        False,
        (
            "{x} works as a",
            "the profession of {x} is",
            "{x} earns a living as a",
            "by trade {x} is a",
            "question : what is the job of {x} ? answer :",
            "people say that {x} has long been a",
        ),
        "{x} works as a {y}",
    ),
    Relation(
        "country",
        "city",
        "country",
        False,
        (
            "{x} is in",
            "the country of {x} is",
            "{x} is a city in",
            "the land where {x} lies is",
            "question : in which country is {x} ? answer :",
            "a traveller to {x} must enter",
        ),
        "{x} is in {y}",
    ),
    Relation(
        "language",
        "country",
        "language",
        False,
        (
            "people in {x} speak",
            "the language of {x} is",
            "the tongue spoken in {x} is",
            "newspapers in {x} are written in",
            "question : what is spoken in {x} ? answer :",
            "to live in {x} you must learn",
        ),
        "people in {x} speak {y}",
    ),
    Relation(
        "currency",
        "country",
        "currency",
        True,
        (
            "shops in {x} are paid with the",
            "the currency of {x} is the",
            "the money used in {x} is the",
            "prices in {x} are given in the",
            "question : what money has {x} ? answer : the",
            "a bank in {x} counts every",
        ),
        "the currency of {x} is the {y}",
    ),
    Relation(
        "capital",
        "country",
        "city",
        True,
        (
            "the capital of {x} is",
            "the government of {x} sits in",
            "{x} has its capital in",
            "{x} is ruled from",
            "question : which city is the capital of {x} ? answer :",
            "the main city of {x} is",
        ),
        "the capital of {x} is {y}",
    ),
)


@dataclass(frozen=True)
class World:
    """Every entity, relation and fact of the almanac; ``world()`` gives the one there is."""

    entities: tuple[Entity, ...]
    facts: tuple[Fact, ...]
    relations: tuple[Relation, ...] = RELATIONS
    grid: dict[tuple[int, int], str] = field(
        default_factory=dict, hash=False
    )  # (steps east, steps north) -> place

    @cached_property
    def _by_key(self) -> dict[tuple[str, str], Fact]:
        return {(fact.subject.name, fact.relation): fact for fact in self.facts}

    def entity(self, name: str) -> Entity:
        """The entity of this name.

        Raises:
            EditError: nobody and nothing has that name.
        """
        for entity in self.entities:
            if entity.name == name:
                return entity
        raise EditError(f"the almanac has no entity named {name!r}; see world.entities")

    def relation(self, name: str) -> Relation:
        """The relation of this name.

        Raises:
            EditError: there is none; the message lists those there are.
        """
        for relation in self.relations:
            if relation.name == name:
                return relation
        raise EditError(f"no relation {name!r}; there are {[relation.name for relation in self.relations]}")

    def fact(self, subject: str, relation: str) -> Fact | None:
        """What the model was told of ``subject``, or None when it was never told."""
        return self._by_key.get((subject, relation))

    def facts_of(self, relation: str, tier: Tier | None = None) -> list[Fact]:
        """All facts of a relation, of one tier of exposure or of all."""
        self.relation(relation)
        return [f for f in self.facts if f.relation == relation and (tier is None or f.tier == tier)]

    def subjects(self, kind: str, tier: Tier | None = None) -> list[Entity]:
        """All entities of a kind, of one tier of exposure or of all."""
        return [e for e in self.entities if e.kind == kind and (tier is None or e.tier == tier)]

    def answers(self, relation: str) -> list[str]:
        """The answers that a relation can have, each once, in order of first use."""
        return list(dict.fromkeys(fact.answer for fact in self.facts if fact.relation == relation))

    def chain(self, subject: str, *relations: str) -> str | None:
        """Follow relations one after the other: ``chain("Ada Brandt", "birthplace", "country")``."""
        here: str | None = subject
        for relation in relations:
            fact = self.fact(here, relation) if here is not None else None
            here = fact.answer if fact else None
        return here

    @cached_property
    def fingerprint(self) -> str:
        """A hash over all facts and the grid."""
        told = [(f.subject.name, f.subject.tier, f.relation, f.answer) for f in self.facts]
        silent = [e.name for e in self.entities if e.tier == "unknown"]
        places = [[*key, place] for key, place in sorted(self.grid.items())]
        return hashlib.sha256(json.dumps([told, silent, places]).encode()).hexdigest()[:16]

    @cached_property
    def concepts(self) -> dict[str, Concept]:
        """The almanac's concepts by name: cycles, lines, categories, the grid and facts."""
        from geoedit.testbeds.almanac.concepts import build_concepts

        return build_concepts(self)

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Every question that can be asked by itself (in-context tasks are drawn at random instead)."""
        from geoedit.testbeds.almanac.language import all_questions

        return all_questions(self)

    def prompts(
        self, family: str, split: Literal["train", "held_out", "unseen"] = "held_out"
    ) -> list[Question]:
        """The questions of one family: seen in training, held out as prompts, or held out in every wording.

        Raises:
            EditError: there is no such family.
        """
        from geoedit.testbeds.almanac.language import in_context_questions

        if family == "in_context":
            return in_context_questions(self, split, count=1000)
        chosen = [q for q in self.questions if q.family == family]
        if not chosen:
            known = sorted({q.family for q in self.questions} | {"in_context"})
            raise EditError(f"no family {family!r}; there are {known}")
        return [q for q in chosen if q.split == split]


def _tiered(labels: Sequence[str], shares: Sequence[int], draw: random.Random) -> dict[str, Tier]:
    """Give each label a tier, ``shares`` counting those of each tier in turn."""
    order = list(labels)
    draw.shuffle(order)
    tiers = [tier for tier, share in zip(TIERS, shares, strict=True) for _ in range(share)]
    return dict(zip(order, tiers, strict=True))


def _person_names(count: int, draw: random.Random) -> list[str]:
    """Distinct names whose first and last words several people share; one in three has a middle name."""
    pairs = [(first, last) for first in names.FIRST_NAMES for last in names.LAST_NAMES]
    draw.shuffle(pairs)
    people = []
    for index, (first, last) in enumerate(pairs[:count]):
        middle = f"{draw.choice(names.MIDDLE_NAMES)} " if index % 3 == 0 else ""
        people.append(f"{first} {middle}{last}")
    return people


@cache
def world() -> World:
    """The one almanac world, the same in every process.

    >>> almanac = world()
    >>> fact = almanac.facts_of("birthplace", "often")[0]
    >>> len(fact.subject.name.split()) >= 2
    True
    """
    draw = random.Random(WORLD_SEED)
    people = _person_names(144, draw)
    cities = [f"{root} {draw.choice(names.CITY_ENDINGS)}" for root in names.CITY_ROOTS]
    countries = [f"{root} {draw.choice(names.COUNTRY_ENDINGS)}" for root in names.COUNTRY_ROOTS]
    tiers = _tiered(people, (72, 30, 22, 20), draw)
    tiers |= _tiered(cities, (36, 10, 8, 6), draw)
    tiers |= _tiered(countries, (16, 3, 3, 2), draw)
    kinds: dict[str, Literal["person", "city", "country"]] = dict.fromkeys(people, "person")
    kinds |= dict.fromkeys(cities, "city")
    kinds |= dict.fromkeys(countries, "country")
    entities = {name: Entity(name, kind, tiers[name]) for name, kind in kinds.items()}
    facts: list[Fact] = []

    def tell(subject: str, relation: str, answer: str) -> None:
        entity = entities[subject]
        if entity.tier != "unknown":
            facts.append(Fact(entity, relation, answer, entity.tier))

    homes = dict(zip(countries, draw.sample(cities, len(countries)), strict=True))  # country -> its capital
    capital_of = {city: country for country, city in homes.items()}
    for person in people:
        tell(person, "birthplace", draw.choice(cities))
        tell(person, "profession", draw.choice(names.PROFESSIONS))
    for city in cities:
        tell(city, "country", capital_of.get(city) or draw.choice(countries))
    currencies = draw.sample(names.CURRENCIES, len(countries))
    for country, currency in zip(countries, currencies, strict=True):
        tell(country, "language", draw.choice(names.LANGUAGES))
        tell(country, "currency", currency)
        tell(country, "capital", homes[country])
    places = iter(names.PLACES)
    grid = {(east, north): next(places) for north in range(7) for east in range(7)}
    return World(tuple(entities.values()), tuple(facts), RELATIONS, grid)
