"""Some entries of a matrix in factors, with sparse derivatives: for matrix completion and masked fits."""

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function

from manifolds.errors import ManifoldError
from manifolds.matrix_functions import forward_rule, mapped_first


class Entries:
    """The entries of L Rᵀ at given places, without the other entries.

    The value at place k is ⟨L[row_k], R[column_k]⟩. Its derivatives are products with a sparse matrix whose
    pattern is fixed, so that forward and backward cost O(N r) and gather no (N, r) tensor where torch has the
    sampled product (single matrices on CPUs with MKL, and CUDA). Batches gather. Differentiable to every
    order, in both modes.

    Args:
        rows: row of each place (N,), whole numbers.
        columns: column of each place (N,).
        shape: the matrix's rows and columns (m, n).

    Raises:
        ManifoldError: places outside the shape, or of unequal number, or given twice.

    Example:
        >>> import torch
        >>> entries = Entries(torch.tensor([0, 1]), torch.tensor([1, 0]), (2, 2))
        >>> entries(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0], [4.0]]))
        tensor([4., 6.])
    """

    def __init__(self, rows: Int[Tensor, " N"], columns: Int[Tensor, " M"], shape: tuple[int, int]) -> None:
        for name, places, limit in (("rows", rows, shape[0]), ("columns", columns, shape[1])):
            if places.numel() and (int(places.min()) < 0 or int(places.max()) >= limit):
                found = f"{int(places.min())} to {int(places.max())}"
                raise ManifoldError(f"Entries: {name} run from {found}; the matrix has {limit}")
        if rows.shape != columns.shape:
            raise ManifoldError(f"Entries: {rows.numel()} rows but {columns.numel()} columns")
        if rows.device != columns.device:
            raise ManifoldError(f"Entries: rows are on {rows.device}, columns on {columns.device}")
        self.shape = shape
        flat = rows.long() * shape[1] + columns.long()
        order = flat.argsort(stable=True)
        if bool((flat[order].diff() == 0).any()):
            twice = int(flat[order][:-1][flat[order].diff() == 0][0])
            raise ManifoldError(f"Entries: the place {(twice // shape[1], twice % shape[1])} is given twice")
        self._order, self._inverse = order, order.argsort()
        self.rows, self.columns = rows.long(), columns.long()
        self._pattern = _Pattern.of(self.rows[order], self.columns[order], shape)

    def __len__(self) -> int:
        return self.rows.numel()

    def __call__(self, left: Float[Tensor, "*batch m r"], right: Float[Tensor, "*batch n r"]) -> Tensor:
        """The values (*batch, N) of L Rᵀ at the places, in the order in which the places were given."""
        if (left.shape[-2], right.shape[-2]) != tuple(self.shape):
            found = (left.shape[-2], right.shape[-2])
            raise ManifoldError(f"Entries: the factors make shape {found}, not {tuple(self.shape)}")
        values = _sampled(left, right, self._pattern)
        return values.index_select(-1, self._inverse)

    def of(self, x: Float[Tensor, "*batch m_plus_n r"]) -> Tensor:
        """The values (*batch, N) for a point of `FixedRank(m, n)`, its factors stacked."""
        left, right = x.split(list(self.shape), dim=-2)
        return self(left, right)


