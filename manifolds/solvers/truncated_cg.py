"""Conjugate gradients in the tangent spaces, stopped at a radius or at negative curvature."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manifolds.solvers.geometry import spread
from manifolds.solvers.items import places, put, take
from manifolds.solvers.objective import Problem, Product


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


@dataclass(frozen=True)
class Inner:
    """Where the inner iteration of each item stands.

    Attributes:
        x: the point (N, *point).
        damping: μ, which is added to H (N).
        model: the step so far, and what it gains.
        residual: g + H η (N, *point).
        direction: d, where it goes next (N, *point).
        rr: ‖residual‖² (N).
        dd: ‖d‖² (N).
        ahead: ⟨η, d⟩ (N).
        length2: ‖η‖² (N).
        radius2: the square of the radius (N).
        goal: ‖residual‖² at which the item ends (N).
        pending: whether it goes on (N).
    """

    x: Tensor
    damping: Tensor | None
    model: Model
    residual: Tensor
    direction: Tensor
    rr: Tensor
    dd: Tensor
    ahead: Tensor
    length2: Tensor
    radius2: Tensor
    goal: Tensor
    pending: Tensor

    def after(self, problem: Problem, product: Product) -> "Inner":
        """One product, one step of every pending item."""
        inner, x, direction, model = problem.geometry.inner, self.x, self.direction, self.model
        bent = product(direction)
        if self.damping is not None:
            bent = bent + spread(self.damping, direction) * direction
        curvature = inner(x, direction, bent)
        alpha = self.rr / curvature
        inside = (curvature > 0) & (self.length2 + alpha * (2 * self.ahead + alpha * self.dd) < self.radius2)
        room = self.radius2 - self.length2
        to_edge = room / (self.ahead + (self.ahead**2 + self.dd * room).sqrt())
        step = torch.where(inside, alpha, to_edge)
        fall = step * (self.rr - step * curvature / 2)
        # Not for an item that has ended, nor where a product is NaN: then every comparison is false.
        useful = self.pending & (fall > 0) & (fall < torch.inf)
        step = torch.where(useful, step, 0)
        along = spread(step, direction)
        residual = torch.where(spread(useful, direction), self.residual + along * bent, self.residual)
        rr = inner(x, residual, residual)
        pending = useful & inside & (rr > self.goal)
        beta = torch.where(pending, rr / self.rr, 0)
        length2 = self.length2 + step * (2 * self.ahead + step * self.dd)
        return replace(
            self,
            model=Model(
                model.step + along * direction,
                torch.where(useful, model.decrease + fall, model.decrease),
                length2.clamp(min=0).sqrt(),
                model.bounded | (useful & ~inside),
                model.products + self.pending,
            ),
            residual=residual,
            direction=spread(beta, direction) * direction - residual,
            rr=rr,
            dd=rr + beta**2 * self.dd,
            ahead=beta * (self.ahead + step * self.dd),
            length2=length2,
            pending=pending,
        )


def truncated_cg(
    problem: Problem,
    x: Tensor,
    gradient: Tensor,
    product: Product,
    radius: Tensor,
    target: Tensor,
    active: Tensor,
    limit: int,
    damping: Tensor | None = None,
) -> Model:
    """Minimises the model inside ‖η‖ ≤ radius by conjugate gradients from η = 0.

    An item ends when its residual is at most `target` (N), when it reaches the radius (N) or finds negative
    curvature, which it follows to the radius, when the model no longer falls, or after `limit` products. H
    is `product`, with `damping` (N) times the identity added. Where half of the items of a divisible problem
    have ended, the others look again at their points and go on alone.

    Source: Steihaug, "The conjugate gradient method and trust regions in large scale optimization" (1983);
    Absil, Baker and Gallivan, "Trust-region methods on Riemannian manifolds" (2007).
    """
    rr = problem.geometry.inner(x, gradient, gradient)
    zero, none = torch.zeros_like(rr), torch.zeros_like(active)
    start = Model(torch.zeros_like(gradient), zero, zero, none, none.long())
    state = Inner(
        x, damping, start, gradient, -gradient, rr, rr, zero, zero, radius**2, target**2, active & (rr > 0)
    )
    model, where = start, None
    for turn in range(limit):
        state = state.after(problem, product)
        count = int(state.pending.sum())
        if count == 0 or turn + 1 == limit:
            break
        if problem.divisible and 2 * count <= len(state.pending):
            model = state.model if where is None else put(model, where, state.model)
            chosen = places(state.pending)
            where = chosen if where is None else where[chosen]
            state, problem = take(state, chosen), problem.subset(chosen)
            again = problem.look(state.x, curvature=True).product
            assert again is not None
            product = again
    return state.model if where is None else put(model, where, state.model)
