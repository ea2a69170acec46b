"""The facts that are taught, and what the model knew before, as tokens with the answers marked."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from geoedit.testbeds import World

FAMILIES = ("facts", "cycles", "lines", "grid", "categories", "statements", "in_context")


@dataclass(frozen=True)
class Sentences:
    """Prompts with their answers.

    Attributes:
        ids: tokens, padded on the right.
        labels: the answers' tokens, -100 elsewhere.
        padding: the token that pads.
    """

    ids: Int[Tensor, "sentences tokens"]
    labels: Int[Tensor, "sentences tokens"]
    padding: int

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: Tensor | slice) -> Sentences:
        ids = self.ids[which]
        width = int((ids != self.padding).sum(-1).max()) if len(ids) else 0
        return Sentences(ids[:, :width], self.labels[which][:, :width], self.padding)

    def loss(self, model: nn.Module) -> Float[Tensor, ""]:
        """The mean cross-entropy of the answers' tokens."""
        return nn.functional.cross_entropy(self._logits(model).flatten(0, 1), self.labels[:, 1:].flatten())

    @torch.no_grad()
    def told(
        self, model: nn.Module, batch: int = 128
    ) -> tuple[Float[Tensor, " sentences"], Bool[Tensor, " sentences"]]:
        """For each sentence the surprise (nats) of its answer, and whether greedy decoding gives it."""
        surprise, right = torch.zeros(len(self)), torch.zeros(len(self), dtype=torch.bool)
        order = (self.ids != self.padding).sum(-1).argsort(stable=True)
        for which in order.split(batch):
            part = self[which]
            logits, labels = part._logits(model), part.labels[:, 1:]
            entropy = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            surprise[which] = entropy.view(labels.shape).sum(-1)
            right[which] = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1)
        return surprise, right

    def _logits(self, model: nn.Module) -> Tensor:
        real = (self.ids != self.padding).long()
        logits: Tensor = model(input_ids=self.ids, attention_mask=real, use_cache=False).logits
        return logits[:, :-1]


def encode(pairs: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> Sentences:
    """Prompts and their answers as tokens."""
    begin = len(tokenizer("")["input_ids"])
    rows = [
        (tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"][begin:]) for prompt, answer in pairs
    ]
    length = max((len(prompt) + len(answer) for prompt, answer in rows), default=0)
    padding = int(tokenizer.pad_token_id)
    ids = torch.full((len(rows), length), padding)
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return Sentences(ids, labels, padding)


def new_facts(world: World, tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[Sentences, Sentences]:
    """Facts drawn for everyone of whom the model was never told anything: to be taught, and held out.

    Every fact is taught in all its wordings but one, drawn for each; that one asks whether it was learned.
    """
    draw = random.Random(f"new facts {seed}")
    taught: list[tuple[str, str]] = []
    held_out: list[tuple[str, str]] = []
    for entity in world.entities:
        for relation in world.relations:
            if entity.tier != "unknown" or relation.subject_kind != entity.kind:
                continue
            answer = draw.choice(world.answers(relation.name))
            left_out = draw.randrange(len(relation.templates))
            for index, template in enumerate(relation.templates):
                (held_out if index == left_out else taught).append((template.format(x=entity.name), answer))
    return encode(taught, tokenizer), encode(held_out, tokenizer)


def known(world: World, tokenizer: PreTrainedTokenizerFast, model: Any, limit: int) -> dict[str, Sentences]:
    """Held-out prompts of each family that the model answers rightly before it is taught."""
    found = {}
    for family in FAMILIES:
        questions = world.prompts(family, "held_out")
        random.Random(f"known {family}").shuffle(questions)
        asked = encode([(q.text, q.answer) for q in questions[: 2 * limit]], tokenizer)
        right = asked.told(model)[1].nonzero().squeeze(-1)[:limit]
        found[family] = asked[right]
    return found


def batches(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Indices of batches without end; every sentence at most once a round."""
    generator = torch.Generator().manual_seed(seed)
    batch = min(batch, count)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // batch * batch].split(batch)
