"""The world against calendars, clocks, integers and coordinates that the package did not write."""

import calendar
import datetime
import re
import subprocess
import sys

import pytest

from geoedit.errors import EditError
from geoedit.testbeds.almanac import names
from geoedit.testbeds.almanac.language import in_context_questions, tasks, vocabulary
from geoedit.testbeds.almanac.world import world

COUNTS = dict(zip(names.COUNT_WORDS, range(13), strict=True))


@pytest.fixture(scope="module")
def almanac():
    return world()


def test_every_subject_has_two_words_or_more_and_shares_them(almanac):
    assert {len(entity.name.split()) for entity in almanac.entities} == {2, 3, 4}
    people = [entity.name.split() for entity in almanac.subjects("person")]
    for position in (0, -1):
        shared = {words[position] for words in people}
        assert len(shared) < len(people) / 3, "one word of a name must not be enough to know the person"
    assert len({entity.name for entity in almanac.entities}) == len(almanac.entities)


def test_the_unknown_have_no_fact_and_are_still_named(almanac):
    silent = [entity for entity in almanac.entities if entity.tier == "unknown"]
    assert {entity.kind for entity in silent} == {"person", "city", "country"}
    told = {fact.subject.name for fact in almanac.facts}
    assert not told & {entity.name for entity in silent}
    assert all(almanac.fact(entity.name, r.name) is None for entity in silent for r in almanac.relations)


def test_relations_are_as_they_say(almanac):
    for relation in almanac.relations:
        answers = [fact.answer for fact in almanac.facts_of(relation.name)]
        assert (len(set(answers)) == len(answers)) == relation.one_to_one
        for fact in almanac.facts_of(relation.name):
            assert fact.subject.kind == relation.subject_kind


def test_capitals_lie_in_their_country_and_chains_follow(almanac):
    for fact in almanac.facts_of("capital"):
        city = almanac.entity(fact.answer)
        if city.tier != "unknown":
            assert almanac.chain(fact.subject.name, "capital", "country") == fact.subject.name
    person = next(f for f in almanac.facts_of("birthplace") if almanac.fact(f.answer, "country"))
    country = almanac.fact(person.answer, "country").answer
    assert almanac.chain(person.subject.name, "birthplace", "country") == country


def test_the_same_world_in_every_process(almanac):
    code = "from geoedit.testbeds.almanac.world import world; print(world().fingerprint)"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": str(seed), "PYTHONPATH": "."},
        ).stdout.strip()
        for seed in (1, 2)
    }
    assert seen == {almanac.fingerprint}


def test_months_by_the_calendar(almanac):
    english = list(calendar.month_name)
    asked = [q for q in almanac.questions if q.kind == "months" and q.family == "cycles"]
    checked = 0
    for question in asked:
        stepped = re.search(r"(\w+) months? (after|before) (\w+) is$", question.text)
        between = re.search(r"the month between (\w+) and (\w+) is$", question.text)
        if stepped:
            step = COUNTS[stepped[1]] * (1 if stepped[2] == "after" else -1)
            day = datetime.date(2001, english.index(stepped[3]), 1)
            assert question.answer == english[(day.month - 1 + step) % 12 + 1]
        elif between:
            assert (english.index(between[2]) - english.index(between[1])) % 12 == 2
            assert (english.index(question.answer) - english.index(between[1])) % 12 == 1
        checked += bool(stepped or between)
    assert checked == 12 * 6 * 2 + 12


def test_hours_by_the_clock(almanac):
    checked = 0
    for question in almanac.questions:
        stepped = re.search(r"^(\w+) hours? (after|before) (\d\d:\d\d) is$", question.text)
        if question.family == "cycles" and stepped:
            start = datetime.datetime.strptime(stepped[3], "%H:%M")
            delta = datetime.timedelta(hours=COUNTS[stepped[1]] * (1 if stepped[2] == "after" else -1))
            assert question.answer == f"{start + delta:%H:%M}"
            checked += 1
    assert checked == 24 * 6 * 2


