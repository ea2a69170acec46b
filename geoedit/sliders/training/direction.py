"""Directions in a denoiser's bottleneck, and how one of them is distilled into a slider."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from geoedit.edits.io import to_json, write_whole
from geoedit.errors import EditError
from geoedit.sliders.bases.base import Base
from geoedit.sliders.bottleneck import Bottleneck, captured, find_bottleneck, shifted
from geoedit.sliders.training.regression import TOGETHER, RegressionTask, encoded, loss_weights
from geoedit.sliders.training.task import Batch
from geoedit.sliders.training.trajectories import normal, uniform

if TYPE_CHECKING:
    from geoedit.sliders.training.settings import TrainSettings

FORMAT = "geoedit.direction"
VERSION = 1


@dataclass(frozen=True)
class Direction:
    """What is added to the stream at a bottleneck, at scale 1, at every time of the sampling.

    Attributes:
        name: what it moves, as far as that is known.
        vector: the change of one row's stream: (channels, height, width) in a U-Net, (tokens, width) in a
            transformer; or one that broadcasts to it, (channels, 1, 1) or (1, width), alike at all places.
        bottleneck: where it is added.
        details: how it was found, as plain JSON: "value" (its singular value), "time", ….
    """

    name: str
    vector: Float[Tensor, "..."]
    bottleneck: Bottleneck
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.vector.numel() or not bool(self.vector.isfinite().all()):
            raise EditError(f"direction {self.name!r} is empty, or not finite everywhere.")
        if not bool(self.vector.any()):
            raise EditError(f"direction {self.name!r} is zero: there is nowhere to go.")

    def __mul__(self, factor: float | int) -> Direction:
        """The direction with another length."""
        return replace(self, vector=self.vector * factor)

    @contextmanager
    def on(self, denoiser: nn.Module, scales: Float[Tensor, " rows"]) -> Iterator[None]:
        """Within the context, the denoiser has the direction added at each row's scale; see `shifted`."""
        change = scales.to(self.vector).reshape(-1, *(1,) * self.vector.ndim) * self.vector
        with shifted(denoiser, self.bottleneck, change):
            yield

    def save(self, path: str | PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        Raises:
            EditError: the folder is not there, or the details hold what JSON cannot.
        """
        header = {
            "version": VERSION,
            "name": self.name,
            "path": self.bottleneck.path,
            "side": self.bottleneck.side,
            "details": to_json(dict(self.details), "details"),
        }
        target = Path(path)
        if not target.parent.is_dir():
            raise EditError(f"The folder {target.parent} does not exist, so {target.name} cannot be written.")
        tensors = {"vector": self.vector.detach().clone().contiguous()}
        write_whole(target, save(tensors, metadata={"format": "pt", FORMAT: json.dumps(header)}))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Direction:
        """Read what `save` wrote, to the bit.

        Raises:
            EditError: the file is missing, cut off, of a newer version or no direction.
        """
        source = Path(path)
        if not source.is_file():
            raise EditError(f"There is no file {source}.")
        try:
            with safe_open(source, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get(FORMAT, "{}"))
                vector = file.get_tensor("vector") if header else None
            if vector is None or int(header["version"]) > VERSION:
                raise EditError(f"{source} holds no direction of version {VERSION} or before.")
            place = Bottleneck(header["path"], header["side"])
            return cls(header["name"], vector, place, header["details"])
        except (SafetensorError, OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise EditError(
                f"{source} cannot be read as a direction; cut off or damaged? ({error})"
            ) from error


@torch.no_grad()
def activation_direction(
    base: Base,
    positive: Sequence[str],
    negative: Sequence[str],
    *,
    name: str = "",
    neutral: Sequence[str] = ("",),
    samples: int = 16,
    steps: int = 12,
    guidance: float = 3.0,
    pooled: bool = True,
    generator: torch.Generator,
) -> Direction:
    """Half the mean difference of the bottleneck's stream under two sets of prompts.

    Trajectories of the neutral prompts are drawn; at every step the denoiser is told the positive and the
    negative prompt of a couple at the same latents, and what differs at the bottleneck is averaged over
    trajectories, times and couples. Scale 1 leads from the middle to the mean of the positive prompts.

    Args:
        base: the pipeline.
        positive: prompts with more of the attribute, alike in all else to `negative`, one by one.
        negative: prompts with less of it.
        name: of the direction; the first positive prompt if empty.
        neutral: prompts of the trajectories.
        samples: trajectories.
        steps: their steps.
        guidance: theirs.
        pooled: average over places as well, so that the direction is alike at all of them.
        generator: draws the noise.

    Raises:
        EditError: the two sets differ in number, are empty, or nothing differs at the bottleneck.
    """
    if len(positive) != len(negative) or not positive:
        raise EditError(
            f"{len(positive)} positive and {len(negative)} negative prompts: give one of each for a couple."
        )
    kept, times, _ = trajectories(
        base, neutral, samples=samples, steps=steps, guidance=guidance, generator=generator
    )
    place = find_bottleneck(base.denoiser)
    couples = torch.arange(samples, device=base.device) % len(positive)
    told = base.encode([*positive, *negative]).rows(torch.cat([couples, couples + len(positive)]))
    total = torch.zeros((), device=base.device)
    for step in range(steps):
        latents, now = kept[:, step], times[step].expand(2 * samples)
        with captured(base.denoiser, place) as streams:
            base.predict(latents.repeat(2, *(1,) * (latents.ndim - 1)), now, told, guidance=guidance)
        more, less = streams[0].float().chunk(2)
        total = total + (more - less).mean(0) / 2
    vector = total / steps
    return Direction(name or positive[0], pool(vector) if pooled else vector, place)


def pool(vector: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The mean over places: (channels, 1, 1) of a map of channels, (1, width) of tokens."""
    return vector.mean((-2, -1), keepdim=True) if vector.ndim == 3 else vector.mean(0, keepdim=True)


@torch.no_grad()
def trajectories(
    base: Base,
    prompts: Sequence[str],
    *,
    samples: int,
    steps: int,
    guidance: float,
    generator: torch.Generator,
    direction: Direction | None = None,
    scales: Float[Tensor, " samples"] | None = None,
) -> tuple[Float[Tensor, "samples steps *shape"], Float[Tensor, " steps"], Tensor]:
    """Latents before every step of sampling, the times of the steps, and the number of each run's prompt.

    With a direction, each run has it at its own scale all the way.
    """
    if samples < 1 or not prompts:
        raise EditError(f"{samples} trajectories of {len(prompts)} prompts: there is nothing to draw.")
    which = torch.arange(samples) % len(prompts)
    conditioning = encoded(base, prompts).rows(which.to(base.device))
    like = torch.empty(0, device=base.device, dtype=base.dtype)
    noise = normal((samples, *base.latent_shape()), generator, like)
    two = guidance != 1 and not base.guidance_distilled and any(prompts)
    unconditional = base.unconditional() if two else None

    def run() -> Tensor:
        return base.sample(
            conditioning,
            steps=steps,
            guidance=guidance,
            noise=noise,
            unconditional=unconditional,
            keep=range(steps),
        )[1]

    if direction is None or scales is None:
        kept = run()
    else:
        with direction.on(base.denoiser, scales):
            kept = run()
    return kept, base.schedule(steps, base.latent_shape()), which


class DirectionTask(RegressionTask):
    """A direction at a bottleneck distilled into adapters: at scale s they do what s · direction does.

    The teacher is the frozen denoiser with the direction added. It also draws the latents, so that the
    student learns where its own sampling will lead: each trajectory has the direction at a scale of its own.
    A couple of rows has the same latents at that scale and at its negative.

    Args:
        base: the pipeline.
        direction: what is distilled, or the file that it was saved to.
        prompts: what the denoiser is told; several are taken in turn. The empty prompt is a good one to
            have among them: guidance then has the slider in both halves alike.
        batch_size: rows of a step.
        name: of the slider; the direction's if empty.
    """

    def __init__(
        self,
        base: Base,
        direction: Direction | str | PathLike[str],
        *,
        prompts: Sequence[str] = ("",),
        batch_size: int = 8,
        name: str = "",
    ) -> None:
        direction = direction if isinstance(direction, Direction) else Direction.load(direction)
        super().__init__(base, name or direction.name, prompts, batch_size=batch_size)
        direction.bottleneck.module(base.denoiser)
        self.direction = replace(direction, vector=direction.vector.to(base.device))

    def make(self, couples: int, settings: TrainSettings, generator: torch.Generator) -> Batch:
        """Trajectories of the teacher, and what it says along them at both signs."""
        base, steps = self.base, settings.trajectory_steps
        samples = math.ceil(couples / steps)
        signs = 1 - 2 * (torch.arange(samples) % 2)
        scales = draw_scales(samples, settings, generator) * signs
        latents, times, which = trajectories(
            base,
            self.prompts,
            samples=samples,
            steps=steps,
            guidance=settings.trajectory_guidance,
            generator=generator,
            direction=self.direction,
            scales=scales.to(base.device),
        )
        order = torch.randperm(samples * steps, generator=generator, device=generator.device)[:couples].cpu()
        sample, step = order // steps, order % steps
        x = latents[sample.to(base.device), step.to(base.device)].repeat_interleave(2, 0)
        now = times[step.to(base.device)].repeat_interleave(2)
        both = torch.stack([scales[sample], -scales[sample]], 1).flatten().to(base.device)
        told = which[sample].repeat_interleave(2).to(base.device)
        targets = []
        for rows in torch.arange(len(x), device=base.device).split(TOGETHER):
            with self.direction.on(base.denoiser, both[rows]):
                targets.append(self.frozen(x[rows], now[rows], told[rows]))
        return Batch(
            {
                "latents": x,
                "times": now,
                "prompts": told,
                "scales": both,
                "targets": torch.cat(targets),
                "weights": loss_weights(base, now, settings.min_snr),
            }
        )


def draw_scales(count: int, settings: TrainSettings, generator: torch.Generator) -> Float[Tensor, " count"]:
    """Sizes of scales by the law that the settings name, none of them zero."""
    if settings.scale_law == "ends":
        return torch.full((count,), float(settings.scale_max))
    return settings.scale_max * (1 - uniform(count, generator))
