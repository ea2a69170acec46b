"""Matrix functions against scipy, at repeated spectra too, and with items that are not finite."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.autograd import gradcheck, gradgradcheck

from manifolds.matrix_functions import (
    inverse_sqrtm_spd,
    nearest_rotation,
    polar,
    solve_sylvester,
    sqrtm_spd,
)

F64 = torch.float64


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_values_against_scipy() -> None:
    a = normal(5, 3)
    s = (a.mT @ a).numpy()
    np.testing.assert_allclose(sqrtm_spd(a.mT @ a).numpy(), scipy.linalg.sqrtm(s).real, atol=1e-11)
    np.testing.assert_allclose(
        inverse_sqrtm_spd(a.mT @ a).numpy(), np.linalg.inv(scipy.linalg.sqrtm(s).real), atol=1e-10
    )
    np.testing.assert_allclose(polar(a).numpy(), scipy.linalg.polar(a.numpy())[0], atol=1e-13)
    c = normal(3, 3, seed=1)
    np.testing.assert_allclose(
        solve_sylvester(a.mT @ a, c).numpy(), scipy.linalg.solve_sylvester(s, s, c.numpy()), atol=1e-11
    )


@pytest.mark.parametrize("matrix", [torch.eye(3, dtype=F64) * 2, normal(3, 3, seed=3)])
def test_derivatives_at_repeated_and_simple_spectra(matrix: torch.Tensor) -> None:
    given = (matrix.clone().requires_grad_(),)
    functions = {
        "polar": polar,
        "rotation": nearest_rotation,
        "root": lambda a: sqrtm_spd(a.mT @ a),
        "inverse root": lambda a: inverse_sqrtm_spd(a.mT @ a),
    }
    for function in functions.values():
        assert gradcheck(function, given, check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(function, given, fast_mode=True)


def test_an_item_that_is_not_finite_is_nan_alone() -> None:
    a = normal(2, 3, 3, seed=4)
    a[0, 1, 1] = torch.nan
    a.requires_grad_()
    for function in (
        polar,
        nearest_rotation,
        lambda m: sqrtm_spd(m.mT @ m),
        lambda m: inverse_sqrtm_spd(m.mT @ m),
    ):
        found = function(a)
        assert bool(found[0].isnan().all())
        assert bool(found[1].isfinite().all())
        (gradient,) = torch.autograd.grad((found**3).sum(), a)
        assert bool(gradient[1].isfinite().all())


def test_the_nearest_rotation_turns_a_reflection_round() -> None:
    matrix = torch.diag(torch.tensor([3.0, 2.0, -1.0], dtype=F64))
    torch.testing.assert_close(nearest_rotation(matrix), torch.eye(3, dtype=F64))
    assert float(torch.linalg.det(nearest_rotation(-normal(4, 3, 3, seed=5))).sub(1).abs().max()) < 1e-12


@pytest.mark.parametrize(
    ("function", "point"),
    [
        (sqrtm_spd, torch.diag(torch.tensor([2.0, 2.0, 5.0]))),
        (polar, torch.eye(4, 3) * 2.0),
        (nearest_rotation, torch.eye(3) * 2.0),
        (lambda h: solve_sylvester(h, h @ h + torch.ones(3, 3, dtype=h.dtype)), torch.eye(3)),
    ],
    ids=["square root", "polar", "rotation", "sylvester"],
)
def test_every_order_of_modes_gives_the_same_second_derivative(function, point) -> None:
    """Two forward passes in particular: torch runs an autograd function's own rule with forward mode off."""
    point = point.double()
    way = torch.linspace(-1, 1, point.numel(), dtype=torch.float64).reshape(point.shape)
    if point.shape[0] == point.shape[1]:
        way = way + way.mT
    forward, reverse = torch.func.jacfwd, torch.func.jacrev
    step = 1e-4
    ends = [function(point + t * way) for t in (-step, 0.0, step)]
    expected = (ends[0] - 2 * ends[1] + ends[2]) / step**2
    for outer, inner in ((forward, forward), (forward, reverse), (reverse, forward), (reverse, reverse)):
        second = outer(inner(function))(point).flatten(3).flatten(-1)
        found = second.reshape(*expected.shape, way.numel(), way.numel()) @ way.flatten() @ way.flatten()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    mapped = torch.func.vmap(
        lambda x: torch.func.jvp(lambda y: torch.func.jvp(function, (y,), (way,))[1], (x,), (way,))[1]
    )
    torch.testing.assert_close(mapped(torch.stack([point, point]))[1], expected, rtol=1e-6, atol=1e-6)
