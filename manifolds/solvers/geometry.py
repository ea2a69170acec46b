"""What a solver asks of a manifold, the same for ours and for geoopt's own."""

from collections.abc import Callable
from functools import partial

import geoopt
import torch
from torch import Tensor

from manifolds.base import Manifold
from manifolds.errors import ManifoldError
from manifolds.operations import HALF, widened

EMBEDDED = (geoopt.Euclidean, geoopt.Sphere, geoopt.EuclideanStiefel)
"""geoopt's submanifolds of a Euclidean space with its metric, whose `proju` is the orthogonal projection."""


class Geometry:
    """The operations of a manifold on a flat batch of points (N, *point).

    `inner(x, u, v)`, `gradient(x, egrad)` and `transport(x, y, v)` are its `inner`, `egrad2rgrad`, `transp`;
    x and y may lack leading dimensions of the vectors.

    Where the Hessian comes from, in `hessian`:

    - "exact": the manifold's own `ehess2rhess`;
    - "projection": for geoopt's `Euclidean`, `Sphere` and `EuclideanStiefel`, Hess f[u] = P (∇²f u + (D_u P)
      ∇f);
    - "difference": in general the difference of gradients, (T_{y→x} grad f(y) − grad f(x)) / t with y = R_x(t
      u) and t ‖u‖ = ε^½. It costs one gradient a product and is right to about half of the digits.
    """

    def __init__(self, manifold: geoopt.Manifold) -> None:
        self.manifold = _trusted(manifold)
        self.name = str(manifold.name)
        self.ndim = manifold.ndim
        if isinstance(self.manifold, Manifold):
            own = type(self.manifold).ehess2rhess is not Manifold.ehess2rhess
            self.hessian = "exact" if own else "difference"
        else:
            self.hessian = "projection" if isinstance(self.manifold, EMBEDDED) else "difference"
        ours = isinstance(self.manifold, Manifold)
        self.inner = self._bare("inner") if ours else self._foreign_inner
        self.transport = self._bare("transp") if ours else self._foreign_transport
        self.gradient = self._bare("egrad2rgrad")
        self._retr = self._bare("retr")
        self._ehess2rhess = self._bare("ehess2rhess") if self.hessian == "exact" else None

    def _bare(self, name: str) -> Callable[..., Tensor]:
        """An operation without the checks of its arguments: a solver's points and vectors fit each other."""
        function = getattr(type(self.manifold), name)
        if getattr(function, "_is_operation", False):
            return partial(function.__wrapped__, self.manifold)
        return getattr(self.manifold, name)

    def _foreign_inner(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The inner product of geoopt (N); its hyperbolic ones have a right shape only with `keepdim`."""
        product = self.manifold.inner(x, u, v, keepdim=True)
        return product.reshape(product.shape[: product.ndim - self.ndim])

    def _foreign_transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """The transport of geoopt; not all of them broadcast."""
        return self.manifold.transp(x.expand_as(v), y.expand_as(v), v)

    def norm(self, x: Tensor, u: Tensor) -> Tensor:
        """‖u‖ at x (N)."""
        return self.inner(x, u, u).clamp(min=0).sqrt()

    def retract(self, x: Tensor, u: Tensor) -> Tensor:
        """The manifold's retraction; where it gives no finite point, x itself."""
        y = self._retr(x, u)
        return torch.where(spread(finite(y), y), y, x)

    def hessian_product(self, x: Tensor, egrad: Tensor, ehess: Tensor, u: Tensor) -> Tensor:
        """Hess f[u] from the Euclidean gradient and Hessian-vector product; not for the mode "difference"."""
        if self._ehess2rhess is not None:
            return self._ehess2rhess(x, egrad, ehess, u)
        change = torch.func.jvp(lambda point: self.manifold.proju(point, egrad), (x,), (u,))[1]
        return self.manifold.proju(x, ehess + change)

    def dimension(self, x: Tensor) -> int:
        """The dimension of the manifold; for one of geoopt's the number of entries."""
        if isinstance(self.manifold, Manifold):
            return self.manifold.dimension(x)
        return x.shape[1:].numel()

    def check_point(self, x: Tensor) -> None:
        """Refuses points that are not on the manifold."""
        if x.ndim < self.ndim:
            raise ManifoldError(
                f"minimize: x0 has shape {tuple(x.shape)}; a point of {self.name} has {self.ndim} dimensions"
            )
        if not bool(x.isfinite().all()):
            count = int((~x.isfinite()).sum())
            raise ManifoldError(
                f"minimize: x0 has {count} entries that are NaN or infinite; start from finite points"
            )
        limit = 3e-2 if x.dtype in HALF else 1e-5 if x.dtype == torch.float64 else 1e-3
        if isinstance(self.manifold, Manifold):
            found = self.manifold.contains(x, tolerance=limit)
            ok, reason = bool(found), found.reason
        else:
            limit = max(limit, 1e-4)
            ok, reason = self.manifold.check_point_on_manifold(
                widened(x), explain=True, atol=limit, rtol=limit
            )
        if not ok:
            raise ManifoldError(
                f"minimize: x0 is not on {self.name}: {reason}; "
                "start from manifold.projx(x0) or manifold.random(...)"
            )


def _trusted(manifold: geoopt.Manifold) -> geoopt.Manifold:
    """The manifold, or ours in place of geoopt's `CanonicalStiefel`.

    The set and the metric are the same; geoopt 0.5.1's `proju` is no projection there and its `retr` not of
    first order, so that slopes along its curves are wrong.
    """
    if isinstance(manifold, geoopt.CanonicalStiefel):
        from manifolds.stiefel import Stiefel

        return Stiefel(metric="canonical")
    return manifold


def spread(scalars: Tensor, like: Tensor) -> Tensor:
    """One number per item, shaped so that it multiplies the item's tensor."""
    return scalars.reshape(scalars.shape + (1,) * (like.ndim - scalars.ndim))


def finite(tensor: Tensor) -> Tensor:
    """Whether every entry of an item is finite (N); a sum that overflows counts as not."""
    total = tensor.flatten(1).sum(1) if tensor.ndim > 1 else tensor
    return (total - total) == 0
