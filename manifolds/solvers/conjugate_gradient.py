"""Nonlinear conjugate gradients."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from manifolds.solvers.geometry import spread
from manifolds.solvers.line_search import Found, LineSearch
from manifolds.solvers.method import begin, require
from manifolds.solvers.objective import Look, Problem
from manifolds.solvers.searching import Directed, Searching
from manifolds.solvers.solution import Status


@dataclass(frozen=True)
class Products:
    """Inner products at the new point x⁺, (N) each, of g⁺, y = g⁺ − T g and the carried direction T d.

    `old` is ‖g‖² at the old point and `slope` ⟨g, d⟩ there.
    """

    gg: Tensor
    gy: Tensor
    yy: Tensor
    dg: Tensor
    dd: Tensor
    old: Tensor
    slope: Tensor

    @property
    def dy(self) -> Tensor:
        """⟨d, y⟩, as the difference of the slopes at both ends of the step."""
        return self.dg - self.slope


def fletcher_reeves(p: Products) -> Tensor:
    """‖g⁺‖² / ‖g‖²."""
    return p.gg / p.old


def polak_ribiere(p: Products) -> Tensor:
    """⟨g⁺, y⟩ / ‖g‖²."""
    return p.gy / p.old


def polak_ribiere_plus(p: Products) -> Tensor:
    """Polak and Ribière's, not below zero."""
    return polak_ribiere(p).clamp(min=0)


def hestenes_stiefel(p: Products) -> Tensor:
    """⟨g⁺, y⟩ / ⟨d, y⟩."""
    return p.gy / p.dy


def dai_yuan(p: Products) -> Tensor:
    """‖g⁺‖² / ⟨d, y⟩."""
    return p.gg / p.dy


def hager_zhang(p: Products) -> Tensor:
    """⟨g⁺, y⟩ / ⟨d, y⟩ − 2 ‖y‖² ⟨d, g⁺⟩ / ⟨d, y⟩², not below 0.4 ⟨d, g⟩ / ‖d‖²."""
    beta = (p.gy - 2 * p.dg * p.yy / p.dy) / p.dy
    return torch.maximum(beta, 0.4 * p.slope / p.dd)


def hybrid(p: Products) -> Tensor:
    """Hestenes and Stiefel's, kept between zero and Dai and Yuan's."""
    return torch.minimum(hestenes_stiefel(p), dai_yuan(p)).clamp(min=0)


RULES: dict[str, Callable[[Products], Tensor]] = {
    "fletcher-reeves": fletcher_reeves,
    "polak-ribiere": polak_ribiere,
    "polak-ribiere+": polak_ribiere_plus,
    "hestenes-stiefel": hestenes_stiefel,
    "dai-yuan": dai_yuan,
    "hager-zhang": hager_zhang,
    "hybrid": hybrid,
}


@dataclass(frozen=True)
class ConjugateGradient(Searching[Directed]):
    """Nonlinear conjugate gradients: d⁺ = −g⁺ + β T d.

    The step length comes from a strong Wolfe line search, which begins at the last one.
    T d is shortened where the transport made it longer, without which Fletcher and Reeves' rule need not
    converge. A direction that does not descend, and one whose gradient has lost its orthogonality to the last
    (Powell's test |⟨g⁺, T g⟩| ≥ ν ‖g⁺‖²), is replaced by −g⁺.

    Source: Sato, "Riemannian conjugate gradient methods: general framework and specific algorithms with
    convergence analyses" (2022); Hager and Zhang, "A survey of nonlinear conjugate gradient methods" (2006).

    Attributes:
        beta: the rule for β, one of `RULES`.
        powell: ν of Powell's restart test; infinite for none.
        decrease: c₁ of the line search.
        curvature: c₂ of the line search: smaller is nearer to an exact search.
        initial_length: the length of the first step tried.
    """

    beta: str = "hybrid"
    powell: float = float("inf")
    decrease: float = 1e-4
    curvature: float = 0.2
    initial_length: float = 1.0

    steps: ClassVar[int] = 5000
    patience: ClassVar[int] = 20

    def __post_init__(self) -> None:
        name = "conjugate-gradient"
        require(
            self.beta in RULES, name, f"beta is {self.beta!r}; it is one of {', '.join(map(repr, RULES))}"
        )
        require(self.powell > 0, name, f"powell is {self.powell}; it is positive")
        require(
            0 < self.decrease < self.curvature < 1,
            name,
            f"decrease is {self.decrease} and curvature {self.curvature}; 0 < decrease < curvature < 1",
        )
        require(self.initial_length > 0, name, f"initial_length is {self.initial_length}; it is positive")

    def init(self, problem: Problem, look: Look) -> Directed:
        """Starts down the gradient."""
        size = torch.where(look.norm > 0, look.norm, 1.0)
        return Directed(
            **begin(look),
            direction=-look.gradient,
            slope=-(look.norm**2),
            size=look.norm,
            trial=self.initial_length / size,
        )

    def line(self) -> LineSearch:
        """The strong Wolfe conditions."""
        return LineSearch(self.decrease, self.curvature)

    def follow(self, problem: Problem, iterate: Directed, found: Found, active: Tensor) -> Directed:
        """The next direction."""
        geometry = problem.geometry
        x, g, carried = found.x, found.gradient, found.direction
        size = geometry.norm(x, carried)
        shorten = torch.where(size > iterate.size, iterate.size / size, 1.0)
        carried = spread(shorten, carried) * carried
        old = geometry.transport(iterate.x, x, iterate.gradient)
        y = g - old
        p = Products(
            gg=found.norm**2,
            gy=geometry.inner(x, g, y),
            yy=geometry.inner(x, y, y),
            dg=geometry.inner(x, carried, g),
            dd=iterate.size**2,
            old=iterate.gradient_norm**2,
            slope=iterate.slope,
        )
        beta = RULES[self.beta](p)
        lost = (p.gg - p.gy).abs() >= self.powell * p.gg
        beta = torch.where(beta.isfinite() & ~lost, beta, 0)
        slope = beta * p.dg - p.gg
        size = (p.gg - 2 * beta * p.dg + beta**2 * (shorten * size) ** 2).clamp(min=0).sqrt()
        descends = (slope <= -1e-8 * size * found.norm) & (found.step > 0)
        beta, slope = torch.where(descends, beta, 0), torch.where(descends, slope, -p.gg)
        size = torch.where(descends, size, found.norm)
        # A failed search along another direction than −g is tried again along −g.
        again = (found.step == 0) & (iterate.slope != -p.gg) & active
        fresh = self.initial_length / torch.where(found.norm > 0, found.norm, 1.0)
        fields = found.moved(iterate, iterate.size)
        fields["status"] = torch.where(again, int(Status.RUNNING), found.status)
        return Directed(
            **fields,
            direction=spread(beta, carried) * carried - g,
            slope=slope,
            size=size,
            trial=torch.where(found.step > 0, found.step, fresh),
        )
