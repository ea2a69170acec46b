"""Tensors with no condition on them."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.base import RiemannianSubmanifold, frobenius_norm
from manifolds.errors import ManifoldError


class Euclidean(RiemannianSubmanifold):
    """All tensors of a shape, with the usual inner product: the flat space.

    Args:
        ndim: how many trailing dimensions make a point; `Euclidean()` holds vectors, where geoopt's default
            is 0.

    Example:
        >>> import torch
        >>> Euclidean().dist(torch.tensor([0.0, 0.0]), torch.tensor([3.0, 4.0]))
        tensor(5.)
    """

    retractions: ClassVar[dict[str, int]] = {"addition": 2}
    isometric: ClassVar[frozenset[str]] = frozenset({"transp", "transp_follow_retr", "transp_follow_expmap"})
    reversible = True

    def __init__(self, ndim: int = 1) -> None:
        super().__init__()
        if ndim < 0:
            raise ManifoldError(f"Euclidean: ndim is {ndim}; give 0 (numbers), 1 (vectors) or more")
        self.ndim = ndim
        self.name = "Euclidean" if ndim == 1 else f"Euclidean(ndim={ndim})"

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """The number of entries."""
        shape = point.shape if isinstance(point, Tensor) else point
        return torch.Size(shape[len(shape) - self.ndim :]).numel()

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """Zero where all entries are finite, else infinite."""
        return {"entries are finite": self._infinite(x)}

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """Zero where all entries are finite, else infinite."""
        return {"entries are finite": self._infinite(u)}

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Points with standard normal entries."""
        return self._point(self._sample(size, dtype, device, generator))

    def origin(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """The zero point; the seed has no part in it."""
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        return self._point(torch.zeros(shape, dtype=dtype, device=device))  # type: ignore[arg-type]

    def projx(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The point itself."""
        return x

    def proju(self, x: Float[Tensor, "..."], u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The vector itself."""
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def retr(self, x: Float[Tensor, "..."], u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum x + u."""
        return x + u

    def expmap(self, x: Float[Tensor, "..."], u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The sum x + u."""
        return x + u

    def logmap(self, x: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The difference y − x."""
        return y - x

    def dist(self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], *, keepdim: bool = False) -> Tensor:
        """‖x − y‖ (*batch)."""
        return frobenius_norm(x - y, self.ndim, keepdim)

    def transp(
        self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], v: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """The vector itself."""
        return v.expand(torch.broadcast_shapes(x.shape, y.shape, v.shape))

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """The products of entries, unsummed: every entry is a factor of its own, as Adam wants it."""
        product = u * (u if v is None else v)
        return product.expand(torch.broadcast_shapes(x.shape, product.shape))

    def weingarten(
        self, x: Float[Tensor, "..."], u: Float[Tensor, "..."], n: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Zero: the space is flat."""
        return torch.zeros_like(x + u + n)

    def second_fundamental_form(
        self, x: Float[Tensor, "..."], u: Float[Tensor, "..."], v: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Zero: the space is flat."""
        return torch.zeros_like(x + u + v)

    def _infinite(self, x: Tensor) -> Tensor:
        finite = x.isfinite().flatten(x.ndim - self.ndim).all(-1) if self.ndim else x.isfinite()
        return torch.where(finite, 0.0, torch.inf).to(x.dtype)
