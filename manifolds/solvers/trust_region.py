"""Trust regions with truncated conjugate gradients."""

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
class Region(Iterate):
    """Adds the radius and the gradient norm at the start (N each), and the Hessian at x if it is known."""

    radius: Tensor
    first_norm: Tensor
    product: Product | None


@dataclass(frozen=True)
class TrustRegion(Method[Region]):
    """Minimises a quadratic model inside a ball of tangent vectors; converges quadratically.

    The inner iteration ends at ‖residual‖ ≤ ‖g‖ min(κ, (‖g‖/‖g₀‖)^θ), or a tenth of the tolerance, which
    makes the convergence of order 1 + θ. A step is taken when ρ = (f(x) − f(R_x(η)) + δ) / (m(0) − m(η) + δ)
    exceeds ρ'. δ, the rounding of f, lets steps pass near the minimum, where f cannot show their gain.

    Source: Absil, Baker and Gallivan, "Trust-region methods on Riemannian manifolds" (2007). δ: Conn, Gould
    and Toint, "Trust-Region Methods" (2000), section 17.4.2.

    Attributes:
        theta: θ.
        kappa: κ.
        acceptance: ρ', from 0 to below ¼.
        initial_radius: of the first ball; an eighth of the root of the dimension if not given.
        max_radius: the radius grows no further.
        max_inner: most Hessian-vector products a step; the dimension if not given.
    """

    theta: float = 1.0
    kappa: float = 0.1
    acceptance: float = 0.1
    initial_radius: float | None = None
    max_radius: float = float("inf")
    max_inner: int | None = None

    steps: ClassVar[int] = 1000
    patience: ClassVar[int] = 10
    second_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        name = "trust-region"
        require(self.theta >= 0, name, f"theta is {self.theta}; it is not negative")
        require(0 < self.kappa < 1, name, f"kappa is {self.kappa}; it lies in (0, 1)")
        require(0 <= self.acceptance < 0.25, name, f"acceptance is {self.acceptance}; it lies in [0, ¼)")
        radius = self.max_radius if self.initial_radius is None else self.initial_radius
        require(
            0 < radius <= self.max_radius,
            name,
            f"initial_radius is {self.initial_radius} and max_radius {self.max_radius}; "
            "0 < initial_radius ≤ max_radius",
        )
        require(
            self.max_inner is None or self.max_inner > 0,
            name,
            f"max_inner is {self.max_inner}; it is positive",
        )

    def init(self, problem: Problem, look: Look) -> Region:
        """Starts with the initial radius."""
        radius = self.initial_radius or problem.geometry.dimension(look.x) ** 0.5 / 8
        radius = min(radius, self.max_radius)
        return Region(
            **begin(look),
            radius=torch.full_like(look.norm, radius),
            first_norm=look.norm,
            product=look.product,
        )

    def step(self, problem: Problem, iterate: Region, active: Tensor) -> Region:
        """Minimises the model, and takes the step if f agrees."""
        geometry, x, norm = problem.geometry, iterate.x, iterate.gradient_norm
        product = iterate.product or problem.look(x, curvature=True).product
        assert product is not None
        extra = (~iterate.moved).long()
        target = problem.residual_goal(norm, iterate.first_norm, self.theta, self.kappa)
        limit = self.max_inner or max(1, geometry.dimension(x))
        model = truncated_cg(problem, x, iterate.gradient, product, iterate.radius, target, active, limit)
        look = problem.look(geometry.retract(x, model.step), curvature=True)
        rounding = problem.rounding(iterate.value)
        ratio = (iterate.value - look.value + rounding) / (model.decrease + rounding)
        ratio = torch.where(look.finite & ratio.isfinite(), ratio, -torch.inf)
        # Where f cannot show the decrease that the model promises, a smaller gradient shows it.
        noise = problem.noise(iterate.value)
        flatter = (model.decrease <= noise) & (look.value <= iterate.value + noise) & (look.norm < norm)
        ratio = torch.where(flatter & look.finite, 1.0, ratio)
        taken = ratio > self.acceptance
        shrunk = torch.minimum(iterate.radius, model.length) / 4
        grown = torch.where(model.bounded & (ratio > 0.75), 2 * iterate.radius, iterate.radius)
        radius = torch.where(ratio < 0.25, shrunk, grown.clamp(max=self.max_radius))
        refused = active & ~taken
        hopeless = refused & (norm * radius <= torch.finfo(x.dtype).eps * iterate.value.abs())
        hopeless = hopeless | (refused & ~(radius > torch.finfo(x.dtype).tiny ** 0.5))
        why = torch.where(look.finite, int(Status.STALLED), int(Status.NOT_FINITE))
        why = torch.where(look.value == -torch.inf, int(Status.UNBOUNDED), why)
        point = spread(taken, x)
        return Region(
            x=torch.where(point, look.x, x),
            value=torch.where(taken, look.value, iterate.value),
            gradient=torch.where(point, look.gradient, iterate.gradient),
            gradient_norm=torch.where(taken, look.norm, norm),
            evaluations=iterate.evaluations + model.products + 1 + extra,
            status=torch.where(hopeless, why, iterate.status),
            moved=taken,
            length=torch.where(taken, model.length, 0),
            radius=radius,
            first_norm=iterate.first_norm,
            product=None if bool(refused.any()) else look.product,
        )
