"""One LoRA on one matrix: what it learns in a fixed number of steps; and every matrix in turn."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from torch import Tensor, nn

import geoedit
from experiments.benchmarks.lora_almanac import Sentences, order
from experiments.spectral_entropy_predicts_peft.settings import Settings
from experiments.spectral_entropy_predicts_peft.tasks import Task, task
from geoedit.diagnosis.result import write_text

log = logging.getLogger(__name__)
PLACES = {
    "c_attn": "attention in",
    "q_proj": "attention in",
    "k_proj": "attention in",
    "v_proj": "attention in",
    "attn.c_proj": "attention out",
    "o_proj": "attention out",
    "c_fc": "MLP in",
    "gate_proj": "MLP in",
    "up_proj": "MLP in",
    "mlp.c_proj": "MLP out",
    "down_proj": "MLP out",
}
"""The matrices of a block, by how their module's path ends, and what both architectures call alike."""


@dataclass(frozen=True)
class Place:
    """One matrix of a model.

    Attributes:
        path: of its module. matrix: the end of the path, as in `PLACES`. kind: what both architectures share.
        depth: of its block, from 0 for the first to 1 for the last.
    """

    path: str
    matrix: str
    kind: str
    depth: float


def places(model: nn.Module, limit: int | None = None) -> list[Place]:
    """Every matrix of every block (of `limit` blocks evenly spread), in the order of the model."""
    found = []
    blocks = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    chosen = set(range(blocks)) if limit is None else {i * (blocks - 1) // (limit - 1) for i in range(limit)}
    for path, _ in model.named_modules():
        numbers = [int(part) for part in path.split(".") if part.isdigit()]
        for end, kind in PLACES.items():
            if path.endswith("." + end) and numbers[0] in chosen:
                found.append(Place(path, end, kind, numbers[0] / (blocks - 1)))
    return found


def runs(settings: Settings) -> Iterator[dict[str, Any]]:
    """One row for every run, from the folder of finished runs where they are there."""
    for seed in settings.seeds:
        for name in settings.models:
            model, tokenizer, world = geoedit.testbeds.load(name)
            for taught in settings.tasks:
                given = task(taught, world, tokenizer, settings, seed)
                before: dict[str, float] = {}
                steepness: dict[str, dict[str, float]] = {}
                for place in places(model, settings.blocks):
                    rates = settings.rates
                    if seed != settings.seeds[0]:
                        rates = (best_rate(settings, name, taught, place),)
                    rows = _read(settings, name, taught, place, seed)
                    if rows is None:
                        before = before or losses(model, given)
                        steepness = steepness or gradients(model, given.taught, settings)
                        known = {f"{part}_before": round(value, 5) for part, value in before.items()}
                        known |= steepness[place.path]
                        rows = [
                            {**train(model, place, given, rate, settings, seed), **known} for rate in rates
                        ]
                        _write(settings, name, taught, place, seed, rows)
                        log.info("%s, %s, seed %d, %s: %s", name, taught, seed, place.path, rows[-1])
                    for row in rows:
                        yield {"model": name, "task": taught, "seed": seed, **vars(place), **row}


def best_rate(settings: Settings, name: str, taught: str, place: Place) -> float:
    """The rate that left the least loss on the trained sentences with the first seed."""
    rows = _read(settings, name, taught, place, settings.seeds[0])
    if rows is None:
        raise geoedit.EditError("several seeds need a folder for finished runs: Settings(runs=FOLDER)")
    return float(min(rows, key=lambda row: row["taught"])["rate"])


def train(
    model: nn.Module, place: Place, given: Task, rate: float, settings: Settings, seed: int
) -> dict[str, float]:
    """Train a LoRA on one matrix; the losses after it, in nats a token, and the share of right answers."""
    started = time.perf_counter()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=[place.path],
            fan_in_fan_out=type(model.get_submodule(place.path)).__name__ == "Conv1D",
        )
        adapted: Any = peft.get_peft_model(copy.deepcopy(model), config)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=rate)
    batches = order(len(given.taught.ids), settings.batch, seed)
    for _ in range(settings.steps):
        optimizer.zero_grad()
        given.taught.loss(adapted, next(batches)).backward()
        optimizer.step()
    after = losses(adapted, given)
    row = {"rate": rate, "seconds": round(time.perf_counter() - started, 2)}
    return row | {part: round(value if math.isfinite(value) else 1e9, 5) for part, value in after.items()}


@torch.no_grad()
def losses(model: nn.Module, given: Task) -> dict[str, float]:
    """The loss on what is taught, asked and kept, and the share of asked answers that are right."""
    found = {part: float(getattr(given, part).loss(model)) for part in ("taught", "asked", "kept")}
    return found | {"right": right_answers(model, given.asked)}


def right_answers(model: nn.Module, asked: Sentences) -> float:
    """The share of sentences whose answer's tokens are all the likeliest."""
    mask = (asked.ids != asked.padding).long()
    guess = model(input_ids=asked.ids, attention_mask=mask, use_cache=False).logits[:, :-1].argmax(-1)
    labels = asked.labels[:, 1:]
    return float(((guess == labels) | (labels < 0)).all(1).float().mean())


def gradients(model: nn.Module, taught: Sentences, settings: Settings) -> dict[str, dict[str, float]]:
    """The loss's gradient by each matrix, before training: its norm, and the best rank-r part's length.

    These need the task. They are a reference for what the base's spectrum alone tells, not a rival of it.
    """
    chosen = places(model, settings.blocks)
    weights: list[Tensor] = [model.get_submodule(place.path).weight for place in chosen]  # type: ignore[misc]
    wanted = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_(True)
    found = torch.autograd.grad(taught.loss(model), weights)
    for weight, was in zip(weights, wanted, strict=True):
        weight.requires_grad_(was)
    return {
        place.path: {
            "gradient": float(gradient.norm()),
            "gradient_nuclear": float(torch.linalg.svdvals(gradient)[: settings.rank].sum()),
        }
        for place, gradient in zip(chosen, found, strict=True)
    }


def _file(settings: Settings, name: str, taught: str, place: Place, seed: int) -> Path | None:
    if settings.runs is None:
        return None
    facts = settings.to_dict()
    chosen = ("rank", "alpha", "rates", "steps", "batch", "facts", "asked")
    key = json.dumps([{part: facts[part] for part in chosen}, geoedit.testbeds.card(name)["world"]])
    mark = hashlib.sha256(key.encode()).hexdigest()[:10]
    return settings.runs / f"{name}-{taught}-{seed}-{place.path}-{mark}.json"


def _read(settings: Settings, name: str, taught: str, place: Place, seed: int) -> list[dict[str, Any]] | None:
    path = _file(settings, name, taught, place, seed)
    return None if path is None or not path.is_file() else list(json.loads(path.read_text("utf-8")))


def _write(
    settings: Settings, name: str, taught: str, place: Place, seed: int, rows: list[dict[str, Any]]
) -> None:
    path = _file(settings, name, taught, place, seed)
    if path is not None:
        write_text(path, json.dumps(rows) + "\n")
