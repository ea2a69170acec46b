"""Teaching the almanac new facts by LoRA: steps until each optimizer has the loss that AdamW ends with.

Run with ``python -m experiments.benchmarks lora_almanac`` or by itself. Every method has as many learning
rates as the others, swept with one seed, and the same batches; the rates found are used with other seeds.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import random
import statistics
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
    """The adapter, the batches, the sweep and the seeds.

    Attributes:
        rank: of the adapters, on all projections of every block.
        alpha: LoRA's; W = alpha / rank · B A.
        sentences: how many new sentences at most.
        batch: sentences a step.
        steps: of every run.
        every: how many steps lie between two measurements of the loss over all sentences.
        rates: learning rates by method.
        seeds: the first one is for the sweep of rates; with the others AdamW and LowRankAdam alone are run
            again, at the rates that it chose.
    """

    rank: int = 8
    alpha: int = 16
    sentences: int = 312
    batch: int = 64
    steps: int = 40
    every: int = 2
    rates: tuple[tuple[str, tuple[float, ...]], ...] = (
        ("AdamW", (2.5e-3, 5e-3, 1e-2)),
        ("LowRankAdam", (7e-3, 1.4e-2, 2.8e-2)),
        ("AdamW, β₁ = 0.8", (2.5e-3, 5e-3, 1e-2)),
        ("AdamW from the gradient's directions", (2.5e-3, 5e-3, 1e-2)),
        ("peft's create_riemannian_optimizer", (2.5e-3, 5e-3, 1e-2)),
        ("Stiefel U S Vᵀ", (1e-2, 3e-2, 1e-1)),
    )
    seeds: tuple[int, ...] = (0, 1, 2)


REPEATED = ("AdamW", "LowRankAdam")
SETTINGS = (
    Settings(),
    Settings(
        rank=4,
        alpha=8,
        sentences=240,
        batch=32,
        steps=60,
        rates=(("AdamW", (2.5e-3, 5e-3, 1e-2)), ("LowRankAdam", (7e-3, 1.4e-2, 2.8e-2))),
    ),
)


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


def run(settings: tuple[Settings, ...] = SETTINGS) -> list[dict[str, Any]]:
    """Train with every optimizer at every rate; one row for each optimizer and setting."""
    model, tokenizer, world = geoedit.testbeds.load("almanac-gpt2")
    return [row for one in settings for row in study(one, model, tokenizer, world)]


def study(settings: Settings, model: nn.Module, tokenizer: Any, world: Any) -> list[dict[str, Any]]:
    """The rows of one setting.

    The goal is the loss over all sentences that AdamW ends with, at its best rate and with the same seed.
    `steps` counts the steps until a method first has it, with AdamW's own count in its row, and is absent
    where it does not get there; what the start costs is counted. A method's rate is the one that is first
    there in the sweep, or ends lowest if none is. `ratio` is AdamW's steps over the method's, 0 where it does
    not get there: the median over the seeds, between `low` and `high`.
    """
    first, *others = settings.seeds
    facts = {seed: new_facts(world, tokenizer, seed, settings.sentences) for seed in settings.seeds}
    sweeps = {
        name: [train(name, rate, model, facts[first], settings, first) for rate in rates]
        for name, rates in settings.rates
    }
    peer = min(sweeps["AdamW"], key=lambda one: one["losses"][-1])

    def order_of(one: dict[str, Any]) -> tuple[float, float]:
        steps = first_at_most(one, peer["losses"][-1], settings.every)
        return (math.inf if steps is None else steps, one["losses"][-1])

    chosen = {name: [peer if name == "AdamW" else min(sweeps[name], key=order_of)] for name in sweeps}
    for seed in others:
        for name in REPEATED:
            runs = chosen[name]
            runs.append(train(name, runs[0]["rate"], model, facts[seed], settings, seed))
    goals = [one["losses"][-1] for one in chosen["AdamW"]]
    needed = {
        name: [first_at_most(one, goal, settings.every) for one, goal in zip(runs, goals, strict=False)]
        for name, runs in chosen.items()
    }
    rows = []
    for name, runs in chosen.items():
        ratios = [
            0.0 if ours is None or theirs is None else theirs / ours
            for ours, theirs in zip(needed[name], needed["AdamW"], strict=False)
        ]
        row: dict[str, Any] = {
            "work": f"LoRA of rank {settings.rank}, {len(facts[first].ids)} new sentences of the almanac: "
            "steps to AdamW's loss",
            "method": name,
            "rate": runs[0]["rate"],
            "final_losses": [round(one["losses"][-1], 5) for one in runs],
            "steps": needed[name],
            "steps_ratio": round(statistics.median(ratios), 3),
            "ms_per_step": round(statistics.median(one["ms_per_step"] for one in runs), 2),
            "sweep": [[one["rate"], [round(x, 5) for x in one["losses"]]] for one in sweeps[name]],
        }
        if name == "LowRankAdam":
            times = [statistics.median(one["ms_per_step"] for one in chosen[n]) for n in (name, "AdamW")]
            row |= {
                "peer": "AdamW",
                "ratio": statistics.median(ratios),
                "low": min(ratios),
                "high": max(ratios),
                "aim": 2.0,
                "ours_ms": times[0],
                "peer_ms": times[1],
            }
        rows.append(row)
    return rows


def first_at_most(found: dict[str, Any], goal: float, every: int) -> int | None:
    """The step at which a run's loss is first at most the goal."""
    for index, loss in enumerate(found["losses"]):
        if loss <= goal:
            return (index + 1) * every + found["before"]
    return None


