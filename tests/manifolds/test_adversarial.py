"""Uses of manifolds that broke once: what another library or an unlucky argument does to them."""

import geoopt
import pytest
import torch
from torch import Tensor

import manifolds
from manifolds import ManifoldError
from manifolds.base import plain

SHAPES = {
    "sphere": (manifolds.Sphere(), (4,)),
    "oblique": (manifolds.Oblique(), (4, 3)),
    "stiefel": (manifolds.Stiefel(), (5, 3)),
    "canonical": (manifolds.Stiefel(metric="canonical", retraction="cayley"), (5, 3)),
    "grassmann": (manifolds.Grassmann(), (5, 3)),
    "rotations": (manifolds.SpecialOrthogonal(), (4, 4)),
    "spd": (manifolds.SPD(), (3, 3)),
    "fixed rank": (manifolds.FixedRank(4, 3), (7, 2)),
    "product": (manifolds.Product((manifolds.Sphere(), 3), (manifolds.Stiefel(), (3, 2))), (9,)),
}
EACH = pytest.mark.parametrize(("manifold", "shape"), list(SHAPES.values()), ids=list(SHAPES))


def drawn(manifold: manifolds.Manifold, *size: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return plain(manifold.random(*size, dtype=dtype, generator=generator))


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_points_are_drawn_in_half_precision(
    manifold: manifolds.Manifold, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for point in (drawn(manifold, 3, *shape, dtype=dtype), manifold.origin(3, *shape, dtype=dtype)):
        assert point.dtype == dtype
        assert manifold.contains(point, tolerance=3e-2)
