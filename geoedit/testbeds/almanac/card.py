"""The card of an almanac model: what it knows, measured on held-out prompts, and where it knows it."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from geoedit.testbeds.almanac.language import Question
from geoedit.testbeds.almanac.world import Fact, World


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


def _blocks(model: PreTrainedModel) -> nn.ModuleList:
    from geoedit.testbeds.almanac.recipe import blocks_of

    return blocks_of(model)


@torch.no_grad()
def _swap(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    module: nn.Module,
    rows: Tensor,
    positions: Tensor,
    states: Tensor,
) -> Float[Tensor, "batch vocabulary"]:
    """The next-word logits when ``module``'s output at the given positions is replaced."""

    def replace(_: nn.Module, __: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, Tensor) else output[0]).clone()
        hidden[rows, positions] = states
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    handle = module.register_forward_hook(replace)
    try:
        return model(**inputs).logits[:, -1]
    finally:
        handle.remove()


@torch.no_grad()
def causal_trace(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, pairs: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Swap one token's state between two subjects, block by block, and count how often the answer follows.

    For two known subjects of one relation, one wording and one length, whose answers differ, the state of
    subject B replaces that of subject A after the embedding and after each block, once at the subject's last
    token and once at the prompt's last token. *Carried* is the share of prompts whose likeliest next word is
    then the first word of B's answer. Only prompts that the model answers rightly for both are counted.
    """
    draw = random.Random(seed)
    known = {relation.name: world.facts_of(relation.name, "often") for relation in world.relations}
    by_relation: dict[str, Any] = {}
    totals: dict[str, list[list[float]]] = {"subject": [], "last": []}
    for relation in world.relations:
        texts: list[tuple[str, Fact, str, Fact, int]] = []
        for _ in range(pairs * 20):
            a, b = draw.sample(known[relation.name], 2)
            template = draw.choice(relation.templates)
            _, _, after = template.partition("{x}")
            if a.answer.split()[0] != b.answer.split()[0] and len(a.subject.name.split()) == len(
                b.subject.name.split()
            ):
                texts.append(
                    (
                        template.replace("{x}", a.subject.name),
                        a,
                        template.replace("{x}", b.subject.name),
                        b,
                        len(after.split()),
                    )
                )
            if len(texts) == pairs:
                break
        base = encode(tokenizer, [t[0] for t in texts], model.device)
        other = encode(tokenizer, [t[2] for t in texts], model.device)
        inputs = {**base, "position_ids": (base["attention_mask"].cumsum(-1) - 1).clamp(min=0)}
        donors = {**other, "position_ids": inputs["position_ids"]}
        unknown = tokenizer.unk_token_id
        begin = len(tokenizer("").input_ids)
        first = [[tokenizer(t[side].answer).input_ids[begin] for t in texts] for side in (1, 3)]
        target_a, target_b = (torch.tensor(ids, device=model.device) for ids in first)
        if unknown in (*first[0], *first[1]):
            raise ValueError("an answer of the world is not in the tokenizer's vocabulary")
        kept = (model(**inputs).logits[:, -1].argmax(-1) == target_a) & (
            model(**donors).logits[:, -1].argmax(-1) == target_b
        )
        rows = torch.arange(len(texts), device=model.device)
        length = base["input_ids"].shape[1]
        places = {
            "subject": torch.tensor([length - 1 - t[4] for t in texts], device=model.device),
            "last": torch.full_like(rows, length - 1),
        }
        hidden = model(**donors, output_hidden_states=True).hidden_states
        modules = [
            model.get_submodule("transformer.drop")
            if hasattr(model, "transformer")
            else model.get_input_embeddings(),
            *_blocks(model),
        ]
        captured: list[Tensor] = list(hidden[: len(modules) - 1])
        # transformers gives the last state after the final norm; take the last block's own output
        keep: list[Tensor] = []
        handle = modules[-1].register_forward_hook(
            lambda _, __, out, keep=keep: keep.append(out if isinstance(out, Tensor) else out[0])
        )
        try:
            model(**donors)
        finally:
            handle.remove()
        captured.append(keep[0])
        entry: dict[str, Any] = {"prompts": int(kept.sum())}
        for place, positions in places.items():
            carried = []
            for module, states in zip(modules, captured, strict=True):
                logits = _swap(model, inputs, module, rows, positions, states[rows, positions])
                carried.append(round((logits.argmax(-1) == target_b)[kept].float().mean().item(), 4))
            entry[place] = {"embedding": carried[0], "blocks": carried[1:]}
            totals[place].append(carried)
        by_relation[relation.name] = entry
    summary = {
        place: {
            "embedding": round(sum(row[0] for row in rows) / len(rows), 4),
            "blocks": [
                round(sum(column) / len(column), 4) for column in zip(*(row[1:] for row in rows), strict=True)
            ],
        }
        for place, rows in totals.items()
    }
    return {**summary, "by_relation": by_relation}


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
    trace = causal_trace(model, tokenizer, world)
    blocks = trace["subject"]["blocks"]
    third = range(len(blocks) // 3, len(blocks) - len(blocks) // 3)
    best = max(third, key=lambda block: blocks[block])
    trace["middle_third"] = {"best_block": best, "carried_at_subject": blocks[best]}
    card["causal_trace"] = trace
    return card
