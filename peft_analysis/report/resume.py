"""A folder that keeps each matrix's row, so that a stopped analysis goes on where it was."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.report.files import write_text
from peft_analysis.updates import WeightUpdate

FORMAT = 1
CHUNK = 1 << 22


class Kept:
    """One JSON file a matrix, each with a key made of everything that its row was computed from.

    A row is taken from the folder only if its key is that of the values at hand: a changed update, base or
    setting is computed anew. Files that cannot be read count as absent.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.settings = dict(settings)
        if self.folder.exists() and not self.folder.is_dir():
            raise UpdateError(f"resume={str(folder)!r} is a file; give a folder")

    def key(self, update: WeightUpdate, name: str) -> str:
        """A hash of the difference's values, the base's, the entry's facts and the settings."""
        entry = update.entries[name]
        facts = [
            FORMAT, torch.__version__, name, list(entry.shape), entry.kind, entry.layout, str(entry.rounded),
            str(entry.base_rounded), self.settings,
        ]  # fmt: skip
        digest = hashlib.blake2b(json.dumps(facts, sort_keys=True, default=str).encode(), digest_size=16)
        _absorb(digest, update[name])
        if entry.magnitude is not None:
            _absorb(digest, entry.magnitude())
        if update.base is not None and name in update.base:
            _absorb(digest, update.base[name])
        return digest.hexdigest()

    def read(self, name: str, key: str) -> dict[str, Any] | None:
        """The row of a matrix if it was kept under this key, else None."""
        try:
            found = json.loads(self._path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        whole = isinstance(found, dict) and found.get("key") == key and isinstance(found.get("row"), dict)
        return found["row"] if whole else None

    def write(self, name: str, key: str, row: Mapping[str, Any]) -> None:
        """Keep a row."""
        write_text(self._path(name), json.dumps({"key": key, "parameter": name, "row": row}, allow_nan=False))

    def _path(self, name: str) -> Path:
        mark = hashlib.blake2b(name.encode(), digest_size=5).hexdigest()
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)[-120:]}-{mark}.json"


def _absorb(digest: Any, value: LowRank | Tensor) -> None:
    parts = (value.left, value.right) if isinstance(value, LowRank) else (value,)
    for part in parts:
        digest.update(f"{tuple(part.shape)} {part.dtype}".encode())
        for piece in _pieces(part):
            digest.update(piece.numpy())


def _pieces(value: Tensor) -> Iterator[Tensor]:
    """The bytes of a tensor in order, a chunk of rows at a time, on the CPU."""
    rows = value.detach().reshape(value.shape[0], -1) if value.ndim else value.detach().reshape(1, 1)
    step = max(1, CHUNK // max(1, rows.shape[1]))
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step].cpu().contiguous().view(torch.uint8)
