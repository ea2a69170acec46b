"""What users did that the other tests did not: each of these failed once."""

import pytest
import torch
from torch import Tensor

import manifolds


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
@pytest.mark.parametrize("derivatives", ["forward", "reverse"])
def test_geodesics_of_a_linear_map_are_straight(batch: tuple[int, ...], derivatives: str) -> None:
    a = normal(7, 4)
    metric = manifolds.Pullback(lambda x: x @ a.mT, derivatives=derivatives)
    x, y = normal(*batch, 4, seed=1), normal(*batch, 4, seed=2)
    found = metric.geodesic(x, y, steps=6)
    t = torch.linspace(0, 1, 7, dtype=x.dtype)[:, None]
    assert found.converged.all()
    torch.testing.assert_close(found.path, x.unsqueeze(-2) + t * (y - x).unsqueeze(-2))
    torch.testing.assert_close(metric.energy(found.path), ((y - x) @ a.mT).square().sum(-1))
    torch.testing.assert_close(metric.dist(x, y), ((y - x) @ a.mT).norm(dim=-1))
    torch.testing.assert_close(metric.expmap(x, y), x + y)


def test_a_constant_map_has_no_directions() -> None:
    metric = manifolds.Pullback(lambda x: torch.ones(x.shape[0], 3, dtype=x.dtype))
    found = metric.singular_directions(normal(2, 5), 2)
    torch.testing.assert_close(found.values, torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(found.vectors @ found.vectors.mT, torch.eye(2).double().expand(2, 2, 2))
