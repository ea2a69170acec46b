import pytest
import torch

from manifolds.pulled_back.linear_solvers import conjugate_gradients, solve_block_tridiagonal

F64 = torch.float64


def system(count, size, shift=0.0):
    generator = torch.Generator().manual_seed(count * 10 + size)
    diagonal = torch.randn(2, count, size, size, generator=generator, dtype=F64)
    diagonal = diagonal @ diagonal.mT + (4 - shift) * torch.eye(size, dtype=F64)
    above = 0.4 * torch.randn(2, count - 1, size, size, generator=generator, dtype=F64)
    dense = torch.zeros(2, count * size, count * size, dtype=F64)
    for i in range(count):
        here, following = slice(i * size, (i + 1) * size), slice((i + 1) * size, (i + 2) * size)
        dense[:, here, here] = diagonal[:, i]
        if i + 1 < count:
            dense[:, here, following] = above[:, i]
            dense[:, following, here] = above[:, i].mT
    right = torch.randn(2, count, size, 2, generator=generator, dtype=F64)
    return diagonal, above, dense, right


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 9, 31, 33, 64, 97])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_block_tridiagonal_systems_by_a_dense_solve(count, size):
    diagonal, above, dense, right = system(count, size)
    assert bool((torch.linalg.eigvalsh(dense) > 0).all())
    found, positive = solve_block_tridiagonal(diagonal, above, right)
    torch.testing.assert_close(found, torch.linalg.solve(dense, right.flatten(1, 2)).reshape(right.shape))
    assert bool(positive.all())
    diagonal, above, dense, right = system(count, size, shift=5.0)
    expected = torch.linalg.eigvalsh(dense)[:, 0] > 0
    assert torch.equal(solve_block_tridiagonal(diagonal, above, right)[1], expected)


def test_conjugate_gradients_solve_each_item_and_flag_negative_curvature():
    _, _, dense, right = system(12, 3)
    b = right[..., 0].flatten(1)
    found = conjugate_gradients(
        lambda v: (dense @ v.unsqueeze(-1)).squeeze(-1), b, tolerance=1e-12, max_iterations=100
    )
    assert bool(found.converged.all()) and not bool(found.curved.any())
    torch.testing.assert_close(found.x, torch.linalg.solve(dense, b))
    mixed = torch.stack([dense[0], -dense[1]])
    found = conjugate_gradients(
        lambda v: (mixed @ v.unsqueeze(-1)).squeeze(-1), b, tolerance=1e-12, max_iterations=100
    )
    assert found.converged.tolist() == [True, False] and found.curved.tolist() == [False, True]
    torch.testing.assert_close(found.x[0], torch.linalg.solve(dense[0], b[0]))
