"""geoopt's own manifolds; and what `minimize` refuses, with the words that it uses."""

from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor

from manifolds import ManifoldError, Sphere
from manifolds.solvers import Status, minimize
from manifolds.solvers.geometry import Geometry

METHODS = ["gradient", "conjugate-gradient", "lbfgs", "trust-region"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def spd(*shape: int, seed: int = 0) -> Tensor:
    matrix = normal(*shape, seed=seed)
    return matrix @ matrix.mT + torch.eye(shape[-1]).double()


class TestGeoopt:
    @pytest.mark.parametrize("method", METHODS)
    def test_sphere(self, method: str) -> None:
        matrix = spd(3, 6, 6, seed=1)
        start = Sphere().projx(normal(3, 6, seed=2))
        found = minimize(
            lambda x: torch.einsum("...i,...ij,...j", x, matrix, x), start, geoopt.Sphere(), method
        )
        torch.testing.assert_close(found.value, torch.linalg.eigvalsh(matrix)[:, 0], atol=1e-11, rtol=0)

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("canonical", [True, False])
    def test_stiefel(self, method: str, canonical: bool) -> None:
        matrix, weights = spd(2, 6, 6, seed=3), torch.tensor([2.0, 1.0]).double()
        start = torch.linalg.qr(normal(2, 6, 2, seed=4)).Q
        manifold = geoopt.Stiefel(canonical=canonical)
        found = minimize(lambda x: (x * (matrix @ x) * weights).sum((-1, -2)), start, manifold, method)
        best = (torch.linalg.eigvalsh(matrix)[:, :2] * weights).sum(-1)
        torch.testing.assert_close(found.value, best, atol=1e-9, rtol=0)
        assert bool(found.converged.all())

    @pytest.mark.parametrize("method", METHODS)
    def test_poincare_ball(self, method: str) -> None:
        """The mean of two points lies halfway on their geodesic."""
        ball = geoopt.PoincareBall()
        points = torch.tensor([[0.3, 0.4], [-0.5, 0.2]], dtype=torch.float64)
        found = minimize(
            lambda x: ball.dist2(x.unsqueeze(-2), points).sum(-1), torch.zeros(2).double(), ball, method
        )
        halfway = ball.geodesic(torch.tensor(0.5).double(), points[0], points[1])
        torch.testing.assert_close(found.x, halfway, atol=1e-7, rtol=0)

    @pytest.mark.parametrize("method", METHODS)
    def test_positive_definite_matrices(self, method: str) -> None:
        """⟨A, X⁻¹⟩ + log det X is least at X = A."""
        goal = spd(3, 4, 4, seed=5)
        found = minimize(
            lambda x: torch.linalg.solve(x, goal).diagonal(dim1=-2, dim2=-1).sum(-1) + torch.logdet(x),
            torch.eye(4).double().expand(3, 4, 4), geoopt.SymmetricPositiveDefinite(), method,
        )  # fmt: skip
        torch.testing.assert_close(found.x, goal, atol=1e-5, rtol=1e-5)

    def test_numbers_each_an_item(self) -> None:
        goal = normal(5, seed=6)
        found = minimize(lambda x: (x - goal) ** 2, torch.zeros(5).double(), geoopt.Euclidean())
        assert found.status.shape == (5,)
        torch.testing.assert_close(found.x, goal, atol=1e-9, rtol=0)

    @pytest.mark.parametrize("manifold", [geoopt.Sphere(), geoopt.PoincareBall(), Sphere()])
    def test_hessians_against_second_derivatives_along_geodesics(self, manifold: geoopt.Manifold) -> None:
        """⟨u, Hess f[u]⟩ = (f ∘ γ)″(0), by central differences."""
        from manifolds.solvers.objective import Problem

        x = 0.5 * Sphere().projx(normal(1, 3, seed=7))
        x = x if isinstance(manifold, geoopt.PoincareBall) else 2 * x
        goal = normal(3, seed=8)
        geometry = Geometry(manifold)
        problem = Problem(lambda p: (p * goal).sum(-1).exp(), geometry, torch.Size([1]))
        u = manifold.proju(x, normal(1, 3, seed=9))
        product = problem.look(x, curvature=True).product
        assert product is not None
        h = 1e-4
        line = [problem.f(manifold.expmap(x, t * u)) for t in (-h, 0.0, h)]
        second = (line[0] - 2 * line[1] + line[2]) / h**2
        torch.testing.assert_close(geometry.inner(x, u, product(u)), second, atol=1e-5, rtol=1e-5)


class TestRefused:
    start = Sphere().projx(normal(2, 3, seed=10))

    def refuse(self, match: str, **changes: Any) -> None:
        call: dict[str, Any] = {"f": lambda x: x[..., 0], "x0": self.start, "manifold": Sphere()}
        with pytest.raises(ManifoldError, match=match):
            minimize(**(call | changes))

    def test_a_start_off_the_manifold(self) -> None:
        self.refuse(r"not on Sphere: ‖x‖ = 1 fails by 1.*projx", x0=2 * self.start)
        self.refuse("not on", x0=2 * self.start, manifold=geoopt.Sphere())

    def test_a_start_that_is_not_finite(self) -> None:
        self.refuse("1 entries that are NaN", x0=torch.tensor([1.0, torch.nan]))

    def test_a_start_that_is_not_real(self) -> None:
        self.refuse("int64", x0=torch.tensor([1, 0]))

    def test_a_start_with_too_few_dimensions(self) -> None:
        self.refuse("a point of Sphere has 1 dimensions", x0=torch.tensor(1.0))

    def test_values_of_another_shape(self) -> None:
        self.refuse(r"f returned shape \(2, 3\).*\(2,\), one value per item", f=lambda x: x)
        self.refuse(r"f returned shape \(\)", f=lambda x: x.sum())
        self.refuse("f returned float", f=lambda x: 1.0)
        self.refuse(r"\(2, 'k'\), residuals", f=lambda x: x[0, 0], method="gauss-newton")

    def test_values_without_a_graph(self) -> None:
        self.refuse("no graph", f=lambda x: x.detach()[..., 0])
        self.refuse("no graph", f=lambda x: torch.zeros(2).double())

    def test_integers(self) -> None:
        self.refuse("int64", f=lambda x: (x[..., 0] > 0).long())

    def test_another_device(self) -> None:
        self.refuse("x0 is on cpu and f returned a tensor on meta", f=lambda x: x[..., 0].to("meta"))

    def test_unknown_methods_and_options(self) -> None:
        self.refuse("no method 'newton'; there are 'gradient', 'conjugate-gradient'", method="newton")
        self.refuse("'trust-region' has no option 'beta'; it has theta, kappa", beta="dai-yuan")
        self.refuse("beta is 'x'; it is one of 'fletcher-reeves'", method="conjugate-gradient", beta="x")

    @pytest.mark.parametrize(
        ("method", "option", "value"),
        [
            ("gradient", "memory", 1.0), ("gradient", "decrease", 0.7), ("gradient", "initial_length", 0.0),
            ("conjugate-gradient", "curvature", 1.0), ("conjugate-gradient", "powell", 0.0),
            ("lbfgs", "memory", 0), ("lbfgs", "caution", -1.0), ("lbfgs", "curvature", 0.0),
            ("trust-region", "kappa", 1.0), ("trust-region", "theta", -1.0),
            ("trust-region", "acceptance", 0.5), ("trust-region", "initial_radius", 0.0),
            ("trust-region", "max_inner", 0), ("gauss-newton", "initial_damping", -1.0),
        ],
    )  # fmt: skip
    def test_options_out_of_range(self, method: str, option: str, value: float) -> None:
        self.refuse(option, method=method, **{option: value})

    def test_limits_out_of_range(self) -> None:
        self.refuse("max_steps", max_steps=-1)
        self.refuse("max_time", max_time=-1.0)
        self.refuse("gradient_tolerance", gradient_tolerance=-1.0)
        self.refuse("gradient_tolerance has shape", gradient_tolerance=torch.ones(3))
        self.refuse("step_tolerance", step_tolerance=-1.0)

    def test_callbacks_that_answer_something_else(self) -> None:
        self.refuse("callback returned 'stop'", callback=lambda state: "stop")

    def test_derivatives_of_another_shape(self) -> None:
        self.refuse("egrad returned", egrad=lambda x: x[0])
        self.refuse("ehess returned", egrad=torch.ones_like, ehess=lambda x, u: u[0])


class TestGivenDerivatives:
    matrix = spd(5, 5, seed=11)
    start = Sphere().projx(normal(3, 5, seed=12))

    @pytest.mark.parametrize("method", METHODS)
    def test_are_used(self, method: str) -> None:
        used = []

        def egrad(x: Tensor) -> Tensor:
            used.append(1)
            return 2 * x.detach() @ self.matrix

        found = minimize(
            lambda x: torch.einsum("...i,ij,...j", x.detach(), self.matrix, x.detach()),
            self.start, Sphere(), method, egrad=egrad, ehess=lambda x, u: 2 * u @ self.matrix,
        )  # fmt: skip
        best = torch.linalg.eigvalsh(self.matrix)[0].expand(3)
        torch.testing.assert_close(found.value, best, atol=1e-11, rtol=0)
        assert used

    def test_a_gradient_without_a_graph_gets_its_hessian_by_differences(self) -> None:
        found = minimize(
            lambda x: torch.einsum("...i,ij,...j", x, self.matrix, x), self.start, Sphere(),
            egrad=lambda x: 2 * x.detach() @ self.matrix,
        )  # fmt: skip
        assert found.statuses == [Status.CONVERGED] * 3
        torch.testing.assert_close(
            found.value, torch.linalg.eigvalsh(self.matrix)[0].expand(3), atol=1e-11, rtol=0
        )
