"""Where an almanac model keeps its facts: swap a state between two subjects and see what the answer does."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from geoedit.activations import collect, run_with
from geoedit.anatomy import anatomy
from geoedit.concept import Prompt, Template
from geoedit.site import Site
from geoedit.testbeds.almanac.world import Relation, World

DRAWS_PER_PAIR = 20  # pairs of one answer, or of names of different length, are drawn again


@dataclass(frozen=True)
class Pairs:
    """Prompts about two subjects each, in the same words; ``donor`` gives its states to ``base``."""

    base: list[Prompt]
    donor: list[Prompt]

    def first_tokens(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """The first token of each side's answer."""
        sides = ([prompt.answer_ids(tokenizer)[0] for prompt in side] for side in (self.base, self.donor))
        base, donor = map(torch.tensor, sides)
        return base, donor


def draw_pairs(world: World, relation: Relation, count: int, draw: random.Random) -> Pairs:
    """Pairs of often told facts whose answers begin differently and whose subjects are of one length."""
    facts = world.facts_of(relation.name, "often")
    base: list[Prompt] = []
    donor: list[Prompt] = []
    for _ in range(DRAWS_PER_PAIR * count):
        a, b = draw.sample(facts, 2)
        template = Template(draw.choice(relation.templates).replace("{x}", "{value}"))
        same_length = len(a.subject.name.split()) == len(b.subject.name.split())
        if same_length and a.answer.split()[0] != b.answer.split()[0]:
            for side, fact in ((base, a), (donor, b)):
                text, span = template.fill(fact.subject.name)
                side.append(Prompt(text, fact.subject.name, fact.answer, span=span))
        if len(base) == count:
            break
    return Pairs(base, donor)


def carried(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Pairs, sites: Sequence[Site]
) -> tuple[int, Float[Tensor, " sites"]]:
    """How many pairs are answered rightly on both sides, and in what share the answer follows the swap."""
    before, wanted = pairs.first_tokens(tokenizer)

    def answers(prompts: list[Prompt], states: dict[Site, Tensor]) -> Tensor:
        return run_with(model, tokenizer, prompts, states, batch_size=100, progress=False).argmax(-1)

    known = (answers(pairs.base, {}) == before) & (answers(pairs.donor, {}) == wanted)
    donated = collect(model, tokenizer, pairs.donor, sites, batch_size=100, progress=False)
    follow = [(answers(pairs.base, {site: donated[site]}) == wanted)[known].float().mean() for site in sites]
    return int(known.sum()), torch.stack(follow)


def causal_trace(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, pairs: int = 200, seed: int = 0
) -> dict[str, Any]:
    """Swap one token's state between two subjects, block by block, and count how often the answer follows.

    For two well known subjects of one relation, in one wording and of one length, whose answers differ, the
    state of subject B replaces that of subject A after the embedding and after each block: once at the
    subject's last token, once at the prompt's last token. *Carried* is the share of prompts whose likeliest
    next word is then the first word of B's answer; only pairs that the model answers rightly are counted. The
    idea is the interchange of Vig et al. (2020, arXiv:2004.12265) and Meng et al. (2022, arXiv:2202.05262).
    """
    draw = random.Random(seed)
    count = len(anatomy(model).stack().blocks)
    by_relation: dict[str, Any] = {}
    shares: dict[str, list[Tensor]] = {"subject": [], "last": []}
    for relation in world.relations:
        drawn = draw_pairs(world, relation, pairs, draw)
        entry: dict[str, Any] = {}
        for place, token in (("subject", "value"), ("last", "last")):
            sites = [
                Site(stream="embedding", token=token),
                *(Site(block, token=token) for block in range(count)),
            ]
            entry["pairs"], share = carried(model, tokenizer, drawn, sites)
            entry[place] = _by_block(share)
            shares[place].append(share)
        by_relation[relation.name] = entry
    trace: dict[str, Any] = {place: _by_block(torch.stack(rows).mean(0)) for place, rows in shares.items()}
    blocks = trace["subject"]["blocks"]
    best = max(range(count // 3, count - count // 3), key=lambda block: blocks[block])
    trace["middle_third"] = {"best_block": best, "carried_at_subject": blocks[best]}
    return {**trace, "by_relation": by_relation}


def _by_block(share: Float[Tensor, " sites"]) -> dict[str, Any]:
    rounded = [round(number, 4) for number in share.tolist()]
    return {"embedding": rounded[0], "blocks": rounded[1:]}
