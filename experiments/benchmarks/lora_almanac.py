"""Teaching the almanac new facts by LoRA: steps until each optimizer has the loss that AdamW ends with.

Run with ``python -m experiments.benchmarks lora_almanac`` or by itself. Each optimizer has a sweep of
learning rates, the same batches and the same start.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import geoopt
import peft
import torch
from peft.optimizers import create_riemannian_optimizer
from torch import Tensor, nn

import geoedit
import manifolds
from manifolds.optim.lora_pairs import lora_pairs

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The adapter, the batches, the sweep and the seed.

    Attributes:
        rank: of the adapters, on all projections of every block.
        batch: sentences a step.
        steps: of every run.
        every: how many steps lie between two measurements of the loss over all new facts.
        rates: learning rates by method.
        patience: seconds for the whole study; rates that would start later are left out, and said so.
    """

    rank: int = 8
    alpha: int = 16
    batch: int = 64
    steps: int = 40
    every: int = 4
    rates: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("AdamW", (3e-3, 1e-2, 2e-2)),
        ("LowRankAdam", (1e-2, 2e-2, 4e-2)),
        ("peft's create_riemannian_optimizer", (3e-3, 1e-2, 2e-2)),
        ("Stiefel U S Vᵀ", (1e-2, 3e-2, 1e-1)),
    )
    patience: float = 330.0
    seed: int = 0


@dataclass(frozen=True)
class Sentences:
    """Prompts with their answers: tokens, and the labels of the answers alone."""

    ids: Tensor
    labels: Tensor
    padding: int

    def loss(self, model: nn.Module, which: Tensor | slice = slice(None)) -> Tensor:
        """The mean cross-entropy of the answers' tokens."""
        ids, labels = self.ids[which], self.labels[which]
        logits = model(input_ids=ids, attention_mask=(ids != self.padding).long(), use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Train with every optimizer at every rate; one row for each optimizer at its best rate.

    `steps_to_adamw` counts the steps until the loss over all new facts is at most what AdamW ends with, and
    is absent where that is never reached; `aim` is half of AdamW's steps.
    """
    settings = settings or Settings()
    model, tokenizer, world = geoedit.testbeds.load("almanac-gpt2")
    sentences = new_facts(world, tokenizer, settings.seed)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _ in settings.rates}
    start, left_out = time.perf_counter(), []
    for position in range(max(len(rates) for _, rates in settings.rates)):
        for name, rates in settings.rates:
            if position >= len(rates):
                continue
            if time.perf_counter() - start > settings.patience:
                left_out.append([name, rates[position]])
                continue
            runs[name].append(train(name, rates[position], model, sentences, settings))
            log.info("%s %s: %s", name, rates[position], runs[name][-1]["losses"][-1])
    best = {name: min(found, key=lambda one: one["losses"][-1]) for name, found in runs.items() if found}
    goal = best["AdamW"]["losses"][-1]
    rows = []
    for name, one in best.items():
        reached = [r for r in (first_at_most(found, goal, settings.every) for found in runs[name]) if r]
        steps, rate, ms = min(reached, default=(None, None, 0.0))
        rows.append(
            {
                "work": f"LoRA of rank {settings.rank}, {len(sentences.ids)} new sentences of the almanac",
                "method": name,
                "best_rate": one["rate"],
                "final_loss": round(one["losses"][-1], 5),
                "goal": round(goal, 5),
                "steps_to_adamw": steps,
                "rate_to_adamw": rate,
                "seconds_to_adamw": None if steps is None else round(steps * ms / 1e3, 3),
                "ms_per_step": round(one["ms_per_step"], 2),
                "aim": settings.steps / 2 if name == "LowRankAdam" else None,
                "sweep": [[f["rate"], [round(x, 5) for x in f["losses"]]] for f in runs[name]],
                "left_out": [rate for other, rate in left_out if other == name],
            }
        )
    return rows


def first_at_most(found: dict[str, Any], goal: float, every: int) -> tuple[int, float, float] | None:
    """The step at which a run's loss is first at most the goal, with its rate and time a step."""
    for index, loss in enumerate(found["losses"]):
        if loss <= goal:
            return (index + 1) * every, found["rate"], found["ms_per_step"]
    return None


def new_facts(world: Any, tokenizer: Any, seed: int) -> Sentences:
    """Facts drawn for everyone of whom the model was never told anything, each in all wordings."""
    draw = random.Random(seed)
    texts = []
    for entity in world.entities:
        for relation in world.relations:
            if entity.tier == "unknown" and relation.subject_kind == entity.kind:
                answer = draw.choice(world.answers(relation.name))
                texts += [(template.format(x=entity.name), answer) for template in relation.templates]
    rows = [(tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in texts]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), int(tokenizer.pad_token_id))
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return Sentences(ids, labels, int(tokenizer.pad_token_id))


