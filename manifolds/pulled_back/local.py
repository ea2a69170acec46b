"""The pulled-back metric at points: products, solutions, Christoffel symbols and acceleration."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.pulled_back.derivatives import Linearization, derivative, over_vectors, second_derivative
from manifolds.pulled_back.geodesic import DENSE
from manifolds.pulled_back.linear_solvers import conjugate_gradients, solve_constant
from manifolds.pulled_back.paths import Embedding


class MetricAt:
    """The metric G = JᵀMJ at points (items, *point)."""

    def __init__(self, embedding: Embedding, x: Float[Tensor, "items *point"]) -> None:
        self.embedding, self.x = embedding, x
        self.at = Linearization(embedding.function, x, embedding.mode)

    def push(self, v: Float[Tensor, "items *point"]) -> Float[Tensor, "items outputs"]:
        """J v."""
        return derivative(self.embedding.function, self.x, v, self.embedding.mode)[1]

    def pull(self, a: Float[Tensor, "items outputs"]) -> Float[Tensor, "items *point"]:
        """Jᵀ M a."""
        return self.at.pull(self.embedding.weigh(self.at.value, a).unsqueeze(1)).squeeze(1)

    def vector(self, v: Float[Tensor, "items *point"]) -> Float[Tensor, "items *point"]:
        """G v."""
        return self.pull(self.push(v))

    def matrix(self) -> Float[Tensor, "items size size"]:
        """G, over flattened coordinates."""
        rows = self.at.jacobian()
        weighed = over_vectors(lambda v: self.embedding.weigh(self.at.value, v), rows)
        found = weighed @ rows.mT
        return (found + found.mT) / 2

    def solve(self, b: Float[Tensor, "items *point"]) -> Float[Tensor, "items *point"]:
        """G⁻¹ b, by Cholesky for few coordinates, else by conjugate gradients; NaN where G is singular.

        Its derivative is that of the solution, not of the iteration.
        """
        if self.x[0].numel() <= DENSE:
            metric = self.matrix()
            scale = metric.diagonal(dim1=-2, dim2=-1).rsqrt()
            factor, failed = torch.linalg.cholesky_ex(scale.unsqueeze(-1) * metric * scale.unsqueeze(-2))
            smallest = factor.detach().diagonal(dim1=-2, dim2=-1).amin(-1)
            singular = (failed > 0) | ~(smallest > 10 * torch.finfo(b.dtype).eps ** 0.5)
            eye = torch.eye(factor.shape[-1], dtype=b.dtype, device=b.device)
            factor = torch.where(singular[:, None, None], eye, factor)
            scaled = (scale * b.flatten(1)).unsqueeze(-1)
            found = scale * torch.cholesky_solve(scaled, factor).squeeze(-1)
            return torch.where(singular[:, None], math.nan, found).reshape(b.shape)
        shape = b.shape
        limit, accuracy = min(4 * self.x[0].numel(), 2000), torch.finfo(b.dtype).eps ** 0.75

        def search(right: Tensor) -> Tensor:
            with torch.no_grad():
                found = conjugate_gradients(
                    lambda v: self.vector(v.reshape(shape)).flatten(1),
                    right,
                    tolerance=accuracy,
                    max_iterations=limit,
                )
            return torch.where(found.converged[:, None], found.x, math.nan)

        if not (torch.is_grad_enabled() and (b.requires_grad or self.at.value.requires_grad)):
            return search(b.flatten(1)).reshape(shape)
        with torch.no_grad():
            near = search(b.detach().flatten(1)).reshape(shape)
        rest = b - self.vector(near)
        return near + solve_constant((rest - rest.detach()).flatten(1), search).reshape(shape)

    def christoffel(self, u: Float[Tensor, "items *point"], v: Float[Tensor, "items *point"]) -> Tensor:
        """Γ(u, v), index down: Jᵀ D²E(u, v), or ½ (D_u(G v) + D_v(G u) − ∇⟨u, G v⟩) with an M(z)."""
        embedding = self.embedding
        if embedding.weight is None:
            return self.pull(second_derivative(embedding.function, self.x, u, v, embedding.mode))
        return (self._along(u, v) + self._along(v, u) - self._slope(u, v)) / 2

    def christoffel_adjoint(self, w: Tensor, u: Tensor) -> Tensor:
        """The covector v ↦ ⟨w, Γ(u, v)⟩, which converts a Hessian."""
        return (self._along(u, w) + self._slope(w, u) - self._along(w, u)) / 2

    def _along(self, u: Tensor, v: Tensor) -> Tensor:
        """D_u (G v)."""

        def product(x: Tensor) -> Tensor:
            return MetricAt(self.embedding, x).vector(v)

        return derivative(product, self.x, u, self.embedding.mode)[1]

    def _slope(self, u: Tensor, v: Tensor) -> Tensor:
        """∇⟨u, G v⟩."""
        embedding = self.embedding

        def product(x: Tensor) -> Tensor:
            z, pushed = derivative(embedding.function, x, u, embedding.mode)
            other = derivative(embedding.function, x, v, embedding.mode)[1]
            return (pushed * embedding.weigh(z, other)).sum()

        return torch.func.grad(product)(self.x)


def acceleration(embedding: Embedding, x: Tensor, v: Tensor) -> Tensor:
    """The coordinate acceleration −Γ(v, v) = −G⁻¹ Jᵀ D²E(v, v) of the geodesic through x with velocity v."""
    at = MetricAt(embedding, x)
    return -at.solve(at.christoffel(v, v))
