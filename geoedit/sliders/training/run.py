"""The loop: a task, its adapters and an optimizer, from a pipeline and a spec to a slider."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.errors import EditError
from geoedit.sliders.bases import Base
from geoedit.sliders.card import model_name, write_card
from geoedit.sliders.fit import describe_base
from geoedit.sliders.slider import Slider
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.adapters import ADAPTER, Adapters, checkpointing
from geoedit.sliders.training.checkpoint import Checkpoint, generator_states, set_generator_states
from geoedit.sliders.training.geometry import LEARNING_RATES, make_optimizer
from geoedit.sliders.training.processes import Workers, check_losses, gradients
from geoedit.sliders.training.progress import Progress
from geoedit.sliders.training.settings import TrainSettings
from geoedit.sliders.training.sheets import sample_prompts, sheet
from geoedit.sliders.training.targets import target_paths
from geoedit.sliders.training.task import Task
from geoedit.sliders.training.task_of import make_task

STEPS = 300
BATCH_SIZE = 8


@dataclass(frozen=True)
class Watch:
    """What is written and shown while a run goes on; nothing of it changes what is trained.

    Attributes:
        checkpoint_every: steps between two checkpoints; the last step always has one.
        sample_every: steps between two sheets of sample images; 0 for none.
        sample_scales: the columns of a sheet.
        sample_prompts: its rows; the spec's own prompts if empty.
        tensorboard: write curves for tensorboard.
        show: draw a progress bar; on a terminal only if None.
        card: write a model card beside the slider's file.
    """

    checkpoint_every: int = 50
    sample_every: int = 0
    sample_scales: Sequence[float | int] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    sample_prompts: Sequence[str] = ()
    tensorboard: bool = False
    show: bool | None = None
    card: bool = True


def train(
    pipe: Any,
    spec: SliderSpec | str | PathLike[str],
    *,
    steps: int | None = None,
    batch_size: int | None = None,
    generator: torch.Generator | None = None,
    output: str | PathLike[str] | None = None,
    settings: TrainSettings | None = None,
    task: Task | None = None,
    tokenizer: Any = None,
    **options: Any,
) -> Slider:
    """Teach a slider to a pipeline, or to a language model.

    The pipeline is left as it was. With an output folder the run writes checkpoints there; called again with
    the same arguments it goes on from the last one, and ends with the bits of a run that was not stopped.

    Args:
        pipe: a diffusers pipeline, its `Base`, or a causal language model.
        spec: what the slider is to be; a path is read by `SliderSpec.load`.
        steps: how many; the spec's own, or 300.
        batch_size: rows of a forward pass: two for each latent; the spec's own, or 8.
        generator: draws everything; one of seed 0 if None.
        output: folder for checkpoints, samples, the slider's file and its card; None keeps all in memory.
        settings: all numbers of the run; fields that are not given are the spec's, then the defaults.
        task: what is taught; found from the spec if None.
        tokenizer: of a language model.
        **options: fields of `TrainSettings` and of `Watch`.

    Returns:
        The slider, on the model's device, in float32. Its details have the spec, the settings and the base.

    Raises:
        EditError: an option is unknown, the spec does not fit the pipeline, the loss is no number (the last
            good state stays in `output`), or `output` has a run with other settings.

    Example:
        ::

            pipe = geoedit.testbeds.load("shapes-unet")
            spec = SliderSpec(
                target="a {hue} shape",
                positive="a very large {hue} shape",
                negative="a very small {hue} shape",
                preserve={"hue": ["", "red", "green", "blue"]},
            )
            slider = train(pipe, spec, steps=300, generator=torch.Generator().manual_seed(0))
    """
    spec = spec if isinstance(spec, SliderSpec) else SliderSpec.load(spec)
    asked = {**({} if settings is not None else spec.train), **options}
    steps = int(asked.pop("steps", STEPS)) if steps is None else steps
    batch_size = int(asked.pop("batch_size", BATCH_SIZE)) if batch_size is None else batch_size
    asked = {key: value for key, value in asked.items() if key not in ("steps", "batch_size")}
    chosen, watch = _options(settings or TrainSettings(), asked)
    if steps < 1:
        raise EditError(f"steps is {steps}; give 1 or more")
    if task is None:
        task = make_task(pipe, spec, batch_size=batch_size, settings=chosen, tokenizer=tokenizer)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    run = _Run(pipe, spec, task, chosen, watch, steps, batch_size, generator, output)
    return run.slider()


def _options(settings: TrainSettings, asked: Mapping[str, Any]) -> tuple[TrainSettings, Watch]:
    """Options told apart by whose fields they are."""
    ours, shown = ({item.name for item in fields(kind)} for kind in (TrainSettings, Watch))
    unknown = sorted(asked.keys() - ours - shown)
    if unknown:
        raise EditError(
            f"train: option {unknown[0]!r} is unknown; there are {', '.join(sorted(ours | shown))}"
        )
    watch = Watch(**{key: value for key, value in asked.items() if key in shown})
    return replace(settings, **{key: value for key, value in asked.items() if key in ours}), watch


class _Run:
    """One run, from its first step or from a checkpoint."""

    def __init__(
        self,
        pipe: Any,
        spec: SliderSpec,
        task: Task,
        settings: TrainSettings,
        watch: Watch,
        steps: int,
        batch_size: int,
        generator: torch.Generator,
        output: str | PathLike[str] | None,
    ) -> None:
        self.pipe = pipe.pipe if isinstance(pipe, Base) else pipe
        self.spec, self.task, self.settings, self.watch = spec, task, settings, watch
        self.steps, self.batch_size, self.generator = steps, batch_size, generator
        self.output = None if output is None else fspath(output)
        self.workers = Workers.current()
        self.history: list[dict[str, float]] = []

    def slider(self) -> Slider:
        """Train, and write what was asked for."""
        settings, components = self.settings, self.task.components
        description = describe_base(self.pipe, components)
        self.asked = {
            **settings.to_dict(),
            "batch_size": self.batch_size,
            "task": type(self.task).__name__,
            "spec": self._spec(),
            "base": {name: found["class"] for name, found in description.items()},
        } | ({"steps": self.steps} if settings.decay == "cosine" else {})
        targets = {name: target_paths(module, settings.targets) for name, module in components.items()}
        with ExitStack() as stack:
            self.adapters = stack.enter_context(
                Adapters(
                    components,
                    targets,
                    rank=settings.rank,
                    alpha=settings.alpha,
                    rank_pattern=settings.rank_pattern,
                    alpha_pattern=settings.alpha_pattern,
                    generator=self.generator,
                )
            )
            for module in components.values():
                if settings.checkpointing:
                    stack.enter_context(checkpointing(module))
                if settings.compile:
                    stack.enter_context(_compiled(module))
            self._train()
            writes = self.output is not None and self.workers.first
            drawn = self._sheet() if writes and self.watch.card and self._rows else None
            slider = Slider(
                self.spec.name,
                self.adapters.changes(),
                details={
                    "spec": self._spec(),
                    "settings": settings.to_dict() | {"steps": self.steps, "batch_size": self.batch_size},
                    "training": self._losses(),
                    "base": description,
                    **({"model": name} if (name := model_name(self.pipe)) else {}),
                },
            )
        if writes:
            file = Path(str(self.output), f"{self.spec.name}.safetensors")
            slider.save(file, format="diffusers")
            if self.watch.card:
                write_card(
                    slider, file, strip=drawn, scales=() if drawn is None else self.watch.sample_scales
                )
        return slider

    @property
    def _rows(self) -> tuple[str, ...]:
        return sample_prompts(self.task, self.spec, self.watch.sample_prompts)

    def _sheet(self) -> Tensor:
        return sheet(self.task, self._rows, self.watch.sample_scales, self.settings)

    def _losses(self) -> dict[str, float]:
        """The mean loss over the first and over the last tenth of the run."""
        losses = [entry["loss"] for entry in self.history]
        few = max(1, len(losses) // 10)
        return {
            "loss at first": statistics.fmean(losses[:few]),
            "loss at last": statistics.fmean(losses[-few:]),
        }

    def _train(self) -> None:
        settings = self.settings
        self.rate = (
            LEARNING_RATES[settings.optimizer] if settings.learning_rate is None else settings.learning_rate
        )
        self.optimizer = make_optimizer(
            self.task.components,
            optimizer=settings.optimizer,
            learning_rate=self.rate,
            weight_decay=settings.weight_decay,
            adapter=ADAPTER,
        )
        self.average: dict[str, Tensor] = {}
        self.task.prepare(settings, self.generator)
        begin = self._resume()
        watch = self.watch
        with Progress(
            self.steps,
            start=begin,
            name=self.spec.name,
            show=watch.show,
            output=self.output,
            sheet=self._sheet if watch.sample_every else None,
            every=watch.sample_every,
            tensorboard=watch.tensorboard,
            first=self.workers.first,
        ) as progress:
            for step in range(begin, self.steps):
                progress.step(step, self._step(step))
                done = step + 1
                if done == self.steps or (watch.checkpoint_every and done % watch.checkpoint_every == 0):
                    self._save(done)
        if self.average:
            self.adapters.load_state(self.average)

    def _step(self, step: int) -> dict[str, float]:
        """One step: draw, gradients over all processes, clip, step."""
        settings, parameters = self.settings, self.adapters.parameters()
        before = generator_states({"generator": self.generator}), self.task.state()
        with torch.no_grad():
            batch = self.task.draw(step, self.generator)
        losses = gradients(self._loss, batch, parameters, workers=self.workers, pieces=settings.accumulate)
        kept = (
            f"The state before it is in {self.output}."
            if self.output
            else "Nothing was written: give output=…."
        )
        try:
            check_losses(
                losses,
                step=step,
                describe=lambda row: self.task.describe(batch, row),
                kept=kept,
                parameters=parameters,
            )
        except EditError:
            self._save(step, *before)
            raise
        rate = self.rate * _share(settings, step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        self.optimizer.step()
        self._follow(step)
        found = {"loss": float(losses.mean())}
        self.history.append(found)
        return {**found, "rate": rate}

    def _loss(self, batch: Any) -> Tensor:
        kind = self.settings.autocast
        if kind is None:
            return self.task.loss(batch)
        device = next(iter(batch.tensors.values())).device.type
        with torch.autocast(device, getattr(torch, kind)):
            return self.task.loss(batch)

    @torch.no_grad()
    def _follow(self, step: int) -> None:
        """Move the running mean of the factors; it forgets faster at first."""
        if not self.settings.average:
            return
        decay = min(self.settings.average, (step + 1) / (step + 10))
        for name, parameter in self.adapters.named_parameters():
            if name not in self.average:
                self.average[name] = parameter.detach().clone()
            self.average[name].lerp_(parameter.detach(), 1 - decay)

    def _resume(self) -> int:
        """The step to begin with; everything else is put back as it was then."""
        if self.output is None:
            return 0
        found = Checkpoint.load(self.output, settings=self.asked)
        begin = 0 if found is None else found.step
        self.workers.agree(begin, "the step of their checkpoint")
        if found is None:
            return 0
        if begin > self.steps:
            raise EditError(
                f"{self.output} holds a run of {begin} steps, more than the {self.steps} that are asked for; "
                "ask for as many or give another output folder"
            )
        mean = {name: tensor for name, tensor in found.adapter.items() if name.startswith("average.")}
        device = next(iter(self.adapters.parameters())).device
        self.average = {name.removeprefix("average."): tensor.to(device) for name, tensor in mean.items()}
        self.adapters.load_state({k: v for k, v in found.adapter.items() if k not in mean})
        self.optimizer.load_state_dict(dict(found.optimizer))
        self.task.load_state(found.task)
        set_generator_states({"generator": self.generator}, found.generators)
        self.history = [dict(item) for item in found.history]
        return begin

    def _save(
        self, done: int, drawn: dict[str, Tensor] | None = None, task: dict[str, Tensor] | None = None
    ) -> None:
        """Write a checkpoint, with the states from before the draw of a step that failed, if given."""
        if self.output is None or not self.workers.first:
            return
        Checkpoint(
            step=done,
            adapter=self.adapters.state() | {f"average.{name}": t for name, t in self.average.items()},
            optimizer=self.optimizer.state_dict(),
            generators=drawn or generator_states({"generator": self.generator}),
            task=self.task.state() if task is None else task,
            history=self.history,
            settings=self.asked,
        ).save(self.output)

    def _spec(self) -> dict[str, Any]:
        """The spec as JSON; pairs and directions that live in memory are told by their type."""
        named = {}
        for name in ("pairs", "direction"):
            value = getattr(self.spec, name)
            if value is not None and not isinstance(value, (str, Mapping)):
                named[name] = type(value).__name__
        return replace(self.spec, **named).to_dict()  # type: ignore[arg-type]


def _share(settings: TrainSettings, step: int, steps: int) -> float:
    """The learning rate at a step as a share of its peak."""
    rise = min(1.0, (step + 1) / max(1, settings.warmup))
    if settings.decay == "root":
        return rise * math.sqrt(max(settings.warmup, 30) / max(step + 1, settings.warmup, 30))
    if settings.decay == "cosine":
        done = max(0.0, (step - settings.warmup) / max(1, steps - settings.warmup))
        return rise * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * done)))
    return rise


@contextmanager
def _compiled(module: nn.Module) -> Iterator[None]:
    """The module's forward pass compiled in place, and put back."""
    before = module._compiled_call_impl
    module.compile(dynamic=True)
    try:
        yield
    finally:
        module._compiled_call_impl = before
