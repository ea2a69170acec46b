"""Orthonormal frames: matrices whose columns are orthonormal."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import stiefel_logarithm
from manifolds.base import Manifold, frobenius_norm, sum_point
from manifolds.errors import ManifoldError, MissingOperationError
from manifolds.frames import (
    carry,
    end_point,
    flow,
    haar,
    identity_defect,
    minus_product,
    noise_level,
    polar_positive,
    polish,
    qr_positive,
    shape_reason,
)
from manifolds.matrix_functions import polar, skew, sym
from manifolds.operations import operation, widened
from manifolds.stiefel_logarithm import Logarithm

Point = Float[Tensor, "*#batch n p"]
Result = Float[Tensor, "*batch n p"]

ORDERS = {
    "euclidean": {"qr": 1, "polar": 2, "cayley": 1},
    "canonical": {"qr": 1, "polar": 1, "cayley": 2},
}


class Stiefel(Manifold):
    """The n×p matrices with orthonormal columns, n ≥ p: {X : XᵀX = I}.

    A point is the last two dimensions of a tensor. The tangent space at X is {U : XᵀU + UᵀX = 0}, in parts
    U = X A + U⊥ with A = XᵀU skew. The metrics are

    - "euclidean": ⟨U, V⟩ = tr UᵀV, that of the surrounding space: tr A_UᵀA_V + tr U⊥ᵀV⊥;
    - "canonical": ⟨U, V⟩ = tr Uᵀ(I − ½ X Xᵀ)V, that of the quotient O(n)/O(n−p): every rotation counts
      once, ½ tr A_UᵀA_V + tr U⊥ᵀV⊥.

    Gradient, geodesics and distances belong to the metric; the projection onto the tangent space is the
    same.

    The order of a retraction is how far it follows the metric's geodesics: polar is of second order for
    the Euclidean metric, Cayley for the canonical one, QR of first order for both. QR is the default: it
    is the cheapest, it keeps frames whose columns are ordered (the first k columns depend on the first k
    columns alone), and descent and Newton-type methods converge as fast with it, as at a critical point
    the Hessian of f ∘ retr is the Riemannian one for every retraction. Where the curve itself matters,
    take the retraction of second order.

    `transp` projects. `transp_follow_expmap` is isometric in both metrics, takes the velocity of the
    geodesic to its velocity and is undone along the way back; it is not parallel transport, which has no
    closed form here. With `retraction="cayley"`, `transp_follow_retr` is a rotation, too.

    Unlike geoopt 0.5.1's default `Stiefel()`, whose `proju` is no projection, whose `retr` is not of
    first order and whose `expmap` is no geodesic, the canonical metric here satisfies its definitions.

    Args:
        metric: "euclidean" or "canonical".
        retraction: "qr", "polar" or "cayley"; what `retr` is.

    Raises:
        ManifoldError: another metric or retraction.

    Source: Edelman, Arias and Smith, "The geometry of algorithms with orthogonality constraints" (1998).

    Example:
        >>> import torch
        >>> stiefel = Stiefel()
        >>> x = torch.eye(3, 2)
        >>> u = stiefel.proju(x, torch.ones(3, 2))
        >>> u
        tensor([[0., 0.],
                [0., 0.],
                [1., 1.]])
        >>> y = stiefel.expmap(x, u)
        >>> bool(stiefel.contains(y))
        True
        >>> stiefel.dist(x, y)
        tensor(1.4142)
    """

    ndim = 2
    example_shape = (5, 3)

    def __init__(self, metric: str = "euclidean", retraction: str | None = None) -> None:
        super().__init__()
        if metric not in ORDERS:
            raise ManifoldError(f"Stiefel: metric is {metric!r}; take one of {', '.join(map(repr, ORDERS))}")
        self.metric = metric
        self.retractions = ORDERS[metric]  # type: ignore[misc]
        self.retraction = "qr" if retraction is None else retraction
        if self.retraction not in self.retractions:
            choices = ", ".join(map(repr, self.retractions))
            raise ManifoldError(f"Stiefel: retraction is {retraction!r}; take one of {choices}")
        self.isometric = frozenset({"transp_follow_expmap"})  # type: ignore[misc]
        if self.retraction == "cayley":
            self.isometric |= {"transp_follow_retr"}  # type: ignore[misc]
        self.bend = {"euclidean": 0.0, "canonical": 0.5}[metric]
        self.name = "Stiefel" if metric == "euclidean" else f"Stiefel(metric={metric!r})"

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        return shape_reason(super()._check_shape(shape, name), shape, name)

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """The dimension n p − p (p + 1) / 2."""
        n, p = (point.shape if isinstance(point, Tensor) else tuple(point))[-2:]
        return n * p - p * (p + 1) // 2

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """How far the columns are from orthonormal, ‖XᵀX − I‖ / √p."""
        return {"XᵀX = I": identity_defect(x)}

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """How far XᵀU is from skew, ‖sym(XᵀU)‖ / ‖U‖."""
        size = frobenius_norm(u, 2) + noise_level(u)
        return {"XᵀU + UᵀX = 0": frobenius_norm(sym(x.mT @ u), 2) / size}

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Points drawn from the uniform (Haar) distribution, which no rotation from either side changes."""
        sample = self._sample(size, dtype, device, generator)
        return self._point(haar(widened(sample)).to(sample.dtype))

    # Projections and metric

    def projx(self, x: Float[Tensor, "*batch n p"]) -> Result:
        """The nearest point, the polar factor. Only for full column rank is there just one."""
        return polar(x)

    def proju(self, x: Point, u: Point) -> Result:
        """The orthogonal projection onto the tangent space, U − X sym(XᵀU), for both metrics."""
        return minus_product(u, x, sym(x.mT @ u))

    def normal(self, x: Point, a: Point) -> Result:
        """The part X sym(XᵀA) that is orthogonal to the tangent space, in both metrics."""
        return x @ sym(x.mT @ a) + torch.zeros_like(a)

    def inner(self, x: Point, u: Point, v: Point | None = None, *, keepdim: bool = False) -> Tensor:
        """⟨u, v⟩ of the metric (*batch): tr UᵀV, less ½ tr (XᵀU)ᵀ(XᵀV) for the canonical one."""
        v = u if v is None else v
        found = sum_point((u * v).expand(torch.broadcast_shapes(x.shape, u.shape, v.shape)), 2, keepdim)
        if self.bend:
            found = found - self.bend * sum_point((x.mT @ u) * (x.mT @ v), 2, keepdim)
        return found

    def norm(self, x: Point, u: Point, *, keepdim: bool = False) -> Tensor:
        """⟨u, u⟩^½ of the metric, scaled, so that neither tiny nor huge entries are lost."""
        if self.bend:
            u = u - (1 - (1 - self.bend) ** 0.5) * (x @ (x.mT @ u))
        return frobenius_norm(u.expand(torch.broadcast_shapes(u.shape, x.shape)), 2, keepdim)

    def egrad2rgrad(self, x: Point, g: Point) -> Result:
        """The gradient of the metric: G − X sym(XᵀG), or G − X GᵀX for the canonical one."""
        return minus_product(g, x, g.mT @ x if self.bend else sym(x.mT @ g))

    def ehess2rhess(self, x: Point, g: Point, h: Point, u: Point) -> Result:
        """The Riemannian Hessian applied to u.

        Formula: for the Euclidean metric P(H − U sym(XᵀG)). For the canonical one, with geodesic
        acceleration Γ(U, V) = ½(U XᵀV + V XᵀU) − ½ X(XᵀU XᵀV + XᵀV XᵀU) − X sym(UᵀV), the vector that
        represents V ↦ ⟨H, V⟩ + ⟨G, Γ(U, V)⟩ in the metric.

        Args:
            x: points.
            g: Euclidean gradients.
            h: Euclidean Hessian-vector products, the derivative of g along u.
            u: tangent vectors.
        """
        inner = x.mT @ g
        form = h - u @ sym(inner)
        if not self.bend:
            return self.proju(x, form)
        turn = skew(x.mT @ u)
        form = form + (x @ (u.mT @ g + turn @ inner + inner @ turn) - g @ turn) / 2
        return self.egrad2rgrad(x, form)

    def weingarten(self, x: Point, u: Point, n: Point) -> Result:
        """The tangent vector −P(U XᵀN) with ⟨W(u, n), v⟩ = ⟨n, II(u, v)⟩, for tangent u and normal n."""
        self._is_submanifold()
        return self.proju(x, -u @ sym(x.mT @ n))

    def second_fundamental_form(self, x: Point, u: Point, v: Point) -> Result:
        """II(u, v) = −X sym(UᵀV), for the Euclidean metric."""
        self._is_submanifold()
        return -x @ sym(u.mT @ v)

    def _is_submanifold(self) -> None:
        if self.bend:
            raise MissingOperationError(
                f"{self.name}: the canonical metric is not that of the surrounding space, so there is no "
                "second fundamental form and no Weingarten map; take metric='euclidean'"
            )

    # Retractions

    def retr(self, x: Point, u: Point) -> Result:
        """The retraction that was chosen."""
        if self.retraction == "qr":
            return qr_positive(x + u)
        return polar_positive(x + u) if self.retraction == "polar" else polish(_cayley_end(_cayley(x, u)))

    def retr_qr(self, x: Point, u: Point) -> Result:
        """The Q of X + U = Q R with positive diagonal of R; first order."""
        return qr_positive(x + u)

    def retr_polar(self, x: Point, u: Point) -> Result:
        """The point nearest to X + U, (X + U)(I + UᵀU)^(−½); second order for the Euclidean metric."""
        return polar_positive(x + u)

    def retr_cayley(self, x: Point, u: Point) -> Result:
        """(I − Ŝ/2)⁻¹ (I + Ŝ/2) X with Ŝ of `Flow` for the canonical metric; second order for that metric.

        Formula: with A = XᵀU, it equals (2 X + U − X A) Z − X for the p×p matrix
        Z = (I − A/2 + Uᵀ(I − X Xᵀ)U/4)⁻¹.

        Source: Wen and Yin, "A feasible method for optimization with orthogonality constraints" (2013).
        """
        return polish(_cayley_end(_cayley(x, u)))

    # Exponential and logarithm

    def expmap(self, x: Point, u: Point) -> Result:
        """The end of the geodesic of length ‖u‖; see `Flow`."""
        return end_point(flow(x, u, self.bend))

    def logmap(self, x: Point, y: Point) -> Result:
        """The velocity of the geodesic from x to y, as `logarithm` finds it.

        It is the shortest one while the points are clearly closer than the injectivity radius (π for the
        Euclidean metric, 0.91 π for the canonical one).

        Raises:
            ManifoldError: the iteration did not converge; under `vmap` and `torch.compile` such items
                are NaN.
        """
        vector, converged, iterations, _ = stiefel_logarithm.solve(x, y, self.bend)
        if not stiefel_logarithm.all_known(converged, unknown=True):
            count = int((~converged).sum())
            raise ManifoldError(
                f"{self.name}.logmap: {count} of {converged.numel()} items did not converge in "
                f"{iterations} iterations: the points are near the cut locus or beyond; "
                "see logarithm, which says which"
            )
        return torch.where(converged[..., None, None], vector, torch.nan)

    @operation
    def _logarithm(self, x: Point, y: Point, tolerance: float | None, max_iterations: int) -> Logarithm:
        return Logarithm(*stiefel_logarithm.solve(x, y, self.bend, tolerance, max_iterations))

    def logarithm(
        self, x: Point, y: Point, *, tolerance: float | None = None, max_iterations: int = 40
    ) -> Logarithm:
        """The velocity of the geodesic from x to y, with what the iteration reached for each item.

        Args:
            x: points to start from.
            y: points to reach.
            tolerance: the relative size of the last step; 64 ε of the dtype if not given.
            max_iterations: after so many, an item counts as not converged.
        """
        found = self._logarithm(x, y, tolerance, max_iterations)
        return replace(found, vector=found.vector.to(x.dtype), residual=found.residual.to(x.dtype))

    # Transports

    def transp(self, x: Point, y: Point, v: Point) -> Result:
        """The vector projected onto the tangent space at y."""
        return self.proju(y, v)

    def transp_follow_retr(self, x: Point, u: Point, v: Point) -> Result:
        """The vector carried along the retraction: rotated for Cayley (isometric), else projected."""
        return self.retr_transp(x, u, v)[1]

    def retr_transp(self, x: Point, u: Point, v: Point) -> tuple[Result, Result]:
        """The retraction, and the vector carried along it."""
        if self.retraction == "cayley":
            rotation = _cayley(x, u)
            return polish(_cayley_end(rotation)), _cayley_carry(rotation, v)
        y = self.retr(x, u)
        return y, self.proju(y, v)

    def transp_follow_expmap(self, x: Point, u: Point, v: Point) -> Result:
        """The vector moved with the geodesic, isometric; it comes back along −γ'(1). See `Flow`."""
        return carry(flow(x, u, self.bend), v)

    def expmap_transp(self, x: Point, u: Point, v: Point) -> tuple[Result, Result]:
        """The end of the geodesic, and the vector moved with it."""
        geodesic = flow(x, u, self.bend)
        return end_point(geodesic), carry(geodesic, v)


