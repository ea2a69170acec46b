"""The function that is minimised: values, gradients and products with the Hessian, for a flat batch."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manifolds.errors import ManifoldError
from manifolds.solvers.constraints import Lift
from manifolds.solvers.geometry import Geometry, finite, spread
from manifolds.solvers.items import take

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Look:
    """What was seen at the points x (N, *point).

    Attributes:
        x: the points.
        value: f (N).
        egrad: the Euclidean gradient (N, *point); zero where it is not finite.
        gradient: the Riemannian gradient (N, *point).
        norm: its norm (N).
        finite: whether value and gradient are (N).
        product: u ↦ Hess f[u], or u ↦ grad(JᵀJ u) for residuals; None if it was not asked for.
    """

    x: Tensor
    value: Tensor
    egrad: Tensor
    gradient: Tensor
    norm: Tensor
    finite: Tensor
    product: Product | None


class Problem:
    """A function on a manifold, seen item by item.

    The Hessian is linearised once a point: the gradient's graph is kept, and each Hessian-vector product is
    one backward pass through it. The Hessian is symmetric, so that the vector-Jacobian product of the
    gradient, which `torch.func.vjp(torch.func.grad(f), x)` gives as well, is its Hessian-vector product.

    Args:
        f: takes (*batch, *point) and the data, returns (*batch), or residuals (*batch, k).
        geometry: of the manifold.
        batch: the shape that f sees; flat, (N), if the problem is divisible.
        data: tensors (*batch, …) that f, egrad and ehess get after their other arguments.
        divisible: whether f can be called on some of the items with their part of the data; see `subset`.
        residuals: whether f returns residuals; the value is then ½‖r‖².
        egrad: the Euclidean gradient x ↦ ∇f, in place of differentiation.
        ehess: the Euclidean Hessian-vector product (x, u) ↦ ∇²f u, in place of differentiation. Without it an
            `egrad` that cannot be differentiated gets its Hessian by differences, as `Geometry` does in
            general.
        lift: the substitution v ↦ x under which the solver sees f; identity if not given.
        penalty: a function that is added, with its full Hessian also where f gives residuals.
    """

    def __init__(
        self,
        f: Callable[..., Tensor],
        geometry: Geometry,
        batch: torch.Size,
        *,
        data: Sequence[Tensor] = (),
        divisible: bool = False,
        residuals: bool = False,
        egrad: Callable[..., Tensor] | None = None,
        ehess: Callable[..., Tensor] | None = None,
        lift: Lift | None = None,
        penalty: "Problem | None" = None,
    ) -> None:
        self._data, self.divisible = tuple(data), divisible
        self._chosen: Tensor | None = None
        self.lift, self.penalty = lift, penalty
        self.f, self.geometry, self.batch = f, geometry, batch
        self.residuals, self.egrad, self.ehess = residuals, egrad, ehess
        self.first: Tensor | None = None
        self.goal: Tensor | None = None

    @property
    def data(self) -> tuple[Tensor, ...]:
        """The tensors that f gets after x (*batch, …)."""
        if self._chosen is not None:
            self._data = tuple(tensor.index_select(0, self._chosen) for tensor in self._data)
            self._chosen = None
        return self._data

    def subset(self, index: Tensor) -> "Problem":
        """The problem of the items at the places `index` (k), with copies of their data, made when needed."""
        if not self.divisible:
            raise ManifoldError("minimize: f cannot be called on some of the items; give data=")
        part = copy.copy(self)
        part.batch = index.shape
        part._data, part._chosen = self.data, index
        part.first = None if self.first is None else self.first.index_select(0, index)
        part.goal = None if self.goal is None else self.goal.index_select(0, index)
        part.lift = None if self.lift is None else take(self.lift, index)
        part.penalty = None if self.penalty is None else self.penalty.subset(index)
        return part

    def sparse(self, count: int, total: int) -> bool:
        """Whether so few of the items are at work that a problem of these alone saves more than it costs."""
        return self.divisible and 4 * count <= 3 * total

    def shown(self, x: Tensor) -> Tensor:
        """Points (N, *point) of the solver as f sees them (*batch, *point)."""
        x = x.reshape(self.batch + x.shape[1:])
        return x if self.lift is None else self.lift(x)

    def residual_goal(self, norm: Tensor, first: Tensor, theta: float, kappa: float) -> Tensor:
        """The residual to solve a model to (N): ‖g‖ min(κ, (‖g‖/‖g₀‖)^θ), or a tenth of the tolerance."""
        relative = norm / torch.where(first > 0, first, 1.0)
        target = norm * (relative**theta).clamp(max=kappa)
        return target if self.goal is None else torch.maximum(target, 0.1 * self.goal)

    def rounding(self, value: Tensor) -> Tensor:
        """Changes of f that are not seen (N): 10³ ε |f|, and 10⁶ ε² of the first value where f vanishes."""
        eps = torch.finfo(value.dtype).eps
        first = value if self.first is None else self.first
        return 1e3 * eps * torch.maximum(value.abs(), 1e3 * eps * first.abs())

    def noise(self, value: Tensor) -> Tensor:
        """How far rounding may move f (N): 10 ε of its value, or of the first one where that is larger."""
        first = value if self.first is None else self.first
        return 10 * torch.finfo(value.dtype).eps * torch.maximum(value.abs(), first.abs())

    def look(self, x: Tensor, *, curvature: bool = False) -> Look:
        """Value and gradient at x, and if asked the product with the second derivative."""
        second = curvature and (
            self.residuals or (self.geometry.hessian != "difference" and self.ehess is None)
        )
        with torch.enable_grad():
            point = x.detach().requires_grad_(self.egrad is None or second)
            value, egrad, product = self._differentiate(point, second)
        seen = finite(value) & finite(egrad)
        egrad = torch.where(spread(seen, egrad), egrad, 0)
        gradient = self.geometry.gradient(x, egrad)
        look = Look(x, value, egrad, gradient, self.geometry.norm(x, gradient), seen, None)
        look = replace(look, product=self._product(look, product)) if curvature else look
        return look if self.penalty is None else self._add(look, self.penalty.look(x, curvature=curvature))

    def _add(self, one: Look, other: Look) -> Look:
        """What is seen of the sum of two functions."""
        first, second = one.product, other.product
        both = None if first is None or second is None else lambda u: first(u) + second(u)
        gradient = one.gradient + other.gradient
        return Look(
            one.x,
            one.value + other.value,
            one.egrad + other.egrad,
            gradient,
            self.geometry.norm(one.x, gradient),
            one.finite & other.finite,
            both,
        )

    def _product(self, look: Look, product: Product | None) -> Product:
        x, geometry = look.x, self.geometry

        def exact(u: Tensor) -> Tensor:
            h = self._user_hessian(x, u) if product is None else product(u)
            return (
                geometry.gradient(x, h) if self.residuals else geometry.hessian_product(x, look.egrad, h, u)
            )

        def difference(u: Tensor) -> Tensor:
            size = geometry.norm(x, u)
            t = spread(torch.finfo(x.dtype).eps ** 0.5 / torch.where(size > 0, size, 1.0), u)
            y = geometry.retract(x, t * u)
            there = geometry.transport(y, x, self.look(y).gradient)
            return (there - look.gradient) / t

        inexact = geometry.hessian == "difference" or (product is None and self.ehess is None)
        return difference if inexact and not self.residuals else exact

    def _differentiate(self, x: Tensor, second: bool) -> tuple[Tensor, Tensor, Product | None]:
        """Value (N), Euclidean gradient and, if asked, the product with the Hessian, without a graph."""
        output = self._call(x)
        if self.residuals:
            return _of_residuals(x, output, second)
        value = output.reshape(-1).to(x.dtype)
        if self.egrad is not None:
            egrad = self._user_gradient(x)
        else:
            _connected(output)
            (egrad,) = torch.autograd.grad(value, x, torch.ones_like(value), create_graph=second)
        opaque = self.egrad is not None and not egrad.requires_grad
        product = _pullback(egrad, x) if second and not opaque else None
        return value.detach(), egrad.detach(), product

    def _call(self, x: Tensor) -> Tensor:
        output = self.f(self.shown(x), *self.data)
        wanted = (
            f"(*batch, k) = {(*self.batch, 'k')}" if self.residuals else f"(*batch) = {tuple(self.batch)}"
        )
        what = "residuals" if self.residuals else "one value per item"
        if not isinstance(output, Tensor):
            raise ManifoldError(
                f"minimize: f returned {type(output).__name__}; "
                f"a tensor of shape {wanted}, {what}, is expected"
            )
        if output.device != x.device:
            raise ManifoldError(
                f"minimize: x0 is on {x.device} and f returned a tensor on {output.device}; "
                "move them to one device"
            )
        shape = output.shape[:-1] if self.residuals and output.ndim else output.shape
        if shape != self.batch or (self.residuals and output.ndim == 0):
            raise ManifoldError(
                f"minimize: f returned shape {tuple(output.shape)} "
                f"for x of shape {(*self.batch, *x.shape[1:])}; "
                f"{wanted}, {what}, is expected"
            )
        if not output.is_floating_point():
            raise ManifoldError(
                f"minimize: f returned dtype {output.dtype}; real floating-point values are expected"
            )
        return output

    def _user_gradient(self, x: Tensor) -> Tensor:
        point = x.reshape(self.batch + x.shape[1:])
        egrad = self.egrad(point, *self.data)  # type: ignore[misc]
        return _shaped(egrad, point, "egrad").reshape(x.shape)

    def _user_hessian(self, x: Tensor, u: Tensor) -> Tensor:
        point = x.reshape(self.batch + x.shape[1:])
        h = self.ehess(point, u.reshape(point.shape), *self.data)  # type: ignore[misc]
        return _shaped(h, point, "ehess").reshape(x.shape).detach()


def _of_residuals(x: Tensor, output: Tensor, second: bool) -> tuple[Tensor, Tensor, Product | None]:
    """½‖r‖², Jᵀr and u ↦ JᵀJ u; J u is the derivative of w ↦ Jᵀw, which is linear in w."""
    _connected(output)
    residual = output.reshape(x.shape[0], output.shape[-1]).to(x.dtype)
    value = residual.detach().square().sum(-1) / 2
    (egrad,) = torch.autograd.grad(residual, x, residual.detach(), retain_graph=second)
    if not second:
        return value, egrad, None
    weight = torch.zeros_like(residual, requires_grad=True)
    (pulled,) = torch.autograd.grad(residual, x, weight, create_graph=True)
    push, pull = _pullback(pulled, weight), _pullback(residual, x)
    return value, egrad, lambda u: pull(push(u))


def _pullback(output: Tensor, x: Tensor) -> Product:
    """U ↦ (∂output/∂x)ᵀ u through a graph that is kept."""
    if not output.requires_grad:
        return lambda u: torch.zeros_like(x)

    def product(u: Tensor) -> Tensor:
        (found,) = torch.autograd.grad(output, x, u, retain_graph=True, allow_unused=True)
        return torch.zeros_like(x) if found is None else found.detach()

    return product


def _connected(output: Tensor) -> None:
    if not output.requires_grad:
        raise ManifoldError(
            "minimize: what f returned does not depend on x by differentiable operations (it has no graph); "
            "compute it from x with torch and without detach, item or numpy, or pass egrad="
        )


def _shaped(tensor: Any, point: Tensor, name: str) -> Tensor:
    if not isinstance(tensor, Tensor) or tensor.shape != point.shape:
        said = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ManifoldError(
            f"minimize: {name} returned {said}; the shape of x, {tuple(point.shape)}, is expected"
        )
    return tensor.to(point.dtype)
