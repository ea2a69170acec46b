"""Train the sliders and measure each. Everything done is kept, so that a run can be stopped."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import geoedit
from experiments.concept_sliders.specs import held_out, plain_spec, spec
from geoedit import sliders
from geoedit.edits.io import write_whole
from geoedit.sliders import Slider

log = logging.getLogger(__name__)
TRAINERS = ("ours", "published")
EXTENT = ("families", "attributes", "seeds", "flow_seeds", "published_seeds")
"""Settings that decide how many sliders there are, and nothing about one of them."""


@dataclass(frozen=True)
class Settings:
    """What is trained and on what it is scored.

    Attributes:
        families: of the shapes pipelines.
        attributes: one slider each.
        seeds: of training.
        published_seeds: of the published trainer's sliders, which take longer.
        flow_seeds: of training the flow-matching pipeline, whose passes take four times as long.
        steps: of our training.
        slider_guidance: how far our sliders' scale 1 goes along the difference of the two words.
        published_steps: of the published trainer.
        prompts: how many of the held-out prompts.
        noises: seeds of the images' noise.
        scales: where images are drawn.
        sampling_steps: of every image.
        guidance: of every image.
    """

    families: tuple[str, ...] = ("unet", "flow")
    attributes: tuple[str, ...] = ("size", "thickness", "brightness", "hue")
    seeds: int = 5
    flow_seeds: int = 2
    published_seeds: int = 1
    steps: int = 200
    slider_guidance: float = 1.0
    published_steps: int = 100
    prompts: int = 4
    noises: int = 4
    scales: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    sampling_steps: int = 20
    guidance: float = 3.0


SMALL = Settings(
    families=("unet",),
    attributes=("size",),
    seeds=1,
    published_seeds=0,
    steps=40,
    prompts=2,
    noises=2,
    sampling_steps=10,
)
"""A slice that takes a minute: it shows that the study runs, and no more."""


def run(settings: Settings, folder: Path) -> list[dict[str, Any]]:
    """Every slider of the study, a row each, and a row of prompting for each attribute and family."""
    rows = []
    for family in settings.families:
        pipe = geoedit.testbeds.load(f"shapes-{family}")
        wanted = [
            (seed, attribute, trainer)
            for trainer in TRAINERS
            for seed in range(_seeds(settings, family, trainer))
            for attribute in settings.attributes
        ]
        for seed, attribute, trainer in sorted(wanted):  # every attribute once before any comes again
            place = folder / family / f"{attribute}-{trainer}-{seed}"
            rows += _measured(settings, pipe, family, attribute, trainer, seed, place)
    return rows


def _seeds(settings: Settings, family: str, trainer: str) -> int:
    if trainer == "ours":
        return settings.seeds if family == "unet" else settings.flow_seeds
    return settings.published_seeds if family == "unet" else 0  # its loss is written for predictions of noise


def _measured(
    settings: Settings, pipe: Any, family: str, attribute: str, trainer: str, seed: int, place: Path
) -> list[dict[str, Any]]:
    """The rows of one slider, from the folder if they are there."""
    kept = place / "rows.json"
    asked = {
        name: value for name, value in json.loads(json.dumps(asdict(settings))).items() if name not in EXTENT
    }
    if kept.is_file():
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["settings"] == asked:
            return list(found["rows"])
    slider, seconds = _trained(settings, pipe, attribute, trainer, seed, place)
    began = time.process_time()
    result = sliders.evaluate(
        pipe,
        {attribute: slider},
        prompts=held_out(attribute)[: settings.prompts],
        seeds=settings.noises,
        scales=settings.scales,
        attributes={attribute: attribute},
        steps=settings.sampling_steps,
        guidance=settings.guidance,
        prompting=seed == 0 and trainer == "ours",
        safe_range=trainer == "ours",
    )
    table = result.table
    rows = [
        {
            "family": family,
            "trainer": trainer if row["method"] == "slider" else "prompting",
            "training_seed": seed,
            "training_seconds": seconds,
            "evaluation_seconds": time.process_time() - began,
            **row,
        }
        for row in json.loads(table[table["seed"].astype(str) == "all"].to_json(orient="records"))
    ]
    if seed == 0:
        result.to_json(place / "evaluation.json")
        result.to_html(place / "evaluation.html")
    write_whole(kept, json.dumps({"settings": asked, "rows": rows}, indent=1).encode())
    for row in rows:
        log.info(
            "%s %s %s %d: ρ %.3f, range %.2f sd, interference %.2f",
            *(family, attribute, row["trainer"], seed),
            *(row["spearman"] or float("nan"), row["range_sd"], row["interference"]),
        )
    return rows


def _trained(
    settings: Settings, pipe: Any, attribute: str, trainer: str, seed: int, place: Path
) -> tuple[Slider, float]:
    """One slider, and the processor seconds that its training took."""
    place.mkdir(parents=True, exist_ok=True)
    file = place / "slider.safetensors"
    clock = place / "seconds.json"
    if file.is_file() and clock.is_file():
        return sliders.load(file), float(json.loads(clock.read_text(encoding="utf-8")))
    began = time.process_time()
    ours = trainer == "ours"
    slider = sliders.train(
        pipe,
        spec(attribute) if ours else plain_spec(attribute),
        steps=settings.steps if ours else settings.published_steps,
        generator=torch.Generator().manual_seed(seed),
        **(
            {"guidance": settings.slider_guidance}
            if ours
            else {"published": True, "published_timestep": "off"}
        ),
    )
    seconds = time.process_time() - began
    slider.save(file)
    write_whole(clock, json.dumps(seconds).encode())
    return slider, seconds
