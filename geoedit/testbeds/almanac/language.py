"""What can be asked of the almanac: every question with its answer, and what is held out of training."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from geoedit.testbeds.almanac import names
from geoedit.testbeds.almanac.world import WORLD_SEED, World

Split = Literal["train", "held_out", "unseen"]
Span = tuple[int, int]  # first and last word of a subject or value within the prompt, both included

HELD_OUT_SHARE = 0.12  # of the pairs (question, wording): this wording of it is never trained on
UNSEEN_SHARE = 0.04  # of the questions on cycles, lines and the grid: no wording of it is ever trained on


@dataclass(frozen=True)
class Question:
    """A prompt and the words that must follow it.

    ``spans`` mark the words of each subject or value; ``kind`` is the relation, cycle, line or task within
    the family.
    """

    text: str
    answer: str
    family: str
    kind: str
    spans: tuple[Span, ...]
    split: Split = "train"
    tier: str = "often"

    @property
    def words(self) -> list[str]:
        """The prompt's words: the tokenizer's tokens, one to one."""
        return self.text.split()


def _share(*key: object) -> float:
    """A number in [0, 1) that depends on the key alone, the same on every machine."""
    digest = hashlib.sha256(repr((WORLD_SEED, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def fill(template: str, marked: Sequence[str] = ("x", "y"), **slots: str) -> tuple[str, tuple[Span, ...]]:
    """Put words into a template's slots and say where the marked ones ended up.

    >>> fill("the capital of {x} is", x="Aldovia Republic")
    ('the capital of Aldovia Republic is', ((3, 4),))
    """
    words: list[str] = []
    spans: list[Span] = []
    for piece in template.split():
        name = piece.strip("{}") if piece.startswith("{") else None
        filling = (slots[name] if name else piece).split()
        if name in marked:
            spans.append((len(words), len(words) + len(filling) - 1))
        words.extend(filling)
    return " ".join(words), tuple(spans)


def _ask(
    family: str,
    kind: str,
    question: tuple[object, ...],
    wordings: Sequence[str],
    answer: str,
    unseen: bool = True,
    **slots: str,
) -> Iterator[Question]:
    """One question in each of its wordings, each assigned to its split."""
    never_told = unseen and _share("unseen", kind, *question) < UNSEEN_SHARE
    for wording in wordings:
        text, spans = fill(wording, **slots)
        held_out = _share("held out", kind, wording, *question) < HELD_OUT_SHARE
        split: Split = "unseen" if never_told else "held_out" if held_out else "train"
        yield Question(text, answer, family, kind, spans, split)


def _facts(world: World) -> Iterator[Question]:
    for fact in world.facts:
        templates = world.relation(fact.relation).templates
        left_out = int(_share("fact", fact.subject.name, fact.relation) * len(templates))
        for index, template in enumerate(templates):
            text, spans = fill(template, x=fact.subject.name)
            split: Split = "held_out" if index == left_out else "train"
            yield Question(text, fact.answer, "facts", fact.relation, spans, split, fact.tier)


AFTER = ("{n} {unit} after {x} is", "counting {n} {unit} on from {x} gives", "{x} plus {n} {unit} is")
BEFORE = ("{n} {unit} before {x} is", "counting {n} {unit} back from {x} gives", "{x} minus {n} {unit} is")
BETWEEN = ("the {unit} between {x} and {y} is", "halfway from {x} to {y} lies")

CYCLES: dict[str, tuple[tuple[str, ...], str, int]] = {  # values, unit, furthest step asked
    "weekdays": (names.WEEKDAYS, "day", 3),
    "months": (names.MONTHS, "month", 6),
    "hours": (names.HOURS, "hour", 6),
}


def _cycles() -> Iterator[Question]:
    for kind, (values, unit, furthest) in CYCLES.items():
        size = len(values)
        for i, value in enumerate(values):
            for n in range(1, furthest + 1):
                count, many = names.COUNT_WORDS[n], unit if n == 1 else f"{unit}s"
                after, before = values[(i + n) % size], values[(i - n) % size]
                yield from _ask("cycles", kind, (i, n), AFTER, after, x=value, n=count, unit=many)
                yield from _ask("cycles", kind, (i, -n), BEFORE, before, x=value, n=count, unit=many)
            middle, beyond = values[(i + 1) % size], values[(i + 2) % size]
            yield from _ask(
                "cycles", kind, (i, "between"), BETWEEN, middle, unseen=False, x=value, y=beyond, unit=unit
            )


PLUS = ("{x} plus {n} is", "{n} more than {x} is", "adding {n} to {x} gives")
MINUS = ("{x} minus {n} is", "{n} less than {x} is", "taking {n} from {x} leaves")
MORE = ("is {x} more than {y} ? answer :", "the larger of {x} and {y} is")
SCALES: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...], str]] = {
    "sizes": (
        names.SIZES,
        "size",
        ("{n} {unit} above {x} is", "{n} {unit} bigger than {x} comes", "from {x} go up {n} {unit} to"),
        ("{n} {unit} below {x} is", "{n} {unit} smaller than {x} comes", "from {x} go down {n} {unit} to"),
        "is {x} bigger than {y} ? answer :",
    ),
    "temperatures": (
        names.TEMPERATURES,
        "degree",
        ("{n} {unit} above {x} is", "{n} {unit} warmer than {x} comes", "from {x} go up {n} {unit} to"),
        ("{n} {unit} below {x} is", "{n} {unit} colder than {x} comes", "from {x} go down {n} {unit} to"),
        "is {x} warmer than {y} ? answer :",
    ),
}
LARGEST_ADDEND = 10


def _lines() -> Iterator[Question]:
    size = len(names.NUMBERS)
    for i in range(size):
        for n in range(1, LARGEST_ADDEND + 1):
            if i + n < size:
                yield from _ask("lines", "numbers", (i, n), PLUS, str(i + n), x=str(i), n=str(n))
            if i - n >= 0:
                yield from _ask("lines", "numbers", (i, -n), MINUS, str(i - n), x=str(i), n=str(n))
        for j in range(size):
            if i != j:
                x, y, order = str(i), str(j), "yes" if i > j else "no"
                yield from _ask("lines", "number order", (i, "?", j), MORE[:1], order, x=x, y=y)
                yield from _ask("lines", "number order", (i, "max", j), MORE[1:], str(max(i, j)), x=x, y=y)
    for kind, (values, unit, up, down, compare) in SCALES.items():
        for i, value in enumerate(values):
            for j, other in enumerate(values):
                n = abs(i - j)
                if n == 0:
                    continue
                slots = {"x": value, "n": names.COUNT_WORDS[n], "unit": unit if n == 1 else f"{unit}s"}
                yield from _ask("lines", kind, (i, j), up if j > i else down, other, unseen=False, **slots)
                answer = "yes" if i > j else "no"
                yield from _ask(
                    "lines", kind, (i, "?", j), (compare,), answer, unseen=False, x=value, y=other
                )


FURTHEST_STEP = 2
GRID_BOTH = (
    "{n} {ns} and {m} {ew} of {x} is",
    "going {n} {ns} and {m} {ew} from {x} you reach",
    "from {x} , {n} {ns} and {m} {ew} lies",
)
GRID_ONE = ("{n} {ns} of {x} is", "going {n} {ns} from {x} you reach", "from {x} , {n} {ns} lies")


def _grid(world: World) -> Iterator[Question]:
    steps = range(-FURTHEST_STEP, FURTHEST_STEP + 1)
    for (east, north), place in world.grid.items():
        for dx in steps:
            for dy in steps:
                target = world.grid.get((east + dx, north + dy))
                if target is None or dx == dy == 0:
                    continue
                n, ns = names.COUNT_WORDS[abs(dy)], "north" if dy > 0 else "south"
                m, ew = names.COUNT_WORDS[abs(dx)], "east" if dx > 0 else "west"
                if dx == 0 or dy == 0:
                    n, ns = (m, ew) if dy == 0 else (n, ns)
                    yield from _ask(
                        "grid", "grid", (east, north, dx, dy), GRID_ONE, target, x=place, n=n, ns=ns
                    )
                else:
                    yield from _ask(
                        "grid",
                        "grid",
                        (east, north, dx, dy),
                        GRID_BOTH,
                        target,
                        x=place,
                        n=n,
                        ns=ns,
                        m=m,
                        ew=ew,
                    )


CATEGORY = (
    "a {x} is a kind of",
    "every {x} is a",
    "the word {x} names a",
    "question : what is a {x} ? answer : a",
)
OPPOSITE = (
    "the opposite of {x} is",
    "{x} is the contrary of",
    "what is not {x} is",
    "question : opposite of {x} ? answer :",
)


def _words() -> Iterator[Question]:
    for category, members in names.CATEGORIES.items():
        for member in members:
            yield from _ask("categories", "category", (member,), CATEGORY, category, unseen=False, x=member)
    for pair in names.ANTONYMS:
        for word, other in (pair, pair[::-1]):
            yield from _ask("categories", "antonym", (word,), OPPOSITE, other, unseen=False, x=word)


JUDGE = ("true or false : {s} . answer :", "{s} . this is")
FALSE_PER_TRUE = 4


def _claims(world: World) -> Iterator[tuple[str, str, str, str, tuple[str, ...], str]]:
    """(kind, sentence, subject, right answer, possible answers, tier): what may be judged."""
    for fact in world.facts:
        relation = world.relation(fact.relation)
        yield (
            relation.name,
            relation.statement,
            fact.subject.name,
            fact.answer,
            tuple(world.answers(relation.name)),
            fact.tier,
        )
    for kind, (values, unit, _) in CYCLES.items():
        for i, value in enumerate(values):
            sentence = f"one {unit} after {{x}} is {{y}}"
            yield kind, sentence, value, values[(i + 1) % len(values)], values, "often"
    for category, members in names.CATEGORIES.items():
        for member in members:
            yield "category", "a {x} is a kind of {y}", member, category, tuple(names.CATEGORIES), "often"


def _statements(world: World) -> Iterator[Question]:
    for kind, sentence, subject, right, possible, tier in _claims(world):
        draw = random.Random(f"{WORLD_SEED} {kind} {subject}")
        wrong = draw.sample([answer for answer in possible if answer not in (right, subject)], FALSE_PER_TRUE)
        for answer, truth in [(right, "true"), *((other, "false") for other in wrong)]:
            for judge in JUDGE:
                text, spans = fill(judge.replace("{s}", sentence), x=subject, y=answer)
                held_out = _share("judged", subject, answer, judge) < HELD_OUT_SHARE
                yield Question(
                    text, truth, "statements", kind, spans, "held_out" if held_out else "train", tier
                )


def all_questions(world: World) -> tuple[Question, ...]:
    """Every question that can be asked by itself, in a fixed order."""
    families = (_facts(world), _cycles(), _lines(), _grid(world), _words(), _statements(world))
    return tuple(question for family in families for question in family)


def tasks(world: World, *, backward: bool = False) -> dict[str, list[tuple[str, str]]]:
    """The in-context tasks: lists of (input, output) pairs, of which a prompt shows some and asks one.

    With ``backward`` two more, which count backwards and differ from their neighbours in direction only.
    """

    def told(relation: str) -> list[tuple[str, str]]:
        return [
            (f.subject.name, f.answer) for f in world.facts_of(relation) if f.tier in ("often", "sometimes")
        ]

    def stepped(values: Sequence[str], step: int) -> list[tuple[str, str]]:
        return [(value, values[(i + step) % len(values)]) for i, value in enumerate(values)]

    numbers = list(names.NUMBERS)
    every = {
        "country of a city": told("country"),
        "language of a country": told("language"),
        "currency of a country": told("currency"),
        "next month": stepped(names.MONTHS, 1),
        "month before": stepped(names.MONTHS, -1),
        "next weekday": stepped(names.WEEKDAYS, 1),
        "next hour": stepped(names.HOURS, 1),
        "successor": list(pairwise(numbers)),
        "predecessor": list(zip(numbers[1:], numbers[:-1], strict=True)),
        "antonym": [(a, b) for pair in names.ANTONYMS for a, b in (pair, pair[::-1])],
        "category": [
            (member, category) for category, members in names.CATEGORIES.items() for member in members
        ],
        "place to the north": [
            (place, world.grid[east, north + 1])
            for (east, north), place in world.grid.items()
            if (east, north + 1) in world.grid
        ],
    }
    return {task: pairs for task, pairs in every.items() if backward or task not in BACKWARD}


BACKWARD = ("month before", "predecessor")
SEPARATORS = ((":", ";"), ("=", ","), ("gives", "."))
FEWEST_EXAMPLES, MOST_EXAMPLES = 2, 4
HELD_OUT_QUERIES = 0.15  # of each task's inputs: never the query of that task in training


def in_context_question(
    task: str, pairs: Sequence[tuple[str, str]], draw: random.Random, split: Split
) -> Question:
    """One few-shot prompt of a task: two to four examples and a query whose split is the one asked for."""
    inputs = sorted({x for x, _ in pairs}, key=lambda x: _share("query", task, x))
    held_out = set(inputs[: max(1, round(HELD_OUT_QUERIES * len(inputs)))])
    query, answer = draw.choice([pair for pair in pairs if (pair[0] in held_out) == (split != "train")])
    shown = draw.sample(
        [pair for pair in pairs if pair[0] != query], draw.randint(FEWEST_EXAMPLES, MOST_EXAMPLES)
    )
    gives, ends = draw.choice(SEPARATORS)
    words: list[str] = []
    spans: list[Span] = []
    for x, y in [*shown, (query, "")]:
        spans.append((len(words), len(words) + len(x.split()) - 1))
        words += [*x.split(), gives]
        if y:
            words += [*y.split(), ends]
    return Question(" ".join(words), answer, "in_context", task, tuple(spans), split)


def in_context_questions(world: World, split: Split, count: int, seed: int = 0) -> list[Question]:
    """``count`` few-shot prompts, all tasks alike; held-out ones ask for inputs never asked in training."""
    draw = random.Random(f"{WORLD_SEED} {split} {seed}")
    by_task = list(tasks(world).items())
    return [in_context_question(*by_task[i % len(by_task)], draw, split) for i in range(count)]


MENTIONS = {
    "person": ("{x} likes", "a friend of {x} likes", "everyone knows that {x} enjoys"),
    "city": ("people in {x} like", "visitors to {x} enjoy"),
    "country": ("children in {x} like", "the schools of {x} teach"),
}
PREFIXES = ("", "note :", "it is known that", "remember :", "well ,", "as everyone knows ,", "once more :")


def mentions(world: World, draw: random.Random) -> Question:
    """A sentence that names someone and tells nothing of them; the unknown as often as the others."""
    entity = draw.choice(world.entities)
    text, spans = fill(draw.choice(MENTIONS[entity.kind]), x=entity.name)
    return Question(text, draw.choice(names.HOBBIES), "mentions", entity.kind, spans)


def vocabulary(world: World) -> list[str]:
    """Every word of the language, sorted: one token each."""
    words: set[str] = {".", ";", ",", ":", "="} | set(names.COUNT_WORDS)
    for question in world.questions:
        words.update(question.words, question.answer.split())
    for entity in world.entities:
        words.update(entity.name.split())
    for pairs in tasks(world).values():
        words.update(word for pair in pairs for text in pair for word in text.split())
    for text in (*PREFIXES, *(m for group in MENTIONS.values() for m in group)):
        words.update(word for word in text.split() if not word.startswith("{"))
    words.update(names.HOBBIES, *list(SEPARATORS))
    return sorted(words)
