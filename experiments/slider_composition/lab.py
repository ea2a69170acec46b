"""What every part of the study works with: a pipeline, its trained sliders, and effects in natural units."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from experiments.concept_sliders.specs import spec
from experiments.slider_composition.settings import Settings
from geoedit.sliders.apply import together
from geoedit.sliders.evaluation.drawing import Row, noise
from geoedit.sliders.evaluation.prepare import prepare
from geoedit.sliders.evaluation.work import Work
from geoedit.sliders.files import load
from geoedit.sliders.slider import Slider
from geoedit.sliders.training.run import train

log = logging.getLogger(__name__)
Scales = Mapping[str, float]


@dataclass(frozen=True)
class Lab:
    """One pipeline with its sliders.

    Attributes:
        pipe: the pipeline.
        sliders: by attribute; "twin" is the one of `Settings.twin`.
        settings: of the study.
        cache: a folder for pictures, or None.
    """

    pipe: Any
    sliders: Mapping[str, Slider]
    settings: Settings
    cache: Path | None = None

    @classmethod
    def of(cls, pipe: Any, name: str, settings: Settings) -> Lab:
        """Train the sliders of a pipeline, or take them from the cache."""
        wanted = {name: (name, seed) for name, seed in settings.attributes} | {"twin": settings.twin}
        sliders = {}
        for label, (attribute, seed) in wanted.items():
            place = None if settings.cache is None else settings.cache / name / f"{label}.safetensors"
            if place is not None and place.is_file():
                sliders[label] = load(place)
                continue
            log.info("%s: training %s", name, label)
            slider = train(
                pipe,
                spec(attribute),
                steps=settings.training_steps,
                batch_size=settings.batch_size,
                guidance=settings.slider_guidance,
                generator=torch.Generator().manual_seed(seed),
                show=False,
            )
            if place is not None:
                place.parent.mkdir(parents=True, exist_ok=True)
                slider.save(place)
            sliders[label] = slider
        return cls(pipe, sliders, settings, None if settings.cache is None else settings.cache / "pictures")

    def work(self, sliders: Mapping[str, Slider]) -> Work:
        """What draws and reads."""
        known = self.settings
        return prepare(
            self.pipe,
            sliders,
            prompts=known.prompts,
            seeds=known.seeds,
            measure=None,
            steps=known.sampling_steps,
            guidance=known.guidance,
            batch_size=known.rows,
            cache=self.cache,
        )[0]

    def effects(
        self, sliders: Mapping[str, Slider], scales: Sequence[Scales]
    ) -> tuple[Float[np.ndarray, "rows images attributes"], Float[np.ndarray, "rows images"]]:
        """Changes against the unsteered image, in natural standard deviations, and residuals."""
        work = self.work(sliders)
        drawn = [Row(*row, at) for at in ({}, *scales) for row in work.rows]
        return in_units(work, work.painter.draw(drawn), 1 + len(scales))

    def in_order(
        self, pairs: Sequence[tuple[Slider, Slider]], scale: float
    ) -> tuple[Float[np.ndarray, "rows images attributes"], Float[np.ndarray, "rows images"]]:
        """Effects of two sliders one after the other: the first in the noisy half, the second in the rest."""
        work = self.work({"first": pairs[0][0]})
        painter, known = work.painter, self.settings
        prompts, seeds = zip(*work.rows, strict=True)
        base, drawn = painter.base, [painter.draw([Row(*row, {}) for row in work.rows])]
        early: Callable[[float], float] = lambda progress: scale * (progress < 0.5)  # noqa: E731
        late: Callable[[float], float] = lambda progress: scale * (progress >= 0.5)  # noqa: E731
        for first, second in pairs:
            with torch.no_grad(), together(base.pipe, [(first, early), (second, late)]):
                latents, _ = base.sample(
                    base.encode(prompts),
                    steps=known.sampling_steps,
                    guidance=known.guidance,
                    noise=noise(base, seeds),
                    unconditional=base.unconditional(len(prompts)),
                )
            pixels = base.decode(latents).float().clamp(0, 1)
            drawn.append((pixels * 255).round().to(torch.uint8).cpu())
        return in_units(work, torch.cat(drawn), 1 + len(pairs))


def in_units(
    work: Work, images: torch.Tensor, blocks: int
) -> tuple[Float[np.ndarray, "rows images attributes"], Float[np.ndarray, "rows images"]]:
    """Changes against the first of some blocks of images, angles the shorter way, and residuals."""
    found = work.measured(images)
    changes = []
    for name in work.tool.attributes:
        values = found[name].reshape(blocks, -1)
        change = values[1:] - values[0]
        if name in work.tool.period:
            period = work.tool.period[name]
            change = (change + period / 2) % period - period / 2
        changes.append(change / work.tool.natural_sd[name])
    return np.stack(changes, -1), found["residual"].reshape(blocks, -1)[1:]


def mean(values: Float[np.ndarray, "*shape"], axis: Any = None) -> Any:
    """The mean over what could be measured."""
    with np.errstate(all="ignore"):
        return np.nanmean(values, axis) if np.isfinite(values).any() else np.nan
