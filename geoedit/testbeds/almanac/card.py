"""The card of an almanac model: what it knows, measured on held-out prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from geoedit.testbeds.almanac.language import Question
from geoedit.testbeds.almanac.trace import causal_trace
from geoedit.testbeds.almanac.world import World


def encode(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], device: torch.device | str
) -> dict[str, Tensor]:
    """Texts as one left-padded batch."""
    batch = tokenizer(
        list(texts), return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
    )
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def is_right(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    answers: Sequence[str],
    batch: int = 256,
) -> Bool[Tensor, " prompts"]:
    """Whether the model's greedy continuation of each text begins with its answer, every token of it."""
    right = torch.zeros(len(texts), dtype=torch.bool)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].split()))
    begin = len(tokenizer("").input_ids)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        # greedy decoding gives the answer exactly when each of its tokens is the likeliest after those before
        full = encode(tokenizer, [f"{texts[i]} {answers[i]}" for i in chosen], model.device)
        positions = (full["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        guesses = model(**full, position_ids=positions).logits[:, :-1].argmax(-1)
        hits = guesses == full["input_ids"][:, 1:]
        for row, i in enumerate(chosen):
            length = len(tokenizer(answers[i]).input_ids) - begin
            right[i] = bool(hits[row, -length:].all())
    return right


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, questions: Iterable[Question]
) -> dict[str, Any]:
    """Share of right answers: over all, by kind, and by tier for facts; true and false weigh alike."""
    asked = list(questions)
    right = is_right(model, tokenizer, [q.text for q in asked], [q.answer for q in asked])
    groups: dict[str, dict[str, list[bool]]] = {
        "kind": defaultdict(list),
        "tier": defaultdict(list),
        "answer": defaultdict(list),
    }
    for question, hit in zip(asked, right.tolist(), strict=True):
        groups["kind"][question.kind].append(hit)
        groups["tier"][question.tier].append(hit)
        groups["answer"][question.answer].append(hit)

    def means(group: dict[str, list[bool]]) -> dict[str, float]:
        return {name: round(sum(hits) / len(hits), 4) for name, hits in sorted(group.items())}

    result: dict[str, Any] = {
        "prompts": len(asked),
        "accuracy": round(right.float().mean().item(), 4),
        "by_kind": means(groups["kind"]),
    }
    if asked and asked[0].family == "facts":
        result["by_tier"] = means(groups["tier"])
    if asked and asked[0].family == "statements":
        by_answer = means(groups["answer"])
        result |= {"accuracy": round(sum(by_answer.values()) / len(by_answer), 4), "by_answer": by_answer}
    return result


FAMILIES = ("facts", "cycles", "lines", "grid", "categories", "statements", "in_context")


def make_card(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World) -> dict[str, Any]:
    """Accuracy on held-out prompts and on questions unseen in any wording, and the causal trace."""
    card: dict[str, Any] = {
        "world": world.fingerprint,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    card["held_out"] = {
        family: accuracy(model, tokenizer, world.prompts(family, "held_out")) for family in FAMILIES
    }
    card["unseen"] = {
        family: accuracy(model, tokenizer, world.prompts(family, "unseen"))
        for family in ("cycles", "lines", "grid")
    }
    card["causal_trace"] = causal_trace(model, tokenizer, world)
    return card
