"""Subspaces: orthonormal bases, of which all that span the same subspace are one point."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.base import Manifold, frobenius_norm, sum_point
from manifolds.errors import ManifoldError, MissingOperationError
from manifolds.frames import (
    carry,
    end_point,
    flow,
    haar,
    identity_defect,
    noise_level,
    polar_positive,
    qr_positive,
    shape_reason,
)
from manifolds.matrix_functions import polar, sym
from manifolds.operations import widened

Point = Float[Tensor, "*#batch n p"]
Result = Float[Tensor, "*batch n p"]

NODES, WEIGHTS = (tuple(each.tolist()) for each in np.polynomial.legendre.leggauss(12))
"""Of Gauss–Legendre for θ / sin θ; the error falls as 4.6^(−2 n) with n nodes, to 1e-16 for twelve."""


class Grassmann(Manifold):
    """The p-dimensional subspaces of ℝⁿ.

    A point is an n×p matrix X with orthonormal columns, a basis of the subspace, in the last two
    dimensions of a tensor; X Q for orthogonal Q is the same point. A tangent vector is a horizontal U,
    XᵀU = 0, and at X Q the same vector is U Q. The metric is tr UᵀV: Grassmann is a quotient of Stiefel,
    with either of its metrics. Functions to be differentiated must depend on the subspace alone.

    `logmap(x, y)` leads to the subspace of y, to the basis of it that is nearest to x. `transp` is
    parallel transport along the shortest geodesic, in closed form and at the cost of a projection and a
    p×p polar factor, so that it is given in the basis y itself. A plain projection would turn the vector
    with every change of basis. Both retractions reach the same subspace and are of second order; "polar",
    the default, gives the basis nearest to x, whatever the basis.

    Args:
        retraction: "polar" or "qr"; what `retr` is.

    Raises:
        ManifoldError: another retraction.

    Source: Edelman, Arias and Smith, "The geometry of algorithms with orthogonality constraints" (1998);
    Bendokat, Zimmermann and Absil, "A Grassmann manifold handbook" (2024).

    Example:
        >>> import torch
        >>> grassmann = Grassmann()
        >>> x = torch.tensor([[1.0], [0.0]])
        >>> y = torch.tensor([[-1.0], [1.0]]) / 2**0.5
        >>> grassmann.dist(x, y)
        tensor(0.7854)
        >>> grassmann.logmap(x, y)
        tensor([[ 0.0000],
                [-0.7854]])
    """

    ndim = 2
    example_shape = (5, 3)
    reversible = True
    retractions: ClassVar[dict[str, int]] = {"polar": 2, "qr": 2}
    isometric: ClassVar[frozenset[str]] = frozenset({"transp", "transp_follow_retr", "transp_follow_expmap"})

    def __init__(self, retraction: str = "polar") -> None:
        super().__init__()
        if retraction not in self.retractions:
            choices = ", ".join(map(repr, self.retractions))
            raise ManifoldError(f"Grassmann: retraction is {retraction!r}; take one of {choices}")
        self.retraction = retraction
        self.name = "Grassmann"

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        return shape_reason(super()._check_shape(shape, name), shape, name)

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """The dimension p (n − p)."""
        n, p = (point.shape if isinstance(point, Tensor) else tuple(point))[-2:]
        return p * (n - p)

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """How far the columns are from orthonormal, ‖XᵀX − I‖ / √p."""
        return {"XᵀX = I": identity_defect(x)}

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """How far the vector is from horizontal, ‖XᵀU‖ / ‖U‖."""
        return {"XᵀU = 0": frobenius_norm(x.mT @ u, 2) / (frobenius_norm(u, 2) + noise_level(u))}

    def embedding(self, x: Tensor) -> Tensor:
        """The projector X Xᵀ, the same for every basis of the subspace."""
        projector = x @ x.mT
        n, p = x.shape[-2:]
        return projector * 0 + torch.eye(n, dtype=x.dtype, device=x.device) if n == p else projector

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Subspaces drawn evenly, from the distribution that no rotation changes."""
        sample = self._sample(size, dtype, device, generator)
        return self._point(haar(widened(sample)).to(sample.dtype))

    # Projections and metric

    def projx(self, x: Float[Tensor, "*batch n p"]) -> Result:
        """The orthonormal basis nearest to the columns, which spans the same subspace."""
        return polar(x)

    def proju(self, x: Point, u: Point) -> Result:
        """The horizontal part, U − X XᵀU; zero where n = p, as ℝⁿ has one subspace of full dimension."""
        return _outside(x, u, x.mT @ u)

    def inner(self, x: Point, u: Point, v: Point | None = None, *, keepdim: bool = False) -> Tensor:
        """The product tr UᵀV (*batch)."""
        product = u * (u if v is None else v)
        return sum_point(product.expand(torch.broadcast_shapes(product.shape, x.shape)), 2, keepdim)

    def norm(self, x: Point, u: Point, *, keepdim: bool = False) -> Tensor:
        """The Frobenius norm, scaled, so that neither tiny nor huge entries are lost."""
        return frobenius_norm(u.expand(torch.broadcast_shapes(u.shape, x.shape)), 2, keepdim)

    def egrad2rgrad(self, x: Point, g: Point) -> Result:
        """The gradient G − X XᵀG, of a function of the subspace."""
        return self.proju(x, g)

    def ehess2rhess(self, x: Point, g: Point, h: Point, u: Point) -> Result:
        """The Riemannian Hessian applied to u, P(H − U XᵀG).

        Args:
            x: points.
            g: Euclidean gradients.
            h: Euclidean Hessian-vector products, the derivative of g along u.
            u: tangent vectors.
        """
        return self.proju(x, h - u @ (x.mT @ g))

    def second_fundamental_form(self, x: Point, u: Point, v: Point) -> Result:
        """Raises: a point is a class of bases, which lies in no Euclidean space of n×p matrices."""
        raise MissingOperationError(
            f"{self.name} is a quotient of Stiefel, not a submanifold of the matrices: II is not defined; "
            "the projectors X Xᵀ are a submanifold, see embedding"
        )

    # Retractions

    def retr(self, x: Point, u: Point) -> Result:
        """The retraction that was chosen."""
        return getattr(self, f"retr_{self.retraction}")(x, u)

    def retr_qr(self, x: Point, u: Point) -> Result:
        """The span of X + U, by the Q of Q R with positive diagonal of R; second order."""
        return qr_positive(x + u)

    def retr_polar(self, x: Point, u: Point) -> Result:
        """The span of X + U, by its basis nearest to X, (X + U)(I + UᵀU)^(−½); second order."""
        return polar_positive(x + u)

    # Exponential and logarithm

    def expmap(self, x: Point, u: Point) -> Result:
        """The end of the geodesic, X cos(√G) + U sin(√G)/√G with G = UᵀU.

        Formula: both functions of G are blocks of exp([[0, −G], [I, 0]]), which is smooth where G has
        repeated or zero eigenvalues.
        """
        return end_point(flow(x, u, 0.5))

    def logmap(self, x: Point, y: Point) -> Result:
        """The velocity of the shortest geodesic to the subspace of y.

        Formula: with the polar factor W of XᵀY and P = XᵀY Wᵀ = cos Θ, log = (I − X Xᵀ) Y Wᵀ g(P), where
        g(cos θ) = θ / sin θ is an integral over [0, 1] of 2 / ((1 + s²) + (1 − s²) cos θ), which
        Gauss–Legendre takes with inverses of p×p matrices between I and 2 I: smooth in every case, exact
        for tiny and for near-right angles.

        The cut locus is where an angle is π/2: there are several shortest geodesics, this gives one of
        them, and its derivative does not exist (NaN or infinite).
        """
        x, y = torch.broadcast_tensors(x, y)
        change = y - x
        across = x.mT @ change
        cosine, turn = _align(across)
        outside = _outside(x, change, across) @ turn.mT
        return outside @ _angle_over_sine(cosine)

    def dist(self, x: Point, y: Point, *, keepdim: bool = False) -> Tensor:
        """The root of the sum of squares of the principal angles (*batch), in radians."""
        return frobenius_norm(self.logmap(x, y), 2, keepdim)

    def dist2(self, x: Point, y: Point, *, keepdim: bool = False) -> Tensor:
        """The sum of squares of the principal angles (*batch)."""
        return self.inner(x, self.logmap(x, y), keepdim=keepdim)

    # Transports

    def transp(self, x: Point, y: Point, v: Point) -> Result:
        """Parallel transport along the shortest geodesic, in the basis y.

        Formula: v' = v W − (X W + Y)(I + Wᵀ P W)⁻¹ Yᵀ v W, with W and P of `logmap`.
        """
        turn = polar(x.mT @ y)
        return _carry(x @ turn, y, v @ turn)

    def transp_follow_retr(self, x: Point, u: Point, v: Point) -> Result:
        """Parallel transport along the shortest geodesic to the retraction's end, in its basis."""
        return self.retr_transp(x, u, v)[1]

    def retr_transp(self, x: Point, u: Point, v: Point) -> tuple[Result, Result]:
        """The retraction, and the vector carried to it as by `transp`; polar needs no alignment."""
        y = self.retr(x, u)
        return y, _carry(x, y, v) if self.retraction == "polar" else self.transp(x, y, v)

    def transp_follow_expmap(self, x: Point, u: Point, v: Point) -> Result:
        """Parallel transport along the geodesic with velocity u, however long, in the basis of `expmap`."""
        return carry(flow(x, u, 0.5), v)

    def expmap_transp(self, x: Point, u: Point, v: Point) -> tuple[Result, Result]:
        """The end of the geodesic, and the vector carried along it."""
        geodesic = flow(x, u, 0.5)
        return end_point(geodesic), carry(geodesic, v)


