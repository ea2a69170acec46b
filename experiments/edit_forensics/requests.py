"""What is to be edited: subjects of the almanac, each with one relation and an object that is not true."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from geoedit.testbeds import World
from geoedit.testbeds.almanac.language import fill


@dataclass(frozen=True)
class Request:
    """One edit: say of the subject, asked by the template, that the answer is the object."""

    subject: str
    relation: str
    template: str
    object: str
    was: str


@dataclass(frozen=True)
class Prompts:
    """Token ids of texts, padded on the right, and the place of each subject's last token.

    Attributes:
        ids: (texts, tokens). mask: 1 where a token is. subject: the place of the subject's last token.
        labels: the answer's tokens at the places that predict them, -100 elsewhere.
    """

    ids: Tensor
    mask: Tensor
    subject: Tensor
    labels: Tensor


def draw_requests(world: World, count: int, seed: int) -> list[Request]:
    """As many edits, no two of one subject, each of a fact that the model was often told."""
    draw = random.Random(seed)
    told = [fact for fact in world.facts if fact.tier in ("often", "sometimes")]
    draw.shuffle(told)
    found: dict[str, Request] = {}
    for fact in told:
        if fact.subject.name not in found:
            relation = world.relation(fact.relation)
            wrong = draw.choice([one for one in world.answers(fact.relation) if one != fact.answer])
            template = draw.choice(relation.templates)
            found[fact.subject.name] = Request(fact.subject.name, fact.relation, template, wrong, fact.answer)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"{count} edits of different subjects are asked for; the almanac has {len(found)}")


def tokens_of(tokenizer: object, parts: Sequence[tuple[str, str, str, str]], device: torch.device) -> Prompts:
    """Tokens of (prefix, template, subject, answer). One word is one token; a start token may stand before.

    The words are counted here, and not asked from the tokenizer's offsets, so that the place of the subject
    is found in another way than the tracing does.
    """
    rows: list[list[int]] = []
    places, starts = [], []
    for prefix, template, subject, answer in parts:
        text, spans = fill(template, x=subject)
        before = prefix.split()
        words = [*before, *text.split()]
        ids = list(tokenizer(" ".join([*words, *answer.split()]))["input_ids"])  # type: ignore[operator]
        extra = len(ids) - len(words) - len(answer.split())
        places.append(extra + len(before) + spans[0][1])
        starts.append(extra + len(words))
        rows.append(ids)
    width = max(map(len, rows))
    padded = torch.zeros(len(rows), width, dtype=torch.long)
    mask, labels = torch.zeros_like(padded), torch.full_like(padded, -100)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
        start, end = starts[index], len(row)
        labels[index, start - 1 : end - 1] = padded[index, start:end]
    return Prompts(*(tensor.to(device) for tensor in (padded, mask, torch.tensor(places), labels)))
