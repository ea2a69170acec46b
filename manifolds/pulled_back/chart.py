"""All tensors of one shape as coordinates, on which a metric may be put."""

from collections.abc import Sequence

import torch
from torch import Tensor

from manifolds.base import Manifold, plain
from manifolds.errors import ManifoldError
from manifolds.operations import widened


class Chart(Manifold):
    """All tensors whose last `ndim` dimensions are one point: each is a point, and each a tangent.

    What does not depend on the metric: projections, the straight retraction, dimension, random points.
    """

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """The number of coordinates."""
        shape = point.shape if isinstance(point, Tensor) else point
        return torch.Size(shape[len(shape) - self.ndim :]).numel()

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """Whether the coordinates are finite; nothing else is asked of a point."""
        return {"x is finite": self._infinite(x)}

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """Whether the vector is finite; nothing else is asked of a tangent."""
        return {"u is finite": self._infinite(u)}

    def _infinite(self, x: Tensor) -> Tensor:
        finite = x.isfinite().flatten(x.ndim - self.ndim).all(-1)
        return torch.where(finite, 0.0, torch.inf).to(x.dtype)

    def projx(self, x: Tensor) -> Tensor:
        """The point itself."""
        return x

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The vector itself."""
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """X + u: a retraction of first order, whatever the metric."""
        return x + u

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Points with standard normal coordinates."""
        return self._point(self._sample(size, dtype, device, generator))

    def _flat(self, operation: str, *tensors: Tensor) -> tuple[list[Tensor], torch.Size]:
        """The tensors, broadcast, as (items, *point), and the shape that they had together."""
        for tensor in tensors:
            ok, reason = self._check_shape(tensor.shape, "x")
            if not ok:
                raise ManifoldError(f"{self.name}.{operation}: {reason}")
            if not tensor.is_floating_point():
                raise ManifoldError(
                    f"{self.name}.{operation}: x has dtype {tensor.dtype}; points are real floating-point "
                    "tensors"
                )
        try:
            together = torch.broadcast_tensors(*(plain(widened(tensor)) for tensor in tensors))
        except RuntimeError as unequal:
            shapes = " and ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise ManifoldError(
                f"{self.name}.{operation}: the shapes {shapes} do not fit together"
            ) from unequal
        shape = together[0].shape
        if 0 in shape:
            raise ManifoldError(f"{self.name}.{operation}: x has shape {tuple(shape)}, without any entries")
        point = shape[len(shape) - self.ndim :]
        return [tensor.reshape(-1, *point).contiguous() for tensor in together], shape

    def _batch(self, shape: torch.Size) -> torch.Size:
        return shape[: len(shape) - self.ndim]

    def _over_items(self, value: Tensor, shape: torch.Size, keepdim: bool) -> Tensor:
        """One number an item, in the shape of the batch."""
        batch = self._batch(shape)
        return value.reshape((*batch, *(1,) * (self.ndim if keepdim else 0)))


def readable(x: Tensor) -> bool:
    """Whether Python may look at values: not under `vmap`, nor while `torch.compile` traces."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return False
        x = functorch.get_unwrapped(x)
    return True


def item_of(flags: Tensor, batch: torch.Size) -> str:
    """In words: which item of a batch is the first that is flagged, and how many are."""
    places = flags.reshape(-1).nonzero().flatten()
    first = tuple(int(i) for i in torch.unravel_index(places[0], batch)) if batch else ()
    if not first:
        return ""
    return (
        f" in {len(places)} of {flags.numel()} items, first in item {first[0] if len(first) == 1 else first}"
    )