def _outside(x: Tensor, u: Tensor, across: Tensor) -> Tensor:
    """The vector less X times its coefficients; without the rounding noise where nothing can be left."""
    rest = u - x @ across
    return rest * 0 if x.shape[-2] == x.shape[-1] else rest


def _angle_over_sine(cosine: Float[Tensor, "*batch p p"]) -> Float[Tensor, "*batch p p"]:
    """Θ / sin Θ as a function of the symmetric matrix cos Θ, with angles from 0 to π/2."""
    node = torch.tensor(NODES, dtype=cosine.dtype, device=cosine.device)[:, None, None]
    weight = torch.tensor(WEIGHTS, dtype=cosine.dtype, device=cosine.device)[:, None, None]
    square = ((node + 1) / 2) ** 2
    identity = torch.eye(cosine.shape[-1], dtype=cosine.dtype, device=cosine.device)
    denominators = (1 + square) * identity + (1 - square) * cosine.unsqueeze(-3)
    return sym((weight * torch.linalg.inv(denominators)).sum(-3))


def _align(across: Tensor) -> tuple[Tensor, Tensor]:
    """P = cos Θ and the orthogonal W with XᵀY = P W, from Xᵀ(Y − X)."""
    inner = across + torch.eye(across.shape[-1], dtype=across.dtype, device=across.device)
    turn = polar(inner)
    return sym(inner @ turn.mT), turn


def _carry(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    """Parallel transport between bases with symmetric positive XᵀY."""
    cosine = sym(x.mT @ y)
    both = cosine + torch.eye(cosine.shape[-1], dtype=cosine.dtype, device=cosine.device)
    return _outside(x + y, v, torch.linalg.solve(both, y.mT @ v))
