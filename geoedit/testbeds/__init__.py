"""Small trained models whose truth is known: what a language model was told, what a pipeline can draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, overload

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from geoedit.errors import EditError
from geoedit.testbeds.almanac.world import World, world

__all__ = ["PIPELINES", "TESTBEDS", "World", "card", "folder", "load", "world"]

TESTBEDS = ("almanac-gpt2", "almanac-llama")
"""The language models."""
PIPELINES = ("shapes-unet", "shapes-flow")
"""The text-to-image pipelines."""
WEIGHTS = Path(__file__).parent / "weights"


def folder(name: str) -> Path:
    """Where a built-in model or pipeline lies: a folder that transformers or diffusers reads as it is.

    Raises:
        EditError: no built-in model has that name, or its files are not where the package keeps them.
    """
    if name not in TESTBEDS + PIPELINES:
        raise EditError(f"no testbed is named {name!r}; there are {', '.join(TESTBEDS + PIPELINES)}")
    path = WEIGHTS / name
    if not (path / ("model.safetensors" if name in TESTBEDS else "model_index.json")).is_file():
        raise EditError(
            f"the weights of {name} are not in this installation; reinstall geoedit, or {_rebuild(name)}"
        )
    return path


def _rebuild(name: str) -> str:
    room, _, kind = name.partition("-")
    option = "architecture" if name in TESTBEDS else "family"
    return f"rebuild them with `python -m geoedit.testbeds.{room} --{option} {kind}`"


def card(name: str) -> dict[str, Any]:
    """What a built-in model knows, or how a pipeline follows its words: measured by its recipe.

    The prompts are held out. The card of a language model also says where the knowledge sits.

    >>> card("almanac-gpt2")["causal_trace"]["middle_third"]["carried_at_subject"] >= 0.8
    True
    """
    return dict(json.loads((folder(name) / "card.json").read_text(encoding="utf-8")))


@overload
def load(
    name: Literal["shapes-unet", "shapes-flow"],
    *,
    dtype: torch.dtype = ...,
    device: torch.device | str = ...,
) -> Any: ...
@overload
def load(
    name: str, *, dtype: torch.dtype = ..., device: torch.device | str = ...
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, World]: ...
def load(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Any:
    """Load a language model, its tokenizer and the world that it was told of; or a text-to-image pipeline.

    Args:
        name: one of ``TESTBEDS``, which gives three things, or of ``PIPELINES``, which gives one: a
            ``StableDiffusionPipeline`` or a ``StableDiffusion3Pipeline`` of diffusers.
        dtype: the type of the weights in memory; on disk they are half precision.
        device: where to put the model.

    Raises:
        EditError: no such model, or its weights belong to another world than this code draws.
    """
    path = folder(name)
    if name in PIPELINES:
        from geoedit.testbeds.shapes.files import read_pipeline, world_fingerprint

        _check_world(name, world_fingerprint())
        return read_pipeline(path, dtype=dtype, device=device)
    almanac = world()
    _check_world(name, almanac.fingerprint)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval(), tokenizer, almanac


def _check_world(name: str, drawn: str) -> None:
    trained = card(name)["world"]
    if trained != drawn:
        raise EditError(
            f"the weights of {name} were trained on world {trained}, and this code draws {drawn}: "
            f"{_rebuild(name)}"
        )
