"""The matrices of one rank, with the metric of the matrices around them."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.errors import ManifoldError
from manifolds.fixed_rank_factors import FactorPairs, inverse
from manifolds.fixed_rank_geodesic import Grams, aim, known, shoot
from manifolds.low_rank import LowRank
from manifolds.low_rank_spectrum import nearest_of_rank
from manifolds.matrix_functions import polar
from manifolds.operations import widened


@dataclass(frozen=True)
class Logarithm:
    """What `FixedRank.logarithm` found.

    Attributes:
        vector: the initial velocity (*batch, m+n, r); NaN where the search did not converge.
        converged: for each item.
        iterations: how many corrections the slowest item took.
        residual: for each item, by how much the geodesic misses its end, relative to its length.
    """

    vector: Float[Tensor, "*batch p r"]
    converged: Bool[Tensor, "*batch"]
    iterations: int
    residual: Float[Tensor, "*batch"]


class FixedRank(FactorPairs):
    """Matrices W of size m × n and rank exactly r, with the metric ⟨Ẇ₁, Ẇ₂⟩ = tr(Ẇ₁ᵀ Ẇ₂) around them.

    A point is one tensor x = [L; R] of shape (*batch, m+n, r), W = L Rᵀ, balanced: LᵀL = RᵀR. The rank is
    read from the tensor. x and x Q are the same W for an orthogonal Q, and every length, angle and matrix
    here is the same for both. Nothing of size m × n is ever formed: work is (m + n) r² or less.

    A tangent vector Ẇ = L̇ Rᵀ + L Ṙᵀ is stored as u = [L̇; Ṙ]. Of the many such pairs the stored one halves
    the part within the row and column spaces: (LᵀL̇)(RᵀR) = (LᵀL)(RᵀṘ)ᵀ. It is horizontal, not tangent to
    the balanced pairs: the velocity of a curve of points has to go through `proju` before it is compared
    with u. Products with vectors of the surrounding space of pairs mean their Ẇ.

    The manifold is not complete: geodesics end where the rank drops, at a distance of at least the smallest
    singular value. There is no closed form of the exponential or the logarithm; both are computed to a
    tolerance and raise (under `vmap` and `torch.compile`: give NaN) where they do not reach it.

    Args:
        rows: m.
        columns: n.
        retraction: "orthographic" or "projection", the one that `retr` uses.

    Example:
        >>> import torch
        >>> manifold = FixedRank(3, 2)
        >>> W = LowRank.from_factors(torch.tensor([[1.0], [0], [0]]), torch.tensor([[4.0, 0]]))
        >>> x = manifold.from_lowrank(W)
        >>> x.mT
        tensor([[2., 0., 0., 2., 0.]])
        >>> manifold.to_lowrank(manifold.retr(x, 0.5 * x)).norm()
        tensor(8.0000)

    Source: Vandereycken, "Low-rank matrix completion by Riemannian optimization" (2013); Absil and
    Oseledets, "Low-rank
    retractions: a survey and new results" (2015).
    """

    retractions: ClassVar[dict[str, int]] = {"orthographic": 2, "projection": 2}

    def __init__(self, rows: int, columns: int, retraction: str = "orthographic") -> None:
        super().__init__(rows, columns)
        if retraction not in self.retractions:
            raise ManifoldError(
                f"FixedRank: no retraction {retraction!r}; choose from {sorted(self.retractions)}"
            )
        self.retraction = retraction

    # Tangent vectors

    def egrad2rgrad(
        self, x: Float[Tensor, "*#batch p r"], g: Float[Tensor, "*#batch p r"]
    ) -> Float[Tensor, "*batch p r"]:
        """The gradient, from the derivative g = [G_L; G_R] by the stored tensor.

        For f(L Rᵀ) with the gradient G in matrices, G_L = G R and G_R = GᵀL, and the result is P_x G. For
        any g it is the tangent vector with ⟨grad, u⟩ = Σ g u for every tangent u. No decomposition is made,
        so that equal singular values do no harm.

        Formula: L̇ = (I − ½ P_L) G_L (RᵀR)⁻¹, Ṙ = (I − ½ P_R) G_R (LᵀL)⁻¹.
        """
        of_left, of_right = self._split(g)
        left, right = self._split(x)
        middle = (left.mT @ of_left + of_right.mT @ right) / 2
        return self._lift(x, of_left, of_right, left.mT @ of_left, right.mT @ of_right, middle)

    def ehess2rhess(
        self,
        x: Float[Tensor, "*#batch p r"],
        g: Float[Tensor, "*#batch p r"],
        h: Float[Tensor, "*#batch p r"],
        u: Float[Tensor, "*#batch p r"],
    ) -> Float[Tensor, "*batch p r"]:
        """The Riemannian Hessian applied to u, for a function of L Rᵀ.

        Formula: with g = [G R; GᵀL] and h = [Ġ R + G Ṙ; ĠᵀL + GᵀL̇], the curvature term G Rₚ (RᵀR)⁻¹
        cancels what h has of G Ṙ outside the column space, which leaves (I − P_L)(h_L − g_L (RᵀR)⁻¹
        RᵀṘ)(RᵀR)⁻¹, and the same on the right; within, Lᵀ Ġ R = Lᵀ h_L − g_Rᵀ Ṙ.

        Args:
            x: points.
            g: Euclidean gradients by the stored tensor.
            h: derivatives of g along u.
            u: tangent vectors.
        """
        left, right = self._split(x)
        left_gram, right_gram = self._grams(x)
        grad_left, grad_right = self._split(g)
        hess_left, hess_right = self._split(h)
        of_left, of_right = self._split(u)
        middle = (
            left.mT @ hess_left
            - grad_right.mT @ of_right
            + (right.mT @ hess_right - grad_left.mT @ of_left).mT
        ) / 2
        outer_left = hess_left - grad_left @ (inverse(right_gram) @ (right.mT @ of_right))
        outer_right = hess_right - grad_right @ (inverse(left_gram) @ (left.mT @ of_left))
        return self._lift(x, outer_left, outer_right, left.mT @ outer_left, right.mT @ outer_right, middle)

    def project_ambient(self, x: Float[Tensor, "*#batch p r"], G: "LowRank | Tensor") -> Tensor:
        """The projection P_x G of matrices of the surrounding space: dense, sparse or in factors."""
        left, right = self._split(x)
        return self.egrad2rgrad(x, torch.cat([G @ right, G.mT @ left], -2))

    def transp(
        self,
        x: Float[Tensor, "*#batch p r"],
        y: Float[Tensor, "*#batch p r"],
        v: Float[Tensor, "*#batch p r"],
    ) -> Float[Tensor, "*batch p r"]:
        """The projection P_y Ẇ of the vector Ẇ at x, through products of size r × r."""
        left, right = self._split(x)
        of_left, of_right = self._split(v)
        at_left, at_right = self._split(y)
        left_gram, right_gram = self._grams(y)
        left_inverse, right_inverse = inverse(left_gram), inverse(right_gram)
        right_old, right_new = right.mT @ at_right, of_right.mT @ at_right
        left_old, left_new = left.mT @ at_left, of_left.mT @ at_left
        middle = left_inverse @ (left_new.mT @ right_old + left_old.mT @ right_new) @ right_inverse
        return torch.cat(
            [
                of_left @ (right_old @ right_inverse)
                + left @ (right_new @ right_inverse)
                - at_left @ (middle / 2),
                of_right @ (left_old @ left_inverse)
                + right @ (left_new @ left_inverse)
                - at_right @ (middle.mT / 2),
            ],
            -2,
        )  # fmt: skip

    # Curvature

    def second_fundamental_form(
        self,
        x: Float[Tensor, "*#batch p r"],
        u: Float[Tensor, "*#batch p r"],
        v: Float[Tensor, "*#batch p r"],
    ) -> LowRank:
        """The normal matrix II(u, v) = Lₚ(u) Rₚ(v)ᵀ + Lₚ(v) Rₚ(u)ᵀ, in factors of rank 2r.

        Here Lₚ = (I − P_L) L̇ and Rₚ = (I − P_R) Ṙ are the parts outside the column and row spaces.
        """
        x, u, v = torch.broadcast_tensors(x, u, v)
        (_, left_u, right_u), (_, left_v, right_v) = self._parts(x, u), self._parts(x, v)
        return LowRank(torch.cat([left_u, left_v], -1), torch.cat([right_v, right_u], -1).mT)

    def weingarten(
        self, x: Float[Tensor, "*#batch p r"], u: Float[Tensor, "*#batch p r"], n: "LowRank | Tensor"
    ) -> Tensor:
        """The tangent vector W(u, N) with ⟨W(u, N), v⟩ = ⟨N, II(u, v)⟩, for a normal matrix N in factors.

        Formula: L̇ = N Rₚ (RᵀR)⁻¹, Ṙ = Nᵀ Lₚ (LᵀL)⁻¹.
        """
        if not isinstance(n, LowRank):
            raise ManifoldError(
                f"{self.name}.weingarten: n is a tensor; normal vectors are m × n matrices, given as LowRank"
            )
        _, left, right = self._parts(x, u)
        left_gram, right_gram = self._grams(x)
        return self.proju(
            x, torch.cat([n @ (right @ inverse(right_gram)), n.mT @ (left @ inverse(left_gram))], -2)
        )

    # Steps

    def retr(
        self, x: Float[Tensor, "*#batch p r"], u: Float[Tensor, "*#batch p r"]
    ) -> Float[Tensor, "*batch p r"]:
        """The retraction chosen in the constructor."""
        return self.retr_projection(x, u) if self.retraction == "projection" else self.retr_orthographic(x, u)

    def retr_orthographic(
        self, x: Float[Tensor, "*#batch p r"], u: Float[Tensor, "*#batch p r"]
    ) -> Float[Tensor, "*batch p r"]:
        """The matrix of rank r that differs from W + Ẇ by a matrix normal at W; second order.

        Its inverse is the projection P_x(Y − W). NaN where the part of W + Ẇ within the row and column
        spaces of W is singular to rounding: there is no such matrix. Steps that are long against the
        smallest singular value may therefore go far; `retr_projection` does not.

        Formula: with C = I + E, L' = L C + Lₚ and R' = R + Rₚ C⁻ᵀ, balanced.
        """
        core, normal_left, normal_right = self._parts(x, u)
        left, right = self._split(x)
        eye = torch.eye(core.shape[-1], dtype=core.dtype, device=core.device)
        middle = eye + core
        back = inverse(middle)
        condition = torch.linalg.matrix_norm(eye) + torch.linalg.matrix_norm(core.detach(), keepdim=True)
        condition = condition * torch.linalg.matrix_norm(back.detach(), keepdim=True)
        singular = condition * torch.finfo(core.dtype).eps > 0.1
        back = torch.where(singular, torch.nan, back)
        return self.projx(torch.cat([left @ middle + normal_left, right + normal_right @ back.mT], -2))

    def retr_projection(
        self, x: Float[Tensor, "*#batch p r"], u: Float[Tensor, "*#batch p r"]
    ) -> Float[Tensor, "*batch p r"]:
        """The matrix of rank r nearest to W + Ẇ; second order, and never further from W + Ẇ than W is.

        From the singular value decomposition of a matrix of size 2r, with derivatives that hold at equal
        singular values. Of all factors [L; R] those nearest to x are taken. NaN where W + Ẇ has rank less
        than r.
        """
        x, u = torch.broadcast_tensors(x, u)
        left, right = self._split(x)
        of_left, of_right = self._split(u)
        found = nearest_of_rank(
            torch.cat([left, of_left], -1), torch.cat([right + of_right, right], -1), x.shape[-1]
        )
        point = self.projx(torch.cat(found, -2))
        return point @ polar(point.mT @ x)

    def expmap(
        self, x: Float[Tensor, "*#batch p r"], u: Float[Tensor, "*#batch p r"]
    ) -> Float[Tensor, "*batch p r"]:
        """The end of the geodesic from x with velocity u at time 1; see `fixed_rank_geodesic`.

        Raises:
            ManifoldError: where the geodesic runs into the boundary, where the rank drops.
        """
        x, u = torch.broadcast_tensors(x, u)
        core, normal_left, normal_right = self._parts(x, u)
        grams = Grams(*self._grams(x), normal_left.mT @ normal_left, normal_right.mT @ normal_right)
        arrival = shoot(core, grams, self._integration_tolerance(x.dtype))
        self._require(arrival.converged, "expmap", "the geodesic meets a loss of rank; take a shorter vector")
        left, right = self._split(x)
        moved = torch.cat(
            [
                left + torch.cat([left, normal_left], -1) @ arrival.left,
                right + torch.cat([right, normal_right], -1) @ arrival.right,
            ],
            -2,
        )
        return self.projx(torch.where(arrival.converged[..., None, None], moved, torch.nan))

    def logmap(
        self, x: Float[Tensor, "*#batch p r"], y: Float[Tensor, "*#batch p r"]
    ) -> Float[Tensor, "*batch p r"]:
        """The initial velocity of the geodesic from x to y, found by shooting; see `logarithm`."""
        found = self.logarithm(x, y)
        self._require(
            found.converged, "logmap",
            "shooting did not reach y, which is far from x against the smallest singular value; "
            "logarithm() tells which items",
        )  # fmt: skip
        return found.vector

    def logarithm(
        self,
        x: Float[Tensor, "*#batch p r"],
        y: Float[Tensor, "*#batch p r"],
        *,
        tolerance: float | int | None = None,
        max_iterations: int = 100,
    ) -> Logarithm:
        """The initial velocity of the geodesic from x to y, with what the search has to say.

        Args:
            x: points.
            y: points.
            tolerance: how far the geodesic may end from y, relative to its length; 1e-12 in float64, 1e-5
                in float32.
            max_iterations: after which an item counts as not converged.
        """
        given = x.dtype
        x, y = torch.broadcast_tensors(widened(x), widened(y))
        left, right = self._split(x)
        to_left, to_right = self._split(y)
        step_left, step_right = to_left - left, to_right - right
        left_gram, right_gram = self._grams(x)
        left_inverse, right_inverse = inverse(left_gram), inverse(right_gram)
        forth_left, forth_right = to_left.mT @ left, to_right.mT @ right
        inside_left, inside_right = left.mT @ step_left, right.mT @ step_right
        core = left_inverse @ (inside_left @ forth_right + left_gram @ inside_right.mT) @ right_inverse
        normal_left = (step_left - left @ (left_inverse @ inside_left)) @ (forth_right @ right_inverse)
        normal_right = (step_right - right @ (right_inverse @ inside_right)) @ (forth_left @ left_inverse)
        grams = Grams(left_gram, right_gram, normal_left.mT @ normal_left, normal_right.mT @ normal_right)
        limit = {torch.float64: 1e-12}.get(x.dtype, 1e-5) if tolerance is None else tolerance
        shot = aim(core, grams, limit, self._integration_tolerance(x.dtype), max_iterations)
        vector = torch.cat(
            [
                left @ shot.core / 2 + normal_left @ shot.left,
                right @ shot.core.mT / 2 + normal_right @ shot.right,
            ],
            -2,
        )
        vector = torch.where(shot.converged[..., None, None], vector, torch.nan)
        return Logarithm(vector.to(given), shot.converged, shot.iterations, shot.residual)

    # Help

    def _lift(
        self, x: Tensor, of_left: Tensor, of_right: Tensor, by_left: Tensor, by_right: Tensor, middle: Tensor
    ) -> Tensor:
        """The stored pair of P_x-like vectors from Z R, ZᵀL, their products with L and R, and LᵀZ R."""
        left, right = self._split(x)
        left_gram, right_gram = self._grams(x)
        left_inverse, right_inverse = inverse(left_gram), inverse(right_gram)
        return torch.cat(
            [
                of_left @ right_inverse + left @ (left_inverse @ (middle / 2 - by_left) @ right_inverse),
                of_right @ left_inverse + right @ (right_inverse @ (middle.mT / 2 - by_right) @ left_inverse),
            ],
            -2,
        )

    def _require(self, converged: Tensor, operation: str, mend: str) -> None:
        if known(converged) is False:
            failed, total = int((~converged).sum()), converged.numel()
            raise ManifoldError(
                f"{self.name}.{operation}: {failed} of {total} items did not converge: {mend}"
            )

    @staticmethod
    def _integration_tolerance(dtype: torch.dtype) -> float:
        return 2e-13 if dtype == torch.float64 else 2e-6
