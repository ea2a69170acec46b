"""What two geometric options bring to text sliders: steps on the fixed-rank manifold, effects made tangent.

Each arm trains the same sliders from the same seeds, and what they draw is measured. ``python -m
experiments.slider_geometry`` writes a JSON beside the pages of results, row by row, and goes on where it was
stopped; ``--small`` is for a look.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from geoedit.edits.io import write_whole
from geoedit.sliders.bases import base_of
from geoedit.sliders.evaluation import evaluate
from geoedit.sliders.slider import Slider
from geoedit.sliders.spec import SliderSpec
from geoedit.sliders.training.run import train
from geoedit.sliders.training.settings import TrainSettings
from geoedit.sliders.training.text import TextTask
from geoedit.testbeds import PIPELINES, load

log = logging.getLogger(__name__)
RESULTS = Path(__file__).parents[1] / "docs" / "results" / "slider_geometry.json"
NUMBERS = ("error", "spearman", "range_sd", "interference", "interference_signed", "residual", "distance")
"""What is kept of a slider: its held-out error, and columns of `geoedit.sliders.evaluation.COLUMNS`."""
CONTEXTS = {"hue": ["", "red", "yellow", "green", "blue"], "shape": ["shape", "ellipse", "bar", "diamond"]}
ENDS = {
    "size": ("very small", "very large"),
    "thickness": ("very thin", "very thick"),
    "brightness": ("dark", "bright"),
}


def arms() -> dict[str, dict[str, Any]]:
    """The trainer as it is, steps of the product at several rates, effects made tangent."""
    rates = (1e-3, 2e-3)
    return {
        "AdamW": {},
        **{f"LowRankAdam, {rate:g}": {"optimizer": "low_rank_adam", "learning_rate": rate} for rate in rates},
        "AdamW, tangent": {"project": True},
    }


@dataclass(frozen=True)
class Study:
    """What is trained and measured."""

    pipelines: Sequence[str] = ("shapes-unet",)
    attributes: Sequence[str] = ("size", "brightness")
    seeds: Sequence[int] = (0,)
    steps: int = 100
    arms: Mapping[str, Mapping[str, Any]] = field(default_factory=arms)
    prompts: Sequence[str] = ("a shape", "a green bar")
    images: int = 3
    scales: Sequence[float] = (-1.0, -0.5, 0.0, 0.5, 1.0)


def spec_of(attribute: str) -> SliderSpec:
    """Both ends of an attribute in words, other words given to both."""
    low, high = ENDS[attribute]
    return SliderSpec(
        name=attribute,
        target="a {hue} {shape}",
        positive=f"a {high} {{hue}} {{shape}}",
        negative=f"a {low} {{hue}} {{shape}}",
        preserve=CONTEXTS,
    )


@torch.no_grad()
def held_out_error(pipe: Any, slider: Slider, spec: SliderSpec, *, rows: int = 96) -> float:
    """The slider's error on latents that no training saw, over the error of doing nothing.

    The targets are those of the plain trainer for every arm, without projection; rows that must stay are
    left out.
    """
    base = base_of(pipe)
    task = TextTask(base, spec, batch_size=rows)
    generator = torch.Generator().manual_seed(1234)
    task.prepare(TrainSettings(preserve=0.0, refresh=0, cache=12), generator)
    batch = task.draw(0, generator)
    told = task.conditioning.rows(batch["prompt"])
    errors = []
    for scales in (batch["scales"], None):
        said = (batch["latents"], batch["times"], told)
        if scales is None:
            output = base.predict(*said)
        else:
            with slider.at(pipe, scales):
                output = base.predict(*said)
        error = (output - batch["target"]).square().flatten(1).mean(1)
        errors.append(float((batch["weight"] * error).sum()))
    return errors[0] / errors[1]


def run(study: Study, path: Path = RESULTS) -> dict[str, Any]:
    """Train and measure every arm; rows that the file has already are kept."""
    known: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    rows: list[dict[str, Any]] = known.get("rows", [])
    keys = ("pipeline", "attribute", "seed", "arm", "steps")
    done = {tuple(row[key] for key in keys) for row in rows}
    wanted = [
        (pipeline, attribute, seed, arm, study.steps)
        for pipeline in study.pipelines
        for seed in study.seeds
        for attribute in study.attributes
        for arm in study.arms
    ]
    pipes: dict[str, Any] = {}
    for key in tqdm(wanted, desc="sliders"):
        if key in done:
            continue
        name, attribute, seed, arm, steps = key
        if name not in pipes:
            pipes[name] = _loaded(name)
        pipe = pipes[name]
        spec = spec_of(attribute)
        began = time.process_time()
        slider = train(
            pipe,
            spec,
            steps=steps,
            generator=torch.Generator().manual_seed(seed),
            show=False,
            **study.arms[arm],
        )
        seconds = time.process_time() - began
        seen = evaluate(
            pipe,
            slider,
            prompts=list(study.prompts),
            seeds=study.images,
            scales=study.scales,
            prompting=False,
            safe_range=False,
        ).table
        line = seen[seen["seed"] == "all"].iloc[0].to_dict()
        found = {column: float(line[column]) for column in NUMBERS if column in line}
        found["error"] = held_out_error(pipe, slider, spec)
        found["condition"] = condition(slider)
        kept = {column: value if math.isfinite(value) else None for column, value in found.items()}
        rows.append({**dict(zip(keys, key, strict=True)), "seconds": seconds, **kept})
        write_whole(path, json.dumps({"rows": rows, "means": means(rows)}, indent=1).encode())
    return {"rows": rows, "means": means(rows)}


def _loaded(name: str) -> Any:
    """A testbed, or a pipeline in a folder."""
    if name in PIPELINES:
        return load(name)
    pipe = DiffusionPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def condition(slider: Slider) -> float:
    """The largest over the least singular value of an update, the geometric mean over modules."""
    logs = []
    for _, _, change in slider:
        values = change.matrix.singular_values()
        logs.append(float((values[0] / values[-1].clamp_min(values[0] * 1e-6)).log()))
    return math.exp(statistics.fmean(logs))


def means(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each arm's mean and standard error over attributes and seeds, pipeline by pipeline."""
    found = []
    for pipeline, arm in dict.fromkeys((row["pipeline"], row["arm"]) for row in rows):
        own = [row for row in rows if (row["pipeline"], row["arm"]) == (pipeline, arm)]
        line: dict[str, Any] = {"pipeline": pipeline, "arm": arm, "sliders": len(own)}
        for column in (*NUMBERS, "condition", "seconds"):
            values = [row[column] for row in own if row.get(column) is not None]
            line[column] = statistics.fmean(values) if values else None
            spread = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            line[f"{column}_error"] = spread
        found.append(line)
    return found


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="one attribute, one seed, few steps")
    parser.add_argument("--pipeline", action="append", help="shapes-unet, shapes-flow or a folder")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    study = Study(pipelines=asked.pipeline or Study.pipelines)
    if asked.small:
        study = replace(study, attributes=("size",), seeds=(0,), steps=20, images=1, prompts=("a shape",))
    logging.basicConfig(level=logging.INFO)
    for line in run(study, asked.output)["means"]:
        log.info("%s", line)


if __name__ == "__main__":
    main()
