"""Conjugate gradients in the tangent spaces, stopped at a radius or at negative curvature."""

from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds.solvers.geometry import Geometry, spread
from manifolds.solvers.objective import Product


@dataclass(frozen=True)
class Model:
    """A step that lowers the quadratic model m(η) = ⟨g, η⟩ + ½ ⟨η, H η⟩.

    Attributes:
        step: η, tangent (N, *point).
        decrease: −m(η) ≥ 0 (N).
        length: ‖η‖ (N).
        bounded: whether the radius stopped it (N).
        products: how many products with H each item used (N).
    """

    step: Tensor
    decrease: Tensor
    length: Tensor
    bounded: Tensor
    products: Tensor


def truncated_cg(
    geometry: Geometry,
    x: Tensor,
    gradient: Tensor,
    product: Product,
    radius: Tensor,
    target: Tensor,
    active: Tensor,
    limit: int,
) -> Model:
    """Minimises the model inside ‖η‖ ≤ radius by conjugate gradients from η = 0.

    An item ends when its residual is at most `target` (N), when it reaches the radius (N) or finds negative
    curvature, which it follows to the radius, when the model no longer falls, or after `limit` products.

    Source: Steihaug, "The conjugate gradient method and trust regions in large scale optimization" (1983);
    Absil, Baker and Gallivan, "Trust-region methods on Riemannian manifolds" (2007).
    """
    inner = geometry.inner
    eta, residual, direction = torch.zeros_like(gradient), gradient, -gradient
    rr = dd = inner(x, gradient, gradient)
    length2 = ahead = decrease = torch.zeros_like(rr)
    bounded, radius2, goal = torch.zeros_like(active), radius**2, target**2
    pending = active & (rr > 0)
    products = torch.zeros_like(rr, dtype=torch.long)
    for _ in range(limit):
        bent = product(direction)
        products = products + pending
        curvature = inner(x, direction, bent)
        alpha = rr / curvature
        inside = (curvature > 0) & (length2 + alpha * (2 * ahead + alpha * dd) < radius2)
        room = radius2 - length2
        to_edge = room / (ahead + (ahead**2 + dd * room).sqrt())
        step = torch.where(inside, alpha, to_edge)
        fall = step * (rr - step * curvature / 2)
        # Not for an item that has ended, nor where a product is NaN: then every comparison is false.
        useful = pending & (fall > 0) & (fall < torch.inf)
        step = torch.where(useful, step, 0)
        along = spread(step, eta)
        eta = eta + along * direction
        residual = torch.where(spread(useful, eta), residual + along * bent, residual)
        decrease = torch.where(useful, decrease + fall, decrease)
        length2 = length2 + step * (2 * ahead + step * dd)
        bounded = bounded | (useful & ~inside)
        before, rr = rr, inner(x, residual, residual)
        pending = useful & inside & (rr > goal)
        if not bool(pending.any()):
            break
        beta = torch.where(pending, rr / before, 0)
        direction = spread(beta, eta) * direction - residual
        ahead, dd = beta * (ahead + step * dd), rr + beta**2 * dd
    return Model(eta, decrease, length2.clamp(min=0).sqrt(), bounded, products)
