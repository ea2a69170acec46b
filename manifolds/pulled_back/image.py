"""How the image of a map bends in the space of outputs."""

import torch
from torch import Tensor

from manifolds.pulled_back.derivatives import second_derivative
from manifolds.pulled_back.local import MetricAt
from manifolds.pulled_back.paths import Embedding


def second_form(embedding: Embedding, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """II(u, v) (items, outputs): the part of D²E(u, v) that is normal to the image of J.

    With a metric M(z) the second derivative is the covariant one, D²E(u, v) + Γ(J u, J v) with the
    Christoffel symbols of M, and normal means with respect to M.
    """
    at = MetricAt(embedding, x)
    bend = second_derivative(embedding.function, x, u, v, embedding.mode)
    if embedding.weight is not None:
        outputs = MetricAt(Embedding(lambda z: z, embedding.weight, embedding.mode), at.at.value)
        bend = bend + outputs.solve(outputs.christoffel(at.push(u), at.push(v)))
    return bend - at.push(at.solve(at.pull(bend)))


def sectional_curvature(embedding: Embedding, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Gauss's equation in a Euclidean space (items)."""
    at = MetricAt(embedding, x)
    a, b = at.push(u), at.push(v)
    along, across, mixed = (second_form(embedding, x, *pair) for pair in ((u, u), (v, v), (u, v)))
    area = a.square().sum(-1) * b.square().sum(-1) - (a * b).sum(-1).square()
    return ((along * across).sum(-1) - mixed.square().sum(-1)) / torch.where(area > 0, area, torch.nan)
