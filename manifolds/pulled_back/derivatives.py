"""Directional derivatives of a batched map, forwards and backwards, many directions at once.

A map takes (items, *point) to (items, outputs), each item by itself, so that one product with the Jacobian of
the whole batch is a product with every item's own Jacobian.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.errors import ManifoldError

Map = Callable[[Tensor], Tensor]
Mode = Literal["forward", "reverse"]


def reverse(function: Map, x: Tensor) -> tuple[Tensor, Map]:
    """The value at x, and the map u ↦ Jᵀ u."""
    found: Any = torch.func.vjp(function, x)
    value, pull = found
    return value, lambda u: pull(u)[0]


def derivative(function: Map, x: Tensor, v: Tensor, mode: Mode = "forward") -> tuple[Tensor, Tensor]:
    """The value at x and the directional derivative along v.

    "forward" pushes the vector through the map (one pass). "reverse" takes the derivative of the linear map
    u ↦ Jᵀ u, which reverse mode gives, along v: for maps whose operations know no forward mode.

    Raises:
        ManifoldError: an operation of the map has no forward mode.
    """
    if mode == "reverse":
        value, pull = reverse(function, x)
        _, push = reverse(pull, torch.zeros_like(value))
        return value, push(v)
    try:
        found: Any = torch.func.jvp(function, (x,), (v,))
    except NotImplementedError as unknown:
        if "forward AD" not in str(unknown) and "forward-mode" not in str(unknown):
            raise
        reason = str(unknown).split(". ")[0]
        raise ManifoldError(
            f"Pullback: the map has an operation without forward-mode derivative ({reason}); construct it "
            "with "
            "derivatives='reverse'"
        ) from unknown
    return found[0], found[1]


def second_derivative(function: Map, x: Tensor, u: Tensor, v: Tensor, mode: Mode = "forward") -> Tensor:
    """D²f(u, v), the derivative along u of the derivative along v."""
    return derivative(lambda point: derivative(function, point, v, mode)[1], x, u, mode)[1]


def over_vectors(function: Map, vectors: Tensor, dim: int = 1) -> Tensor:
    """The function of each vector along a dimension, which the results get back.

    `torch.func.vmap` with another place than the first for its results fails where they do not depend on the
    vectors, as derivatives of a constant do; the second derivative of a linear map is one.
    """
    return torch.func.vmap(function, dim, 0)(vectors).movedim(0, dim)


def push_all(
    function: Map, x: Float[Tensor, "items *point"], vectors: Float[Tensor, "items k *point"], mode: Mode
) -> Tensor:
    """J v (items, k, …) for k vectors at each point."""
    if mode == "reverse":
        value, pull = reverse(function, x)
        _, push = reverse(pull, torch.zeros_like(value))
        return over_vectors(push, vectors)
    return over_vectors(lambda v: derivative(function, x, v)[1], vectors)


def push_symmetric(
    function: Map, x: Float[Tensor, "items *point"], vectors: Float[Tensor, "items k *point"]
) -> Tensor:
    """J v for k vectors a point where J is symmetric, as a gradient's is, by reverse mode alone."""
    return over_vectors(reverse(function, x)[1], vectors)


class Linearization:
    """A map at points, with products with its Jacobians J and their transposes, several vectors a point.

    Attributes:
        value: the outputs (items, outputs).
    """

    def __init__(self, function: Map, x: Float[Tensor, "items *point"], mode: Mode = "forward") -> None:
        self.x, self.function, self.mode = x, function, mode
        self.value, self._pull = reverse(function, x)

    def push(self, vectors: Float[Tensor, "items k *point"]) -> Float[Tensor, "items k outputs"]:
        """J v for each vector."""
        return push_all(self.function, self.x, vectors, self.mode)

    def pull(self, covectors: Float[Tensor, "items k outputs"]) -> Float[Tensor, "items k *point"]:
        """Jᵀ u for each covector."""
        return over_vectors(self._pull, covectors)

    def jacobian(self) -> Float[Tensor, "items size outputs"]:
        """Every row the derivative along one coordinate of the point."""
        return self.push(basis_like(self.x))


def basis_like(x: Float[Tensor, "items *point"]) -> Float[Tensor, "items size *point"]:
    """The coordinate directions at each point."""
    size = x[0].numel()
    eye = torch.eye(size, dtype=x.dtype, device=x.device).reshape(size, *x.shape[1:])
    return eye.expand(x.shape[0], *eye.shape)
