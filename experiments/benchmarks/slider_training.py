"""A slider's training against the published step and against a trainer that batches its frozen predictions.

All teach the same prompts to the same shapes U-Net, with adapters of the same rank on the same layers, and
are scored by the published loss on held-out latents: trajectories of the base from noise that no trainer
sees, at the latents' own timesteps, at scale 1. The question is how many CPU seconds each takes to reach the
loss that the published trainer has after 100 steps. Scoring is not timed.

The published step is written as published: 58 forward passes on average, the adapter multiplied by zero. The
"batched" one has the scheme of ai-toolkit's concept sliders: latents at hand, the frozen predictions of three
prompts in one pass, then a pass with gradients for each sign.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from geoedit import testbeds
from geoedit.sliders.bases import Base, base_of
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.adapters import Adapters, adapter_off, row_scales
from geoedit.sliders.training.geometry import LEARNING_RATES, make_optimizer
from geoedit.sliders.training.processes import gradients
from geoedit.sliders.training.published import GUIDANCE
from geoedit.sliders.training.settings import TrainSettings
from geoedit.sliders.training.targets import target_paths
from geoedit.sliders.training.text import TextTask

SPEC = SliderSpec(
    name="size",
    target="a {hue} {noun}",
    positive="a very large {hue} {noun}",
    negative="a very small {hue} {noun}",
    preserve={"hue": ["", "red", "green", "blue"], "noun": ["ellipse", "bar", "diamond"]},
)


@dataclass(frozen=True)
class Settings:
    """What all trainers share, the published trainer's own numbers, and how long each may take.

    Attributes:
        pipeline: a built-in pipeline's name.
        rank: of all adapters.
        targets: layers of all adapters.
        guidance: η of all targets.
        published_steps: after which the published trainer's loss is the one to reach.
        published_rate: its learning rate.
        trajectory_steps: its sampling steps.
        batch_size: rows of a step of ours; the others take one latent a step, as they do.
        held_out: trajectories that score.
        score_every: steps between two scores.
        longest: steps after which a trainer that has not arrived is given up.
        seed: of everything.
    """

    pipeline: str = "shapes-unet"
    rank: int = 4
    targets: str = "full"
    guidance: float = 1.0
    published_steps: int = 100
    published_rate: float = 2e-4
    trajectory_steps: int = 50
    batch_size: int = 8
    held_out: int = 8
    score_every: int = 2
    longest: int = 300
    seed: int = 0


Step = Callable[[int], None]


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Each trainer's seconds to the published trainer's loss, its steps a second and its memory."""
    settings = settings or Settings()
    pipe = testbeds.load(settings.pipeline)
    score = held_out(base_of(pipe), settings)
    rate = LEARNING_RATES["adamw"]
    asked: list[tuple[str, Callable[..., Step], float]] = [
        ("published", published, settings.published_rate),
        ("published, at our rate", published, rate),
        ("batched", batched, settings.published_rate),
        ("batched, at our rate", batched, rate),
        ("ours", ours, rate),
    ]
    runs: dict[str, dict[str, Any]] = {}
    for name, maker, its_rate in asked:
        goal = runs["published"]["loss"] if runs else None
        runs[name] = course(pipe, maker, settings, score, goal, its_rate)
    reference = runs["published"]
    return [
        {
            "work": f"a size slider of {settings.pipeline} until the loss is {reference['loss']:.4f}",
            "trainer": name,
            **found,
            "times_faster": reference["seconds"] / found["seconds"],
        }
        for name, found in runs.items()
    ]


