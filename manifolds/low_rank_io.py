"""A `LowRank` in a safetensors file: written whole or not at all."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from manifolds.errors import ManifoldError

FORMAT = "manifolds.LowRank"


def write_factors(
    path: str | os.PathLike[str], left: Tensor, right: Tensor, metadata: Mapping[str, str] | None
) -> None:
    """Writes two factors to a temporary file beside the path, then renames it."""
    target = Path(path)
    named = {**(metadata or {}), "format": FORMAT}
    for key, value in named.items():
        if not isinstance(value, str):
            raise ManifoldError(
                f"LowRank.save: metadata[{key!r}] is a {type(value).__name__}; safetensors stores strings"
            )
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    os.close(handle)
    try:
        tensors = {"left": left.detach().contiguous().clone(), "right": right.detach().contiguous().clone()}
        save_file(tensors, temporary, metadata=named)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_factors(
    path: str | os.PathLike[str], device: torch.device | str | None
) -> tuple[Tensor, Tensor, dict[str, str]]:
    """Both factors and the metadata of a file that `write_factors` wrote."""
    if not Path(path).is_file():
        raise ManifoldError(f"LowRank.load: there is no file {os.fspath(path)}")
    try:
        with safe_open(path, framework="pt", device=str(device or "cpu")) as file:
            metadata = dict(file.metadata() or {})
            names = set(file.keys())
            if metadata.get("format") != FORMAT or names != {"left", "right"}:
                raise ManifoldError(
                    f"LowRank.load: {os.fspath(path)} holds the tensors {sorted(names)} in format "
                    f"{metadata.get('format')!r}; LowRank.save writes left and right in format {FORMAT!r}"
                )
            left, right = file.get_tensor("left"), file.get_tensor("right")
    except SafetensorError as broken:
        raise ManifoldError(
            f"LowRank.load: {os.fspath(path)} is not a whole safetensors file ({broken}); save it again"
        ) from broken
    metadata.pop("format")
    return left, right, metadata
