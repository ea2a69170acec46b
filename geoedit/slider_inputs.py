"""What a user writes on the command line of a slider: models, files at scales, numbers, settings."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from geoedit.errors import EditError

DEFAULT_MODEL = "shapes-unet"


def load_base(
    name: str, *, dtype: str | None = None, device: str = "cpu", language: bool = False
) -> tuple[Any, Any]:
    """A pipeline and None, or a language model and its tokenizer.

    A built-in name and a folder say themselves which of the two they are; a hub id is a pipeline unless a
    language model is asked for.

    Args:
        name: a built-in name, a folder that diffusers or transformers wrote, or a hub id.
        dtype: of the weights in memory; None for float32, or as stored for a language model.
        device: where to put it.
        language: whether a hub id is a language model.

    Raises:
        EditError: there is no such model, or it can't be read.
    """
    from geoedit.loading import DTYPES, check_device, check_hub_id, dtype_of, load_model
    from geoedit.testbeds import PIPELINES, TESTBEDS

    check_device(device)
    kind = dtype_of(dtype)
    path = Path(name).expanduser()
    if (
        name in TESTBEDS
        or (path / "config.json").is_file()
        or (language and not path.exists() and name not in PIPELINES)
    ):
        return load_model(name, dtype=kind, device=device)
    if name in PIPELINES:
        from geoedit.testbeds import load

        return load(name, dtype=DTYPES[dtype or "float32"], device=device), None
    if path.exists() and not (path / "model_index.json").is_file():
        raise EditError(
            f"{path} has no model_index.json, so that it is no folder of a diffusers pipeline; write one "
            "with pipe.save_pretrained(folder), from a single file after …Pipeline.from_single_file(file)."
        )
    if not path.exists():
        check_hub_id(name, PIPELINES + TESTBEDS)
    return _pipeline(str(path) if path.exists() else name, DTYPES[dtype or "float32"], device), None


def _pipeline(source: str, dtype: Any, device: str) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging
    from safetensors import SafetensorError
    from transformers.utils import logging as transformers_logging

    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        pipe = DiffusionPipeline.from_pretrained(source, torch_dtype=dtype, use_safetensors=True)
    except (
        OSError,
        ValueError,
        KeyError,
        ImportError,
        RuntimeError,
        AttributeError,
        SafetensorError,
    ) as error:
        text = str(error).strip().splitlines()
        raise EditError(
            f"can't load a pipeline from {source!r}: {text[0] if text else type(error).__name__} Give a "
            "folder that pipe.save_pretrained(folder) wrote with safetensors, or check id and network."
        ) from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def read_term(text: str) -> tuple[str, float]:
    """A file and its scale: ``age.safetensors@1.5``; 1 if none is given.

    >>> read_term("age.safetensors@-0.7"), read_term("me@home/age.safetensors")
    (('age.safetensors', -0.7), ('me@home/age.safetensors', 1.0))

    Raises:
        EditError: what stands behind the @ is no number.
    """
    file, at, scale = text.rpartition("@")
    if not at or "/" in scale:
        return text, 1.0
    try:
        return file, float(scale)
    except ValueError:
        raise EditError(
            f"{text!r}: {scale!r} is no number; write file@scale, for instance {file}@1.5."
        ) from None


def read_scales(text: str) -> list[float]:
    """Numbers between commas.

    >>> read_scales("-1,0,1.5")
    [-1.0, 0.0, 1.5]

    Raises:
        EditError: they are none.
    """
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise EditError(f"--scales is {text!r}; give numbers separated by commas: -1,0,1.") from None


def read_settings(entries: Sequence[str]) -> Mapping[str, Any]:
    """Settings of a run as ``name=value``, the value in YAML.

    >>> read_settings(["rank=8", "targets=[attn, conv]", "learning_rate=2e-3"])
    {'rank': 8, 'targets': ['attn', 'conv'], 'learning_rate': 0.002}

    Raises:
        EditError: an entry has no =, or its value is no YAML.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise EditError(f"--set {entry!r}: write name=value, for instance --set rank=8.")
        try:
            # YAML wants a point in 1e-3 to see a number in it.
            found[name] = (
                float(value) if re.fullmatch(r"\s*[-+]?\d+[eE][-+]?\d+\s*", value) else yaml.safe_load(value)
            )
        except yaml.YAMLError as error:
            raise EditError(f"--set {entry!r}: {value!r} is no YAML value ({error}).") from error
    return found


def file_name(text: str) -> str:
    """A name that every file system takes."""
    return (
        "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in text).strip(".")
        or "slider"
    )
