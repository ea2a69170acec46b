"""Small trained models whose truth is known: every fact, every answer, and where the knowledge sits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from geoedit.errors import EditError
from geoedit.testbeds.almanac.world import World, world

__all__ = ["TESTBEDS", "World", "card", "folder", "load", "world"]

TESTBEDS = ("almanac-gpt2", "almanac-llama")
WEIGHTS = Path(__file__).parent / "weights"


def folder(name: str) -> Path:
    """Where a built-in model lies: a plain Hugging Face folder.

    Raises:
        EditError: no built-in model has that name, or its files are not where the package keeps them.
    """
    if name not in TESTBEDS:
        raise EditError(f"no testbed is named {name!r}; there are {', '.join(TESTBEDS)}")
    path = WEIGHTS / name
    if not (path / "model.safetensors").is_file():
        raise EditError(
            f"the weights of {name} are not in this installation; reinstall geoedit, or rebuild them with "
            f"`python -m geoedit.testbeds.almanac --architecture {name.removeprefix('almanac-')}`"
        )
    return path


def card(name: str) -> dict[str, Any]:
    """What a built-in model knows, measured by its recipe on held-out prompts, and where (its causal trace).

    >>> card("almanac-gpt2")["causal_trace"]["middle_third"]["carried_at_subject"] >= 0.8
    True
    """
    return dict(json.loads((folder(name) / "card.json").read_text(encoding="utf-8")))


def load(
    name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, World]:
    """Load a built-in model, its tokenizer and the world that it was told of.

    Args:
        name: one of ``TESTBEDS``.
        dtype: the type of the weights in memory; on disk they are half precision.
        device: where to put the model.

    Raises:
        EditError: no such model, or its weights belong to another world than this code draws.
    """
    path = folder(name)
    almanac = world()
    if card(name)["world"] != almanac.fingerprint:
        raise EditError(
            f"the weights of {name} were trained on world {card(name)['world']}, and this code draws "
            f"{almanac.fingerprint}: "
            "rebuild them with `python -m geoedit.testbeds.almanac`"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), tokenizer, almanac