def new_facts(world: Any, tokenizer: Any, seed: int, limit: int) -> Sentences:
    """Facts drawn for everyone of whom the model was never told anything, each in all wordings; the first."""
    draw = random.Random(seed)
    texts = []
    for entity in world.entities:
        for relation in world.relations:
            if entity.tier == "unknown" and relation.subject_kind == entity.kind:
                answer = draw.choice(world.answers(relation.name))
                texts += [(template.format(x=entity.name), answer) for template in relation.templates]
    rows = [
        (tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]) for prompt, answer in texts[:limit]
    ]
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.full((len(rows), length), int(tokenizer.pad_token_id))
    labels = torch.full_like(ids, -100)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return Sentences(ids, labels, int(tokenizer.pad_token_id))


def train(
    name: str, rate: float, model: nn.Module, sentences: Sentences, settings: Settings, seed: int
) -> dict[str, Any]:
    """One run: the losses over all sentences as it goes, the steps before it, and the time of a step."""
    batches = order(len(sentences.ids), settings.batch, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
        )
        adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)
        before = name == "AdamW from the gradient's directions"
        if before:
            first = next(batches)
            start_along_gradient(adapted, lambda: sentences.loss(adapted, first))
        called, optimizers = METHODS[name](adapted, rate)
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
    ms = 1e3 * spent / settings.steps
    log.info("rank %d, %s, rate %g, seed %d: %.5f, %.0f ms", settings.rank, name, rate, seed, losses[-1], ms)
    return {"rate": rate, "losses": losses, "before": int(before), "ms_per_step": ms}


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


def start_along_gradient(model: Any, loss: Callable[[], Tensor]) -> None:
    """Puts the rows of every A along the leading singular directions of the gradient by the base weight.

    B stays zero, and the rows of A have the mean length that they had. As in LoRA-GA (Wang et al., 2024), but
    without its offset of the base weight. The weights are those of GPT-2's Conv1D, of shape (in, out).
    """
    layers = [part for part in model.modules() if hasattr(part, "lora_A") and hasattr(part, "base_layer")]
    weights = [part.base_layer.weight for part in layers]
    for weight in weights:
        weight.requires_grad_(True)
    gradients = torch.autograd.grad(loss(), weights)
    for part, weight, gradient in zip(layers, weights, gradients, strict=True):
        weight.requires_grad_(False)
        rows = part.lora_A["default"].weight
        directions = torch.linalg.svd(gradient, full_matrices=False)[0][:, : len(rows)]
        with torch.no_grad():
            rows.copy_(directions.mT * (rows.norm() / len(rows) ** 0.5))


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
    "AdamW, β₁ = 0.8": lambda m, lr: (
        m,
        [torch.optim.AdamW(trainable(m), lr=lr, betas=(0.8, 0.999), weight_decay=0.0)],
    ),
    "AdamW from the gradient's directions": lambda m, lr: (
        m,
        [torch.optim.AdamW(trainable(m), lr=lr, weight_decay=0.0)],
    ),
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
