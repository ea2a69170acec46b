"""An adapter folder: its settings, and its tensors one at a time."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.foundation import present
from peft_analysis.updates.files import Stored, open_file, read_json
from peft_analysis.updates.names import listed

CONFIG = "adapter_config.json"
FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (folder / CONFIG).is_file()


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of an adapter folder.

    Raises:
        UpdateError: if the file is missing, is no JSON, or names no kind of adapter.
    """
    if not is_adapter(folder):
        inside = (
            sorted(child.name for child in folder.iterdir() if is_adapter(child)) if folder.is_dir() else []
        )
        hint = f"; it holds the adapters {', '.join(inside)}: give one of them" if inside else ""
        raise UpdateError(f"{folder} has no {CONFIG}{hint}")
    settings = read_json(folder / CONFIG)
    if not isinstance(settings, dict) or not settings.get("peft_type"):
        raise UpdateError(f"{folder / CONFIG} names no peft_type; is this an adapter of peft?")
    return settings


def read_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of an adapter folder by their names in the file.

    Raises:
        UpdateError: if the file is missing, cut short or unsafe, or has values that are not finite.
    """
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise UpdateError(f"{folder} has neither {FILES[0]} nor {FILES[1]}")
    found = open_file(path).tensors
    if not found:
        raise UpdateError(f"{path} holds no tensors; was it saved before anything was trained?")
    check_finite(found, str(path))
    return dict(found)


def check_finite(tensors: Mapping[str, Stored], source: str) -> None:
    """Raises an `UpdateError` that lists the tensors with NaN or infinite values."""
    wrong = [
        name
        for name, stored in tensors.items()
        if stored.dtype.is_floating_point and not bool(torch.isfinite(present(stored.read(), name)).all())
    ]
    if wrong:
        raise UpdateError(f"{source}: NaN or infinite values in {listed(sorted(wrong))}")


def grouped(
    tensors: Mapping[str, Stored], roles: Iterable[str]
) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """The tensors of each module by role, and those that have none of the roles."""
    known = set(roles)
    parts: dict[str, dict[str, Stored]] = defaultdict(dict)
    rest = {}
    for name, stored in tensors.items():
        words = name.split(".")
        for length in (1, 2):
            role = ".".join(words[-length:])
            if role in known:
                parts[".".join(words[:-length])][role] = stored
                break
        else:
            rest[name] = stored
    return dict(parts), rest
