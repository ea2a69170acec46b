"""Rebuild the shapes pipelines: ``python -m geoedit.testbeds.shapes --family unet --out FOLDER``."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, get_args

import diffusers
import torch
import typer

from geoedit.testbeds.shapes.card import make_card
from geoedit.testbeds.shapes.files import write_pipeline
from geoedit.testbeds.shapes.pipelines import Family
from geoedit.testbeds.shapes.recipe import Recipe, train_autoencoder, train_denoiser

logger = logging.getLogger(__name__)
STEPS: dict[Family, int] = {"unet": 3200, "flow": 3600}
"""Steps of the second stage for the pipelines that are shipped."""


def main(
    family: Annotated[str, typer.Option(help="unet, flow, or both on one autoencoder")] = "both",
    out: Annotated[Path, typer.Option(help="folder in which shapes-FAMILY is written")] = Path("."),
    steps: Annotated[int | None, typer.Option(help="of the denoiser; default: as shipped")] = None,
    autoencoder_steps: Annotated[int | None, typer.Option(help="default: the recipe's")] = None,
    images: Annotated[int | None, typer.Option(help="that the denoiser sees; default: the recipe's")] = None,
    prompts: Annotated[int, typer.Option(help="pairs of prompts an attribute on the card")] = 24,
    seed: Annotated[int, typer.Option(help="of weights, shapes, captions and noise")] = 0,
    threads: Annotated[int, typer.Option(help="processor threads")] = 2,
) -> None:
    """Train the shapes pipelines from nothing and write them with their cards."""
    families = [kind for kind in get_args(Family) if family in (kind, "both")]
    if not families:
        raise typer.BadParameter(f"{family!r}: it is unet, flow or both", param_hint="--family")
    for kind in families:
        target = out / f"shapes-{kind}"
        if target.exists() and not (target / "card.json").is_file():
            raise typer.BadParameter(
                f"{target} is there and is no shapes pipeline; name another folder", param_hint="--out"
            )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    recipe = Recipe(seed=seed)
    recipe = recipe if autoencoder_steps is None else replace(recipe, autoencoder_steps=autoencoder_steps)
    recipe = recipe if images is None else replace(recipe, images=images)
    started = time.monotonic()
    autoencoder = train_autoencoder(recipe)
    first_stage = time.monotonic() - started
    for kind in families:
        its = replace(recipe, family=kind, steps=STEPS[kind] if steps is None else steps)
        started = time.monotonic()
        pipe = train_denoiser(autoencoder, its)
        about = {
            "name": f"shapes-{kind}",
            "recipe": asdict(its),
            "training_minutes": round((first_stage + time.monotonic() - started) / 60, 1),
            "threads": threads,
            "torch": torch.__version__.split("+")[0],
            "diffusers": diffusers.__version__,
        }
        write(out / f"shapes-{kind}", pipe, about, prompts=prompts)
        autoencoder = autoencoder.float()  # the next denoiser learns on what the first one learned on


def write(target: Path, pipe: Any, about: dict[str, Any], *, prompts: int = 24) -> dict[str, Any]:
    """Write a trained pipeline with its card, and log what the card says."""
    card = write_pipeline(target, pipe, lambda read: {**about, **make_card(read, prompts=prompts)})
    held_out = card["held_out"]
    for name, found in held_out["attributes"].items():
        logger.info("%-10s %s natural sd under %s", name, found["mean"], found["words"])
    logger.info("classes %s, digits %s", held_out["class_accuracy"], card["digits"]["accuracy"])
    logger.info("relative residual %s", held_out["relative_residual"])
    logger.info("written: %s", target)
    return card


if __name__ == "__main__":
    typer.run(main)
