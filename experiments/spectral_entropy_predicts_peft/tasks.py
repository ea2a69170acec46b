"""What is taught: sentences to train on, other wordings to ask in, and what should stay as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from experiments.benchmarks.lora_almanac import Sentences
from experiments.spectral_entropy_predicts_peft.settings import Settings
from geoedit.errors import EditError
from geoedit.testbeds import World

CYCLES = ("weekdays", "months", "hours")
ASKED_SHARE = 0.25
KEPT = 96
Line = tuple[str, str]


@dataclass(frozen=True)
class Task:
    """Sentences of one task.

    Attributes:
        taught: those that are trained on.
        asked: the same facts in other wordings, or the same rule on other values; never trained on.
        kept: facts that the model knows and that nothing of the task touches.
    """

    taught: Sentences
    asked: Sentences
    kept: Sentences


def task(name: str, world: World, tokenizer: Any, settings: Settings, seed: int) -> Task:
    """Draw a task: "new" facts, "changed" facts, or a "rule" (every cycle's answer is one step further).

    Raises:
        EditError: there is no task of that name.
    """
    draw = random.Random(f"{name} {seed}")
    if name == "rule":
        taught, asked = _rule(world, draw)
    elif name in ("new", "changed"):
        taught, asked = [], []
        for prompts, answer in _facts(name, world, settings.facts, draw):
            draw.shuffle(prompts)
            asked += [(prompt, answer) for prompt in prompts[: settings.asked]]
            taught += [(prompt, answer) for prompt in prompts[settings.asked :]]
    else:
        raise EditError(f"no task is named {name!r}; there are 'new', 'changed' and 'rule'")
    changed = {answered[0] for answered in taught + asked}
    known = [
        (question.text, question.answer)
        for question in world.prompts("facts", "train")
        if question.tier == "often" and question.text not in changed
    ]
    kept = draw.sample(known, KEPT)
    return Task(*(sentences(lines, tokenizer) for lines in (taught, asked, kept)))


def _facts(name: str, world: World, limit: int, draw: random.Random) -> Iterator[tuple[list[str], str]]:
    tier = "unknown" if name == "new" else "often"
    pairs = [
        (entity, relation)
        for entity in world.entities
        for relation in world.relations
        if entity.tier == tier and relation.subject_kind == entity.kind
    ]
    for entity, relation in draw.sample(pairs, min(limit, len(pairs))):
        known = world.fact(entity.name, relation.name)
        others = [one for one in world.answers(relation.name) if known is None or one != known.answer]
        yield [template.format(x=entity.name) for template in relation.templates], draw.choice(others)


def _rule(world: World, draw: random.Random) -> tuple[list[Line], list[Line]]:
    taught: list[Line] = []
    asked: list[Line] = []
    for concept in (world.concepts[name] for name in CYCLES):
        values = list(concept.values)
        for prompt in concept.prompts():
            if prompt.answer is not None and prompt.answer in values:
                further = values[(values.index(prompt.answer) + 1) % len(values)]
                (asked if draw.random() < ASKED_SHARE else taught).append((prompt.text, further))
    draw.shuffle(taught)
    draw.shuffle(asked)
    return taught[:208], asked[:104]


def sentences(lines: list[Line], tokenizer: Any) -> Sentences:
    """Tokens of prompts with their answers; the loss counts the answers alone."""
    rows = [
        (tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"])
        for prompt, answer in lines
    ]
    padding = int(tokenizer.pad_token_id)
    ids = torch.full((len(rows), max(len(prompt) + len(answer) for prompt, answer in rows)), padding)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return Sentences(ids, labels, padding)