class _Cayley(NamedTuple):
    """The rotation (I − Ŝ/2)⁻¹ (I + Ŝ/2) with Ŝ = V Xᵀ − X Vᵀ, V = U − ½ X XᵀU, reduced to one p×p inverse.

    Formula: the Woodbury identity gives v + U β + X((2 I − A) β − 2 Xᵀv) with β = ½ Z (2 Xᵀv − A Xᵀv −
    Uᵀv); for v = X, β = Z.
    """

    x: Tensor
    u: Tensor
    turn: Tensor
    identity: Tensor
    inverse: Tensor


def _cayley(x: Tensor, u: Tensor) -> _Cayley:
    turn = skew(x.mT @ u)
    identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    outside = u.mT @ u + turn @ turn
    return _Cayley(x, u, turn, identity, torch.linalg.inv(identity - turn / 2 + outside / 4))


def _cayley_end(way: _Cayley) -> Tensor:
    inside = (2 * way.identity - way.turn) @ way.inverse - way.identity
    return way.x @ inside + way.u @ way.inverse


def _cayley_carry(way: _Cayley, v: Tensor) -> Tensor:
    across = way.x.mT @ v
    beta = way.inverse @ (across - (way.turn @ across + way.u.mT @ v) / 2)
    return v + way.x @ (2 * beta - way.turn @ beta - 2 * across) + way.u @ beta
