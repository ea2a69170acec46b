"""Conjugate gradients in the tangent spaces, stopped at a radius or at negative curvature."""

from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds.solvers.geometry import Geometry, finite, spread
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
    eta, residual, direction = torch.zeros_like(gradient), gradient, -gradient
    rr = geometry.inner(x, gradient, gradient)
    length2, ahead, dd = torch.zeros_like(rr), torch.zeros_like(rr), rr
    model = torch.zeros_like(rr)
    pending, bounded = active & (rr > 0), torch.zeros_like(active)
    products = torch.zeros_like(rr, dtype=torch.long)
    goal = target**2
    for _ in range(limit):
        bent = product(direction)
        bent = torch.where(spread(finite(bent), bent), bent, 0)
        products = products + pending
        curvature = geometry.inner(x, direction, bent)
        alpha = rr / curvature
        further = length2 + 2 * alpha * ahead + alpha**2 * dd
        hits = ~((curvature > 0) & (further < radius**2))
        room = (radius**2 - length2).clamp(min=0)
        tau = room / (ahead + (ahead**2 + dd * room).sqrt())
        step = torch.where(hits, tau, alpha)
        fall = step * rr - step**2 * curvature / 2
        useful = pending & step.isfinite() & (fall > 0)
        step = torch.where(useful, step, 0)
        eta = eta + spread(step, eta) * direction
        residual = residual + spread(step, eta) * bent
        model = torch.where(useful, model + fall, model)
        length2 = length2 + 2 * step * ahead + step**2 * dd
        bounded = bounded | (useful & hits)
        before, rr = rr, geometry.inner(x, residual, residual)
        pending = useful & ~hits & (rr > goal)
        if not bool(pending.any()):
            break
        beta = torch.where(pending, rr / before, 0)
        direction = spread(beta, eta) * direction - residual
        ahead, dd = beta * (ahead + step * dd), rr + beta**2 * dd
    return Model(eta, model, length2.clamp(min=0).sqrt(), bounded, products)
