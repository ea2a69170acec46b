"""What every operation keeps to: derivatives, vmap, compile, half precision, tiny distances, clear errors."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from manifolds.base import Manifold, plain
from manifolds.errors import ManifoldError
from manifolds.euclidean import Euclidean
from manifolds.oblique import Oblique
from manifolds.operations import unchecked
from manifolds.orthogonal import SpecialOrthogonal
from manifolds.product import Product
from manifolds.spd import SPD
from manifolds.sphere import Sphere

WEIGHTS = (1.0, 2.0, 3.0)
MANIFOLDS: dict[str, tuple[Callable[[], Manifold], tuple[int, ...]]] = {
    "euclidean": (Euclidean, (3,)),
    "sphere": (Sphere, (4,)),
    "sphere of matrices": (lambda: Sphere(ndim=2), (2, 3)),
    "oblique": (Oblique, (3, 2)),
    "rotations": (SpecialOrthogonal, (3, 3)),
    "spd": (SPD, (3, 3)),
    "product": (lambda: Product((Sphere(), 3), (SPD(), (2, 2)), (Euclidean(0), ()), weights=WEIGHTS), (8,)),
}  # fmt: skip
every = pytest.mark.parametrize("name", MANIFOLDS)


def pick(name: str) -> tuple[Manifold, tuple[int, ...]]:
    build, shape = MANIFOLDS[name]
    return build(), shape


def draw(
    manifold: Manifold, shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = plain(manifold.random(*shape, dtype=dtype, generator=generator))
    u, v = (manifold.random_tangent(x, generator=generator) for _ in range(2))
    u = 0.5 * u / manifold.norm(x, u, keepdim=True)
    y = plain(manifold.retr(x, u))
    g, h = (torch.randn(x.shape, generator=generator, dtype=dtype) for _ in range(2))
    return {"x": x, "y": y, "u": u, "v": v, "g": g, "h": h}


OPERATIONS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "projx": (lambda m, g: m.projx(g), "g"),
    "proju": (lambda m, x, g: m.proju(x, g), "xg"),
    "retr": (lambda m, x, u: m.retr(x, u), "xu"),
    "expmap": (lambda m, x, u: m.expmap(x, u), "xu"),
    "logmap": (lambda m, x, y: m.logmap(x, y), "xy"),
    "transp": (lambda m, x, y, v: m.transp(x, y, v), "xyv"),
    "transp_follow_expmap": (lambda m, x, u, v: m.transp_follow_expmap(x, u, v), "xuv"),
    "inner": (lambda m, x, u, v: m.inner(x, u, v), "xuv"),
    "norm": (lambda m, x, u: m.norm(x, u), "xu"),
    "dist": (lambda m, x, y: m.dist(x, y), "xy"),
    "dist2": (lambda m, x, y: m.dist2(x, y), "xy"),
    "egrad2rgrad": (lambda m, x, g: m.egrad2rgrad(x, g), "xg"),
    "ehess2rhess": (lambda m, x, g, h, u: m.ehess2rhess(x, g, h, u), "xghu"),
    "second_fundamental_form": (lambda m, x, u, v: m.second_fundamental_form(x, u, v), "xuv"),
}


def available(manifold: Manifold) -> dict[str, tuple[Callable[..., Tensor], str]]:
    """All operations; SPD and products with it are no submanifolds."""
    flat = manifold.name == "SPD" or "SPD" in manifold.name
    return {k: op for k, op in OPERATIONS.items() if not (flat and k == "second_fundamental_form")}


@every
def test_derivatives_of_first_order_in_both_modes(name: str) -> None:
    manifold, shape = pick(name)
    data = draw(manifold, shape)
    for run, needs in available(manifold).values():
        given = tuple(data[key].clone().requires_grad_() for key in needs)
        with unchecked():
            assert gradcheck(
                lambda *a, run=run: run(manifold, *a), given, check_forward_ad=True, fast_mode=True
            )


@every
def test_derivatives_of_second_order(name: str) -> None:
    manifold, shape = pick(name)
    data = draw(manifold, shape, seed=1)
    for key in ("retr", "expmap", "logmap", "transp", "dist2"):
        run, needs = OPERATIONS[key]
        given = tuple(data[each].clone().requires_grad_() for each in needs)
        with unchecked():
            assert gradgradcheck(lambda *a, run=run: run(manifold, *a), given, fast_mode=True), key


@every
def test_hessian_vector_products_forward_over_reverse(name: str) -> None:
    manifold, shape = pick(name)
    data = draw(manifold, shape, seed=2)
    x, y, u = data["x"], data["y"], data["u"]

    def gradient(point: Tensor) -> Tensor:
        return torch.func.grad(lambda p: manifold.dist2(p, y))(point)

    with unchecked():
        product = torch.func.jvp(gradient, (x,), (u,))[1]
        h = 1e-5
        difference = (gradient(x + h * u) - gradient(x - h * u)) / (2 * h)
    torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-7)


@every
@pytest.mark.parametrize("batch", [(3,), (2, 3)])
def test_a_batch_and_vmap_give_what_single_calls_give(
    name: str, batch: tuple[int, ...], device: torch.device
) -> None:
    manifold, shape = pick(name)
    data = {key: value.to(device) for key, value in draw(manifold, (*batch, *shape)).items()}
    manifold = manifold.to(device)
    flat = {key: value.reshape(-1, *shape) for key, value in data.items()}
    for key, (run, needs) in available(manifold).items():
        given = [flat[each] for each in needs]
        together = run(manifold, *(data[each] for each in needs))
        single = torch.stack([run(manifold, *(each[i] for each in given)) for i in range(len(given[0]))])
        mapped = torch.vmap(lambda *a, run=run: run(manifold, *a))(*given)
        torch.testing.assert_close(together.reshape(single.shape), single, rtol=1e-12, atol=1e-12, msg=key)
        torch.testing.assert_close(mapped, single, rtol=1e-12, atol=1e-12, msg=key)


@every
def test_one_point_meets_a_batch(name: str) -> None:
    manifold, shape = pick(name)
    data = draw(manifold, (5, *shape))
    x = data["x"][0]
    for key in ("logmap", "dist", "proju", "inner"):
        run, _ = OPERATIONS[key]
        others = {"logmap": ["y"], "dist": ["y"], "proju": ["g"], "inner": ["g", "h"]}[key]
        with unchecked():
            found = run(manifold, x, *(data[each] for each in others))
            one = run(manifold, x, *(data[each][3] for each in others))
        assert found.shape[0] == 5
        torch.testing.assert_close(found[3], one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("manifold", "shape"),
    [
        (SpecialOrthogonal(), (2, 3, 3)),
        (Product((Oblique(), (2, 2)), (SPD(), (2, 2))), (2, 8)),
    ],
    ids=str,
)
def test_compiled_operations_and_their_gradients_are_the_eager_ones(
    manifold: Manifold, shape: tuple[int, ...]
) -> None:
    """All in one graph, as tracing is what takes long."""
    generator = torch.Generator().manual_seed(0)
    x = plain(manifold.random(*shape, dtype=torch.float64, generator=generator))
    u, v, g = (manifold.random_tangent(x, generator=generator) / 4 for _ in range(3))
    y = manifold.retr(x, u)

    def run(x: Tensor, y: Tensor, u: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        return (
            manifold.projx(x), manifold.proju(x, g), manifold.retr(x, u), manifold.expmap(x, u),
            manifold.logmap(x, y), manifold.transp(x, y, v), manifold.inner(x, u, v), manifold.dist(x, y),
            manifold.egrad2rgrad(x, g), manifold.ehess2rhess(x, g, v, u),
        )  # fmt: skip

    x.requires_grad_()
    found = torch.compile(run, backend="aot_eager", fullgraph=True)(x, y, u, v, g)
    expected = run(x, y, u, v, g)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    slopes = [torch.autograd.grad(sum((each**2).sum() for each in parts), x) for parts in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)
    torch._dynamo.reset()


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_float32_rounded(name: str, dtype: torch.dtype) -> None:
    manifold, shape = pick(name)
    data = {key: value.to(dtype) for key, value in draw(manifold, (2, *shape), dtype=torch.float32).items()}
    with unchecked():
        for key, (run, needs) in available(manifold).items():
            given = [data[each] for each in needs]
            found = run(manifold, *given)
            assert found.dtype == dtype
            assert torch.equal(found, run(manifold, *(each.float() for each in given)).to(dtype)), key


@every
def test_tiny_distances_keep_their_digits(name: str) -> None:
    manifold, shape = pick(name)
    for dtype, apart, limit in ((torch.float64, 1e-12, 2e-3), (torch.float32, 1e-6, 0.5)):
        data = draw(manifold, shape, dtype=dtype)
        x, u = data["x"], data["u"]
        u = u / manifold.norm(x, u, keepdim=True) * apart
        y = x + u
        for found in (
            manifold.dist(x, y),
            manifold.norm(x, manifold.logmap(x, y)),
            manifold.dist2(x, y) ** 0.5,
        ):
            assert abs(float(found) / apart - 1) < limit, (dtype, float(found))
        assert float(manifold.dist(x, x)) == 0.0
        assert float(manifold.logmap(x, x).abs().max()) == 0.0


@every
def test_bad_input_is_named(name: str) -> None:
    manifold, shape = pick(name)
    data = draw(manifold, (2, *shape))
    x, u = data["x"], data["u"]
    spoiled = x.clone()
    spoiled[(1, *[0] * len(shape))] = torch.nan
    with pytest.raises(ManifoldError, match=r"\.retr: x .* in item 1"):
        manifold.retr(spoiled, u)
    with pytest.raises(ManifoldError, match=r"float64 and u torch\.float32"):
        manifold.retr(x, u.float())
    with pytest.raises(ManifoldError, match="on cpu and u on meta"):
        manifold.retr(x, u.to("meta"))
    with pytest.raises(ManifoldError, match=r"\.egrad2rgrad: g has 1 entries that are not finite"):
        manifold.egrad2rgrad(x, torch.where(spoiled.isnan(), spoiled, data["g"]))
    with pytest.raises(ManifoldError, match="shape"):
        manifold.retr(x, u[..., :-1])
    with pytest.raises(ManifoldError, match=r"dtype torch\.int64"):
        manifold.projx(torch.ones(shape, dtype=torch.int64))
    if not isinstance(manifold, Euclidean):
        with pytest.raises(ManifoldError, match=r"x is not on the manifold: .* fails by .*; see projx"):
            manifold.logmap(x + 1.0 + torch.arange(shape[-1]), x)
        with pytest.raises(ManifoldError, match=r"u is not tangent at x: .*; see proju"):
            manifold.expmap(x, data["g"])


@every
def test_a_random_point_follows_its_generator(name: str) -> None:
    manifold, shape = pick(name)
    first, second, third = (
        manifold.random(3, *shape, dtype=torch.float32, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert first.manifold is manifold
    assert bool(manifold.contains(plain(first))), manifold.contains(plain(first)).reason
    assert torch.equal(manifold.origin(*shape), manifold.origin(*shape))
    assert manifold.random((2, *shape)).shape == (2, *shape)
    with pytest.raises(ManifoldError, match="random"):
        manifold.random(*shape[:-1]) if len(shape) > 1 else manifold.random(())
