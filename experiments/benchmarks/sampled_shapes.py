"""Samples of manifolds whose curvature is known in closed form, for benchmarks and tests of estimators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    """Points with their curvature.

    Attributes:
        points: one point a row.
        mean_curvature: |trace II| / d at each point.
        sectional: the mean sectional curvature at each point.
        dim: the dimension d.
        direction: a tangent vector at each point, where the shape names one.
        bend: II(v, v) for that vector.
    """

    points: Float[Tensor, "n D"]
    mean_curvature: Float[Tensor, "n"]
    sectional: Float[Tensor, "n"]
    dim: int
    direction: Float[Tensor, "n D"] | None = None
    bend: Float[Tensor, "n D"] | None = None

    def embedded(self, ambient: int, noise: float, generator: torch.Generator) -> Sample:
        """The sample in a random subspace of a larger space, with white noise in all its directions."""
        axes = torch.linalg.qr(_normal(ambient, self.points.shape[1], generator=generator)).Q
        points = self.points @ axes.mT
        points = points + noise * _normal(*points.shape, generator=generator)
        direction, bend = (None if part is None else part @ axes.mT for part in (self.direction, self.bend))
        return Sample(points, self.mean_curvature, self.sectional, self.dim, direction, bend)


def _normal(*size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=generator)


def _uniform(*size: int, generator: torch.Generator) -> Tensor:
    return torch.rand(*size, dtype=torch.float64, generator=generator)


def _level_set(normals: Tensor, hessian: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """|H| and mean sectional curvature of a hypersurface whose shape operator is P diag(h) P / slope."""
    dim = normals.shape[1] - 1
    along = (normals**2 * hessian).sum(1)
    trace = (hessian.sum(-1) - along) / slope
    squares = ((hessian**2).sum(-1) - 2 * (normals**2 * hessian**2).sum(1) + along**2) / slope**2
    return trace.abs() / dim, (trace**2 - squares) / (dim * (dim - 1))


def sphere(n: int, dim: int, generator: torch.Generator, radius: float = 1.0) -> Sample:
    """Uniform on a sphere: |H| = 1/R, every sectional curvature 1/R²."""
    points = torch.nn.functional.normalize(_normal(n, dim + 1, generator=generator), dim=1) * radius
    one = torch.ones(n, dtype=torch.float64)
    return Sample(points, one / radius, one / radius**2, dim)


def ellipsoid(n: int, dim: int, generator: torch.Generator) -> Sample:
    """Σ xᵢ²/aᵢ² = 1 with half-axes from 1 to 2; not uniform."""
    axes = torch.linspace(1, 2, dim + 1, dtype=torch.float64)
    points = sphere(n, dim, generator).points * axes
    gradient = points / axes**2
    slope = torch.linalg.vector_norm(gradient, dim=1)
    return Sample(points, *_level_set(gradient / slope[:, None], axes**-2, slope), dim)


def paraboloid(n: int, dim: int, generator: torch.Generator) -> Sample:
    """The graph of ½ Σ κᵢ xᵢ² over the unit ball, with κ from ½ to 1½; uniform in x."""
    bends = torch.linspace(0.5, 1.5, dim, dtype=torch.float64)
    directions = torch.nn.functional.normalize(_normal(n, dim, generator=generator), dim=1)
    flat = directions * _uniform(n, 1, generator=generator) ** (1 / dim)
    points = torch.cat([flat, 0.5 * (bends * flat**2).sum(1, keepdim=True)], 1)
    gradient = torch.cat([bends * flat, -torch.ones(n, 1, dtype=torch.float64)], 1)
    slope = torch.linalg.vector_norm(gradient, dim=1)
    hessian = torch.cat([bends, torch.zeros(1, dtype=torch.float64)])
    return Sample(points, *_level_set(gradient / slope[:, None], hessian, slope), dim)


def torus(n: int, generator: torch.Generator, outer: float = 2.0, inner: float = 1.0) -> Sample:
    """The ring torus, uniform in area: K = cos φ / (r (R + r cos φ))."""
    u, v, keep = _uniform(3, 8 * n, generator=generator)
    u, v = 2 * math.pi * u, 2 * math.pi * v
    inside = keep < (outer + inner * v.cos()) / (outer + inner)
    u, v = u[inside][:n], v[inside][:n]
    ring = outer + inner * v.cos()
    points = torch.stack([ring * u.cos(), ring * u.sin(), inner * v.sin()], 1)
    mean = (outer + 2 * inner * v.cos()) / (2 * inner * ring)
    return Sample(points, mean.abs(), v.cos() / (inner * ring), 2)


def clifford_torus(n: int, dim: int, generator: torch.Generator) -> Sample:
    """The product of unit circles: flat, |H| = 1/√d."""
    angles = 2 * math.pi * _uniform(n, dim, generator=generator)
    points = torch.cat([angles.cos(), angles.sin()], 1)
    mean = torch.full((n,), dim**-0.5, dtype=torch.float64)
    return Sample(points, mean, torch.zeros(n, dtype=torch.float64), dim)


def stiefel(n: int, rows: int, columns: int, generator: torch.Generator) -> Sample:
    """Uniform orthonormal frames: II(Δ, Δ) = −X ΔᵀΔ, so trace II = −X (rows − (columns + 1)/2)."""
    points = torch.linalg.qr(_normal(n, rows, columns, generator=generator)).Q
    points = points * torch.where(_uniform(n, 1, columns, generator=generator) < 0.5, -1.0, 1.0)
    dim = rows * columns - columns * (columns + 1) // 2
    frame = torch.eye(rows, columns, dtype=torch.float64)
    coordinates = torch.eye(rows * columns, dtype=torch.float64).view(-1, rows, columns)
    symmetric = frame.mT @ coordinates
    tangent = coordinates - frame @ (symmetric + symmetric.mT) / 2
    basis = torch.linalg.svd(tangent.flatten(1)).Vh[:dim].view(dim, rows, columns)
    form = torch.einsum("anp,bnq->abpq", basis, basis)
    form = -(form + form.mT) / 2
    trace = form.diagonal(dim1=0, dim2=1).sum(-1)
    scalar = float((trace**2).sum() - (form**2).sum())
    ones = torch.ones(n, dtype=torch.float64)
    mean = float(torch.linalg.matrix_norm(trace)) / dim
    step = _normal(n, rows, columns, generator=generator)
    inner = points.mT @ step
    step = step - points @ (inner + inner.mT) / 2
    bend = -points @ (step.mT @ step)
    sectional = ones * scalar / (dim * (dim - 1))
    return Sample(points.flatten(1), ones * mean, sectional, dim, step.flatten(1), bend.flatten(1))


def rank_one(n: int, rows: int, columns: int, generator: torch.Generator) -> Sample:
    """Matrices s u vᵀ with s from 1.2 to 1.8: II(Z, Z) = 2 U_p V_pᵀ / s, for Z = U_p vᵀ + u V_pᵀ + c u vᵀ.

    II vanishes on pairs of two left or of two right directions, so that H = 0 and the scalar curvature is
    −2 (rows − 1)(columns − 1)/s².
    """
    left = torch.nn.functional.normalize(_normal(n, rows, 1, generator=generator), dim=1)
    right = torch.nn.functional.normalize(_normal(n, columns, 1, generator=generator), dim=1)
    size = 1.2 + 0.6 * _uniform(n, 1, 1, generator=generator)
    up, vp = _normal(n, rows, 1, generator=generator), _normal(n, columns, 1, generator=generator)
    up, vp = up - left @ (left.mT @ up), vp - right @ (right.mT @ vp)
    along = _normal(n, 1, 1, generator=generator)
    step = up @ right.mT + left @ vp.mT + along * left @ right.mT
    bend = 2 * up @ vp.mT / size
    dim = rows + columns - 1
    scalar = -2 * (rows - 1) * (columns - 1) / size.flatten() ** 2
    points = (size * left @ right.mT).flatten(1)
    sectional = scalar / (dim * (dim - 1))
    return Sample(points, torch.zeros_like(scalar), sectional, dim, step.flatten(1), bend.flatten(1))


Maker = Callable[[int, torch.Generator], Sample]
