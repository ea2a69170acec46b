"""Teaching a model new facts, by every method; one folder a run."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from experiments.low_rank_vs_full_rank.facts import Sentences, batches, known, new_facts
from experiments.low_rank_vs_full_rank.settings import Method, Settings
from geoedit import testbeds
from manifolds.optim import LowRankAdam

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pupil:
    """A model before it is taught, and what it knows then."""

    name: str
    model: Any
    tokenizer: Any
    world: Any
    known: dict[str, Sentences]

    @classmethod
    def load(cls, name: str, settings: Settings) -> Pupil:
        """A built-in model with the sentences that tell what it forgets."""
        model, tokenizer, world = testbeds.load(name)
        return cls(name, model, tokenizer, world, known(world, tokenizer, model, settings.known))


def train_all(settings: Settings) -> list[dict[str, Any]]:
    """Every run of the study: the sweep of rates, then all models and seeds at the rates that it chose.

    Rates are swept on the first model with the first seed; a method's rate is the one with the largest
    difference of what was learned and what was forgotten. Runs whose folder is there are read, not repeated.
    """
    pupils = [Pupil.load(name, settings) for name in settings.models]
    records, chosen = [], {}
    for method in settings.methods:
        sweep = [one_run(pupils[0], method, rate, settings.seeds[0], settings) for rate in method.rates]
        best = max(sweep, key=lambda record: record["learned"] - record["forgotten"])
        records += [{**record, "chosen": False} for record in sweep if record is not best]
        chosen[method.name] = best["rate"]
    for seed in settings.seeds:
        for pupil in pupils:
            for method in settings.methods:
                record = one_run(pupil, method, chosen[method.name], seed, settings)
                records.append({**record, "chosen": True})
    return records


def one_run(pupil: Pupil, method: Method, rate: float, seed: int, settings: Settings) -> dict[str, Any]:
    """The record of one run, trained now unless its folder is there."""
    folder = run_folder(settings, pupil.name, method.name, rate, seed)
    about = {
        "model": pupil.name,
        "method": method.name,
        "kind": method.kind,
        "rank": method.rank,
        "stages": method.stages,
        "rate": rate,
        "seed": seed,
        "steps": settings.steps,
        "batch": settings.batch,
        "warmup": settings.warmup,
        "alpha": settings.alpha,
        "known": settings.known,
    }
    if (folder / "record.json").is_file():
        record: dict[str, Any] = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        if {name: record.get(name) for name in about} != about:
            raise ValueError(f"{folder} holds a run of other settings; give another folder for the runs")
        return record
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    record = about | teach(pupil, method, rate, seed, settings, partial)
    (partial / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    log.info(
        "%s, %s, rate %g, seed %d: loss %.4f, learned %.2f, forgotten %.2f, %.0f s",
        pupil.name, method.name, rate, seed, record["loss"], record["learned"], record["forgotten"],
        record["seconds"],
    )  # fmt: skip
    return record


def run_folder(settings: Settings, model: str, method: str, rate: float, seed: int) -> Path:
    """Where a run lies."""
    plain = method.replace(" ", "-").replace("×", "x").lower()
    return settings.runs / model / f"{plain}_rate-{rate:g}_seed-{seed}"


def folder_of(record: dict[str, Any], settings: Settings) -> Path:
    """Where the run of a record lies."""
    return run_folder(settings, record["model"], record["method"], record["rate"], record["seed"])


def teach(
    pupil: Pupil, method: Method, rate: float, seed: int, settings: Settings, folder: Path
) -> dict[str, Any]:
    """Train a copy of the model, write its weights to a folder, and tell what it learned and forgot.

    `tuned.safetensors` holds all trained parameters of the merged model; `stage-1.safetensors` and so on what
    they were before each restart; `adapter` the adapter itself, where there is one alone.
    """
    taught, held_out = new_facts(pupil.world, pupil.tokenizer, seed)
    drawn = batches(len(taught), settings.batch, seed)
    model, losses, seconds = copy.deepcopy(pupil.model), [], 0.0
    base = {name: value.clone() for name, value in model.state_dict().items()}
    stage_steps = [len(part) for part in torch.arange(settings.steps).tensor_split(method.stages)]
    done = 0
    for stage, steps in enumerate(stage_steps, start=1):
        trained, optimizer = begin(model, method, rate, seed * 100 + stage, settings)
        started = time.perf_counter()
        for step in range(steps):
            share = schedule(done, step, settings)
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.zero_grad()
            loss = taught[next(drawn)].loss(trained)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
            done += 1
        seconds += time.perf_counter() - started
        if isinstance(trained, peft.PeftModel):
            if method.stages == 1:
                trained.save_pretrained(str(folder / "adapter"))
            model = trained.merge_and_unload()
        if stage < method.stages:
            write(model, base, folder / f"stage-{stage}.safetensors")
    write(model, base, folder / "tuned.safetensors")
    model.eval()
    return {
        **measured(model, taught, held_out, pupil.known),
        "losses": [round(value, 5) for value in losses],
        "seconds": round(seconds, 2),
    }


def begin(
    model: Any, method: Method, rate: float, seed: int, settings: Settings
) -> tuple[Any, torch.optim.Optimizer]:
    """What is to be trained, and its optimizer: AdamW without weight decay, or `LowRankAdam`."""
    if method.kind == "full":
        model.requires_grad_(True)
        return model, torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=method.rank,
            lora_alpha=settings.alpha * method.rank,
            target_modules="all-linear",
            fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),
            use_dora=method.kind == "dora",
            task_type="CAUSAL_LM",
        )
        adapted = peft.get_peft_model(model, config)
    if method.kind == "low rank adam":
        return adapted, LowRankAdam(adapted, lr=rate)
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    return adapted, torch.optim.AdamW(trainable, lr=rate, weight_decay=0.0)


def schedule(done: int, step: int, settings: Settings) -> float:
    """The learning rate's share: a rise after each (re)start, and a linear fall over the whole run."""
    fall = 1 - done / settings.steps
    return min(1.0, (step + 1) / settings.warmup) * fall


def write(model: nn.Module, base: dict[str, Tensor], path: Path) -> None:
    """The parameters that differ from the base, to a safetensors file."""
    tensors = {
        name: value.detach().contiguous().clone()
        for name, value in model.named_parameters()
        if not torch.equal(value.detach(), base[name])
    }
    save_file(tensors, path)


def measured(
    model: nn.Module, taught: Sentences, held_out: Sentences, before: dict[str, Sentences]
) -> dict[str, Any]:
    """What was learned and forgotten.

    `loss` is the mean surprise of the taught sentences' answers, `learned` the share of facts that are
    answered rightly in the wording that was held out, `forgotten` the share of what was known that is
    answered wrongly now: the mean over the families, which `forgotten_by_family` tells one by one.
    """
    surprise, right = taught.told(model)
    held, answered = held_out.told(model)
    now = {family: sentences.told(model) for family, sentences in before.items()}
    lost = {family: 1 - float(known[1].float().mean()) for family, known in now.items()}
    return {
        "loss": round(float(surprise.mean()), 6),
        "fitted": round(float(right.float().mean()), 4),
        "held_out_surprise": round(float(held.mean()), 4),
        "learned": round(float(answered.float().mean()), 4),
        "forgotten": round(math.fsum(lost.values()) / len(lost), 4),
        "forgotten_by_family": {family: round(share, 4) for family, share in lost.items()},
        "surprise_by_family": {family: round(float(known[0].mean()), 4) for family, known in now.items()},
    }
