"""The shapes pipelines in folders that diffusers reads as they are: half precision, nothing to unpickle."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from geoedit.errors import EditError
from geoedit.testbeds.shapes.render import SATURATION, SIZE, SOFTNESS
from geoedit.testbeds.shapes.world import ATTRIBUTES, CLASSES


def world_fingerprint() -> str:
    """Sixteen hexadecimal digits that change when the shapes' world does: ranges, words, classes, edges."""
    told = {
        "attributes": [asdict(attribute) for attribute in ATTRIBUTES.values()],
        "classes": CLASSES,
        "drawing": [SIZE, SATURATION, SOFTNESS],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def read_pipeline(
    path: Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Any:
    """Load a pipeline's folder, without a word and with its progress bar off.

    Raises:
        EditError: the folder holds no pipeline, or a file of it cannot be read.
    """
    from diffusers import DiffusionPipeline

    index = path / "model_index.json"
    try:
        parts = json.loads(index.read_text(encoding="utf-8"))
        absent = {name: None for name, kind in parts.items() if kind == [None, None]}
        with _quiet():
            pipe: Any = DiffusionPipeline.from_pretrained(
                path, local_files_only=True, use_safetensors=True, **absent
            )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EditError(
            f"no pipeline could be read from {path}: {reason[0]}; "
            "write the folder again, or reinstall geoedit"
        ) from error
    with _quiet():
        pipe.to(torch.device(device), dtype)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    return pipe


def write_pipeline(out: Path, pipe: Any, describe: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Write a pipeline in half precision, describe what can be read again, then move the folder into place.

    The text encoders' own files ask for float32 in memory, as diffusers' parts do by themselves: so that a
    plain ``from_pretrained`` gives a pipeline of one type.

    Args:
        out: the folder; what is there is replaced as a whole.
        pipe: the pipeline; its weights become half precision.
        describe: what to write on the card of a pipeline as it is read from the folder.

    Returns:
        The card.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        fresh = Path(scratch) / "pipeline"
        with _quiet():
            for part in pipe.components.values():
                if isinstance(part, torch.nn.Module):
                    part.half()
            pipe.save_pretrained(fresh, safe_serialization=True)
        for config in (fresh / "model_index.json", *fresh.glob("*/config.json")):
            content = json.loads(config.read_text(encoding="utf-8"))
            content.pop("_name_or_path", None)  # where it was once read from, on this machine
            if config.parent.name.startswith("text_encoder"):
                content["dtype"] = "float32"
            config.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in fresh.rglob("*.safetensors"):
            file.chmod(0o644)  # its writer makes it private
        card = describe(read_pipeline(fresh))
        (fresh / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        if out.exists():
            os.replace(out, Path(scratch) / "old")
        os.replace(fresh, out)
    return card


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The libraries' progress bars and remarks switched off, and afterwards as they were."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    before = [
        (library, library.get_verbosity(), library.is_progress_bar_enabled())
        for library in (of_diffusers, of_transformers)
    ]
    try:
        for library, _, _ in before:
            library.set_verbosity_error()
            library.disable_progress_bar()
        yield
    finally:
        for library, verbosity, bars in before:
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
