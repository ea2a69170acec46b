"""Rotations: orthogonal matrices of determinant one."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.base import RiemannianSubmanifold, frobenius_norm
from manifolds.errors import ManifoldError
from manifolds.matrix_functions import exponential, nearest_rotation, polar, skew, sqrtm_spd, sym
from manifolds.operations import widened

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(14)
SMALL = 0.5
"""Up to which Frobenius distance from the identity a rotation is read off its difference to it."""
CUT = 1e-6
"""How badly a square root may miss its rotation before the rotation counts as one by π."""


class SpecialOrthogonal(RiemannianSubmanifold):
    """Rotations X ∈ ℝⁿˣⁿ, Xᵀ X = I and det X = 1, with the Euclidean metric, which is bi-invariant.

    The tangent space at X is {X Ω : Ω = −Ωᵀ}; vectors are stored as n×n matrices X Ω, as on Stiefel.
    Geodesics are X exp(tΩ). A rotation is joined to another by one shortest geodesic unless an angle of Xᵀ Y
    is π: there the logarithm and the transport are NaN. They are smooth at repeated angles.

    Args:
        retraction: "cayley" (second order, one linear solve), "polar" (second order) or "qr" (first order).

    Sources: Edelman, Arias and Smith, "The geometry of algorithms with orthogonality constraints" (1998);
        Absil, Mahony
    and Sepulchre, "Optimization Algorithms on Matrix Manifolds" (2008), section 4.1.

    Example:
        >>> import torch
        >>> quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> SpecialOrthogonal().logmap(torch.eye(2), quarter)
        tensor([[ 0.0000, -1.5708],
                [ 1.5708,  0.0000]])
    """

    ndim = 2
    retractions: ClassVar[dict[str, int]] = {"cayley": 2, "polar": 2, "qr": 1}
    isometric: ClassVar[frozenset[str]] = frozenset({"transp", "transp_follow_retr", "transp_follow_expmap"})
    reversible = True
    example_shape = (4, 4)

    def __init__(self, retraction: str = "cayley") -> None:
        super().__init__()
        if retraction not in self.retractions:
            raise ManifoldError(
                f"SpecialOrthogonal: retraction is {retraction!r}; choose one of {sorted(self.retractions)}"
            )
        self.retraction = retraction
        self.name = (
            "SpecialOrthogonal" if retraction == "cayley" else f"SpecialOrthogonal(retraction={retraction!r})"
        )

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """It is n (n − 1) / 2."""
        n = (point.shape if isinstance(point, Tensor) else point)[-1]
        return n * (n - 1) // 2

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """How far xᵀx is from the identity, and the determinant from one."""
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        size = max(x.shape[-1], 1) ** 0.5
        return {
            "xᵀx = I": frobenius_norm(x.mT @ x - identity, 2) / size,
            "det x = 1": (torch.linalg.det(x) - 1).abs(),
        }

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """The symmetric part of xᵀu, relative to u."""
        size = frobenius_norm(u, 2)
        return {"xᵀu is skew-symmetric": frobenius_norm(sym(x.mT @ u), 2) / torch.where(size > 0, size, 1.0)}

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Rotations drawn evenly (Haar measure), by QR of a normal matrix."""
        sample = self._sample(size, dtype, device, generator)
        q = _positive_qr(widened(sample))
        last = torch.arange(q.shape[-1], device=q.device) == q.shape[-1] - 1
        rotation = q * torch.where(last, torch.linalg.det(q).sign()[..., None, None], 1.0)
        return self._point(rotation.to(sample.dtype))

    def projx(self, x: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """The nearest rotation; where det X < 0, the smallest singular direction is turned round."""
        return nearest_rotation(x)

    def proju(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """X skew(Xᵀ U)."""
        return x @ skew(x.mT @ u)

    def retr(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """The retraction that was chosen."""
        chosen: Tensor = getattr(self, f"retr_{self.retraction}")(x, u)
        return chosen

    def retr_cayley(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """X (I − Ω/2)⁻¹ (I + Ω/2) with Ω = Xᵀ U: a rotation for every U; second order."""
        half = skew(x.mT @ u) / 2
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return _polished(x @ torch.linalg.solve_ex(identity - half, identity + half)[0])

    def retr_polar(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """The rotation nearest to X + U; second order."""
        return polar(x + u)

    def retr_qr(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """The factor Q of X + U = Q R, diag R > 0; first order."""
        return _positive_qr(x + u)

    def expmap(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """X exp(Xᵀ U)."""
        return _polished(x @ exponential(skew(x.mT @ u)))

    def logmap(
        self, x: Float[Tensor, "*#batch n n"], y: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """X log(Xᵀ Y), to full relative precision for close points, too. NaN where an angle is π."""
        return x @ _logarithm(x.mT @ (y - x))

    def dist(
        self, x: Float[Tensor, "*#batch n n"], y: Float[Tensor, "*#batch n n"], *, keepdim: bool = False
    ) -> Tensor:
        """‖log(Xᵀ Y)‖ (*batch), √2 times the root of the sum of the squared angles; NaN at an angle of π."""
        return frobenius_norm(_logarithm(x.mT @ (y - x)), 2, keepdim)

    def transp(
        self,
        x: Float[Tensor, "*#batch n n"],
        y: Float[Tensor, "*#batch n n"],
        v: Float[Tensor, "*#batch n n"],
    ) -> Float[Tensor, "*batch n n"]:
        """Parallel transport along the shortest geodesic: X Q (Xᵀ V) Q, Q² = Xᵀ Y. NaN at an angle of π."""
        return _carried(x, _half(x.mT @ (y - x)), v)

    def transp_follow_expmap(
        self,
        x: Float[Tensor, "*#batch n n"],
        u: Float[Tensor, "*#batch n n"],
        v: Float[Tensor, "*#batch n n"],
    ) -> Float[Tensor, "*batch n n"]:
        """Parallel transport along X exp(tΩ) to its end, however long it is."""
        return _carried(x, exponential(skew(x.mT @ u) / 2), v)

    def expmap_transp(
        self,
        x: Float[Tensor, "*#batch n n"],
        u: Float[Tensor, "*#batch n n"],
        v: Float[Tensor, "*#batch n n"],
    ) -> tuple[Float[Tensor, "*batch n n"], Float[Tensor, "*batch n n"]]:
        """The end of the geodesic, and the vector transported along it."""
        half = exponential(skew(x.mT @ u) / 2)
        return _polished(x @ half @ half), _carried(x, half, v)

    def weingarten(
        self,
        x: Float[Tensor, "*#batch n n"],
        u: Float[Tensor, "*#batch n n"],
        n: Float[Tensor, "*#batch n n"],
    ) -> Float[Tensor, "*batch n n"]:
        """−½ (U S + X S Xᵀ U) with S = Xᵀ N."""
        inside = x.mT @ n
        return -(u @ inside + x @ (inside @ (x.mT @ u))) / 2

    def second_fundamental_form(
        self,
        x: Float[Tensor, "*#batch n n"],
        u: Float[Tensor, "*#batch n n"],
        v: Float[Tensor, "*#batch n n"],
    ) -> Float[Tensor, "*batch n n"]:
        """−X sym(Uᵀ V)."""
        return -x @ sym(u.mT @ v)

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        ok, reason = super()._check_shape(shape, name)
        if ok and shape[-1] != shape[-2]:
            return False, f"{name} has shape {tuple(shape)}; the last two dimensions must be equal"
        return ok, reason


def _positive_qr(matrix: Tensor) -> Tensor:
    """The factor Q of the QR decomposition whose R has a positive diagonal."""
    q, r = torch.linalg.qr(matrix)
    signs = torch.diagonal(r, dim1=-2, dim2=-1).detach()
    return q * torch.where(signs < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)


def _polished(x: Tensor) -> Tensor:
    """One Newton step towards the nearest orthogonal matrix, so that rounding does not pile up."""
    return 1.5 * x - 0.5 * x @ (x.mT @ x)


def _carried(x: Tensor, half: Tensor, v: Tensor) -> Tensor:
    return x @ half @ skew(x.mT @ v) @ half


def _half(difference: Tensor) -> Tensor:
    """The square root of the rotation R = I + difference, the polar factor of I + R; NaN at an angle of π."""
    identity = torch.eye(difference.shape[-1], dtype=difference.dtype, device=difference.device)
    root = polar(2 * identity + difference)
    missed = (root @ root - identity - difference).detach().abs().amax((-2, -1), keepdim=True)
    mirrored = torch.linalg.det(root.detach())[..., None, None] < 0
    limit = CUT if difference.dtype == torch.float64 else 1e-2
    return torch.where((missed > limit) | mirrored, torch.nan, root)


def _logarithm(difference: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
    """The logarithm of the rotation R = I + difference, with full relative precision for a small difference.

    Formula: S with the eigenvalues ± i tan(θ/4) gives log R = 4 ∫₀¹ S (I + t² Sᵀ S)⁻¹ dt, by Gauss and
        Legendre. Far
    from the identity S = skew(Q) (I + sym(Q))⁻¹ with Q² = R. Close to it the Cayley transform C = (R − I) (R
    + I)⁻¹, whose eigenvalues are ± i tan(θ/2), is halved: S = C (I + (I + Cᵀ C)^½)⁻¹.
    """
    n = difference.shape[-1]
    identity = torch.eye(n, dtype=difference.dtype, device=difference.device)
    close = frobenius_norm(difference.detach(), 2, True) < SMALL
    near = torch.where(close, difference, 0.0)
    cayley = skew(torch.linalg.solve_ex(2 * identity + near, near)[0])
    from_near = torch.linalg.solve_ex(
        identity + sqrtm_spd(identity + cayley.mT @ cayley), cayley, left=False
    )[0]
    half = _half(torch.where(close, 0.0, difference))
    from_far = torch.linalg.solve_ex(identity + sym(half), skew(half), left=False)[0]
    quarter = skew(torch.where(close, from_near, from_far))
    nodes = torch.as_tensor((_NODES + 1) / 2, dtype=quarter.dtype, device=quarter.device)[:, None, None]
    weights = torch.as_tensor(_WEIGHTS / 2, dtype=quarter.dtype, device=quarter.device)[:, None, None]
    square = (quarter.mT @ quarter).unsqueeze(-3)
    terms = torch.linalg.solve_ex(identity + nodes**2 * square, quarter.unsqueeze(-3))[0]
    return 4 * skew((weights * terms).sum(-3))
