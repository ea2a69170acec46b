"""Edits in files: safetensors with a description in JSON. Nothing is unpickled."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from geoedit.errors import EditError
from geoedit.fingerprint import Fingerprint
from geoedit.site import Site

if TYPE_CHECKING:
    from geoedit.edits.base import Edit

FORMAT = "geoedit.edit"
VERSION = 1

_kinds: dict[str, type[Edit]] = {}


def register(kind: str, edit_class: type[Edit]) -> None:
    """Make a class of edits known to `load_edit`, as `class Name(Edit, kind="name")` does by itself.

    Raises:
        EditError: another class has that kind.
    """
    known = _kinds.get(kind)
    if known is not None and (known.__module__, known.__qualname__) != (
        edit_class.__module__,
        edit_class.__qualname__,
    ):
        raise EditError(
            f"The kind {kind!r} belongs to {known.__module__}.{known.__qualname__}; choose another name."
        )
    _kinds[kind] = edit_class


def kinds() -> tuple[str, ...]:
    """The kinds of edits that `load_edit` knows."""
    return tuple(sorted(_kinds))


def described(edit: Edit) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give kind and values of an edit for JSON, and its tensors.

    Raises:
        EditError: its class has no kind.
    """
    if edit.kind is None:
        raise EditError(
            f"{type(edit).__name__} has no kind, so no file can name it:"
            f' write class {type(edit).__name__}(..., kind="its-name").'
        )
    values, tensors = edit.describe()
    return {"kind": edit.kind, "values": values}, tensors


def rebuilt(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
    """Make an edit from what `described` gave.

    Raises:
        EditError: the kind is unknown, or values or tensors do not fit it.
    """
    kind, values = description.get("kind"), description.get("values")
    if kind not in _kinds:
        raise EditError(
            f"No edit of kind {kind!r} is known; known are {', '.join(kinds())}."
            " Import the module that defines it first."
        )
    if not isinstance(values, dict):
        raise EditError(f"The edit of kind {kind!r} has no values: the file is damaged.")
    return _kinds[kind].rebuild(values, tensors)


def write_edit(edit: Edit, path: str | PathLike[str]) -> None:
    """Write an edit to a safetensors file: first beside it, then in its place; the old file stays whole.

    Raises:
        EditError: the edit holds something that JSON cannot hold, or the folder does not exist.
    """
    description, tensors = described(edit)
    header = {"format": FORMAT, "version": VERSION, "edit": description}
    # A copy of each: safetensors refuses two names for one memory.
    kept = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    content = save(kept, metadata={"format": "pt", FORMAT: json.dumps(header, allow_nan=False)})
    target = Path(path)
    if not target.parent.is_dir():
        raise EditError(
            f"The folder {target.parent} does not exist, so {target.name} cannot be written there."
        )
    write_whole(target, content)


def write_whole(target: Path, content: bytes) -> None:
    """Write a file so that at any moment, even after a crash, the old or the new one is there as a whole."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise
    folder = os.open(target.parent, os.O_RDONLY) if os.name == "posix" else None
    if folder is not None:
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_edit(path: str | PathLike[str]) -> Edit:
    """Read an edit that `save` wrote; its tensors are on the CPU and move to the states when they are needed.

    Args:
        path: The file.

    Raises:
        EditError: the file is missing, cut off, not an edit, of an unknown kind, or of a newer version.
    """
    source = Path(path)
    if not source.is_file():
        raise EditError(f"There is no file {source}.")
    try:
        with safe_open(source, framework="pt") as file:
            header = (file.metadata() or {}).get(FORMAT)
            if header is None:
                raise EditError(
                    f"{source} is a safetensors file, but not an edit: it has no {FORMAT!r} in its metadata."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise EditError(f"{source} cannot be read as safetensors; cut off or damaged? ({error})") from error
    try:
        description = json.loads(header)
        version, edit = description["version"], description["edit"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise EditError(f"{source} has a damaged description: {error!r}.") from error
    if not isinstance(version, int) or version > VERSION:
        raise EditError(
            f"{source} has version {version!r} of the edit format, this geoedit reads up to"
            f" {VERSION}; update it."
        )
    try:
        return rebuilt(edit, tensors)
    except EditError as error:
        raise EditError(f"{source}: {error}") from error


def to_json(value: Any, name: str) -> Any:
    """Turn a field's value into what JSON holds.

    Raises:
        EditError: there is no such form.
    """
    if isinstance(value, Site):
        return {"$site": value.to_dict()}
    if isinstance(value, Fingerprint):
        return {"$fingerprint": value.to_dict()}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: to_json(item, f"{name}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item, f"{name}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and value - value == 0:
        return value
    raise EditError(
        f"{name} = {value!r} cannot be saved: a file holds finite numbers, texts, lists and mappings"
        " with texts as keys; and tensors as fields of their own."
    )


def from_json(value: Any) -> Any:
    """Undo `to_json`; tuples come back as lists."""
    if isinstance(value, dict):
        if value.keys() == {"$site"}:
            return Site.from_dict(value["$site"])
        if value.keys() == {"$fingerprint"}:
            return Fingerprint.from_dict(value["$fingerprint"])
        return {key: from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return value
