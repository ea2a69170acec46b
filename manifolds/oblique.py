"""Matrices whose columns have norm one."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.base import RiemannianSubmanifold, frobenius_norm
from manifolds.sphere import Sphere


class Oblique(RiemannianSubmanifold):
    """Matrices with columns of norm one: {X ∈ ℝⁿˣᵖ : diag(Xᵀ X) = 1}, with the Euclidean metric.

    It is the product of p spheres, one a column. The tangent space at X is {U : diag(Xᵀ U) = 0}. Every
    operation is the sphere's, column by column; the distance is the root of the sum of the squared angles.

    Source: Absil and Gallivan, "Joint diagonalization on the oblique manifold" (2006).

    Example:
        >>> import torch
        >>> Oblique().projx(torch.tensor([[3.0, 0.0], [4.0, 2.0]]))
        tensor([[0.6000, 0.0000],
                [0.8000, 1.0000]])
    """

    name = "Oblique"
    ndim = 2
    retractions: ClassVar[dict[str, int]] = {"projection": 2}
    isometric: ClassVar[frozenset[str]] = frozenset({"transp", "transp_follow_retr", "transp_follow_expmap"})
    reversible = True

    def __init__(self) -> None:
        super().__init__()
        self._column = Sphere()

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """(n − 1) p."""
        *_, n, p = point.shape if isinstance(point, Tensor) else point
        return (n - 1) * p

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """How far the norm of a column is from one, at its worst."""
        return {"columns have norm 1": (frobenius_norm(x.mT, 1) - 1).abs().amax(-1)}

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """The largest ⟨xᵢ, uᵢ⟩ over the columns, relative to the norm of u."""
        size = frobenius_norm(u, 2)
        return {"diag(xᵀu) = 0": (x * u).sum(-2).abs().amax(-1) / torch.where(size > 0, size, 1.0)}

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Points whose columns are drawn evenly over the sphere."""
        return self._point(self.projx(self._sample(size, dtype, device, generator)))

    def projx(self, x: Float[Tensor, "*batch n p"]) -> Float[Tensor, "*batch n p"]:
        """The nearest point: every column divided by its norm. A zero column has none and gives NaN."""
        return self._column.projx(x.mT).mT

    def proju(
        self, x: Float[Tensor, "*#batch n p"], u: Float[Tensor, "*#batch n p"]
    ) -> Float[Tensor, "*batch n p"]:
        """U − X diag(Xᵀ U)."""
        return self._column.proju(x.mT, u.mT).mT

    def retr(
        self, x: Float[Tensor, "*#batch n p"], u: Float[Tensor, "*#batch n p"]
    ) -> Float[Tensor, "*batch n p"]:
        """The nearest point to X + U; a retraction of second order."""
        return self._column.retr(x.mT, u.mT).mT

    def expmap(
        self, x: Float[Tensor, "*#batch n p"], u: Float[Tensor, "*#batch n p"]
    ) -> Float[Tensor, "*batch n p"]:
        """Every column along its great circle."""
        return self._column.expmap(x.mT, u.mT).mT

    def logmap(
        self, x: Float[Tensor, "*#batch n p"], y: Float[Tensor, "*#batch n p"]
    ) -> Float[Tensor, "*batch n p"]:
        """Column by column; a column opposite to its fellow has no direction and gives NaN."""
        return self._column.logmap(x.mT, y.mT).mT

    def dist(
        self, x: Float[Tensor, "*#batch n p"], y: Float[Tensor, "*#batch n p"], *, keepdim: bool = False
    ) -> Tensor:
        """The root of the sum of the squared angles between columns (*batch), in radians."""
        distance = frobenius_norm(self._column.dist(x.mT, y.mT), 1)
        return distance[..., None, None] if keepdim else distance

    def transp(
        self,
        x: Float[Tensor, "*#batch n p"],
        y: Float[Tensor, "*#batch n p"],
        v: Float[Tensor, "*#batch n p"],
    ) -> Float[Tensor, "*batch n p"]:
        """Parallel transport along the shortest geodesic. A column opposite to its fellow gives NaN."""
        return self._column.transp(x.mT, y.mT, v.mT).mT

    def weingarten(
        self,
        x: Float[Tensor, "*#batch n p"],
        u: Float[Tensor, "*#batch n p"],
        n: Float[Tensor, "*#batch n p"],
    ) -> Float[Tensor, "*batch n p"]:
        """−U diag(Xᵀ N)."""
        return self._column.weingarten(x.mT, u.mT, n.mT).mT

    def second_fundamental_form(
        self,
        x: Float[Tensor, "*#batch n p"],
        u: Float[Tensor, "*#batch n p"],
        v: Float[Tensor, "*#batch n p"],
    ) -> Float[Tensor, "*batch n p"]:
        """−X diag(Uᵀ V)."""
        return self._column.second_fundamental_form(x.mT, u.mT, v.mT).mT