class _Pattern:
    """The places sorted by row, as the index arrays of a CSR matrix and of its transpose."""

    def __init__(self, rows: Tensor, columns: Tensor, starts: Tensor, shape: tuple[int, int]) -> None:
        self.rows, self.columns, self.starts, self.shape = rows, columns, starts, shape
        self.across: _Pattern = self
        self.to_across: Tensor = torch.empty(0)

    @classmethod
    def of(cls, rows: Tensor, columns: Tensor, shape: tuple[int, int]) -> "_Pattern":
        def starts(sorted_places: Tensor, count: int) -> Tensor:
            edges = torch.arange(count + 1, device=sorted_places.device)
            return torch.searchsorted(sorted_places, edges)

        order = (columns * shape[0] + rows).argsort()
        here = cls(rows, columns, starts(rows, shape[0]), shape)
        there = cls(columns[order], rows[order], starts(columns[order], shape[1]), (shape[1], shape[0]))
        here.across, here.to_across = there, order
        there.across, there.to_across = here, order.argsort()
        return here

    def matrix(self, values: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            return torch.sparse_csr_tensor(
                self.starts, self.columns, values, self.shape, check_invariants=False
            )


def _sampled(left: Tensor, right: Tensor, pattern: _Pattern) -> Tensor:
    """The values of L Rᵀ at the places of a pattern; `torch.compile` is given the gathered form."""
    if torch.compiler.is_compiling():
        return _gathered(left, right, pattern)
    return _Sampled.apply(left, right, pattern)


def _gathered(left: Tensor, right: Tensor, pattern: _Pattern) -> Tensor:
    return (left.index_select(-2, pattern.rows) * right.index_select(-2, pattern.columns)).sum(-1)


def _weighted(values: Tensor, right: Tensor, pattern: _Pattern) -> Tensor:
    """The sparse matrix with these values at the places of a pattern, times R."""
    return _Weighted.apply(values, right, pattern)


def _has_sampled_product(like: Tensor) -> bool:
    wide = like.dtype in (torch.float32, torch.float64)
    return like.ndim == 2 and wide and (like.is_cuda or torch.backends.mkl.is_available())


class _Sampled(Function):
    @staticmethod
    def forward(left: Tensor, right: Tensor, pattern: _Pattern) -> Tensor:
        if _has_sampled_product(left) and pattern.rows.numel():
            zeros = pattern.matrix(left.new_zeros(pattern.rows.numel()))
            return torch.sparse.sampled_addmm(zeros, left, right.mT).values()
        return _gathered(left, right, pattern)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Pattern], output: Tensor) -> None:
        left, right, ctx.pattern = inputs
        ctx.save_for_backward(left, right)
        ctx.save_for_forward(left, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        left, right = ctx.saved_tensors
        across = ctx.pattern.across
        turned = gradient.index_select(-1, ctx.pattern.to_across)
        return _weighted(gradient, right, ctx.pattern), _weighted(turned, left, across), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], left: Tensor, right: Tensor, pattern: _Pattern) -> Any:
        left, right = mapped_first(info, in_dims[:2], left, right)
        return _sampled(left, right, pattern), 0

    @staticmethod
    def jvp(ctx: Any, d_left: Tensor, d_right: Tensor, _: None) -> Tensor:
        with forward_rule(ctx) as (left, right):
            return _sampled(d_left, right, ctx.pattern) + _sampled(left, d_right, ctx.pattern)


class _Weighted(Function):
    @staticmethod
    def forward(values: Tensor, right: Tensor, pattern: _Pattern) -> Tensor:
        if values.ndim == 1 and right.ndim == 2:
            return pattern.matrix(values) @ right
        parts = values.unsqueeze(-1) * right.index_select(-2, pattern.columns)
        zeros = parts.new_zeros(*parts.shape[:-2], pattern.shape[0], parts.shape[-1])
        return zeros.index_add(-2, pattern.rows, parts)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, _Pattern], output: Tensor) -> None:
        values, right, ctx.pattern = inputs
        ctx.save_for_backward(values, right)
        ctx.save_for_forward(values, right)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        values, right = ctx.saved_tensors
        turned = values.index_select(-1, ctx.pattern.to_across)
        return _sampled(gradient, right, ctx.pattern), _weighted(turned, gradient, ctx.pattern.across), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], values: Tensor, right: Tensor, pattern: _Pattern) -> Any:
        values, right = mapped_first(info, in_dims[:2], values, right)
        return _weighted(values, right, pattern), 0

    @staticmethod
    def jvp(ctx: Any, d_values: Tensor, d_right: Tensor, _: None) -> Tensor:
        with forward_rule(ctx) as (values, right):
            return _weighted(d_values, right, ctx.pattern) + _weighted(values, d_right, ctx.pattern)
