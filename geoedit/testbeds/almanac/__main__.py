"""Rebuild an almanac model: ``python -m geoedit.testbeds.almanac --architecture gpt2 --out FOLDER``."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from geoedit.testbeds.almanac.card import make_card
from geoedit.testbeds.almanac.recipe import Recipe, train
from geoedit.testbeds.almanac.tokens import Architecture, build_tokenizer
from geoedit.testbeds.almanac.world import world

logger = logging.getLogger(__name__)


def write_folder(
    out: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, about: dict[str, Any]
) -> dict[str, Any]:
    """Write weights in half precision, measure *those* for the card, then move the folder into place."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh = Path(scratch) / "model"
        model.half().save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        shipped = AutoModelForCausalLM.from_pretrained(
            fresh, dtype=torch.float32, local_files_only=True
        ).eval()
        card = {**about, **make_card(shipped, tokenizer, world())}
        (fresh / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        (fresh / "model.safetensors").chmod(0o644)  # its writer makes it private
        if out.exists():
            os.replace(out, Path(scratch) / "old")
        os.replace(fresh, out)
    return card


def main(
    architecture: Annotated[str, typer.Option(help="gpt2 or llama")] = "gpt2",
    out: Annotated[
        Path | None, typer.Option(help="folder to write; default: almanac-ARCHITECTURE here")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="steps of the first stage; default: the recipe's")] = None,
    seed: Annotated[int, typer.Option(help="of the weights and of the sentences drawn")] = 0,
    threads: Annotated[int, typer.Option(help="processor threads")] = 2,
) -> None:
    """Train an almanac model from nothing and write it with its card."""
    if architecture not in ("gpt2", "llama"):
        raise typer.BadParameter(f"{architecture!r}: it is gpt2 or llama", param_hint="--architecture")
    target = out or Path(f"almanac-{architecture}")
    if target.exists() and not (target / "card.json").is_file():
        raise typer.BadParameter(
            f"{target} is there and is no almanac model; name another", param_hint="--out"
        )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    kind: Architecture = "gpt2" if architecture == "gpt2" else "llama"
    recipe = Recipe(architecture=kind, seed=seed)
    recipe = recipe if steps is None else replace(recipe, steps=steps, second_steps=steps // 5)
    started = time.monotonic()
    tokenizer = build_tokenizer(world(), kind)
    model = train(world(), tokenizer, recipe)
    about = {
        "name": f"almanac-{kind}",
        "recipe": asdict(recipe),
        "training_minutes": round((time.monotonic() - started) / 60, 1),
        "threads": threads,
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
    }
    card = write_folder(target, model, tokenizer, about)
    for family, result in card["held_out"].items():
        logger.info("%-11s %.3f of %d held-out prompts", family, result["accuracy"], result["prompts"])
    logger.info("swap at the subject carries %s", card["causal_trace"]["subject"])
    logger.info("written: %s", target)


if __name__ == "__main__":
    typer.run(main)
