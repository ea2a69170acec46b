"""Learned manifolds in safetensors files, with their numbers as JSON. Nothing is unpickled."""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from manifolds.errors import ManifoldError

if TYPE_CHECKING:
    from manifolds.cloud.learned import LearnedManifold

FORMAT = "manifolds.LearnedManifold"
VERSION = 1


def write_manifold(manifold: "LearnedManifold", path: str | os.PathLike[str]) -> None:
    """Writes a manifold to a temporary file beside the path, then renames it."""
    if manifold.kind is None:
        raise ManifoldError(
            f"{type(manifold).__name__}.save: the class has no kind, by which a file could name it; "
            'give it one: class …(LearnedManifold, kind="…")'
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise ManifoldError(f"{manifold.name}.save: there is no folder {target.parent}; make it first")
    values, tensors = manifold.describe()
    text = json.dumps(values, allow_nan=True)
    named = {"format": FORMAT, "version": str(VERSION), "kind": manifold.kind, "values": text}
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    try:
        copies = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        save_file(copies, temporary, metadata=named)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_manifold(
    wanted: type["LearnedManifold"], path: str | os.PathLike[str], device: torch.device | str | None = None
) -> "LearnedManifold":
    """The manifold in a file that `write_manifold` wrote; of the class `wanted` or one of its children."""
    source = f"{wanted.__name__}.load: {os.fspath(path)}"
    if not Path(path).is_file():
        raise ManifoldError(f"{wanted.__name__}.load: there is no file {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            metadata = dict(file.metadata() or {})
            if metadata.get("format") != FORMAT:
                raise ManifoldError(
                    f"{source} is in format {metadata.get('format')!r}; save writes {FORMAT!r}"
                )
            if metadata.get("version") != str(VERSION):
                raise ManifoldError(
                    f"{source} has version {metadata.get('version')}; this program reads {VERSION}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as broken:
        raise ManifoldError(f"{source} is not a whole safetensors file ({broken}); save it again") from broken
    kind = metadata.get("kind", "")
    found = wanted._kinds.get(kind)
    if found is None:
        raise ManifoldError(
            f"{source} holds a manifold of kind {kind!r}; known are {', '.join(sorted(wanted._kinds))}"
        )
    if not issubclass(found, wanted):
        raise ManifoldError(f"{source} holds a {found.__name__}; read it with {found.__name__}.load")
    try:
        return found.rebuild(json.loads(metadata["values"]), tensors)
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as missing:
        raise ManifoldError(f"{source} lacks what a {found.__name__} is made of: {missing}") from missing
