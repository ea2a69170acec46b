"""Products: packing as in geoopt, sums of metrics, weights, factors of others."""

import geoopt
import pytest
import torch

from manifolds.base import plain
from manifolds.checks import check
from manifolds.errors import ManifoldError, MissingOperationError
from manifolds.euclidean import Euclidean
from manifolds.oblique import Oblique
from manifolds.orthogonal import SpecialOrthogonal
from manifolds.product import Product
from manifolds.spd import SPD
from manifolds.sphere import Sphere

F64 = torch.float64


def build(weights: tuple[float, ...] | None = None) -> Product:
    return Product((Sphere(), 3), (SpecialOrthogonal(), (2, 2)), (Euclidean(0), ()), weights=weights)


@pytest.mark.parametrize(
    "manifold",
    [
        build((1.0, 2.0, 0.5)),
        Product((Oblique(), (3, 2)), (Sphere(), (2, 3))),
        Product((geoopt.PoincareBall(), 2), (Sphere(), 3)),
        Product((SPD(), (2, 2)), (geoopt.EuclideanStiefel(), (3, 2))),
    ],
)
def test_every_property_holds(manifold: Product) -> None:
    result = check(manifold)
    # geoopt's ball loses digits of small distances in float32, how many depends on the points.
    allowed = (
        {"dist at 1e-04 in float32", "logmap at 1e-04 in float32"} if "Poincare" in manifold.name else set()
    )
    assert {each.property for each in result.failures} <= allowed, str(result)


def test_the_packing_is_geoopts() -> None:
    peer = geoopt.ProductManifold((geoopt.Sphere(), 3), (geoopt.EuclideanStiefel(), (3, 2)))
    manifold = Product((Sphere(), 3), (geoopt.EuclideanStiefel(), (3, 2)))
    parts = torch.randn(4, 3), torch.randn(4, 3, 2)
    packed = manifold.pack_point(*parts)
    assert torch.equal(packed, peer.pack_point(*parts))
    for ours, theirs, part in zip(
        manifold.unpack_tensor(packed), peer.unpack_tensor(packed), parts, strict=True
    ):
        assert torch.equal(ours, theirs)
        assert torch.equal(ours, part)
    assert torch.equal(manifold.take_submanifold_value(packed, 1, reshape=False), packed[:, 3:])
    assert manifold.n_elements == 9


def test_operations_are_the_factors_and_weights_scale_the_metric() -> None:
    manifold, weights = build((1.0, 4.0, 0.25)), (1.0, 4.0, 0.25)
    seeded = torch.Generator().manual_seed(0)
    x = plain(manifold.random(5, 8, dtype=F64, generator=seeded))
    u = 0.3 * manifold.random_tangent(x, generator=seeded)
    g = torch.randn(5, 8, dtype=F64, generator=seeded)
    y = manifold.expmap(x, u)
    factors = list(zip(manifold.manifolds, *map(manifold.unpack_tensor, (x, u, y, g)), weights, strict=True))
    torch.testing.assert_close(y, manifold.pack_point(*(m.expmap(p, a) for m, p, a, *_ in factors)))
    squares = sum(w * m.dist(p, q) ** 2 for m, p, _, q, _, w in factors)
    torch.testing.assert_close(manifold.dist(x, y), squares.sqrt())
    torch.testing.assert_close(manifold.dist2(x, y), squares)
    torch.testing.assert_close(manifold.inner(x, u), sum(w * m.inner(p, a) for m, p, a, _, _, w in factors))
    gradient = manifold.pack_point(*(m.egrad2rgrad(p, e) / w for m, p, _, _, e, w in factors))
    torch.testing.assert_close(manifold.egrad2rgrad(x, g), gradient)
    torch.testing.assert_close(manifold.inner(x, gradient, u), (manifold.proju(x, g) * u).sum(-1))
    assert manifold.dimension((8,)) == 2 + 1 + 1
    assert manifold.component_inner(x, u).shape == x.shape


def test_reasons_name_the_factor() -> None:
    manifold = Product((Sphere(), 3), (geoopt.PoincareBall(), 2), (SPD(), (2, 2)))
    x = plain(manifold.random(2, 9, dtype=F64, generator=torch.Generator().manual_seed(0)))
    assert bool(manifold.contains(x))
    for entry, label in ((0, "factor 0 (Sphere)"), (4, "factor 1 (PoincareBall)"), (6, "factor 2 (SPD)")):
        wrong = x.clone()
        wrong[1, entry] += 5.0
        assert label in manifold.contains(wrong).reason
        assert manifold.contains(wrong).inside.tolist() == [True, False]
    with pytest.raises(MissingOperationError, match=r"factor 1 \(PoincareBall\) has no ehess2rhess"):
        manifold.ehess2rhess(x, x, x, torch.zeros_like(x))


def test_bad_input_is_named() -> None:
    with pytest.raises(ManifoldError, match="no factor"):
        Product()
    with pytest.raises(ManifoldError, match=r"factor 1 \(SPD\)"):
        Product((Sphere(), 3), (SPD(), (2, 3)))
    with pytest.raises(ManifoldError, match="weights"):
        Product((Sphere(), 3), weights=(-1.0,))
    with pytest.raises(ManifoldError, match="holds 8 entries"):
        build().projx(torch.ones(7))
    with pytest.raises(ManifoldError, match="3 tensors go in"):
        build().pack_point(torch.ones(3))
    with pytest.raises(ManifoldError, match="does not end in"):
        build().pack_point(torch.ones(2), torch.ones(2, 2), torch.ones(()))


def test_geoopts_optimizer_descends_on_it() -> None:
    manifold = build()
    target = plain(manifold.random(8, dtype=F64, generator=torch.Generator().manual_seed(1)))
    start = manifold.random(8, dtype=F64, generator=torch.Generator().manual_seed(2))
    parameter = geoopt.ManifoldParameter(start, manifold=manifold)
    optimizer = geoopt.optim.RiemannianAdam([parameter], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = ((parameter - target) ** 2).sum()
        loss.backward()
        optimizer.step()
    assert float(loss) < 1e-2
    assert bool(manifold.contains(plain(parameter.detach())))
