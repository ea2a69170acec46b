"""Files of tensors, looked at without reading them: safetensors, shards with an index, safe torch files."""

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from peft_analysis.errors import UpdateError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "U16": torch.uint16, "U32": torch.uint32, "U64": torch.uint64, "BOOL": torch.bool,
}  # fmt: skip
SAFE = ".safetensors"
TORCH = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape and dtype, and how to read it.

    Attributes:
        shape: its shape.
        dtype: the dtype that it is stored in.
        read: gives its values.
        mapped: whether `read` maps the file, so that rows that are not looked at take no memory.
    """

    shape: torch.Size
    dtype: torch.dtype
    read: Callable[[], Tensor]
    mapped: bool = False


@dataclass(frozen=True)
class TensorFile:
    """The tensors of one file or of several shards, none of them read yet.

    Attributes:
        tensors: by name.
        metadata: the text metadata of a safetensors file.
        path: the file, or the folder of the shards.
    """

    tensors: Mapping[str, Stored]
    path: Path
    metadata: Mapping[str, str] = field(default_factory=dict)


def open_file(path: Path) -> TensorFile:
    """One file of tensors: safetensors, or a torch file that loads with ``weights_only=True``.

    A tensor of a safetensors file or of a zipped torch file is mapped into memory when it is read, alone, and
    let go with it: the memory in use is that of the tensors in use.

    Raises:
        UpdateError: no such file, a file that is cut off, a pickle that is not plain tensors.
    """
    if not path.is_file():
        raise UpdateError(f"there is no file {path}")
    if path.suffix == SAFE:
        return _open_safetensors(path)
    if path.suffix in TORCH:
        return _open_torch(path)
    raise UpdateError(f"{path} is not a file of tensors; known endings: {', '.join((SAFE, *TORCH))}")


def open_shards(folder: Path, files: Mapping[str, Path] | list[Path]) -> TensorFile:
    """Several files as one: a list of files, or the file of each tensor as an index gives it.

    Raises:
        UpdateError: shards or tensors are missing, or a name stands in two shards.
    """
    paths = sorted(set(files.values())) if isinstance(files, Mapping) else files
    absent = [path.name for path in paths if not path.is_file()]
    if absent:
        raise UpdateError(
            f"{folder} lacks {len(absent)} of {len(paths)} shards: {', '.join(absent[:5])}; "
            "copy the whole folder"
        )
    found: dict[str, Stored] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        part = open_file(path)
        metadata.update(part.metadata)
        wanted = part.tensors
        if isinstance(files, Mapping):
            wanted = {name: value for name, value in wanted.items() if files.get(name) == path}
        twice = sorted(found.keys() & wanted.keys())
        if twice:
            raise UpdateError(f"{folder}: {', '.join(twice[:5])} stand in more than one shard")
        found.update(wanted)
    if isinstance(files, Mapping) and files.keys() - found.keys():
        lost = sorted(files.keys() - found.keys())
        raise UpdateError(
            f"{folder}: the index names {len(lost)} tensors that its shards lack: {', '.join(lost[:5])}"
        )
    return TensorFile(found, folder, metadata)


def read_json(path: Path) -> Any:
    """A JSON file.

    Raises:
        UpdateError: it is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as broken:
        raise UpdateError(f"{path} cannot be read as JSON: {broken}") from broken


def _open_safetensors(path: Path) -> TensorFile:
    tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                piece = file.get_slice(name)
                kind = piece.get_dtype()
                if kind not in DTYPES:
                    raise UpdateError(f"{path}: {name} is stored as {kind}; convert it to a dtype of torch")
                tensors[name] = Stored(
                    torch.Size(piece.get_shape()), DTYPES[kind], partial(_read_safetensors, path, name), True
                )
            return TensorFile(tensors, path, dict(file.metadata() or {}))
    except (SafetensorError, OSError) as broken:
        raise UpdateError(
            f"{path} is not a whole safetensors file ({broken}); download or save it again"
        ) from broken


def _read_safetensors(path: Path, name: str) -> Tensor:
    # A file that stays open keeps every page that was read. Opened for one tensor, it goes with that tensor.
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError) as broken:
        raise UpdateError(f"{path}: {name} cannot be read ({broken})") from broken


def _open_torch(path: Path) -> TensorFile:
    mapped = zipfile.is_zipfile(path)
    content = load_torch(path, mapped)
    keep = None if mapped else content  # the old format cannot be mapped: it is read once, as a whole
    tensors = {
        name: Stored(
            value.shape,
            value.dtype,
            value.detach if keep is not None else partial(_read_torch, path, name),
            mapped,
        )
        for name, value in content.items()
    }
    return TensorFile(tensors, path)


def _read_torch(path: Path, name: str) -> Tensor:
    return load_torch(path, mapped=True)[name]


def load_torch(path: Path, mapped: bool) -> dict[str, Tensor]:
    """All tensors of a torch file by name, mapped into memory or read.

    Raises:
        UpdateError: a file that is cut off, or a pickle that is not plain tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as unsafe:
        raise UpdateError(
            f"{path} is cut off, or a pickle of more than tensors, which is not read, because unpickling can "
            "run code. Save its state dict as safetensors"
        ) from unsafe
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, TypeError, AttributeError) as broken:
        raise UpdateError(f"{path} cannot be read as a torch file ({broken}); save it again") from broken
    for key in ("state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise UpdateError(f"{path} holds a {type(content).__name__}, not tensors by name")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UpdateError(f"{path} holds no tensors")
    return tensors
