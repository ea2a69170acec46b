"""A subspace that must not change, a ball that must not be left: closed forms and the KKT conditions."""

import math

import geoopt
import pytest
import torch
from torch import Tensor

from manifolds import ManifoldError, Sphere
from manifolds.fixed_rank import FixedRank
from manifolds.solvers import NullSpace, Status, TrustBall, minimize

FLAT = geoopt.Euclidean(ndim=2)
METHODS = ["gradient", "conjugate-gradient", "lbfgs", "trust-region"]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class TestNullSpace:
    keys, inputs, goal = normal(6, 2, seed=1), normal(6, 9, seed=2), normal(4, 9, seed=3)

    def misfit(self, x: Tensor) -> Tensor:
        return (x @ self.inputs - self.goal).square().sum((-1, -2)) / 2

    def best(self) -> Tensor:
        """min ‖X A − B‖² with X K = 0, from the KKT equations, solved densely."""
        m, n, k = 4, 6, 2
        eye = torch.eye(m).double()
        hessian = torch.kron(eye, self.inputs @ self.inputs.mT)
        border = torch.kron(eye, self.keys.mT.contiguous())
        system = torch.cat([
            torch.cat([hessian, border.mT], dim=1),
            torch.cat([border, torch.zeros(m * k, m * k).double()], dim=1),
        ])  # fmt: skip
        right = torch.cat([(self.goal @ self.inputs.mT).flatten(), torch.zeros(m * k).double()])
        return torch.linalg.solve(system, right)[: m * n].reshape(m, n)

    @pytest.mark.parametrize("method", METHODS)
    def test_least_squares_under_equality_constraints(self, method: str) -> None:
        seen: list[Tensor] = []
        found = minimize(
            self.misfit, torch.zeros(4, 6).double(), FLAT, method, constraint=NullSpace(self.keys),
            callback=lambda state: seen.append((state.x @ self.keys).abs().max()),
        )  # fmt: skip
        torch.testing.assert_close(found.x, self.best(), atol=1e-8, rtol=0)
        assert len(seen) > 0
        assert float(torch.stack(seen).max()) < 1e-14 * 30

    @pytest.mark.parametrize("method", ["gauss-newton", "levenberg-marquardt"])
    def test_residuals_under_equality_constraints(self, method: str) -> None:
        found = minimize(
            lambda x: (x @ self.inputs - self.goal).flatten(-2),
            torch.zeros(4, 6).double(), FLAT, method, constraint=NullSpace(self.keys),
        )  # fmt: skip
        torch.testing.assert_close(found.x, self.best(), atol=1e-8, rtol=0)

    def test_dependent_keys_count_once(self) -> None:
        more = torch.cat([self.keys, self.keys @ normal(2, 3, seed=4), torch.zeros(6, 1).double()], dim=1)
        found = minimize(self.misfit, torch.zeros(4, 6).double(), FLAT, constraint=NullSpace(more))
        torch.testing.assert_close(found.x, self.best(), atol=1e-8, rtol=0)

    def test_items_may_have_keys_of_different_rank(self) -> None:
        one = torch.cat([self.keys[:, :1], 2 * self.keys[:, :1]], dim=1)
        none = torch.zeros(6, 2).double()
        keys = torch.stack([self.keys, one, none])
        found = minimize(self.misfit, normal(3, 4, 6, seed=5), FLAT, constraint=NullSpace(keys))
        for item in range(3):
            alone = minimize(self.misfit, normal(4, 6, seed=6), FLAT, constraint=NullSpace(keys[item]))
            torch.testing.assert_close(found.x[item], alone.x, atol=1e-8, rtol=0)
        free = torch.linalg.lstsq(self.inputs.mT, self.goal.mT).solution.mT
        torch.testing.assert_close(found.x[0], self.best(), atol=1e-8, rtol=0)
        torch.testing.assert_close(found.x[2], free, atol=1e-8, rtol=0)

    @pytest.mark.parametrize("method", METHODS)
    def test_factors_of_low_rank(self, method: str) -> None:
        """min ‖X − B‖² with X K = 0 and rank 2 is the truncated SVD of B projected off the keys."""
        goal = normal(2, 7, 6, seed=7)
        off = torch.eye(6).double() - self.keys @ torch.linalg.pinv(self.keys)
        u, s, vh = torch.linalg.svd(goal @ off)
        best = (u[..., :2] * s[..., None, :2]) @ vh[..., :2, :]
        manifold = FixedRank(7, 6)
        start = manifold.random(2, 13, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
        found = minimize(
            lambda x: (x[..., :7, :] @ x[..., 7:, :].mT - goal).square().sum((-1, -2)) / 2,
            start, manifold, method, constraint=NullSpace(self.keys),
        )  # fmt: skip
        product = found.x[..., :7, :] @ found.x[..., 7:, :].mT
        torch.testing.assert_close(product, best, atol=1e-7, rtol=0)
        assert float((product @ self.keys).abs().max()) < 1e-13
        assert bool(manifold.contains(found.x))

    def test_what_is_refused(self) -> None:
        x0 = torch.zeros(4, 6).double()
        with pytest.raises(ManifoldError, match="nothing to change"):
            minimize(self.misfit, x0, FLAT, constraint=NullSpace(normal(6, 6)))
        with pytest.raises(ManifoldError, match="fewer than the rank 3"):
            manifold = FixedRank(5, 6)
            minimize(
                lambda x: x.sum((-1, -2)), manifold.random(11, 3, dtype=torch.float64), manifold,
                constraint=NullSpace(normal(6, 4)),
            )  # fmt: skip
        with pytest.raises(ManifoldError, match=r"keys have 5 rows.*6 columns"):
            minimize(self.misfit, x0, FLAT, constraint=NullSpace(normal(5, 2)))
        with pytest.raises(ManifoldError, match="Sphere is not a space of matrices"):
            keys = NullSpace(torch.eye(3)[:, :1])
            minimize(lambda x: x[..., 0], torch.eye(3)[0], Sphere(), constraint=keys)
        with pytest.raises(ManifoldError, match="NaN"):
            NullSpace(torch.full((3, 2), torch.nan))


class TestTrustBall:
    @pytest.mark.parametrize("method", METHODS)
    def test_a_linear_function_over_flat_balls(self, method: str) -> None:
        slope, center = normal(3, 5, seed=10), normal(5, seed=11)
        radius = torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
        found = minimize(
            lambda x: (slope * x).sum(-1), center.expand(3, 5), geoopt.Euclidean(ndim=1), method,
            constraint=TrustBall(center, radius),
        )  # fmt: skip
        size = slope.norm(dim=-1, keepdim=True)
        best = center - radius[:, None] * slope / size
        torch.testing.assert_close(found.x, best, atol=1e-6, rtol=1e-6)
        assert found.multiplier is not None
        torch.testing.assert_close(found.multiplier, size[:, 0], atol=1e-6, rtol=1e-6)
        assert bool(((found.x - center).norm(dim=-1) <= radius * (1 + 1e-14)).all())
        assert bool(found.converged.all()), found.describe()

    @pytest.mark.parametrize("method", [*METHODS, "gauss-newton"])
    def test_a_quadratic_keeps_the_kkt_conditions(self, method: str) -> None:
        a, b = normal(6, 9, 4, seed=12), 3 * normal(6, 9, seed=13)
        radius = torch.linspace(0.2, 6.0, 6, dtype=torch.float64)

        def residuals(x: Tensor) -> Tensor:
            return (a @ x.unsqueeze(-1)).squeeze(-1) - b

        f = residuals if method == "gauss-newton" else lambda x: residuals(x).square().sum(-1) / 2
        found = minimize(
            f, torch.zeros(6, 4).double(), geoopt.Euclidean(ndim=1), method,
            constraint=TrustBall(None, radius),
        )  # fmt: skip
        multiplier = found.multiplier
        assert multiplier is not None
        size = found.x.norm(dim=-1)
        gradient = (a.mT @ residuals(found.x).unsqueeze(-1)).squeeze(-1)
        # c = (‖x‖² − R²) / (2 R)
        stationary = gradient + (multiplier / radius).unsqueeze(-1) * found.x
        scale = (a.mT @ b.unsqueeze(-1)).norm(dim=(-1, -2))
        assert float((stationary.norm(dim=-1) / scale).max()) < 1e-6
        assert bool((size <= radius * (1 + 1e-14)).all())
        assert bool((multiplier >= 0).all())
        assert float((multiplier * (radius - size) / scale).abs().max()) < 1e-6
        free = torch.linalg.lstsq(a, b.unsqueeze(-1)).solution.squeeze(-1)
        inactive = free.norm(dim=-1) < radius
        assert 0 < int(inactive.sum()) < 6
        torch.testing.assert_close(found.x[inactive], free[inactive], atol=1e-6, rtol=0)

    def test_a_ball_that_is_not_reached_changes_nothing(self) -> None:
        matrix = normal(5, 5, seed=14)
        matrix = matrix + matrix.mT
        start = Sphere().projx(normal(4, 5, seed=15))

        def f(x: Tensor) -> Tensor:
            return torch.einsum("...i,ij,...j", x, matrix, x)

        free = minimize(f, start, Sphere())
        # 4 exceeds the largest distance on a sphere, π
        kept = minimize(f, start, Sphere(), constraint=TrustBall(start, 4.0))
        torch.testing.assert_close(kept.x, free.x, atol=1e-8, rtol=0)
        assert kept.multiplier is not None
        assert bool((kept.multiplier == 0).all())

    @pytest.mark.parametrize("method", METHODS)
    def test_a_cap_of_a_sphere(self, method: str) -> None:
        """The lowest point of a cap about c at the angle r lies on the great circle towards −e₀."""
        sphere, radius = Sphere(), 0.4
        center = sphere.projx(torch.tensor([0.3, 1.0, -0.5], dtype=torch.float64))
        found = minimize(lambda x: x[..., 0], center, sphere, method, constraint=TrustBall(center, radius))
        down = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64)
        tangent = down - (down @ center) * center
        best = center * math.cos(radius) + tangent / tangent.norm() * math.sin(radius)
        torch.testing.assert_close(found.x, best, atol=1e-6, rtol=0)
        assert float(sphere.dist(center, found.x)) <= radius * (1 + 1e-14)

    def test_low_rank_within_a_frobenius_norm(self) -> None:
        """The nearest matrix of rank 1 with norm at most R to B is R u₁ v₁ᵀ when σ₁ > R."""
        goal = normal(6, 5, seed=16)
        u, s, vh = torch.linalg.svd(goal)
        manifold = FixedRank(6, 5)
        start = manifold.random(11, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(17))
        found = minimize(
            lambda x: (x[:6] @ x[6:].mT - goal).square().sum() / 2, start, manifold,
            constraint=TrustBall(None, 0.5 * float(s[0])),
        )  # fmt: skip
        product = found.x[:6] @ found.x[6:].mT
        torch.testing.assert_close(product, 0.5 * s[0] * u[:, :1] @ vh[:1], atol=1e-7, rtol=0)
        assert float(product.norm()) <= 0.5 * float(s[0]) * (1 + 1e-13)

    def test_together_with_a_null_space(self) -> None:
        keys, slope = normal(5, 2, seed=18), normal(3, 5, seed=19)
        found = minimize(
            lambda x: (slope * x).sum((-1, -2)), torch.zeros(3, 5).double(), FLAT,
            constraint=[NullSpace(keys), TrustBall(None, 2.0)],
        )  # fmt: skip
        off = slope - slope @ keys @ torch.linalg.pinv(keys)
        torch.testing.assert_close(found.x, -2 * off / off.norm(), atol=1e-7, rtol=0)
        assert float((found.x @ keys).abs().max()) < 1e-14 * 20
        assert float(found.x.norm()) <= 2 * (1 + 1e-14)
        assert found.statuses is Status.CONVERGED

    def test_a_start_outside_is_brought_in(self) -> None:
        found = minimize(
            lambda x: x[..., 0], torch.full((3,), 100.0).double(), geoopt.Euclidean(ndim=1), max_steps=0,
            constraint=TrustBall(None, 1.0),
        )  # fmt: skip
        assert float(found.x.norm()) == pytest.approx(1.0, abs=1e-12)

    def test_what_is_refused(self) -> None:
        x0 = torch.eye(3)[0].double()
        with pytest.raises(ManifoldError, match="radii are positive"):
            minimize(lambda x: x[..., 0], x0, Sphere(), constraint=TrustBall(x0, -1.0))
        with pytest.raises(ManifoldError, match="has no zero; give a center"):
            minimize(lambda x: x[..., 0], x0, Sphere(), constraint=TrustBall(None, 1.0))
        with pytest.raises(ManifoldError, match="center is not on Sphere"):
            minimize(lambda x: x[..., 0], x0, Sphere(), constraint=TrustBall(2 * x0, 1.0))
        with pytest.raises(ManifoldError, match="does not fit the batch"):
            minimize(lambda x: x[..., 0], x0, Sphere(), constraint=TrustBall(x0, torch.ones(2)))
        with pytest.raises(ManifoldError, match="one of each"):
            minimize(lambda x: x[..., 0], x0, Sphere(), constraint=[TrustBall(x0, 1.0)] * 2)
