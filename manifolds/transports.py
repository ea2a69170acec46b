"""What a vector transport promises, measured."""

from collections.abc import Callable

import geoopt
import torch
from torch import Tensor

from manifolds.measurements import (
    Measurement,
    at_most,
    batch_dims,
    inner_product,
    relative_error,
    unit_tangent,
    vector_error,
)


def transport_keeps_its_promises(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """Transport gives tangent vectors, and keeps what it promises.

    It keeps inner products where `isometric` names it, and is undone where the manifold is `reversible`. The
    two points are a retraction of length 0.4 apart. A manifold without the attribute `isometric`, as
    geoopt's, claims no isometry: the deviation is told and not judged.
    """
    u, v, w = (unit_tangent(manifold, x, generator) for _ in range(3))
    u = 0.4 * u
    claims: frozenset[str] = getattr(manifold, "isometric", frozenset())
    found = []

    def along_retraction(vector: Tensor) -> tuple[Tensor, Tensor]:
        return manifold.retr(x, u), manifold.transp_follow_retr(x, u, vector)

    def along_geodesic(vector: Tensor) -> tuple[Tensor, Tensor]:
        return manifold.expmap(x, u), manifold.transp_follow_expmap(x, u, vector)

    def between(vector: Tensor) -> tuple[Tensor, Tensor]:
        y = manifold.retr(x, u)
        return y, manifold.transp(x, y, vector)

    ways: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "transp": between,
        "transp_follow_retr": along_retraction,
        "transp_follow_expmap": along_geodesic,
    }
    for name, carry in ways.items():

        def is_tangent(carry: Callable[[Tensor], tuple[Tensor, Tensor]] = carry) -> Tensor:
            y, moved = carry(v)
            return relative_error(manifold.proju(y, moved), moved, batch_dims(manifold, x))

        def keeps_products(carry: Callable[[Tensor], tuple[Tensor, Tensor]] = carry) -> Tensor:
            (y, moved), (_, other) = carry(v), carry(w)
            products = (
                inner_product(manifold, y, moved, other) - inner_product(manifold, x, v, w),
                inner_product(manifold, y, moved, moved) - inner_product(manifold, x, v, v),
            )
            return torch.maximum(products[0].abs(), products[1].abs())

        found.append(at_most(f"{name} gives a tangent vector", is_tangent, 1e-8))
        claimed = name in claims
        found.append(at_most(f"{name} keeps inner products", keeps_products, 1e-8, judged=claimed))

    def together(name: str) -> Tensor:
        both = getattr(manifold, f"{name}_transp")(x, u, v)
        alone = getattr(manifold, name)(x, u), getattr(manifold, f"transp_follow_{name}")(x, u, v)
        errors = [relative_error(a, b, batch_dims(manifold, x)) for a, b in zip(both, alone, strict=True)]
        return torch.maximum(*errors)

    def undone() -> Tensor:
        y = manifold.retr(x, u)
        return vector_error(manifold, x, manifold.transp(y, x, manifold.transp(x, y, v)), v)

    def to_itself() -> Tensor:
        return vector_error(manifold, x, manifold.transp(x, x, v), v)

    return [
        *found,
        at_most("transp to the point itself", to_itself, 1e-8),
        at_most("transp there and back", undone, 1e-8, judged=bool(manifold.reversible)),
        at_most("retr_transp is retr and its transport", lambda: together("retr"), 1e-8),
        at_most("expmap_transp is expmap and its transport", lambda: together("expmap"), 1e-8),
    ]
