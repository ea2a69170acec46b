"""What every manifold here has, and what a Riemannian submanifold gets from its projection alone.

`Manifold` is a `geoopt.Manifold`: geoopt's parameters and optimizers work on ours. `RiemannianSubmanifold`
derives gradient, Hessian and second fundamental form from the projection onto the tangent space.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import geoopt
import torch
from geoopt import ManifoldTensor
from jaxtyping import Float
from torch import Tensor

from manifolds.errors import ManifoldError, MissingOperationError
from manifolds.operations import OPERATIONS, operation, widened


@dataclass(frozen=True)
class Containment:
    """Whether points lie on a manifold, or vectors in a tangent space; true when all of them do.

    Attributes:
        inside: for each item of the batch.
        defect: for each item, the largest residual of the defining conditions, relative to its natural size.
        reason: the condition that is hurt most, with its size and item; empty when nothing is.
    """

    inside: Tensor
    defect: Tensor
    reason: str

    def __bool__(self) -> bool:
        return bool(self.inside.all())


class Manifold(geoopt.Manifold):
    """A set with tangent spaces. A point is a tensor's last `ndim` dimensions; those before are the batch.

    A subclass gives `projx`, `proju`, `retr`, `transp`, `inner`, `egrad2rgrad`, `dimension`, `point_defects`
    and `tangent_defects`, and what it can of `expmap`, `logmap`, `ehess2rhess`, `second_fundamental_form`.
    Every operation checks its arguments, and computes half precision in float32 and gives it back as it came.

    Attributes:
        name: what messages call it.
        ndim: how many trailing dimensions make one point.
        reversible: whether transport along the retraction can be undone by transporting back (geoopt's flag).
        retractions: the retractions by name, with their order: how far each follows a geodesic.
        isometric: the names of the transports that keep inner products.
        metric_is_ambient: whether `inner` holds for vectors of the surrounding space too, not only for
            tangent ones.
        example_shape: the shape of one point, for examples, where the number of dimensions does not give one.
    """

    name: str
    ndim: int
    reversible: bool = False
    retractions: ClassVar[dict[str, int]] = {}
    isometric: ClassVar[frozenset[str]] = frozenset()
    metric_is_ambient: bool = True
    example_shape: tuple[int, ...] | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in OPERATIONS & cls.__dict__.keys():
            setattr(cls, name, operation(cls.__dict__[name]))

    # What a subclass says of itself

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """The dimension of the manifold that holds points of this shape."""
        raise NotImplementedError

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """For each defining condition, by its formula, the residual (*batch) relative to its natural size."""
        raise NotImplementedError

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """For each condition on a tangent vector, the residual (*batch) relative to the size of u."""
        raise NotImplementedError

    def embedding(self, x: Tensor) -> Tensor:
        """The point in a Euclidean space, the same for every representative of it; here the point itself.

        A quotient overrides it with what its representatives share, as x xᵀ of a subspace's basis x. `check`
        tries functions of it.
        """
        return x

    # Points and vectors

    def contains(self, x: Tensor, *, tolerance: float | None = None) -> Containment:
        """Whether points lie on the manifold, and if not, why.

        Args:
            x: points (*batch, *point).
            tolerance: largest relative residual; `default_tolerance` of the dtype if not given.
        """
        ok, reason = self._check_shape(x.shape, "x")
        if not ok:
            return Containment(torch.tensor(False), torch.tensor(math.inf), str(reason))
        return self._judge(x, self.point_defects(widened(x)), tolerance)

    def contains_tangent(self, x: Tensor, u: Tensor, *, tolerance: float | None = None) -> Containment:
        """Whether vectors lie in the tangent spaces at points, and if not, why; see `contains`."""
        for tensor, name in ((x, "x"), (u, "u")):
            ok, reason = self._check_shape(tensor.shape, name)
            if not ok:
                return Containment(torch.tensor(False), torch.tensor(math.inf), str(reason))
        return self._judge(u, self.tangent_defects(widened(x), widened(u)), tolerance)

    def random_tangent(
        self, x: Float[Tensor, "..."], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "..."]:
        """A Gaussian tangent vector at each point: a standard normal tensor, projected."""
        noise = torch.randn(x.shape, dtype=widened(x).dtype, device=x.device, generator=generator)
        return self.proju(x, noise.to(x.dtype))

    def origin(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> Tensor:
        """A point that is the same at every call, drawn with a seed; the global generator is left alone."""
        generator = torch.Generator(device or "cpu").manual_seed(42 if seed is None else seed)
        return self.random(*size, dtype=dtype, device=device, generator=generator)

    # Operations that follow from the others

    @operation
    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """The norm of tangent vectors, ⟨u, u⟩^½; its derivative at zero is zero, not NaN."""
        return safe_sqrt(self.inner(x, u, keepdim=keepdim))

    @operation
    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The geodesic distance (*batch), ‖log_x y‖."""
        return self.norm(x, self.logmap(x, y), keepdim=keepdim)

    @operation
    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The squared geodesic distance (*batch); smooth where x = y, which `dist` is not."""
        return self.inner(x, self.logmap(x, y), keepdim=keepdim)

    @operation
    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The vector v carried from x to retr(x, u)."""
        return self.transp(x, self.retr(x, u), v)

    @operation
    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The vector v carried from x to exp_x(u)."""
        return self.transp(x, self.expmap(x, u), v)

    @operation
    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The point retr(x, u), and v carried there."""
        y = self.retr(x, u)
        return y, self.transp(x, y, v)

    @operation
    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The point exp_x(u), and v carried there."""
        y = self.expmap(x, u)
        return y, self.transp(x, y, v)

    @operation
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The initial velocity of the shortest geodesic from x to y."""
        raise MissingOperationError(f"{self.name} has no logarithm")

    @operation
    def ehess2rhess(self, x: Tensor, g: Tensor, h: Tensor, u: Tensor) -> Tensor:
        """The Riemannian Hessian applied to u, from the Euclidean gradient and Hessian-vector product."""
        raise MissingOperationError(f"{self.name} has no conversion of the Hessian")

    @operation
    def second_fundamental_form(self, x: Tensor, u: Tensor, v: Tensor) -> Any:
        """The normal vector II(u, v): the acceleration in the surrounding space that staying on needs."""
        raise MissingOperationError(
            f"{self.name} is not a Riemannian submanifold of a Euclidean space: II is not defined"
        )

    # geoopt's hooks

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        if len(shape) >= self.ndim:
            return True, None
        return False, f"{name} has shape {tuple(shape)}; a point has {self.ndim} dimensions"

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        found = self.contains(x, tolerance=max(atol, rtol, default_tolerance(x.dtype)))
        return bool(found), found.reason or None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        found = self.contains_tangent(x, u, tolerance=max(atol, rtol, default_tolerance(u.dtype)))
        return bool(found), found.reason or None

    def __repr__(self) -> str:
        return self.name

    # Help for subclasses

    def _judge(self, tensor: Tensor, defects: dict[str, Tensor], tolerance: float | None) -> Containment:
        limit = default_tolerance(tensor.dtype) if tolerance is None else tolerance
        names = list(defects)
        sizes = torch.stack(torch.broadcast_tensors(*defects.values())).detach()
        sizes = torch.where(sizes.isnan(), math.inf, sizes)
        defect, which = sizes.max(dim=0)
        inside = defect <= limit
        if bool(inside.all()):
            return Containment(inside, defect, "")
        worst = int(defect.flatten().argmax())
        item = (
            tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), defect.shape))
            if defect.ndim
            else ()
        )
        where = f" in item {item[0] if len(item) == 1 else item}" if item else ""
        size = float(defect.flatten()[worst])
        name = names[int(which.flatten()[worst])]
        said = "is not finite" if math.isinf(size) else f"fails by {size:.2g} (tolerance {limit:.1g})"
        return Containment(inside, defect, f"{name} {said}{where}")

    def _sample(
        self,
        size: tuple[int | Sequence[int], ...],
        dtype: torch.dtype | None,
        device: torch.device | str | None,
        generator: torch.Generator | None,
    ) -> Tensor:
        """A standard normal tensor of a size given as numbers or as one sequence; checks the shape."""
        if dtype is not None and not dtype.is_floating_point:
            raise ManifoldError(
                f"{self.name}.random: dtype is {dtype}; points are real floating-point tensors"
            )
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        ok, reason = self._check_shape(shape, "size")  # type: ignore[arg-type]
        if not ok:
            raise ManifoldError(f"{self.name}.random: {reason}")
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)  # type: ignore[arg-type]

    def _point(self, x: Tensor) -> Tensor:
        """A new point as geoopt marks it, so that `ManifoldParameter` knows its manifold."""
        return ManifoldTensor(x, manifold=self)


