"""An update in a safetensors file of its own: written as it is read, whole or not at all."""

import json
import os
import secrets
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.files import DTYPES, SAFE, TensorFile, open_file
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights

FORMAT = "peft_analysis.WeightUpdate"
VERSION = 1
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LARGEST = 10**16  # bytes; offsets are written with at most this many digits


def write_update(update: WeightUpdate, path: str | os.PathLike[str]) -> None:
    """Writes an update beside the path, one value in memory at a time, then renames the file into its place.

    A safetensors file begins with what it holds, and whether a value is a `LowRank`, and of which rank, is
    known only once it is read. So the header's place is kept free, filled at the end and padded with spaces,
    which the format allows.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise UpdateError(f"there is no folder {target.parent} to write {target.name} into")
    if target.is_dir():
        raise UpdateError(f"{target} is a folder; give the name of a file in it")
    if target.suffix != SAFE:
        raise UpdateError(f"{target.name} must end with {SAFE}; an update is saved in that format")
    try:
        described = json.dumps(_described(update))
    except (TypeError, ValueError) as wrong:
        raise UpdateError(
            f"details of an entry are not plain JSON ({wrong}); make them strings and numbers"
        ) from wrong
    metadata = {"format": FORMAT, "version": str(VERSION), "update": described}
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with open(temporary, "xb") as file:
            _write(file, update, metadata)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def read_saved(path: str | os.PathLike[str], *, base: Weights | None = None) -> WeightUpdate:
    """The update in a file that `write_update` wrote."""
    return from_file(open_file(Path(path).expanduser()), base=base)


def is_saved_update(file: TensorFile) -> bool:
    """Whether `write_update` wrote a file."""
    return file.metadata.get("format") == FORMAT


def from_file(file: TensorFile, *, base: Weights | None = None) -> WeightUpdate:
    """The update in an open file; see `read_saved`."""
    if not is_saved_update(file):
        raise UpdateError(
            f"{file.path} was not written by WeightUpdate.save; read it with read_update(base, path)"
        )
    if int(file.metadata.get("version", "0")) > VERSION:
        raise UpdateError(f"{file.path} was written by a newer version; update this package")
    try:
        described = json.loads(file.metadata["update"])
        return _rebuilt(file, described, "", base)
    except (KeyError, TypeError, ValueError, AttributeError) as broken:
        if isinstance(broken, UpdateError):
            raise
        raise UpdateError(f"{file.path} is damaged: {broken!r}; save the update again") from broken


def _described(update: WeightUpdate) -> dict[str, Any]:
    entries = {}
    for name, entry in update.entries.items():
        facts = {
            "shape": list(entry.shape),
            "kind": entry.kind,
            "layout": entry.layout,
            "rounded": _dtype_name(entry.rounded),
            "base_rounded": _dtype_name(entry.base_rounded),
            "details": dict(entry.details),
        }
        entries[name] = {key: value for key, value in facts.items() if value is not None and value != {}}
    return {
        "source": update.source,
        "entries": entries,
        "skipped": update.skipped,
        "stages": [_described(stage) for stage in update.stages],
    }


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _values(update: WeightUpdate, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor to write, each when its turn comes."""
    for name, entry in update.entries.items():
        value = update[name]
        if isinstance(value, LowRank):
            yield f"{prefix}{name}|left", value.left
            yield f"{prefix}{name}|right", value.right
        else:
            yield f"{prefix}{name}", value
        del value
        if entry.magnitude is not None:
            yield f"{prefix}{name}|magnitude", entry.magnitude()
    for number, stage in enumerate(update.stages):
        yield from _values(stage, f"{prefix}{number}|")


def _keys(update: WeightUpdate, prefix: str = "") -> list[str]:
    """Every key that may be written."""
    found = [f"{prefix}{name}{end}" for name in update.entries for end in ("|left", "|right", "|magnitude")]
    return found + [
        key for number, stage in enumerate(update.stages) for key in _keys(stage, f"{prefix}{number}|")
    ]


def _write(file: BinaryIO, update: WeightUpdate, metadata: dict[str, str]) -> None:
    worst = {"dtype": "BF16", "shape": [10**12] * 6, "data_offsets": [LARGEST, LARGEST]}
    room = len(_packed({"__metadata__": metadata, **dict.fromkeys(_keys(update), worst)}))
    room += -room % 8
    file.write(b" " * (8 + room))
    header: dict[str, Any] = {"__metadata__": metadata}
    begin = 0
    for key, value in _values(update):
        if key in header:
            raise UpdateError(
                f"two values would be called {key!r} in the file: a name with '|' in it is that of another's "
                "part; rename it"
            )
        end = begin + _write_tensor(file, value.detach())
        header[key] = {"dtype": NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
        begin = end
    file.seek(0)
    file.write(room.to_bytes(8, "little") + _packed(header).ljust(room))


def _packed(header: dict[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":")).encode()


def _write_tensor(file: BinaryIO, value: Tensor) -> int:
    content = value.to("cpu").contiguous()
    if sys.byteorder == "big":
        raise UpdateError("updates are not written on a big-endian machine")
    file.write(content.reshape(-1).view(torch.uint8).numpy().data)
    return content.numel() * content.element_size()


def _rebuilt(file: TensorFile, described: dict[str, Any], prefix: str, base: Weights | None) -> WeightUpdate:
    entries = {}
    for name, facts in described["entries"].items():
        key = f"{prefix}{name}"
        if f"{key}|left" in file.tensors:
            read: Any = partial(_low_rank, file, key)
            file.tensors[f"{key}|right"]
        else:
            read = file.tensors[key].read
        magnitude = file.tensors.get(f"{key}|magnitude")
        entries[name] = Entry(
            torch.Size(facts["shape"]),
            read,
            kind=facts["kind"],
            layout=facts["layout"],
            rounded=_dtype(facts.get("rounded")),
            base_rounded=_dtype(facts.get("base_rounded")),
            details=facts.get("details", {}),
            magnitude=None if magnitude is None else magnitude.read,
        )
    stages = [
        _rebuilt(file, stage, f"{prefix}{number}|", None) for number, stage in enumerate(described["stages"])
    ]
    return WeightUpdate(
        entries, base=base, source=described["source"], stages=stages, skipped=described["skipped"]
    )


def _dtype(name: str | None) -> torch.dtype | None:
    return None if name is None else getattr(torch, name)


def _low_rank(file: TensorFile, key: str) -> LowRank:
    return LowRank(file.tensors[f"{key}|left"].read(), file.tensors[f"{key}|right"].read())
