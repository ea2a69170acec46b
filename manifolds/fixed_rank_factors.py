"""Matrices of one rank as stacked balanced factors: points, vectors and their inner products."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.base import Manifold, frobenius_norm, safe_sqrt
from manifolds.errors import ManifoldError
from manifolds.low_rank import LowRank
from manifolds.matrix_functions import inverse_sqrtm_spd, polar, sqrtm_spd, sym
from manifolds.operations import widened


def inverse(matrix: Float[Tensor, "*batch r r"]) -> Float[Tensor, "*batch r r"]:
    """The inverse, and NaN for a singular matrix: one such item does not stop a batch."""
    found, failed = torch.linalg.inv_ex(matrix)
    return torch.where((failed != 0)[..., None, None], torch.nan, found)


def _cholesky(matrix: Tensor) -> Tensor:
    """C with matrix = C Cᵀ, and NaN for a matrix that is not positive definite."""
    found, failed = torch.linalg.cholesky_ex(matrix)
    return torch.where((failed != 0)[..., None, None], torch.nan, found)


class FactorPairs(Manifold):
    """Pairs x = [L; R] with LᵀL = RᵀR, for W = L Rᵀ; `FixedRank` adds gradients, steps and curvature.

    Args:
        rows: the rows of L.
        columns: the rows of R.
    """

    ndim = 2

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        if rows < 1 or columns < 1:
            raise ManifoldError(f"FixedRank: {rows} rows and {columns} columns; both are at least 1")
        self.rows, self.columns = rows, columns
        self.name = f"FixedRank({rows}, {columns})"
        self.example_shape = (rows + columns, max(1, min(rows, columns) // 2))

    def embedding(self, x: Float[Tensor, "*batch p r"]) -> Float[Tensor, "*batch m n"]:
        """The dense matrix W = L Rᵀ, the same for all factors of it; for `check`, no operation forms it."""
        left, right = self._split(x)
        return left @ right.mT

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """(m + n − r) r."""
        rank = (point.shape if isinstance(point, Tensor) else point)[-1]
        return (self.rows + self.columns - rank) * rank

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """How far LᵀL and RᵀR differ, relative to their size, and whether the rank is r."""
        left, right = self._grams(x)
        size = frobenius_norm(left + right, 2) / 2
        balance = frobenius_norm(left - right, 2) / torch.where(size == 0, 1.0, size)
        whole = torch.isfinite(left + right)
        values = torch.linalg.eigvalsh(sym(torch.where(whole, left + right, 0.0)))
        floor = x.shape[-1] * torch.finfo(x.dtype).eps
        lost = (values[..., 0] <= floor * values[..., -1]).to(x.dtype)
        return {
            "LᵀL = RᵀR": balance,
            f"smallest singular value > {floor:.1e} × largest (rank {x.shape[-1]})": torch.where(
                whole.all(-1).all(-1), lost, torch.nan
            ),
        }

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """How far the part within row and column space is from being halved, relative to the size of u."""
        left, right = self._split(x)
        of_left, of_right = self._split(u)
        left_gram, right_gram = self._grams(x)
        defect = (left.mT @ of_left) @ right_gram - left_gram @ (of_right.mT @ right)
        size = frobenius_norm(u, 2) * frobenius_norm(x, 2) * frobenius_norm(left_gram + right_gram, 2) / 2
        return {"(LᵀL̇)(RᵀR) = (LᵀL)(RᵀṘ)ᵀ": frobenius_norm(defect, 2) / torch.where(size == 0, 1.0, size)}

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Points of a size (*batch, m+n, r): products of two Gaussian factors."""
        return self._point(self.projx(self._sample(size, dtype, device, generator)))

    def random_tangent(
        self, x: Float[Tensor, "*batch p r"], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch p r"]:
        """A standard normal vector in each tangent space, with E‖u‖² = (m + n − r) r."""
        wide = widened(x)
        noise = torch.randn(wide.shape, dtype=wide.dtype, device=x.device, generator=generator)
        shape = (*x.shape[:-2], x.shape[-1], x.shape[-1])
        middle = torch.randn(shape, dtype=wide.dtype, device=x.device, generator=generator)
        left, right = self._split(wide)
        left_root, right_root = (inverse_sqrtm_spd(gram) for gram in self._grams(wide))
        of_left, of_right = self._split(noise)
        normal_left = of_left - left @ (left_root @ (left_root @ (left.mT @ of_left)))
        normal_right = of_right - right @ (right_root @ (right_root @ (right.mT @ of_right)))
        core = left_root @ middle @ right_root
        return torch.cat(
            [
                normal_left @ right_root + left @ core / 2,
                normal_right @ left_root + right @ core.mT / 2,
            ],
            -2,
        ).to(x.dtype)

    def from_lowrank(self, W: LowRank, rank: int | None = None) -> Tensor:
        """The points [L; R] of matrices in factors.

        Args:
            W: of shape (*batch, m, n).
            rank: the nearest matrix of this rank is taken; the stored rank of W if not given.
        """
        if tuple(W.shape[-2:]) != (self.rows, self.columns):
            raise ManifoldError(f"{self.name}.from_lowrank: W has shape {tuple(W.shape)}")
        rank = W.rank if rank is None else rank
        ok, reason = self._check_shape((self.rows + self.columns, rank), "x")
        if not ok or rank > W.rank:
            raise ManifoldError(
                f"{self.name}.from_lowrank: {reason or f'W has rank {W.rank}, which is less than {rank}'}"
            )
        if rank == W.rank:
            batch = W.shape[:-2]
            left = W.left.expand(*batch, *W.left.shape[-2:])
            right = W.right.mT.expand(*batch, *W.right.mT.shape[-2:])
            return self.projx(torch.cat([left, right], -2))
        kept = W.truncate(rank)
        return torch.cat([kept.left, kept.right.mT], -2)

    def to_lowrank(self, x: Float[Tensor, "*batch p r"]) -> LowRank:
        """W = L Rᵀ, in factors."""
        left, right = self._split(x)
        return LowRank(left, right.mT)

    def tangent_lowrank(self, x: Float[Tensor, "*#batch p r"], u: Float[Tensor, "*#batch p r"]) -> LowRank:
        """Ẇ = L̇ Rᵀ + L Ṙᵀ, in factors of rank 2r."""
        x, u = torch.broadcast_tensors(x, u)
        left, right = self._split(x)
        of_left, of_right = self._split(u)
        return LowRank(torch.cat([of_left, left], -1), torch.cat([right, of_right], -1).mT)

    def projx(self, x: Float[Tensor, "*batch p r"]) -> Float[Tensor, "*batch p r"]:
        """The same W in balanced factors L T, R T⁻ᵀ; balanced factors stay as they are.

        Formula: T is the root of the geometric mean S of (LᵀL)⁻¹ and RᵀR, which solves S LᵀL S = RᵀR. With
        the Cholesky factors LᵀL = C Cᵀ and RᵀR = D Dᵀ and the polar decomposition Dᵀ C = Y H, it is S = C⁻ᵀ H
        C⁻¹. Factors that have lost rank give NaN.
        """
        left, right = self._split(x)
        left_gram, right_gram = self._grams(x)
        left_root, right_root = _cholesky(left_gram), _cholesky(right_gram)
        product, back = right_root.mT @ left_root, inverse(left_root)
        turn = sqrtm_spd(back.mT @ (polar(product).mT @ product) @ back)
        return torch.cat([left @ turn, right @ inverse(turn).mT], -2)

    def proju(
        self, x: Float[Tensor, "*#batch p r"], u: Float[Tensor, "*#batch p r"]
    ) -> Float[Tensor, "*batch p r"]:
        """The stored pair of the same Ẇ: [L̇ + L D; Ṙ − R Dᵀ] with D = ½ ((RᵀṘ)ᵀ (RᵀR)⁻¹ − (LᵀL)⁻¹ LᵀL̇)."""
        left, right = self._split(x)
        of_left, of_right = self._split(u)
        left_gram, right_gram = self._grams(x)
        shift = ((of_right.mT @ right) @ inverse(right_gram) - inverse(left_gram) @ (left.mT @ of_left)) / 2
        return torch.cat([of_left + left @ shift, of_right - right @ shift.mT], -2)

    def inner(
        self,
        x: Float[Tensor, "*#batch p r"],
        u: Float[Tensor, "*#batch p r"],
        v: Float[Tensor, "*#batch p r"] | None = None,
        *,
        keepdim: bool = False,
    ) -> Tensor:
        """⟨Ẇᵤ, Ẇᵥ⟩ (*batch), from Gram matrices; u and v may be any pairs."""
        left, right = self._split(x)
        left_gram, right_gram = self._grams(x)
        of_left, of_right = self._split(u)
        other_left, other_right = (of_left, of_right) if v is None else self._split(v)
        first = left.mT @ of_left, right.mT @ of_right
        second = first if v is None else (left.mT @ other_left, right.mT @ other_right)
        terms = (
            (of_left.mT @ other_left) * right_gram
            + (of_right.mT @ other_right) * left_gram
            + first[0] * second[1].mT
            + second[0] * first[1].mT
        )
        return terms.sum((-2, -1), keepdim=keepdim)

    def norm(
        self, x: Float[Tensor, "*#batch p r"], u: Float[Tensor, "*#batch p r"], *, keepdim: bool = False
    ) -> Tensor:
        """‖Ẇ‖, scaled, so that neither tiny nor huge vectors are lost; its derivative at zero is zero."""
        scale = u.detach().abs().amax((-2, -1), keepdim=True)
        scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
        size = safe_sqrt(self.inner(x, u / scale, keepdim=True)) * scale
        return size if keepdim else size[..., 0, 0]

    # Help

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        if len(shape) < 2 or shape[-2] != self.rows + self.columns:
            return False, (
                f"{name} has shape {tuple(shape)}; a point is [L; R] of shape "
                f"(*batch, rows + columns, rank) = (*batch, {self.rows + self.columns}, rank)"
            )
        if not 1 <= shape[-1] <= min(self.rows, self.columns):
            return False, (
                f"{name} has rank {shape[-1]}; a {self.rows} × {self.columns} matrix has a rank from 1 to "
                f"min(rows, columns) = {min(self.rows, self.columns)}"
            )
        return True, None

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[..., : self.rows, :], x[..., self.rows :, :]

    def _grams(self, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = self._split(x)
        return left.mT @ left, right.mT @ right

    def _parts(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """E, Lₚ and Rₚ of Ẇ = L E Rᵀ + Lₚ Rᵀ + L Rₚᵀ."""
        left, right = self._split(x)
        of_left, of_right = self._split(u)
        left_gram, right_gram = self._grams(x)
        inside_left = inverse(left_gram) @ (left.mT @ of_left)
        inside_right = inverse(right_gram) @ (right.mT @ of_right)
        return inside_left + inside_right.mT, of_left - left @ inside_left, of_right - right @ inside_right