class RiemannianSubmanifold(Manifold):
    """A submanifold of a Euclidean space of tensors, with the metric of that space.

    From the orthogonal projection P_x onto the tangent space, which a subclass gives as `proju`, follow

    - the gradient, grad f = P_x ∇f;
    - the second fundamental form, II(u, v) = (D_u P) v for tangent v;
    - the Weingarten map, W(u, n) = P_x (D_u P) n for normal n, which satisfies ⟨W(u, n), v⟩ = ⟨n, II(u, v)⟩;
    - the Hessian, Hess f[u] = P_x ∇²f[u] + W(u, (I − P_x) ∇f).

    D_u P is taken by forward-mode differentiation of `proju`; subclasses replace it by closed forms. `proju`
    must therefore be smooth in x in a neighbourhood of the manifold.

    Source: Absil, Mahony and Trumpf, "An extrinsic look at the Riemannian Hessian" (2013).
    """

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """⟨u, v⟩ of the surrounding space, the sum of the products of entries (*batch)."""
        product = u * (u if v is None else v)
        if product.shape != x.shape:
            product = product.expand(torch.broadcast_shapes(product.shape, x.shape))
        return sum_point(product, self.ndim, keepdim)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """The norm of the surrounding space; scaled, so that neither tiny nor huge entries are lost."""
        return frobenius_norm(u.expand(torch.broadcast_shapes(u.shape, x.shape)), self.ndim, keepdim)

    def egrad2rgrad(self, x: Tensor, g: Tensor) -> Tensor:
        """The Riemannian gradient: the Euclidean one, projected."""
        return self.proju(x, g)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """The vector projected onto the tangent space at y."""
        return self.proju(y, v)

    def normal(self, x: Tensor, a: Tensor) -> Tensor:
        """The part of a vector of the surrounding space that is normal to the manifold."""
        return a - self.proju(x, a)

    def weingarten(self, x: Tensor, u: Tensor, n: Tensor) -> Tensor:
        """The tangent vector W(u, n), with ⟨W(u, n), v⟩ = ⟨n, II(u, v)⟩, for tangent u and normal n."""
        return self.proju(x, self._projection_derivative(x, u, n))

    def second_fundamental_form(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """II(u, v), the normal part of the derivative of v along u, for tangent u and v; symmetric."""
        return self.normal(x, self._projection_derivative(x, u, v))

    def ehess2rhess(self, x: Tensor, g: Tensor, h: Tensor, u: Tensor) -> Tensor:
        """The Riemannian Hessian applied to u.

        Args:
            x: points.
            g: Euclidean gradients.
            h: Euclidean Hessian-vector products, the derivative of g along u.
            u: tangent vectors.
        """
        return self.proju(x, h) + self.weingarten(x, u, self.normal(x, g))

    def _projection_derivative(self, x: Tensor, u: Tensor, a: Tensor) -> Tensor:
        x, u, a = torch.broadcast_tensors(x, u, a)
        return torch.func.jvp(lambda point: self.proju(point, a), (plain(x),), (plain(u),))[1]


def plain(x: Tensor) -> Tensor:
    """A tensor without geoopt's mark, with its graph."""
    return x.as_subclass(Tensor) if isinstance(x, ManifoldTensor) else x


def default_tolerance(dtype: torch.dtype) -> float:
    """How far a computed point may be off: 1e-8 in float64, 1e-4 in float32, 1e-2 in half precision."""
    return {torch.float64: 1e-8, torch.float32: 1e-4}.get(dtype, 1e-2)


def safe_sqrt(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The square root of numbers ≥ 0 (rounding below zero counts as zero), with derivative 0 at zero."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), value.clamp(max=0) * 0)


def sum_point(value: Tensor, ndim: int, keepdim: bool = False) -> Tensor:
    """The sum over the dimensions of a point."""
    return value.sum(tuple(range(-ndim, 0)), keepdim=keepdim) if ndim else value


def frobenius_norm(value: Tensor, ndim: int, keepdim: bool = False) -> Tensor:
    """The root of the sum of squares over a point's dimensions, without overflow; derivative 0 at zero."""
    dims = tuple(range(-ndim, 0))
    scale = value.detach().abs().amax(dims, keepdim=True) if ndim else value.detach().abs()
    usable = (scale > 0) & scale.isfinite()
    scale = torch.where(usable, scale, 1.0)
    size = safe_sqrt(sum_point((value / scale) ** 2, ndim, True)) * scale
    return size if keepdim else size.reshape(size.shape[: size.ndim - ndim])
