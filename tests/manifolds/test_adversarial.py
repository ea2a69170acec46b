"""Uses of manifolds that broke once: what another library or an unlucky argument does to them."""

import geoopt
import numpy as np
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


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_a_single_rotation_moves_as_exactly_as_a_batch(dtype: torch.dtype, limit: float) -> None:
    """Around x = I in the plane the end of a geodesic is written with sine and cosine."""
    for angle in torch.logspace(-3, 0.4, 40, dtype=torch.float64):
        cosine, sine = angle.cos(), angle.sin()
        expected = torch.stack([torch.stack([cosine, -sine]), torch.stack([sine, cosine])])
        x = torch.eye(2, dtype=dtype)
        u = (angle * torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)).to(dtype)
        rotations = manifolds.SpecialOrthogonal()
        end, moved = rotations.expmap_transp(x, u, u)
        for found in (end, rotations.expmap(x, u)):
            assert (found.double() - expected).abs().max() < limit
        for found in (moved, rotations.transp_follow_expmap(x, u, u)):
            assert (found.double() / angle - expected @ u.double() / angle).abs().max() < limit


@pytest.mark.parametrize(("dtype", "angle"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_tiny_angles_do_not_see_the_rounding_of_the_norms(dtype: torch.dtype, angle: float) -> None:
    """The angle of the stored points, in float64 with the part of y − x along x taken out by hand."""
    sphere = manifolds.Sphere()
    x = drawn(sphere, 200, 4, dtype=dtype)
    u = sphere.random_tangent(x, generator=torch.Generator().manual_seed(1))
    y = sphere.retr(x, angle * u / u.norm(dim=-1, keepdim=True))
    change = y.double() - x.double()
    along = (change * x.double()).sum(-1, keepdim=True) / x.double().square().sum(-1, keepdim=True)
    expected = (change - along * x.double()).norm(dim=-1)
    limit = 64 * torch.finfo(dtype).eps
    assert ((sphere.dist(x, y).double() - expected) / expected).abs().max() < limit
    columns = manifolds.Oblique().dist(x.mT, y.mT).double()
    assert abs(columns / expected.norm() - 1) < limit
    assert torch.allclose(sphere.dist(x, -x), torch.tensor(torch.pi, dtype=dtype))


@EACH
@pytest.mark.parametrize("nesterov", [False, True])
def test_geoopts_momentum_begins_with_a_vector_that_is_not_tangent(
    manifold: manifolds.Manifold, shape: tuple[int, ...], nesterov: bool
) -> None:
    """Its buffer is the Euclidean gradient at first; the step must be taken, and the way stay on."""
    goal = drawn(manifold, 2, *shape, dtype=torch.float32, seed=1)
    point = geoopt.ManifoldParameter(drawn(manifold, 2, *shape, dtype=torch.float32), manifold=manifold)
    optimizer = geoopt.optim.RiemannianSGD([point], lr=0.03, momentum=0.8, nesterov=nesterov)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (manifold.embedding(plain(point)) - manifold.embedding(goal)).square().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert manifold.contains(plain(point))


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_gradient_that_is_nothing_but_rounding_is_no_wrong_tangent(
    manifold: manifolds.Manifold, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """At a minimum the gradient of ½ ‖x − goal‖² is zero up to rounding, in any direction."""
    x = drawn(manifold, 3, *shape, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype) * torch.finfo(dtype).eps
    for way in (manifold.retr, manifold.expmap):
        assert (way(x, noise) - x).abs().max() < 64 * torch.finfo(dtype).eps
    if shape != (3, 3):  # Every small random tensor of another shape has a part that is not tangent.
        wrong = noise / noise.abs().amax()
        wrong[0] = 0
        with pytest.raises(ManifoldError, match="not tangent at x"):
            manifold.retr(x, wrong)


@EACH
def test_batches_that_do_not_broadcast_are_named(
    manifold: manifolds.Manifold, shape: tuple[int, ...]
) -> None:
    x = drawn(manifold, 3, *shape, dtype=torch.float64)
    u = manifold.random_tangent(x, generator=torch.Generator().manual_seed(1))
    for call in (
        lambda: manifold.retr(x, u[:2]),
        lambda: manifold.proju(x, u[:2]),
        lambda: manifold.inner(x, u[:2]),
        lambda: manifold.dist(x, x[:2]),
        lambda: manifold.transp(x, x, u[:2]),
    ):
        with pytest.raises(ManifoldError, match=r"must broadcast") as refused:
            call()
        assert str(refused.value).startswith(f"{manifold.name}.")


@EACH
@pytest.mark.parametrize("dtype", [torch.int64, torch.complex128])
def test_no_points_are_drawn_that_are_not_real(
    manifold: manifolds.Manifold, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    with pytest.raises(ManifoldError, match=rf"random: dtype is {dtype}"):
        manifold.random(*shape, dtype=dtype)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_one_vector_meets_every_matrix_of_a_batch(batch: tuple[int, ...]) -> None:
    """With a stored rank that equals the batch, the wrong reading of the vector gives numbers, too."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(*batch, *size, generator=generator) for size in ((5, 3), (3, 4)))
    matrices = manifolds.LowRank(left, right)
    assert torch.allclose(matrices @ torch.arange(4.0), left @ right @ torch.arange(4.0), atol=1e-5)
    assert torch.allclose(torch.arange(5.0) @ matrices, torch.arange(5.0) @ (left @ right), atol=1e-5)


def test_a_batch_of_low_rank_is_gone_through_and_scaled_by_numpy() -> None:
    matrices = manifolds.LowRank(torch.ones(3, 5, 2), torch.ones(3, 2, 4))
    assert [each.shape for each in matrices] == [(5, 4)] * 3
    doubled = np.float64(2.0) * matrices
    assert isinstance(doubled, manifolds.LowRank)
    assert torch.equal(doubled.dense(), torch.full((3, 5, 4), 4.0))


@pytest.mark.parametrize("scale", [1e-16, 1.0, 1e16])
def test_norm_of_a_product_whose_square_leaves_the_range(scale: float) -> None:
    """The norm of ones (5, 4) · 2 s² is 2 s² √20, its derivative by s twice that over s."""
    factor = torch.tensor(scale, requires_grad=True)
    norm = manifolds.LowRank(factor * torch.ones(5, 2), factor * torch.ones(2, 4)).norm()
    norm.backward()
    expected = 2 * 20**0.5 * scale**2
    assert norm.item() == pytest.approx(expected, rel=1e-5, abs=0)
    assert factor.grad is not None
    assert factor.grad.item() == pytest.approx(2 * expected / scale, rel=1e-5, abs=0)


@pytest.mark.parametrize("manifold", [manifolds.Sphere(ndim=2), manifolds.Oblique()], ids=str)
@pytest.mark.parametrize("length", [0.0, 1e-16, 1e-9])
def test_second_derivatives_hold_at_tiny_vectors(manifold: manifolds.Manifold, length: float) -> None:
    x = drawn(manifold, 4, 3, dtype=torch.float64)
    u = manifold.random_tangent(x, generator=torch.Generator().manual_seed(1)) * length
    u.requires_grad_()

    def there(v: Tensor) -> Tensor:
        return manifold.expmap(x, manifold.proju(x, v))

    for function in (there, lambda v: manifold.logmap(x, there(v))):
        assert torch.autograd.gradgradcheck(function, (u,), fast_mode=True)