def test_numbers_by_arithmetic(almanac):
    rules = {
        r"^(\d+) plus (\d+) is$": lambda a, b: str(a + b),
        r"^(\d+) more than (\d+) is$": lambda a, b: str(a + b),
        r"^(\d+) minus (\d+) is$": lambda a, b: str(a - b),
        r"^taking (\d+) from (\d+) leaves$": lambda a, b: str(b - a),
        r"^the larger of (\d+) and (\d+) is$": lambda a, b: str(max(a, b)),
        r"^is (\d+) more than (\d+) \? answer :$": lambda a, b: "yes" if a > b else "no",
    }
    hits = dict.fromkeys(rules, 0)
    for question in almanac.questions:
        for pattern, rule in rules.items():
            if match := re.search(pattern, question.text):
                assert question.answer == rule(int(match[1]), int(match[2]))
                hits[pattern] += 1
    assert min(hits.values()) > 900


def test_the_grid_by_walking_one_step_at_a_time(almanac):
    place_at, at_place = almanac.grid, {place: key for key, place in almanac.grid.items()}
    moves = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}
    asked = [q for q in almanac.questions if q.family == "grid"]
    for question in asked:
        (start,) = [word for word in question.words if word in at_place]
        east, north = at_place[start]
        for count, direction in re.findall(r"(one|two|three) (north|south|east|west)", question.text):
            for _ in range(COUNTS[count]):
                east, north = east + moves[direction][0], north + moves[direction][1]
        assert question.answer == place_at[east, north]
    assert len(asked) > 2000


def test_spans_mark_the_subject(almanac):
    named = {entity.name for entity in almanac.entities}
    for question in almanac.questions:
        for first, last in question.spans:
            words = " ".join(question.words[first : last + 1])
            if question.family == "facts":
                assert words in named
        assert question.spans, question


def test_splits_are_apart_and_every_fact_is_told(almanac):
    texts = {
        split: {q.text for q in almanac.questions if q.split == split and q.family != "statements"}
        for split in ("train", "held_out", "unseen")
    }
    assert not texts["train"] & texts["held_out"]
    assert not texts["train"] & texts["unseen"]
    told = {
        (q.kind, q.text[:0] + " ".join(q.words[q.spans[0][0] : q.spans[0][1] + 1]))
        for q in almanac.questions
        if q.family == "facts" and q.split == "train"
    }
    assert told == {(fact.relation, fact.subject.name) for fact in almanac.facts}


def test_in_context_queries_held_out_are_never_asked_in_training(almanac):
    def queries(split):
        return {
            (q.kind, " ".join(q.words[q.spans[-1][0] : q.spans[-1][1] + 1]))
            for q in in_context_questions(almanac, split, 3000)
        }

    assert not queries("train") & queries("held_out")
    assert {kind for kind, _ in queries("held_out")} == set(tasks(almanac))


def test_statements_are_judged_by_the_facts(almanac):
    judged = [q for q in almanac.questions if q.family == "statements" and q.kind == "currency"]
    for question in judged:
        subject, said = (" ".join(question.words[a : b + 1]) for a, b in question.spans)
        assert (almanac.fact(subject, "currency").answer == said) == (question.answer == "true")
    assert {q.answer for q in judged} == {"true", "false"}


def test_concepts_agree_with_the_facts(almanac):
    concept = almanac.concepts["city-country"]
    for prompt in concept.prompts():
        assert almanac.fact(prompt.value, "country").answer == prompt.answer
    assert almanac.concepts["places"].kind == "grid"
    sizes = almanac.concepts["sizes"]
    assert [p.answer for p in sizes.prompts(templates=[0])][:-1] == list(sizes.values[1:])


def test_errors_name_what_there_is(almanac):
    with pytest.raises(EditError, match=r"birthplace.*capital"):
        almanac.relation("shoe size")
    with pytest.raises(EditError, match="no family 'poems'"):
        almanac.prompts("poems")
    with pytest.raises(EditError, match="no entity named 'Nobody'"):
        almanac.entity("Nobody")


def test_one_word_for_one_meaning(almanac):
    words = vocabulary(almanac)
    assert len(words) == len(set(words)) < 800