def train(
    name: str, rate: float, model: nn.Module, sentences: Sentences, settings: Settings
) -> dict[str, Any]:
    """One run: the losses over all sentences as it goes, and the time of a step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
        )
        adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)
        called, optimizers = METHODS[name](adapted, rate)
    batches = order(len(sentences.ids), settings.batch, settings.seed)
    losses, spent = [], 0.0
    for step in range(settings.steps):
        which = next(batches)
        started = time.perf_counter()
        for optimizer in optimizers:
            optimizer.zero_grad()
        sentences.loss(called, which).backward()
        for optimizer in optimizers:
            optimizer.step()
        spent += time.perf_counter() - started
        if (step + 1) % settings.every == 0:
            with torch.no_grad():
                losses.append(float(sentences.loss(called)))
            losses[-1] = losses[-1] if math.isfinite(losses[-1]) else 1e9
    return {"rate": rate, "losses": losses, "ms_per_step": 1e3 * spent / settings.steps}


def order(count: int, batch: int, seed: int) -> Iterator[Tensor]:
    """Batches without end; every sentence once a round."""
    generator = torch.Generator().manual_seed(seed + 1)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // batch * batch].split(batch)


class StiefelPairs(nn.Module):
    """A PEFT model whose updates are U S Vᵀ with orthonormal U and V, as in StelLA; S is zero at first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        names = {id(p): name for name, p in model.named_parameters()}
        self.names, self.frames, self.cores = [], nn.ParameterList(), nn.ParameterList()
        stiefel = manifolds.Stiefel()
        for pair in lora_pairs(model):
            rank = pair.left.shape[1]
            self.names.append((names[id(pair.left)], names[id(pair.right)]))
            for rows in (pair.left.shape[0], pair.right.shape[1]):
                self.frames.append(geoopt.ManifoldParameter(stiefel.random(rows, rank), manifold=stiefel))
            self.cores.append(nn.Parameter(torch.zeros(rank, rank)))

    def forward(self, **inputs: Any) -> Any:
        """The model's output with the present U S Vᵀ in the place of B A."""
        factors = {}
        for index, (left, right) in enumerate(self.names):
            factors[left] = self.frames[2 * index] @ self.cores[index]
            factors[right] = self.frames[2 * index + 1].mT
        return torch.func.functional_call(self.model, factors, kwargs=inputs)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """What an adapter trains."""
    return [p for p in model.parameters() if p.requires_grad]


def stiefel(model: nn.Module, rate: float) -> tuple[nn.Module, list[Any]]:
    """Riemannian Adam on U and V, Adam on S."""
    pairs = StiefelPairs(model)
    groups = [{"params": list(pairs.frames)}, {"params": list(pairs.cores)}]
    return pairs, [manifolds.optim.RiemannianAdam(groups, lr=rate)]


METHODS: dict[str, Callable[[Any, float], tuple[nn.Module, list[Any]]]] = {
    "AdamW": lambda m, lr: (m, [torch.optim.AdamW(trainable(m), lr=lr, weight_decay=0.0)]),
    "LowRankAdam": lambda m, lr: (m, [manifolds.optim.LowRankAdam(m, lr=lr)]),
    "peft's create_riemannian_optimizer": lambda m, lr: (
        m,
        [create_riemannian_optimizer(m, torch.optim.AdamW, lr=lr, weight_decay=0.0)],
    ),
    "Stiefel U S Vᵀ": stiefel,
}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    log.info("%s", json.dumps(run(), indent=1, ensure_ascii=False))
