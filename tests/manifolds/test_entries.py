"""Entries of a product against the dense product."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from manifolds.entries import Entries
from manifolds.errors import ManifoldError


def places(m, n, count, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(m * n, generator=generator)[:count]
    return (chosen // n).to(device), (chosen % n).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize(("m", "n", "r", "count"), [(7, 5, 3, 12), (1, 1, 1, 1), (4, 6, 2, 24), (5, 4, 2, 0)])
def test_values_and_gradient_are_those_of_the_dense_product(dtype, batch, m, n, r, count, device):
    rows, columns = places(m, n, count, device)
    entries = Entries(rows, columns, (m, n))
    left = torch.randn(*batch, m, r, device=device).to(dtype).requires_grad_()
    right = torch.randn(*batch, n, r, device=device).to(dtype).requires_grad_()
    values = entries(left, right)
    dense = left.double() @ right.double().mT
    tolerance = 8 * torch.finfo(dtype).eps
    wanted = dense[..., rows, columns]
    assert values.dtype == dtype and values.shape == (*batch, count)
    torch.testing.assert_close(values.double(), wanted, rtol=tolerance, atol=tolerance * 8)
    if dtype != torch.bfloat16:
        found = torch.autograd.grad(values.pow(2).sum(), (left, right))
        expected = torch.autograd.grad(wanted.pow(2).sum(), (left, right))
        torch.testing.assert_close(found, expected, rtol=50 * tolerance, atol=50 * tolerance)


def test_derivatives_to_second_order_in_both_modes(device):
    rows, columns = places(4, 3, 7, device)
    entries = Entries(rows, columns, (4, 3))
    left = torch.randn(4, 2, dtype=torch.float64, device=device, requires_grad=True)
    right = torch.randn(3, 2, dtype=torch.float64, device=device, requires_grad=True)
    assert gradcheck(entries, (left, right), check_forward_ad=True)
    assert gradgradcheck(lambda a, b: entries(a, b) ** 3, (left, right), check_fwd_over_rev=True)


def test_hessian_vector_product_under_vmap_is_the_dense_one(device):
    rows, columns = places(4, 3, 7, device)
    entries = Entries(rows, columns, (4, 3))
    points = torch.randn(5, 7, 2, dtype=torch.float64, device=device)
    ways = torch.randn_like(points)

    def product(value):
        def both(x, v):
            return torch.func.jvp(torch.func.grad(value), (x,), (v,))[1]

        return torch.func.vmap(both)(points, ways)

    found = product(lambda x: (entries.of(x) ** 4).sum())
    wanted = product(lambda x: ((x[:4] @ x[4:].mT)[rows, columns] ** 4).sum())
    torch.testing.assert_close(found, wanted)


def test_compiles_in_one_graph(device):
    rows, columns = places(4, 3, 7, device)
    entries = Entries(rows, columns, (4, 3))
    x = torch.randn(7, 2, device=device, requires_grad=True)
    compiled = torch.compile(lambda p: entries.of(p).pow(2).sum(), backend="aot_eager")
    plain = entries.of(x).pow(2).sum()
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x), torch.autograd.grad(plain, x))


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([0, 4], [0, 0], "rows run from 0 to 4"),
        ([0], [-1], "columns run from -1"),
        ([0, 1], [0], "2 rows but 1"),
        ([1, 1], [2, 2], r"\(1, 2\) is given twice"),
    ],
)
def test_bad_places(rows, columns, message):
    with pytest.raises(ManifoldError, match=message):
        Entries(torch.tensor(rows), torch.tensor(columns), (4, 3))


def test_factors_of_another_shape():
    entries = Entries(torch.tensor([0]), torch.tensor([0]), (4, 3))
    with pytest.raises(ManifoldError, match=r"shape \(3, 4\), not \(4, 3\)"):
        entries(torch.zeros(3, 2), torch.zeros(4, 2))


def test_a_second_derivative_by_forward_mode_twice(device):
    rows, columns = places(4, 3, 7, device)
    entries = Entries(rows, columns, (4, 3))
    x = torch.randn(7, 2, dtype=torch.float64, device=device)

    def twice(value):
        return torch.func.jacfwd(torch.func.jacfwd(value))(x)

    found = twice(lambda x: (entries.of(x) ** 3).sum())
    torch.testing.assert_close(found, twice(lambda x: ((x[:4] @ x[4:].mT)[rows, columns] ** 3).sum()))