def course(
    pipe: Any,
    maker: Callable[..., Step],
    settings: Settings,
    score: Callable[[], float],
    goal: float | None,
    rate: float,
) -> dict[str, Any]:
    """Train until the goal is reached (or for the published number of steps) and tell what it took."""
    base, generator = base_of(pipe), torch.Generator().manual_seed(settings.seed)
    targets = {base.component: target_paths(base.denoiser, settings.targets)}
    begun = time.process_time()
    with Adapters(
        {base.component: base.denoiser}, targets, rank=settings.rank, generator=generator
    ) as adapters:
        optimizer = make_optimizer({base.component: base.denoiser}, learning_rate=rate)
        step = maker(base, settings, adapters, optimizer, generator)
        prepared = time.process_time() - begun
        seconds, loss, done = prepared, float("inf"), 0
        last = settings.published_steps if goal is None else settings.longest
        while done < last and (goal is None or loss > goal):
            begun = time.process_time()
            step(done)
            seconds += time.process_time() - begun
            done += 1
            if done == last or (goal is not None and done % settings.score_every == 0):
                loss = score()
    return {
        "arrived": goal is None or loss <= goal,
        "seconds": seconds,
        "of_which_preparing": prepared,
        "steps": done,
        "steps_per_second": done / (seconds - prepared),
        "loss": loss,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


@torch.no_grad()
def held_out(base: Base, settings: Settings) -> Callable[[], float]:
    """The published loss at scale 1 on trajectories that no trainer sees."""
    task = TextTask(base, SPEC)
    generator = torch.Generator().manual_seed(settings.seed + 1)
    targets = {base.component: target_paths(base.denoiser, settings.targets)}
    with Adapters({base.component: base.denoiser}, targets, generator=generator):
        task.prepare(TrainSettings(cache=settings.held_out, preserve=0.0), generator)
    kept = task.cache
    target = kept["neutral"] + settings.guidance * kept["difference"]
    prompts = task.conditioning.rows(task.prompt_rows["target"][kept["context"]])

    @torch.no_grad()
    def score() -> float:
        with row_scales(base.denoiser, torch.ones(1)):
            found = base.predict(kept["latents"], kept["times"], prompts)
        return float((found - target).square().mean())

    return score


def ours(base: Base, settings: Settings, adapters: Adapters, optimizer: Any, generator: Any) -> Step:
    """Our step: cached latents and targets, both signs in one pass."""
    task = TextTask(base, SPEC, batch_size=settings.batch_size)
    chosen = TrainSettings(rank=settings.rank, targets=settings.targets, guidance=settings.guidance)
    task.prepare(chosen, generator)

    def step(number: int) -> None:
        with torch.no_grad():
            batch = task.draw(number, generator)
        gradients(task.loss, batch, adapters.parameters())
        optimizer.step()

    return step


def batched(base: Base, settings: Settings, adapters: Adapters, optimizer: Any, generator: Any) -> Step:
    """Frozen predictions of three prompts in one pass, then a pass with gradients for each sign."""
    task = TextTask(base, SPEC, batch_size=2)
    task.prepare(TrainSettings(preserve=0.0, refresh=0), generator)
    kept, rows = task.cache, task.prompt_rows

    def step(number: int) -> None:
        place = torch.randint(len(kept), (1,), generator=generator)
        latents, times, context = (kept[name][place] for name in ("latents", "times", "context"))
        names = torch.cat([rows[name][context] for name in ("positive", "neutral", "negative")])
        with torch.no_grad(), adapter_off(base.denoiser):
            positive, neutral, negative = base.predict(
                latents.repeat(3, 1, 1, 1), times.repeat(3), task.conditioning.rows(names)
            ).chunk(3)
        optimizer.zero_grad(set_to_none=True)
        for sign in (1.0, -1.0):
            with row_scales(base.denoiser, torch.tensor([sign])):
                found = base.predict(latents, times, task.conditioning.rows(rows["target"][context]))
            wanted = neutral + sign * settings.guidance * (positive - negative)
            (found - wanted).square().mean().div(2).backward()
        optimizer.step()

    return step


def published(base: Base, settings: Settings, adapters: Adapters, optimizer: Any, generator: Any) -> Step:
    """The published step: a partial trajectory, three frozen predictions, the student; all by halves."""
    contexts = list(SPEC.contexts())
    words = {
        text: base.encode([text])
        for prompts in contexts
        for text in (prompts.target, prompts.positive, prompts.negative, prompts.neutral)
    }
    visited, fine = base.schedule(settings.trajectory_steps), base.schedule(1000)
    zero = torch.zeros(1)

    def guided(latents: Tensor, time: Tensor, unconditional: str, text: str, guidance: float) -> Tensor:
        both = type(words[text]).concatenate([words[unconditional], words[text]])
        without, given = base.predict(latents.repeat(2, 1, 1, 1), time.expand(2), both).chunk(2)
        return without + guidance * (given - without)

    def step(number: int) -> None:
        prompts = contexts[int(torch.randint(len(contexts), (1,), generator=generator))]
        stop = 1 + int(torch.randint(settings.trajectory_steps - 1, (1,), generator=generator))
        latents = torch.randn(1, *base.latent_shape(), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for index in range(stop):
                output = guided(latents, visited[index], prompts.negative, prompts.target, GUIDANCE)
                latents = base.step(output, index, latents, visited)
            time = fine[int(stop * 1000 / settings.trajectory_steps)]
            with row_scales(base.denoiser, zero):
                positive, neutral, negative = (
                    guided(latents, time, prompts.negative, text, 1.0)
                    for text in (prompts.positive, prompts.neutral, prompts.negative)
                )
        found = guided(latents, time, prompts.negative, prompts.target, 1.0)
        (found - neutral - settings.guidance * (positive - negative)).square().mean().backward()
        optimizer.step()

    return step
