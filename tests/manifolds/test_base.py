"""What the base derives from a projection alone, and how it tells what is wrong."""

import geoopt
import pytest
import torch

from manifolds.base import RiemannianSubmanifold, frobenius_norm, plain, safe_sqrt
from manifolds.errors import ManifoldError, MissingOperationError
from manifolds.oblique import Oblique
from manifolds.operations import unchecked
from manifolds.orthogonal import SpecialOrthogonal
from manifolds.spd import SPD
from manifolds.sphere import Sphere

F64 = torch.float64


@pytest.mark.parametrize(
    ("manifold", "shape"), [(Sphere(), (4,)), (Oblique(), (3, 2)), (SpecialOrthogonal(), (3, 3))]
)
def test_closed_forms_are_what_the_projection_gives(
    manifold: RiemannianSubmanifold, shape: tuple[int, ...]
) -> None:
    """The base differentiates `proju`; the closed forms of II and Weingarten must agree with it."""
    seeded = torch.Generator().manual_seed(0)
    x = plain(manifold.random(2, *shape, dtype=F64, generator=seeded))
    u, v = (manifold.random_tangent(x, generator=seeded) for _ in range(2))
    g = torch.randn(x.shape, dtype=F64, generator=seeded)
    n = manifold.normal(x, g)
    base = RiemannianSubmanifold
    torch.testing.assert_close(
        manifold.second_fundamental_form(x, u, v), base.second_fundamental_form(manifold, x, u, v)
    )
    torch.testing.assert_close(manifold.weingarten(x, u, n), base.weingarten(manifold, x, u, n))
    torch.testing.assert_close(
        manifold.inner(x, manifold.weingarten(x, u, n), v),
        (n * manifold.second_fundamental_form(x, u, v)).flatten(1).sum(-1),
    )


def test_the_reason_names_condition_size_and_item() -> None:
    x = torch.ones(2, 3, 4)
    x[..., 1:] = 0.0
    x[1, 2] *= 1.5
    found = Sphere().contains(x)
    assert not found
    assert found.inside.tolist() == [[True, True, True], [True, True, False]]
    assert found.reason == "‖x‖ = 1 fails by 0.5 (tolerance 0.0001) in item (1, 2)"
    assert "is not finite" in Sphere().contains(torch.full((3,), torch.nan)).reason
    assert "a point has 1 dimensions" in Sphere().contains(torch.tensor(1.0)).reason


def test_missing_operations_are_both_errors() -> None:
    x = torch.eye(2)
    with pytest.raises(MissingOperationError, match="SPD is not a Riemannian submanifold") as caught:
        SPD().second_fundamental_form(x, x, x)
    assert isinstance(caught.value, ManifoldError)
    assert isinstance(caught.value, NotImplementedError)


def test_checks_of_values_are_made_from_outside_and_left_out_where_asked() -> None:
    off = torch.tensor([2.0, 0.0])
    with pytest.raises(ManifoldError, match="not on the manifold"):
        Sphere().retr(off, torch.zeros(2))
    with pytest.raises(ManifoldError, match="not tangent"):
        Sphere().transp_follow_retr(off / 2, torch.zeros(2), torch.ones(2))
    with unchecked():
        assert torch.equal(Sphere().retr(off, torch.zeros(2)), off / 2)


def test_norms_neither_overflow_nor_lose_small_numbers() -> None:
    assert float(frobenius_norm(torch.full((4,), 1e30), 1)) == pytest.approx(2e30)
    assert float(frobenius_norm(torch.full((4,), 1e-30), 1)) == pytest.approx(2e-30)
    for function in (lambda v: frobenius_norm(v, 1), lambda v: safe_sqrt((v**2).sum(-1))):
        assert float(torch.func.grad(function)(torch.zeros(3)).abs().max()) == 0.0


@pytest.mark.parametrize("manifold", [Sphere(), geoopt.Sphere()])
def test_geoopts_parameter_and_optimizer_take_our_manifolds(manifold: geoopt.Manifold) -> None:
    target = torch.tensor([0.0, 0.6, 0.8], dtype=F64)
    start = geoopt.ManifoldTensor(torch.tensor([1.0, 0.0, 0.0], dtype=F64), manifold=manifold)
    parameter = geoopt.ManifoldParameter(start)
    optimizer = geoopt.optim.RiemannianSGD([parameter], lr=0.2, momentum=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        (-(parameter * target).sum()).backward()
        optimizer.step()
    torch.testing.assert_close(plain(parameter.detach()), target, atol=1e-6, rtol=0)
