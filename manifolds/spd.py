"""Symmetric positive definite matrices, with the affine-invariant metric."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.base import Manifold, frobenius_norm, sum_point
from manifolds.matrix_functions import eigh_finite, polar, sqrtm_spd, sym
from manifolds.operations import widened
from manifolds.spectral_functions import expm_symmetric, log1pm_symmetric


class SPD(Manifold):
    """Symmetric positive definite n×n matrices with the metric ⟨U, V⟩ = tr(X⁻¹ U X⁻¹ V).

    Tangent vectors are the symmetric matrices. The metric is the same after X ↦ A X Aᵀ for any invertible A,
    so that with X = L Lᵀ everything is computed at the identity and carried back: exp_X(U) = L exp(L⁻¹ U
    L⁻ᵀ) Lᵀ. Any two points are joined by exactly one geodesic. Derivatives hold at repeated eigenvalues, to
    second order.

    A matrix that is not positive definite gives NaN where the check of values is left out.

    Sources: Pennec, Fillard and Ayache, "A Riemannian framework for tensor computing" (2006); Bhatia,
        "Positive
    Definite Matrices" (2007), chapter 6; Sra and Hosseini, "Conic geometric optimization" (2015) for
    transport.

    Example:
        >>> import torch
        >>> x, y = torch.eye(2), torch.diag(torch.tensor([1.0, 100.0]))
        >>> SPD().dist(x, y)
        tensor(4.6052)
    """

    name = "SPD"
    ndim = 2
    retractions: ClassVar[dict[str, int]] = {"taylor": 2}
    isometric: ClassVar[frozenset[str]] = frozenset({"transp", "transp_follow_retr", "transp_follow_expmap"})
    reversible = True
    example_shape = (4, 4)

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """It is n (n + 1) / 2."""
        n = (point.shape if isinstance(point, Tensor) else point)[-1]
        return n * (n + 1) // 2

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """The asymmetry, and one or more where an eigenvalue is not positive."""
        values = eigh_finite(sym(x))[0]
        largest = values[..., -1].abs().clamp_min(torch.finfo(x.dtype).tiny)
        ratio = values[..., 0] / largest
        indefinite = torch.where(ratio > 0, 0.0, 1 - ratio)
        return {"x = xᵀ": _asymmetry(x), "smallest eigenvalue > 0": indefinite}

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """The asymmetry."""
        return {"u = uᵀ": _asymmetry(u)}

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Exponentials of random symmetric matrices whose eigenvalues lie in about ±√2."""
        noise = self._sample(size, dtype, device, generator)
        found = expm_symmetric(widened(noise) / max(noise.shape[-1], 1) ** 0.5)
        return self._point(found.to(noise.dtype))

    def projx(self, x: Float[Tensor, "*batch n n"]) -> Float[Tensor, "*batch n n"]:
        """The symmetric part, its eigenvalues raised to 10 n ε ‖X‖ where they are lower (ε: rounding)."""
        symmetric = sym(x)
        values = eigh_finite(symmetric.detach())[0]
        size = values.abs().amax(-1)[..., None, None]
        floor = 10 * x.shape[-1] * torch.finfo(x.dtype).eps * torch.where(size == 0, 1.0, size)
        low = values[..., :1, None] < 0.5 * floor
        identity = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        above = torch.where(low, symmetric - floor * identity, identity)
        raised = floor * identity + (above + sym(polar(above) @ above)) / 2
        return torch.where(low, raised, symmetric)

    def proju(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """The symmetric part."""
        return sym(u).expand(torch.broadcast_shapes(x.shape, u.shape))

    def inner(
        self,
        x: Float[Tensor, "*#batch n n"],
        u: Float[Tensor, "*#batch n n"],
        v: Float[Tensor, "*#batch n n"] | None = None,
        *,
        keepdim: bool = False,
    ) -> Tensor:
        """tr(X⁻¹ U X⁻¹ V) (*batch)."""
        root = _root(x)
        left = _at_identity(root, u)
        right = left if v is None else _at_identity(root, v)
        return sum_point(left * right, 2, keepdim)

    def norm(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"], *, keepdim: bool = False
    ) -> Tensor:
        """‖L⁻¹ U L⁻ᵀ‖ (*batch)."""
        return frobenius_norm(_at_identity(_root(x), u), 2, keepdim)

    def retr(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """X + U + ½ U X⁻¹ U, positive definite for every U; a retraction of second order."""
        root = _root(x)
        inside = torch.linalg.solve_triangular(root, u, upper=False)
        return sym(x + u + inside.mT @ inside / 2)

    def expmap(
        self, x: Float[Tensor, "*#batch n n"], u: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """L exp(L⁻¹ U L⁻ᵀ) Lᵀ with X = L Lᵀ."""
        root = _root(x)
        return sym(root @ expm_symmetric(_at_identity(root, u)) @ root.mT)

    def logmap(
        self, x: Float[Tensor, "*#batch n n"], y: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """L log(I + L⁻¹ (Y − X) L⁻ᵀ) Lᵀ with X = L Lᵀ: to full relative precision for close points, too."""
        root = _root(x)
        return sym(root @ log1pm_symmetric(_at_identity(root, y - x)) @ root.mT)

    def dist(
        self, x: Float[Tensor, "*#batch n n"], y: Float[Tensor, "*#batch n n"], *, keepdim: bool = False
    ) -> Tensor:
        """(Σ log² λᵢ)^½ over the eigenvalues of X⁻¹ Y (*batch)."""
        return frobenius_norm(log1pm_symmetric(_at_identity(_root(x), y - x)), 2, keepdim)

    def dist2(
        self, x: Float[Tensor, "*#batch n n"], y: Float[Tensor, "*#batch n n"], *, keepdim: bool = False
    ) -> Tensor:
        """Σ log² λᵢ over the eigenvalues of X⁻¹ Y (*batch)."""
        return sum_point(log1pm_symmetric(_at_identity(_root(x), y - x)) ** 2, 2, keepdim)

    def transp(
        self,
        x: Float[Tensor, "*#batch n n"],
        y: Float[Tensor, "*#batch n n"],
        v: Float[Tensor, "*#batch n n"],
    ) -> Float[Tensor, "*batch n n"]:
        """Parallel transport along the geodesic: E V Eᵀ with E = (Y X⁻¹)^½ = L (L⁻¹ Y L⁻ᵀ)^½ L⁻¹."""
        root = _root(x)
        carried = root @ sqrtm_spd(_at_identity(root, y))
        return sym(carried @ _at_identity(root, v) @ carried.mT)

    def egrad2rgrad(
        self, x: Float[Tensor, "*#batch n n"], g: Float[Tensor, "*#batch n n"]
    ) -> Float[Tensor, "*batch n n"]:
        """X sym(G) X."""
        return sym(x @ sym(g) @ x)

    def ehess2rhess(
        self,
        x: Float[Tensor, "*#batch n n"],
        g: Float[Tensor, "*#batch n n"],
        h: Float[Tensor, "*#batch n n"],
        u: Float[Tensor, "*#batch n n"],
    ) -> Float[Tensor, "*batch n n"]:
        """X sym(H) X + sym(U sym(G) X)."""
        return sym(x @ sym(h) @ x) + sym(u @ sym(g) @ x)

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        ok, reason = super()._check_shape(shape, name)
        if ok and shape[-1] != shape[-2]:
            return False, f"{name} has shape {tuple(shape)}; the last two dimensions must be equal"
        return ok, reason


def _root(x: Tensor) -> Tensor:
    """The Cholesky factor; NaN where there is none."""
    root, failed = torch.linalg.cholesky_ex(sym(x))
    return torch.where((failed == 0)[..., None, None], root, torch.nan)


def _at_identity(root: Tensor, u: Tensor) -> Tensor:
    """L⁻¹ U L⁻ᵀ."""
    half = torch.linalg.solve_triangular(root, u, upper=False)
    return torch.linalg.solve_triangular(root, half.mT, upper=False).mT


def _asymmetry(x: Tensor) -> Tensor:
    size = frobenius_norm(x, 2)
    return frobenius_norm(x - x.mT, 2) / torch.where(size == 0, 1.0, size)
