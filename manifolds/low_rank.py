"""A matrix that is kept in two factors and never multiplied out unless asked."""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils import _pytree

from manifolds.errors import ManifoldError
from manifolds.low_rank_checks import check_factors, check_finite
from manifolds.low_rank_io import read_factors, write_factors
from manifolds.low_rank_spectrum import core, nearest_of_rank, product_norm, thin_svd

HALF = (torch.float16, torch.bfloat16)


class LowRank:
    """A batch of matrices W = left right, of shapes (*batch, m, k) and (*batch, k, n).

    Work is in (m + n) k² or less, never in m n, except for `dense` and sums with a dense tensor. Products
    with tensors and with other `LowRank`s read as for a matrix. Half precision is decomposed in float32.
    All is differentiable; where singular values meet, everything but the singular vectors themselves
    (`svd`, `column_space`, `row_space`) stays so.

    Attributes:
        left: the factor of the columns (*batch, m, k).
        right: the factor of the rows (*batch, k, n).

    Example:
        >>> import torch
        >>> update = LowRank.from_factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        >>> update.norm(), (update - update).norm(), (update @ update.T).shape
        (tensor(5.), tensor(0.), torch.Size([2, 2]))
        >>> update @ torch.tensor([2.0, 1.0, 1.0])
        tensor([6., 8.])
    """

    left: Tensor
    right: Tensor
    __array_ufunc__ = None  # numpy's numbers leave the product to `__rmul__`

    def __init__(self, left: Tensor, right: Tensor) -> None:
        check_factors(left, right)
        object.__setattr__(self, "left", left)
        object.__setattr__(self, "right", right)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a LowRank does not change; make a new one instead of setting {name!r}")

    # Factors in

    @classmethod
    def from_factors(cls, B: Float[Tensor, "*#batch m r"], A: Float[Tensor, "*#batch r n"]) -> "LowRank":
        """W = B A, in the order of a LoRA: B is `lora_B` (m, r) and A is `lora_A` (r, n)."""
        return cls(B, A)

    @classmethod
    def from_svd(
        cls, U: Float[Tensor, "*#batch m k"], S: Float[Tensor, "*#batch k"], Vh: Float[Tensor, "*#batch k n"]
    ) -> "LowRank":
        """W = U diag(S) Vh, with √|S| in either factor and the sign on the left."""
        size = S.abs()
        root = torch.where(size > 0, torch.where(size > 0, size, 1.0).sqrt(), 0.0)
        return cls(U * (root * S.sign()).unsqueeze(-2), root.unsqueeze(-1) * Vh)

    @classmethod
    def from_dense(
        cls, W: Float[Tensor, "*batch m n"], *, tolerance: float | int | None = None, rank: int | None = None
    ) -> "LowRank":
        """The best approximation of a dense matrix, by rank, by tolerance, or by the smaller of both.

        Args:
            W: matrices.
            tolerance: the least rank with ‖W − W'‖ ≤ tolerance ‖W‖ in every item; that of `recompress` if
                neither is given.
            rank: the largest rank.
        """
        if W.ndim < 2 or not W.is_floating_point():
            raise ManifoldError(f"LowRank.from_dense: W has shape {tuple(W.shape)} and dtype {W.dtype}")
        wide = W.float() if W.dtype in HALF else W
        rows, columns = wide.shape[-2:]
        eye = torch.eye(min(rows, columns), dtype=wide.dtype, device=wide.device)
        found = cls(eye, wide) if rows <= columns else cls(wide, eye)
        if rank is not None:
            found = found.truncate(rank)
        if rank is None or tolerance is not None:
            found = found.recompress(tolerance)
        return found.to(W.dtype)

    @classmethod
    def zeros(cls, *shape: int, dtype: torch.dtype | None = None, device: Any = None) -> "LowRank":
        """The zero matrix (*batch, m, n), of stored rank 0."""
        *batch, rows, columns = shape
        return cls(
            torch.zeros(*batch, rows, 0, dtype=dtype, device=device),
            torch.zeros(*batch, 0, columns, dtype=dtype, device=device),
        )

    # What it is

    @property
    def shape(self) -> torch.Size:
        """(*batch, m, n), as of the dense matrix."""
        batch = torch.broadcast_shapes(self.left.shape[:-2], self.right.shape[:-2])
        return torch.Size((*batch, self.left.shape[-2], self.right.shape[-1]))

    @property
    def ndim(self) -> int:
        """The number of dimensions, as of the dense matrix."""
        return len(self.shape)

    @property
    def rank(self) -> int:
        """The stored rank k, the width of the factors. It may be more than the rank; see `numerical_rank`."""
        return self.left.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of both factors."""
        return self.left.dtype

    @property
    def device(self) -> torch.device:
        """The device of both factors."""
        return self.left.device

    def __repr__(self) -> str:
        if not isinstance(self.left, Tensor):
            return f"LowRank({self.left!r}, {self.right!r})"
        return (
            f"LowRank(shape={tuple(self.shape)}, rank={self.rank}, dtype={self.dtype}, device={self.device})"
        )

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> "Iterator[LowRank]":
        return (self[item] for item in range(len(self)))

    def dense(self) -> Float[Tensor, "*batch m n"]:
        """The product left right."""
        return self.left @ self.right

    # Spectrum

    def svd(
        self,
    ) -> tuple[Float[Tensor, "*batch m p"], Float[Tensor, "*batch p"], Float[Tensor, "*batch p n"]]:
        """The exact thin singular value decomposition U, S, Vh with p = min(m, n, k), by QR of the factors.

        The signs (and, at repeated values, the bases) of singular vectors are not defined, nor are their
        derivatives at repeated values; `singular_values`, `norm` and `truncate` are differentiable there.
        """
        self._finite("svd")
        u, values, v = thin_svd(self._wide(self.left), self._wide(self.right).mT)
        return u.to(self.dtype), values.to(self.dtype), v.mT.to(self.dtype)

    def singular_values(self) -> Float[Tensor, "*batch p"]:
        """The min(m, n, k) singular values, largest first. Their symmetric functions have derivatives."""
        self._finite("singular_values")
        return torch.linalg.svdvals(
            core(self._wide(self.left)) @ core(self._wide(self.right).mT).mT
        ).to(self.dtype)  # fmt: skip

    def numerical_rank(self, tolerance: float | int | None = None) -> Tensor:
        """How many singular values are above tolerance × the largest (*batch); max(m, n) ε if not given."""
        values = self.singular_values()
        if values.shape[-1] == 0:
            return torch.zeros(values.shape[:-1], dtype=torch.long, device=values.device)
        return (values > self._tolerance(tolerance) * values[..., :1]).sum(-1)

    def norm(self) -> Float[Tensor, "*batch"]:
        """The Frobenius norm, from the QR factors: a difference keeps the digits that its entries have."""
        return product_norm(self._wide(self.left), self._wide(self.right).mT).to(self.dtype)

    def inner(self, other: "LowRank | Tensor") -> Float[Tensor, "*batch"]:
        """The Frobenius inner product ⟨W, other⟩, from small Gram matrices; `other` may be a dense tensor."""
        if isinstance(other, LowRank):
            self._same(other, "inner")
            return ((self.left.mT @ other.left) * (self.right @ other.right.mT)).sum((-2, -1))
        return ((self.left.mT @ other) * self.right).sum((-2, -1))

    def truncate(self, rank: int) -> "LowRank":
        """The nearest matrix of a rank (Eckart and Young), with √σ in either factor.

        A rank of k or more gives the matrix itself. Differentiable twice where the values on both sides of
        the cut differ.
        """
        if rank < 0:
            raise ManifoldError(f"LowRank.truncate: rank is {rank}; a rank is 0 or more")
        if rank >= self.rank:
            return self
        self._finite("truncate")
        rank = min(rank, *self.shape[-2:])
        left, right = nearest_of_rank(self._wide(self.left), self._wide(self.right).mT, rank)
        return LowRank(left.to(self.dtype), right.mT.to(self.dtype))

    def recompress(self, tolerance: float | int | None = None) -> "LowRank":
        """The least stored rank with ‖W − W'‖ ≤ tolerance ‖W‖ in every item of the batch.

        Args:
            tolerance: relative error in the Frobenius norm; max(m, n) ε of the dtype if not given.

        Raises:
            ManifoldError: under `vmap`, where the rank of the result cannot depend on values.
        """
        values = self.singular_values().detach()
        tail = values.square().flip(-1).cumsum(-1).flip(-1).sqrt()
        limit = self._tolerance(tolerance)
        if not values.shape[-1]:
            return LowRank(self.left[..., :0], self.right[..., :0, :])
        try:
            needed = int((tail > limit * tail[..., :1]).sum(-1).max()) if tail.numel() else 0
        except RuntimeError as unreadable:
            raise ManifoldError(
                "LowRank.recompress: the rank depends on values, which vmap does not read; use truncate"
            ) from unreadable
        left, right = nearest_of_rank(self._wide(self.left), self._wide(self.right).mT, needed)
        return LowRank(left.to(self.dtype), right.mT.to(self.dtype))

    def column_space(self) -> Float[Tensor, "*batch m p"]:
        """The left singular vectors, by falling singular value; those of value 0 are arbitrary."""
        return self.svd()[0]

    def row_space(self) -> Float[Tensor, "*batch n p"]:
        """The right singular vectors as columns, by falling singular value; see `column_space`."""
        return self.svd()[2].mT

    # Algebra

    def matmul(self, other: "LowRank | Tensor") -> Any:
        """W @ other: a `LowRank` of the smaller stored rank for a `LowRank`, a tensor for a tensor.

        `torch.compile` knows this name; it has no operator @ of objects that are not tensors.
        """
        if isinstance(other, Tensor):
            if other.ndim == 1:
                return (self.left @ (self.right @ other.unsqueeze(-1))).squeeze(-1)
            return self.left @ (self.right @ other)
        if not isinstance(other, LowRank):
            return NotImplemented
        if self.shape[-1] != other.shape[-2]:
            raise ManifoldError(f"LowRank @: shapes {tuple(self.shape)} and {tuple(other.shape)} do not fit")
        middle = self.right @ other.left
        if self.rank <= other.rank:
            return LowRank(self.left, middle @ other.right)
        return LowRank(self.left @ middle, other.right)

    __matmul__ = matmul

    def __rmatmul__(self, other: Tensor) -> Tensor:
        if other.ndim == 1:
            return ((other.unsqueeze(-2) @ self.left) @ self.right).squeeze(-2)
        return (other @ self.left) @ self.right

    @property
    def mT(self) -> "LowRank":  # noqa: N802
        """The transpose of each matrix."""
        return LowRank(self.right.mT, self.left.mT)

    @property
    def T(self) -> "LowRank":  # noqa: N802
        """The transpose of each matrix; the same as `mT`."""
        return self.mT

    def __add__(self, other: "LowRank | Tensor") -> Any:
        """W + other: a `LowRank` with the factors of both for a `LowRank`, a tensor for a tensor."""
        if isinstance(other, LowRank):
            return LowRank.concatenate([self, other])
        if isinstance(other, Tensor):
            return self.dense() + other
        return self if other == 0 else NotImplemented

    __radd__ = __add__

    def __neg__(self) -> "LowRank":
        return LowRank(-self.left, self.right)

    def __sub__(self, other: "LowRank | Tensor") -> Any:
        return self + (-other)

    def __rsub__(self, other: Tensor) -> Tensor:
        return other - self.dense()

    def __mul__(self, scale: "float | int | Float[Tensor, '*#batch']") -> "LowRank":
        """The matrix times a number, or times one number for each item of the batch."""
        if isinstance(scale, Tensor):
            return LowRank(self.left * scale.to(self.dtype)[..., None, None], self.right)
        return LowRank(self.left * scale, self.right)

    __rmul__ = __mul__

    def __truediv__(self, scale: "float | int | Float[Tensor, '*#batch']") -> "LowRank":
        if isinstance(scale, Tensor):
            return LowRank(self.left / scale.to(self.dtype)[..., None, None], self.right)
        return LowRank(self.left / scale, self.right)

    @staticmethod
    def concatenate(parts: "Sequence[LowRank]") -> "LowRank":
        """The exact sum, with the factors side by side: its stored rank is the sum of theirs."""
        if not parts:
            raise ManifoldError("LowRank.sum: there is nothing to sum; give at least one LowRank")
        for part in parts[1:]:
            parts[0]._same(part, "+")
        batch = torch.broadcast_shapes(*(part.shape[:-2] for part in parts))
        return LowRank(
            torch.cat([part.left.expand(*batch, *part.left.shape[-2:]) for part in parts], -1),
            torch.cat([part.right.expand(*batch, *part.right.shape[-2:]) for part in parts], -2),
        )

    @staticmethod
    def sum(parts: "Sequence[LowRank]", *, tolerance: float | int | None = None) -> "LowRank":
        """The sum, recompressed to a tolerance; see `recompress`, and `concatenate` for the exact sum."""
        return LowRank.concatenate(list(parts)).recompress(tolerance)

    # Batches, devices, files

    @staticmethod
    def stack(parts: "Sequence[LowRank]", dim: int = 0) -> "LowRank":
        """A batch of matrices of one shape; factors of lower rank are padded with zeros."""
        if not parts:
            raise ManifoldError("LowRank.stack: there is nothing to stack; give at least one LowRank")
        width = max(part.rank for part in parts)
        for part in parts[1:]:
            parts[0]._same(part, "stack")
        batch = parts[0].shape[:-2]
        if any(part.shape != parts[0].shape for part in parts):
            raise ManifoldError(f"LowRank.stack: shapes {[tuple(p.shape) for p in parts]} differ")
        if not -len(batch) - 1 <= dim <= len(batch):
            raise ManifoldError(f"LowRank.stack: dim is {dim}; there are {len(batch)} batch dimensions")
        dim = dim if dim >= 0 else dim + len(batch) + 1
        pad = torch.nn.functional.pad
        left = [pad(p.left.expand(*batch, -1, -1), (0, width - p.rank)) for p in parts]
        right = [pad(p.right.expand(*batch, -1, -1), (0, 0, 0, width - p.rank)) for p in parts]
        return LowRank(torch.stack(left, dim), torch.stack(right, dim))

    def __getitem__(self, index: Any) -> "LowRank":
        """Items of the batch. The dimensions of the matrix cannot be indexed."""
        batch = self.shape[:-2]
        left, right = (t.expand(*batch, *t.shape[-2:]) for t in (self.left, self.right))
        index = index if isinstance(index, tuple) else (index,)
        index = index if any(i is Ellipsis for i in index) else (*index, ...)
        full = (*index, slice(None), slice(None))
        try:
            left, right = left[full], right[full]
        except IndexError as wrong:
            raise ManifoldError(f"LowRank: index {index} into the batch {tuple(batch)}: {wrong}") from None
        return LowRank(left, right)

    def to(self, *args: Any, **options: Any) -> "LowRank":
        """Both factors in another dtype or on another device, as `Tensor.to`."""
        return self._map(lambda factor: factor.to(*args, **options))

    def detach(self) -> "LowRank":
        """Without the graph."""
        return self._map(Tensor.detach)

    def save(self, path: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None) -> None:
        """Writes both factors and text metadata to a safetensors file, whole or not at all."""
        write_factors(path, self.left, self.right, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> "LowRank":
        """Reads what `save` wrote, to the bit; a missing, shortened or foreign file raises."""
        return cls(*read_factors(path, device)[:2])

    @staticmethod
    def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
        """The text metadata that a file was saved with."""
        return read_factors(path, None)[2]

    # Help

    def _map(self, function: Callable[[Tensor], Tensor]) -> "LowRank":
        return LowRank(function(self.left), function(self.right))

    def _wide(self, factor: Tensor) -> Tensor:
        batch = self.shape[:-2]
        return (factor.float() if factor.dtype in HALF else factor).expand(*batch, *factor.shape[-2:])

    def _tolerance(self, tolerance: float | int | None) -> float:
        if tolerance is None:
            return max(*self.shape[-2:], 1) * torch.finfo(self.dtype).eps
        if not 0 <= tolerance < math.inf:
            raise ManifoldError(f"LowRank: tolerance is {tolerance}; it is a relative error of 0 or more")
        return tolerance

    def _same(self, other: "LowRank", operation: str) -> None:
        if self.shape[-2:] != other.shape[-2:] or self.dtype != other.dtype or self.device != other.device:
            raise ManifoldError(f"LowRank {operation}: {self} and {other} differ in shape, dtype or device")

    def _finite(self, operation: str) -> None:
        check_finite(self.left, self.right, operation)


def _rebuilt(factors: Iterable[Any], context: Any) -> LowRank:
    """From leaves that may be anything: torch.func puts numbers where the factors were."""
    whole = object.__new__(LowRank)
    left, right = factors
    object.__setattr__(whole, "left", left)
    object.__setattr__(whole, "right", right)
    return whole


_pytree.register_pytree_node(
    LowRank,
    lambda whole: ([whole.left, whole.right], None),
    _rebuilt,
    serialized_type_name="manifolds.LowRank",
)
