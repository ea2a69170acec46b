"""The unit sphere in tensors of any shape."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.base import RiemannianSubmanifold, frobenius_norm, sum_point
from manifolds.errors import ManifoldError


class Sphere(RiemannianSubmanifold):
    """Tensors of norm one: {x : ‖x‖ = 1}, with the metric of the surrounding space.

    A point is a tensor whose last `ndim` dimensions are one point: `Sphere()` holds vectors, `Sphere(ndim=2)`
    matrices of Frobenius norm one. The tangent space at x is {u : ⟨x, u⟩ = 0}.

    Args:
        ndim: how many trailing dimensions make a point.

    Example:
        >>> import torch
        >>> sphere = Sphere()
        >>> x, y = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
        >>> sphere.dist(x, y)
        tensor(1.5708)
        >>> sphere.logmap(x, y)
        tensor([0.0000, 1.5708, 0.0000])
    """

    retractions: ClassVar[dict[str, int]] = {"projection": 2}
    isometric: ClassVar[frozenset[str]] = frozenset({"transp", "transp_follow_retr", "transp_follow_expmap"})
    reversible = True

    def __init__(self, ndim: int = 1) -> None:
        super().__init__()
        if ndim < 1:
            raise ManifoldError(f"Sphere: ndim is {ndim}; a point has at least one dimension")
        self.ndim = ndim
        self.name = "Sphere" if ndim == 1 else f"Sphere(ndim={ndim})"

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """The number of entries less one."""
        shape = point.shape if isinstance(point, Tensor) else point
        return torch.Size(shape[len(shape) - self.ndim :]).numel() - 1

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """How far the norm is from one."""
        return {"‖x‖ = 1": (frobenius_norm(x, self.ndim) - 1).abs()}

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """The cosine of x and u."""
        size = frobenius_norm(u, self.ndim)
        return {"⟨x, u⟩ = 0": sum_point(x * u, self.ndim).abs() / torch.where(size > 0, size, 1.0)}

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Points drawn evenly over the sphere."""
        return self._point(self.projx(self._sample(size, dtype, device, generator)))

    def projx(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nearest point, x / ‖x‖. The zero tensor has none and gives NaN."""
        return x / frobenius_norm(x, self.ndim, keepdim=True)

    def proju(self, x: Float[Tensor, "..."], u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The part of u at right angles to x: u − ⟨x, u⟩ x."""
        return u - sum_point(x * u, self.ndim, True) * x

    def retr(self, x: Float[Tensor, "..."], u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The nearest point to x + u; a retraction of second order."""
        return self.projx(x + u)

    def expmap(self, x: Float[Tensor, "..."], u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """cos(‖u‖) x + sin(‖u‖) u / ‖u‖."""
        square = sum_point(u * u, self.ndim, True)
        small = square < 1e-2
        angle = torch.where(small, 1.0, square).sqrt()
        cosine = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square / 40320)))
        ratio = 1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square / 362880)))
        cosine = torch.where(small, cosine, torch.cos(angle))
        return self.projx(cosine * x + torch.where(small, ratio, torch.sin(angle) / angle) * u)

    def logmap(self, x: Float[Tensor, "..."], y: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The tangent vector of length `dist` that points to y. At x = −y the direction is undefined: NaN."""
        toward = self.proju(x, y - x)
        sine = frobenius_norm(toward, self.ndim, True)
        angle = torch.atan2(sine, 1 - sum_point((y - x) ** 2, self.ndim, True) / 2)
        square = sum_point(toward * toward, self.ndim, True)
        small = (square < 1e-3) & (angle < 1)
        series = 1 + square * (1 / 6 + square * (3 / 40 + square * (15 / 336 + square * (105 / 3456))))
        opposite = (sine == 0) & (angle > 1)
        ratio = torch.where(small, series, angle / torch.where(small | opposite, 1.0, sine))
        return torch.where(opposite, torch.nan, ratio * toward)

    def dist(self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], *, keepdim: bool = False) -> Tensor:
        """The angle (*batch) in radians, 2 atan2(‖x − y‖, ‖x + y‖): right for near and opposite points.

        Of x − y the part along x + y is left out: it is the rounding of the two norms, and no small part
        where the points are close.
        """
        apart, whole = x - y, x + y
        apart = apart - sum_point(apart * whole, self.ndim, True) / 4 * whole
        return 2 * torch.atan2(
            frobenius_norm(apart, self.ndim, keepdim), frobenius_norm(whole, self.ndim, keepdim)
        )

    def dist2(self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], *, keepdim: bool = False) -> Tensor:
        """The squared angle (*batch)."""
        return self.inner(x, self.logmap(x, y), keepdim=keepdim)

    def transp(
        self, x: Float[Tensor, "..."], y: Float[Tensor, "..."], v: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """Parallel transport on the shortest geodesic: v − ⟨y, v⟩ / (1 + ⟨x, y⟩) (x + y). NaN at y = −x."""
        return v - sum_point(y * v, self.ndim, True) / (1 + sum_point(x * y, self.ndim, True)) * (x + y)

    def weingarten(
        self, x: Float[Tensor, "..."], u: Float[Tensor, "..."], n: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """−⟨x, n⟩ u."""
        return -sum_point(x * n, self.ndim, True) * u

    def second_fundamental_form(
        self, x: Float[Tensor, "..."], u: Float[Tensor, "..."], v: Float[Tensor, "..."]
    ) -> Float[Tensor, "..."]:
        """−⟨u, v⟩ x."""
        return -sum_point(u * v, self.ndim, True) * x
