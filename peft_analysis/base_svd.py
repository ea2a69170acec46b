"""Singular value decompositions of base weights, kept so that a thousand adapters need each only once."""

import hashlib
import os
import re
import tempfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from peft_analysis.errors import UpdateError

FORMAT = "peft_analysis.BaseSVD"


@dataclass(frozen=True)
class BaseSVD:
    """The thin singular value decomposition W = U diag(S) Vᵀ of a base weight (m, n), with p = min(m, n).

    Computed in float64; kept in float64 for a float64 weight and in float32 for any other.

    Attributes:
        U: the left singular vectors as columns (m, p).
        S: the singular values (p,), largest first.
        V: the right singular vectors as columns (n, p).
        key: the hash of the weight; see `weight_key`.
    """

    U: Float[Tensor, "m p"]
    S: Float[Tensor, " p"]
    V: Float[Tensor, "n p"]
    key: str

    @classmethod
    def of(cls, matrix: Float[Tensor, "m n"], *, key: str | None = None) -> "BaseSVD":
        """Decompose a weight (m, n).

        Args:
            matrix: the weight, as (out, in).
            key: its `weight_key`, where it is known already.

        Raises:
            UpdateError: the matrix is empty or holds NaN or infinity.
        """
        check_matrix(matrix, "the base matrix")
        left, values, right = torch.linalg.svd(matrix.detach().double(), full_matrices=False)
        kept = torch.float64 if matrix.dtype == torch.float64 else torch.float32
        return cls(left.to(kept), values.to(kept), right.mT.to(kept), key or weight_key(matrix))

    @property
    def shape(self) -> torch.Size:
        """(m, n), as of the weight."""
        return torch.Size((self.U.shape[0], self.V.shape[0]))

    @property
    def rank(self) -> int:
        """How many singular values are above `zero`."""
        return int((self.zero < self.S).sum())

    @property
    def zero(self) -> float:
        """Below this a singular value is rounding: 8 ε σ₁ of the kept dtype, or max(m, n) ε₆₄ σ₁ if more.

        Entries rounded to float32 move singular values by about ε₃₂ σ₁ at most, whatever the size.
        """
        return rounding(self.shape, self.S.dtype) * float(self.S[0])

    @property
    def bytes(self) -> int:
        """The memory that the three tensors take."""
        return sum(tensor.nbytes for tensor in (self.U, self.S, self.V))

    def to(self, device: torch.device | str) -> "BaseSVD":
        """The same on another device."""
        return BaseSVD(self.U.to(device), self.S.to(device), self.V.to(device), self.key)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, whole or not at all."""
        target = Path(path)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
        os.close(handle)
        try:
            tensors = {name: getattr(self, name).contiguous() for name in ("U", "S", "V")}
            save_file(tensors, temporary, metadata={"format": FORMAT, "key": self.key})
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> "BaseSVD":
        """Read what `save` wrote.

        Raises:
            UpdateError: the file is missing, shortened or something else.
        """
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                facts = file.metadata() or {}
                names = sorted(file.keys())
                if facts.get("format") != FORMAT or names != ["S", "U", "V"]:
                    raise UpdateError(
                        f"{os.fspath(path)} holds {names} in format {facts.get('format')!r}, not {FORMAT!r}"
                    )
                U, S, V = (file.get_tensor(name) for name in ("U", "S", "V"))
        except (SafetensorError, OSError) as broken:
            raise UpdateError(
                f"{os.fspath(path)} is not a whole safetensors file ({broken}); delete it, "
                "and it is made again"
            ) from broken
        if U.ndim != 2 or V.ndim != 2 or S.shape != (min(len(U), len(V)),) or U.shape[1] != V.shape[1]:
            raise UpdateError(
                f"{os.fspath(path)}: shapes {tuple(U.shape)}, {tuple(S.shape)}, {tuple(V.shape)} do not fit"
            )
        return cls(U, S, V, facts.get("key", ""))


class SVDCache:
    """Decompositions of base weights by the hash of the weight: in memory, and in a folder if one is given.

    Calling it with a matrix gives its `BaseSVD`. A weight is decomposed once however many adapters are
    scanned, and once for all runs that share a folder. Of what is in memory, the least recently used goes
    first; a file stays until it is deleted.

    Attributes:
        folder: where files go, or None.
        memory: how many bytes may stay in memory.

    Example:
        >>> import torch
        >>> cache = SVDCache()
        >>> W = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
        >>> cache(W) is cache(W.clone())
        True
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, memory: int = 2**31) -> None:
        self.folder = None if folder is None else Path(folder)
        self.memory = memory
        self._kept: OrderedDict[tuple[str, str], BaseSVD] = OrderedDict()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, matrix: Float[Tensor, "m n"], *, key: str | None = None) -> BaseSVD:
        """The decomposition of a weight: from memory, from the folder, or computed.

        Args:
            matrix: the weight, as (out, in).
            key: its `weight_key`, where it is known already: a key saves the reading of the whole matrix.

        Raises:
            UpdateError: the matrix is empty or holds NaN or infinity; the key is not one of `weight_key`.
        """
        check_matrix(matrix, "the base matrix", finite=False)
        key = weight_key(matrix) if key is None else key
        if not re.fullmatch(r"[0-9a-f]{16,128}", key):
            raise UpdateError(f"key is {key!r}; it is what weight_key(matrix) gives")
        place = key, str(matrix.device)
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        found = self._read(key, matrix) or BaseSVD.of(matrix, key=key)
        if self.folder is not None and not self._path(key).exists():
            found.save(self._path(key))
        self._keep(place, found)
        return found

    def __len__(self) -> int:
        return len(self._kept)

    def _path(self, key: str) -> Path:
        return (self.folder or Path()) / f"{key}.safetensors"

    def _read(self, key: str, matrix: Tensor) -> BaseSVD | None:
        if self.folder is None or not self._path(key).exists():
            return None
        found = BaseSVD.load(self._path(key), device=matrix.device)
        if found.key != key or found.shape != matrix.shape:
            raise UpdateError(
                f"{self._path(key)} is of another weight: its key is {found.key!r}, its shape "
                f"{tuple(found.shape)}; delete it, and it is made again"
            )
        return found

    def _keep(self, place: tuple[str, str], found: BaseSVD) -> None:
        if found.bytes > self.memory:
            return
        self._kept[place] = found
        while sum(one.bytes for one in self._kept.values()) > self.memory:
            self._kept.popitem(last=False)


