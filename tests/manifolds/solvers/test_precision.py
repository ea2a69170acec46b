"""Where the precision of the numbers is the limit: decreases lost in rounding, starts in half precision."""

import pytest
import torch

from manifolds import FixedRank, Oblique, Sphere, Stiefel, minimize


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_decrease_lost_in_rounding_is_seen_in_the_gradient(seed, device):
    """Least eigenvalues near zero of matrices of norm 20: f has rounding errors far above its own ε."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(500, 8, 8, dtype=torch.float64, generator=generator).to(device)
    matrices = matrices @ matrices.mT
    start = Sphere().random(500, 8, dtype=torch.float64, device=device)
    found = minimize(lambda x: torch.einsum("bi,bij,bj->b", x, matrices, x), start, Sphere())
    assert bool(found.converged.all()), found.describe()
    expected = torch.linalg.eigvalsh(matrices)[:, 0]
    torch.testing.assert_close(found.value, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("manifold", "size"),
    [(Sphere(), (3, 5)), (Stiefel(), (2, 6, 3)), (Oblique(), (5, 2)), (FixedRank(5, 4), (9, 2))],
)
def test_half_precision_starts_where_rounding_puts_it(manifold, size, dtype, device):
    generator = torch.Generator().manual_seed(0)
    start = manifold.random(*size, generator=generator).as_subclass(torch.Tensor).to(device, dtype)
    target = manifold.embedding(manifold.random(*size, generator=generator)).to(device)

    def distance(x):
        return (manifold.embedding(x) - target).square().flatten(-manifold.ndim).sum(-1)

    found = minimize(distance, start, manifold)
    assert found.x.dtype == dtype
    assert bool((found.gradient_norm < 1e-2).all())
