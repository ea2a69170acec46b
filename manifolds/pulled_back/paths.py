"""Discretised paths: lengths of segments without cancellation, energy, and its derivatives."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.pulled_back.derivatives import (
    Linearization,
    Map,
    Mode,
    basis_like,
    derivative,
    over_vectors,
    push_all,
    push_symmetric,
    reverse,
)

Weight = Callable[[Tensor, Tensor], Tensor]
GAUSS = ((0.5 - 3**-0.5 / 2, 0.5), (0.5 + 3**-0.5 / 2, 0.5))
"""Points and weights of Gauss's rule with two points on [0, 1]."""


@dataclass(frozen=True)
class Embedding:
    """A map z = E(x) from points (items, *point) to (items, outputs), and the metric on its outputs.

    Attributes:
        function: E.
        weight: (z, v) ↦ M(z) v; None where M = I.
        mode: how it is differentiated.
    """

    function: Map
    weight: Weight | None
    mode: Mode = "forward"

    def along(self, path: Float[Tensor, "items nodes *point"]) -> Float[Tensor, "items nodes outputs"]:
        """The images of the nodes of paths."""
        return self.function(path.flatten(0, 1)).unflatten(0, path.shape[:2])

    def linearize(self, path: Float[Tensor, "items nodes *point"]) -> Linearization:
        """The derivatives at the nodes of paths, the nodes of a path one after the other."""
        return Linearization(self.function, path.flatten(0, 1), self.mode)

    def weigh(self, z: Tensor, v: Tensor) -> Tensor:
        """M(z) v for z and v of (*batch, outputs)."""
        if self.weight is None:
            return v
        return self.weight(z.flatten(0, -2), v.flatten(0, -2)).reshape(v.shape)


def differences(
    embedding: Embedding,
    path: Float[Tensor, "items nodes *point"],
    images: Float[Tensor, "items nodes outputs"],
) -> Float[Tensor, "items segments outputs"]:
    """E(x_{i+1}) − E(x_i), to full relative precision for segments of any length.

    Where an image is much larger than the difference, subtracting loses digits: a segment shorter than
    ε^(1/4) of its images is computed as ∫ J(x_i + s Δx) Δx ds by Gauss's rule with two points instead, which
    errs by the fourth power of the length.
    """
    plain = images[:, 1:] - images[:, :-1]
    size = images.detach().abs().amax(-1, keepdim=True)
    limit = torch.finfo(images.dtype).eps ** 0.25 * torch.maximum(size[:, 1:], size[:, :-1])
    near = plain.detach().abs().amax(-1, keepdim=True) < limit
    try:
        if not torch.compiler.is_compiling() and not bool(near.any()):
            return plain
    except RuntimeError as unreadable:  # under vmap a value cannot be read: take both
        if "vmap" not in str(unreadable):
            raise
    start = path[:, :-1].flatten(0, 1)
    step = path[:, 1:].flatten(0, 1) - start
    summed = torch.zeros_like(plain)
    for place, share in GAUSS:
        slope = derivative(embedding.function, start + place * step, step, embedding.mode)[1]
        summed = summed + share * slope.unflatten(0, path.shape[:1] + plain.shape[1:2])
    return torch.where(near, summed, plain)


def squared_segments(
    embedding: Embedding, path: Float[Tensor, "items nodes *point"]
) -> Float[Tensor, "items segments"]:
    """The squared length ⟨Δz, M(z̄) Δz⟩ of each segment, z̄ being the mean of its ends' images."""
    images = embedding.along(path)
    steps = differences(embedding, path, images)
    return (steps * embedding.weigh((images[:, 1:] + images[:, :-1]) / 2, steps)).sum(-1)


@dataclass(frozen=True)
class Model:
    """The energy F = ½ Σ ⟨Δz, M Δz⟩ of paths at their inner nodes: gradient and second derivatives.

    Attributes:
        gradient: (items, inner, size).
        hessian: blocks of the Hessian on and above the diagonal, (items, inner, size, size) and (items, inner
            − 1, …).
        approximate: the same of the Gauss–Newton matrix, which is positive semidefinite.
    """

    gradient: Tensor
    hessian: tuple[Tensor, Tensor]
    approximate: tuple[Tensor, Tensor]


def half_energy(embedding: Embedding, path: Tensor) -> Tensor:
    """F (items)."""
    return squared_segments(embedding, path).sum(-1) / 2