def rounding(shape: torch.Size, dtype: torch.dtype) -> float:
    """Singular values this small, over the largest, are rounding; see `BaseSVD.zero`."""
    return max(8 * torch.finfo(dtype).eps, max(shape) * torch.finfo(torch.float64).eps)


def weight_key(matrix: Float[Tensor, "m n"]) -> str:
    """A hash of a weight's shape, dtype and bits: 64 hexadecimal digits."""
    digest = hashlib.sha256(f"{tuple(matrix.shape)} {matrix.dtype}".encode())
    bits = matrix.detach().contiguous().view(torch.uint8) if matrix.numel() else matrix.new_zeros(0)
    digest.update(bits.cpu().numpy().data)
    return digest.hexdigest()


def check_matrix(matrix: Tensor, name: str, *, finite: bool = True) -> None:
    """Refuse what is not a matrix of real floating-point numbers.

    Raises:
        UpdateError: not two dimensions, no entries, not floating point, or (if `finite`) NaN or infinity.
    """
    if matrix.ndim != 2 or not matrix.is_floating_point():
        raise UpdateError(
            f"{name} has shape {tuple(matrix.shape)} and dtype {matrix.dtype}; a matrix (out, in) of "
            "floating-point numbers is needed; update.matrix(name) gives one"
        )
    if not matrix.numel():
        raise UpdateError(f"{name} has shape {tuple(matrix.shape)}; it has no entries")
    if finite and not bool(matrix.isfinite().all()):
        count = int((~matrix.isfinite()).sum())
        raise UpdateError(f"{name} holds {count} entries that are NaN or infinite; it cannot be decomposed")
