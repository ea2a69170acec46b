"""Gauss and Newton's method for residuals, with Levenberg and Marquardt's damping."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manifolds.solvers.geometry import spread
from manifolds.solvers.method import Iterate, Method, begin, require
from manifolds.solvers.objective import Look, Problem, Product
from manifolds.solvers.solution import Status
from manifolds.solvers.truncated_cg import truncated_cg


@dataclass(frozen=True)
class Damped(Iterate):
    """Adds the damping, its next growth, the first gradient norm (N each), and JᵀJ at x if it is known."""

    damping: Tensor
    growth: Tensor
    first_norm: Tensor
    product: Product | None


@dataclass(frozen=True)
class GaussNewton(Method[Damped]):
    """Minimises ½‖r(x)‖² by steps with (JᵀJ + μ) η = −grad, solved by conjugate gradients without forming J.

    JᵀJ is taken in the metric: u ↦ grad(JᵀJ u). μ follows Nielsen: after a good step it is multiplied by
    max(⅓, 1 − (2ρ − 1)³), after a refused one by 2, then 4, 8, …. ρ is the gain in f over the gain in the
    model. Where μ is zero and a step is refused, it begins at 10⁻³ of the curvature along the gradient.

    Source: Nielsen, "Damping parameter in Marquardt's method" (1999); Adler and others, "Newton's method on
    Riemannian manifolds and a geometric model for the human spine" (2002) for the manifold.

    Attributes:
        initial_damping: the first μ, in units of the curvature along the gradient; zero is Gauss and Newton's
            own step.
        theta: the linear equations are solved to ‖g‖ min(κ, (‖g‖/‖g₀‖)^θ).
        kappa: κ.
        max_inner: most products with JᵀJ a step; twice the dimension if not given.
    """

    initial_damping: float = 0.0
    theta: float = 1.0
    kappa: float = 0.1
    max_inner: int | None = None

    steps: ClassVar[int] = 1000
    patience: ClassVar[int] = 10
    residuals: ClassVar[bool] = True
    second_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = "gauss-newton"
        require(
            self.initial_damping >= 0, name, f"initial_damping is {self.initial_damping}; it is not negative"
        )
        require(self.theta >= 0, name, f"theta is {self.theta}; it is not negative")
        require(0 < self.kappa < 1, name, f"kappa is {self.kappa}; it lies in (0, 1)")
        require(
            self.max_inner is None or self.max_inner > 0,
            name,
            f"max_inner is {self.max_inner}; it is positive",
        )

    def init(self, problem: Problem, look: Look) -> Damped:
        """Starts with the initial damping."""
        damping = torch.zeros_like(look.norm)
        if self.initial_damping > 0:
            damping = self.initial_damping * _curvature(problem, look.x, look.gradient, look.product)
        start = begin(look)
        start["evaluations"] = start["evaluations"] + int(self.initial_damping > 0)
        return Damped(
            **start,
            damping=damping,
            growth=torch.full_like(look.norm, 2.0),
            first_norm=look.norm,
            product=look.product,
        )

    def step(self, problem: Problem, iterate: Damped, active: Tensor) -> Damped:
        """Solves the damped normal equations, and takes the step if the residuals agree."""
        geometry, x, norm = problem.geometry, iterate.x, iterate.gradient_norm
        product = iterate.product or problem.look(x, curvature=True).product
        assert product is not None
        damping, extra = iterate.damping, (~iterate.moved).long()
        target = problem.residual_goal(norm, iterate.first_norm, self.theta, self.kappa)
        limit = self.max_inner or max(1, 2 * geometry.dimension(x))
        far = torch.full_like(norm, torch.inf)
        model = truncated_cg(problem, x, iterate.gradient, product, far, target, active, limit, damping)
        look = problem.look(geometry.retract(x, model.step), curvature=True)
        rounding = problem.rounding(iterate.value)
        expected = model.decrease + damping * model.length**2 / 2
        ratio = (iterate.value - look.value + rounding) / (expected + rounding)
        taken = look.finite & (ratio > 1e-4)
        ratio = torch.where(taken, ratio, 0)
        refused = active & ~taken
        eased = damping * (1 - (2 * ratio - 1) ** 3).clamp(min=1 / 3)
        if bool(refused.any()):
            first = 1e-3 * _curvature(problem, x, iterate.gradient, product)
            raised = torch.where(damping > 0, damping * iterate.growth, first)
            again = None
        else:
            raised, again = damping, look.product
        extra = extra + (refused & (damping <= 0))
        hopeless = refused & (norm * model.length <= torch.finfo(x.dtype).eps * iterate.value.abs())
        hopeless = hopeless | (refused & ~(model.length > torch.finfo(x.dtype).tiny ** 0.5))
        why = torch.where(look.finite, int(Status.STALLED), int(Status.NOT_FINITE))
        point = spread(taken, x)
        return Damped(
            x=torch.where(point, look.x, x),
            value=torch.where(taken, look.value, iterate.value),
            gradient=torch.where(point, look.gradient, iterate.gradient),
            gradient_norm=torch.where(taken, look.norm, norm),
            evaluations=iterate.evaluations + model.products + 1 + extra,
            status=torch.where(hopeless, why, iterate.status),
            moved=taken,
            length=torch.where(taken, model.length, 0),
            damping=torch.where(taken, eased, raised),
            growth=torch.where(taken, 2.0, 2 * iterate.growth),
            first_norm=iterate.first_norm,
            product=again,
        )


def _curvature(problem: Problem, x: Tensor, gradient: Tensor, product: Product | None) -> Tensor:
    """⟨g, H g⟩ / ⟨g, g⟩ (N), one where g is zero."""
    assert product is not None
    inner = problem.geometry.inner
    found = inner(x, gradient, product(gradient)) / inner(x, gradient, gradient)
    return torch.where(found.isfinite() & (found > 0), found, 1.0)