def gradient(
    embedding: Embedding, path: Float[Tensor, "items nodes *point"]
) -> Float[Tensor, "items inner *point"]:
    """The derivative of F in the inner nodes, J_iᵀ (Δz_{i−1} − Δz_i) where M = I."""
    if embedding.weight is not None:

        def inner_energy(inner: Tensor) -> Tensor:
            return half_energy(embedding, torch.cat([path[:, :1], inner, path[:, -1:]], 1)).sum()

        return torch.func.grad(inner_energy)(path[:, 1:-1])
    images = embedding.along(path)
    steps = differences(embedding, path, images)
    at = embedding.linearize(path[:, 1:-1])
    return (
        at.pull((steps[:, :-1] - steps[:, 1:]).flatten(0, 1).unsqueeze(1))
        .squeeze(1)
        .unflatten(0, (path.shape[0], path.shape[1] - 2))
    )


def dense_model(embedding: Embedding, path: Float[Tensor, "items nodes *point"]) -> Model:
    """Gradient, Hessian and Gauss–Newton matrix by Jacobians, for points of few coordinates.

    The Hessian adds to the Gauss–Newton matrix the blocks Σ_k λ_k ∇²z_k with λ = Δz_{i−1} − Δz_i where M = I.
    For another metric it is taken from products with the directions of every third node at once, of which it
    has one block a node and none in common.
    """
    items, inner = path.shape[0], path.shape[1] - 2
    size = path[0, 0].numel()
    nodes = path[:, 1:-1].flatten(0, 1)
    basis = basis_like(nodes)
    images = embedding.along(path)
    steps = differences(embedding, path, images)
    rows = push_all(embedding.function, nodes, basis, embedding.mode).unflatten(0, (items, inner))
    if embedding.weight is None:
        pull = (steps[:, :-1] - steps[:, 1:]).flatten(0, 1)
        slope = (rows @ pull.reshape(items, inner, -1, 1)).squeeze(-1)
        approximate = 2 * rows @ rows.mT, -(rows[:, :-1] @ rows[:, 1:].mT)
        turned = push_symmetric(lambda x: _pulled(embedding.function, x, pull), nodes, basis)
        bend = turned.flatten(2).reshape(items, inner, size, size)
        return Model(slope, (approximate[0] + (bend + bend.mT) / 2, approximate[1]), approximate)
    middle = (images[:, 1:] + images[:, :-1]) / 2
    before = _weigh_rows(embedding, middle[:, :-1], rows)
    after = _weigh_rows(embedding, middle[:, 1:], rows)
    approximate = (before + after) @ rows.mT, -(after[:, :-1] @ rows[:, 1:].mT)
    slope = gradient(embedding, path).flatten(2)
    return Model(slope, _coloured(embedding, path, size), approximate)


def _pulled(function: Map, x: Tensor, covector: Tensor) -> Tensor:
    return reverse(function, x)[1](covector)


def _weigh_rows(embedding: Embedding, z: Tensor, rows: Tensor) -> Tensor:
    return over_vectors(lambda v: embedding.weigh(z, v), rows, 2)


def _coloured(embedding: Embedding, path: Tensor, size: int) -> tuple[Tensor, Tensor]:
    items, inner = path.shape[0], path.shape[1] - 2
    basis = basis_like(path[:1, 0])[0]
    colour = torch.arange(inner, device=path.device) % 3
    picked = torch.stack([colour == c for c in range(3)]).to(path.dtype)
    directions = torch.einsum("cn,d...->cdn...", picked, basis).flatten(0, 1)
    directions = directions.expand(items, *directions.shape)

    def slope(flat: Tensor) -> Tensor:
        return gradient(embedding, torch.cat([path[:, :1], flat, path[:, -1:]], 1))

    products = push_symmetric(slope, path[:, 1:-1], directions)
    products = products.reshape(items, 3, size, inner, size)
    node = torch.arange(inner, device=path.device)
    diagonal = products[:, colour, :, node].movedim(0, 1)
    above = products[:, colour[1:], :, node[:-1]].movedim(0, 1).mT
    return (diagonal + diagonal.mT) / 2, above


def hessian_product(
    embedding: Embedding, path: Float[Tensor, "items nodes *point"]
) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The gradient of F (items, inner·size), products with its Hessian, and with the scale of that.

    The scale is the block diagonal of the Gauss–Newton matrix, which damping is measured in: 2 JᵀMJ at each
    node.
    """
    inner = path[:, 1:-1]

    def slope(nodes: Tensor) -> Tensor:
        return gradient(embedding, torch.cat([path[:, :1], nodes, path[:, -1:]], 1))

    at = embedding.linearize(inner)
    level, turn = reverse(slope, inner)  # the Hessian is symmetric: reverse mode gives its products

    def product(vector: Tensor) -> Tensor:
        return turn(vector.reshape(inner.shape)).flatten(1)

    def scale(vector: Tensor) -> Tensor:
        pushed = at.push(vector.reshape(inner.shape).flatten(0, 1).unsqueeze(1)).squeeze(1)
        pulled = at.pull(embedding.weigh(at.value, pushed).unsqueeze(1)).squeeze(1)
        return 2 * pulled.reshape(vector.shape)

    return level.flatten(1), product, scale
