"""The properties that make a set of operations a manifold, each measured by a plain function.

Every function takes any `geoopt.Manifold` and points on it, in float64, and returns what it measured. None
of them needs a formula of the manifold other than the operation that it judges: slopes need no exponential,
the dimension is a rank, the gradient is differentiated along a retraction. What a manifold lacks is said,
never passed over.

Sources: N. Boumal, "An Introduction to Optimization on Smooth Manifolds" (2023), sections 4.8 and 6.8
    (slopes of
gradient and Hessian); the log-log fits follow the idea of Manopt's `checkgradient` and Manopt.jl's checks.
"""

from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifolds.base import plain
from manifolds.low_rank import LowRank
from manifolds.measurements import (
    Measurement,
    at_most,
    batch_dims,
    curves,
    derivatives,
    embed,
    failed,
    first_point,
    inner_product,
    noise,
    operation_named,
    positive,
    random_function,
    relative_error,
    scaled_to,
    size,
    slope_at_least,
    tangent_length,
    taylor_slopes,
    unit_tangent,
    unmeasured,
    vector_error,
)
from manifolds.slopes import Slope, measure_slopes

EXACT = 1e-10
"""The limit for identities that hold but for rounding."""
CLOSE = 1e-7
"""The limit for identities through an iteration or a difference quotient."""
LARGEST_BASIS = 4096
"""The largest number of entries of a point for which the basis of the surrounding space is formed."""


def projection_is_idempotent(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """P(Pa) = Pa for vectors a of the surrounding space, and π(π(a)) = π(a) for the projection of points."""

    def of_vectors() -> Tensor:
        a = noise(x, generator)
        once, lead = plain(manifold.proju(x, a)), batch_dims(manifold, x)
        return size(plain(manifold.proju(x, once)) - once, lead) / positive(size(a, lead))

    def of_points() -> Tensor:
        a = noise(x, generator)
        near = manifold.projx(plain(x) + 0.1 * scaled_to(a, plain(x), batch_dims(manifold, x)))
        return relative_error(manifold.projx(near), near, batch_dims(manifold, x))

    def of_this_point() -> Tensor:
        return relative_error(embed(manifold, manifold.projx(x)), embed(manifold, x), batch_dims(manifold, x))

    return [
        at_most("proju twice is proju", of_vectors, EXACT),
        at_most("projx twice is projx", of_points, EXACT),
        at_most("projx keeps a point", of_this_point, 1e-8),
    ]


def projection_is_self_adjoint(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """⟨Pa, b⟩ = ⟨a, Pb⟩ for vectors a, b of the surrounding space: the projection is orthogonal."""
    name = "proju is self-adjoint"
    if not getattr(manifold, "metric_is_ambient", True):
        return [unmeasured(name, "the metric is defined for tangent vectors only")]

    def error() -> Tensor:
        a, b = noise(x, generator), noise(x, generator)
        pa, pb = manifold.proju(x, a), manifold.proju(x, b)
        left, right = inner_product(manifold, x, pa, b), inner_product(manifold, x, a, pb)
        scale = inner_product(manifold, x, pa, pa).abs() + inner_product(manifold, x, pb, pb).abs()
        return (left - right).abs() / torch.where(scale > 0, scale, 1.0)

    return [at_most(name, error, EXACT)]


def tangent_dimension(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """The rank of the Gram matrix of the projected basis of the surrounding space equals `dimension`.

    It is taken at the first point of the batch.
    """
    name = "rank of proju is the dimension"
    point = first_point(manifold, x)
    count = point.numel()
    if count > LARGEST_BASIS:
        return [unmeasured(name, f"a point has {count} entries; the basis is formed up to {LARGEST_BASIS}")]
    try:
        basis = torch.eye(count, dtype=point.dtype, device=point.device)
        rows = [manifold.proju(point, each.reshape(point.shape)).flatten() for each in basis]
        values = torch.linalg.svdvals(torch.stack(rows))
        rank = int((values > 1e-8 * values.max().clamp_min(1e-300)).sum()) if count else 0
    except Exception as fault:
        return [failed(name, fault)]
    try:
        stated = int(operation_named(manifold, "dimension")(point))
    except NotImplementedError as missing:
        return [Measurement(name, float(rank), "not stated", None, str(missing))]
    return [Measurement(name, float(rank), f"= {stated}", rank == stated)]


def zero_step_is_identity(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """Every retraction of zero, and its exponential, give the point; the logarithm of the point is zero."""
    zero = torch.zeros_like(plain(x))

    def moved(run: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return lambda: relative_error(
            embed(manifold, run(x, zero)), embed(manifold, x), batch_dims(manifold, x)
        )

    found = [at_most(f"{label} of zero", moved(run), EXACT) for label, run, _ in curves(manifold)]
    found.append(
        at_most(
            "logmap of the point itself", lambda: tangent_length(manifold, x, manifold.logmap(x, x)), 1e-12
        )
    )
    found.append(at_most("dist to the point itself", lambda: manifold.dist(x, x), 1e-12))
    return found


def retractions_are_first_order(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """Every retraction, and the exponential, starts along its vector.

    Formula: ‖E(R(tu)) − E(x) − t DE(x)[u]‖ falls as t².

    E is the manifold's `embedding` where it has one (a quotient's points have many representatives), else
    the point.
    """
    u = unit_tangent(manifold, x, generator)
    pushed = torch.func.jvp(lambda point: embed(manifold, point), (plain(x),), (u,))
    start, speed = pushed[0], pushed[1]
    lead = batch_dims(manifold, x)

    def slope_of(run: Callable[..., Tensor]) -> Callable[[], list[Slope]]:
        def error(t: float) -> Tensor:
            return size(embed(manifold, run(x, t * u)) - start - t * speed, lead)

        scale = size(start, lead) + 1e-3 * size(speed, lead)
        return lambda: measure_slopes(error, scale)

    return [slope_at_least(f"{label} is first order", slope_of(run), 2) for label, run, _ in curves(manifold)]


def retractions_keep_their_order(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """What claims the second order, and the exponential, follows geodesics to second order.

    Formula: |f(R(tu)) − f(x) − t⟨grad f, u⟩ − t²/2 ⟨Hess f[u], u⟩| falls as t³.
    f is a random smooth function. It is no critical point, so that only a second-order retraction passes; an
    error of the gradient or of the Hessian shows here, too.
    """
    second = [(label, run) for label, run, order in curves(manifold) if order >= 2]
    name = "follows geodesics to second order"
    if not hasattr(manifold, "ehess2rhess"):
        return [unmeasured(f"{label} {name}", f"{manifold.name} has no ehess2rhess") for label, _ in second]
    return [
        slope_at_least(f"{label} {name}", taylor_slopes(manifold, x, run, 2, generator), 3)
        for label, run in second
    ]


def exponential_is_geodesic(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """The curve t ↦ exp(tu) keeps its speed, and goes on along itself when restarted with its velocity."""

    def at(t: float, u: Tensor) -> tuple[Tensor, Tensor]:
        h = 1e-3
        plus, minus = manifold.expmap(x, (t + h) * u), manifold.expmap(x, (t - h) * u)
        far, back = manifold.expmap(x, (t + 2 * h) * u), manifold.expmap(x, (t - 2 * h) * u)
        y = manifold.expmap(x, t * u)
        return y, manifold.proju(y, (8 * (plus - minus) - (far - back)) / (12 * h))

    def speed() -> Tensor:
        u = 0.5 * unit_tangent(manifold, x, generator)
        y, velocity = at(0.7, u)
        return (
            tangent_length(manifold, y, velocity) / positive(tangent_length(manifold, x, u)) - 1
        ).abs() * (tangent_length(manifold, x, u) > 0)

    def restart() -> Tensor:
        u = 0.5 * unit_tangent(manifold, x, generator)
        y, velocity = at(0.6, u)
        end = embed(manifold, manifold.expmap(x, u))
        return relative_error(
            embed(manifold, manifold.expmap(y, 0.4 * velocity)),
            end,
            batch_dims(manifold, x),
            embed(manifold, x),
        )

    return [
        at_most("expmap keeps its speed", speed, CLOSE),
        at_most("expmap goes on along itself", restart, CLOSE),
    ]


def logarithm_inverts_exponential(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """log(exp(u)) = u and exp(log(y)) = y at length 0.3 and 1e-9, and dist is the length of the logarithm."""
    u = unit_tangent(manifold, x, generator)

    def back(length: float) -> Tensor:
        step = length * u
        return vector_error(manifold, x, manifold.logmap(x, manifold.expmap(x, step)), step)

    def forth(length: float) -> Tensor:
        y = manifold.retr(x, length * u)
        found = embed(manifold, manifold.expmap(x, manifold.logmap(x, y)))
        return relative_error(found, embed(manifold, y), batch_dims(manifold, x), embed(manifold, x))

    def length_of_log() -> Tensor:
        y = manifold.retr(x, 0.3 * u)
        expected = tangent_length(manifold, x, manifold.logmap(x, y))
        return (manifold.dist(x, y) - expected).abs() / positive(expected)

    def symmetric() -> Tensor:
        y = manifold.retr(x, 0.3 * u)
        there, again = manifold.dist(x, y), manifold.dist(y, x)
        return (there - again).abs() / positive(there.abs())

    return [
        at_most("log(exp(u)) is u", lambda: back(0.3), CLOSE),
        at_most("exp(log(y)) is y", lambda: forth(0.3), CLOSE),
        at_most("log(exp(u)) is u at length 1e-9", lambda: back(1e-9), 1e-5),
        at_most("exp(log(y)) is y at distance 1e-9", lambda: forth(1e-9), 1e-5),
        at_most("dist is the length of the logarithm", length_of_log, CLOSE),
        at_most("dist is symmetric", symmetric, CLOSE),
    ]


def small_distances_are_kept(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """The distance and the logarithm of two nearby points hold: 1e-9 apart, and 1e-4 in float32.

    One point is a retraction of the other. To first order it moves by the length of its vector, so that no
    exponential is needed.
    """
    found = []
    u = unit_tangent(manifold, x, generator)
    for dtype, apart, limit in ((torch.float64, 1e-9, 1e-5), (torch.float32, 1e-4, 5e-2)):
        where = f"at {apart:.0e} in {str(dtype).removeprefix('torch.')}"

        def pair(dtype: torch.dtype = dtype, apart: float = apart) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            point, step = plain(x).to(dtype), (apart * u).to(dtype)
            return point, manifold.retr(point, step), step, tangent_length(manifold, point, step)

        def distance(pair: Callable[..., Any] = pair) -> Tensor:
            point, moved, _, size = pair()
            return (manifold.dist(point, moved) - size).abs() / positive(size)

        def logarithm(pair: Callable[..., Any] = pair) -> Tensor:
            point, moved, step, _ = pair()
            return vector_error(manifold, point, manifold.logmap(point, moved), step)

        found.append(at_most(f"dist {where}", distance, limit))
        found.append(at_most(f"logmap {where}", logarithm, limit))
    return found


def gradient_and_hessian(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """The converted gradient is tangent with slope 2; the converted Hessian is tangent and symmetric.

    That the Hessian has slope 3 is measured by `retractions_keep_their_order`.
    """
    f = random_function(manifold, x, generator)
    u, v = unit_tangent(manifold, x, generator), unit_tangent(manifold, x, generator)

    def gradient_is_tangent() -> Tensor:
        gradient = manifold.egrad2rgrad(x, derivatives(f, x, u)[0])
        return relative_error(manifold.proju(x, gradient), gradient, batch_dims(manifold, x))

    def hessian(direction: Tensor) -> Tensor:
        g, h = derivatives(f, x, direction)
        return operation_named(manifold, "ehess2rhess")(x, g, h, direction)

    def hessian_is_tangent() -> Tensor:
        found = hessian(u)
        return relative_error(manifold.proju(x, found), found, batch_dims(manifold, x))

    def hessian_is_symmetric() -> Tensor:
        hu, hv = hessian(u), hessian(v)
        left, right = inner_product(manifold, x, hu, v), inner_product(manifold, x, u, hv)
        return (left - right).abs() / positive(
            tangent_length(manifold, x, hu) + tangent_length(manifold, x, hv)
        )

    return [
        at_most("gradient is tangent", gradient_is_tangent, 1e-8),
        slope_at_least("gradient", taylor_slopes(manifold, x, manifold.retr, 1, generator), 2),
        at_most("Hessian is tangent", hessian_is_tangent, 1e-8),
        at_most("Hessian is symmetric", hessian_is_symmetric, 1e-8),
    ]


def batch_equals_loop(
    manifold: geoopt.Manifold, x: Tensor, *, generator: torch.Generator | None = None
) -> list[Measurement]:
    """Every operation on a batch of points gives what it gives for each point alone."""
    lead = batch_dims(manifold, x)
    flat = plain(x).reshape(-1, *x.shape[lead:])
    if len(flat) < 2:
        flat = torch.cat([flat, plain(manifold.retr(flat, 0.3 * unit_tangent(manifold, flat, generator)))])
    u, v = (0.3 * unit_tangent(manifold, flat, generator) for _ in range(2))
    a, b = noise(flat, generator), noise(flat, generator)
    y = plain(manifold.retr(flat, u))
    arguments = {
        "projx": (flat,), "proju": (flat, a), "retr": (flat, u), "expmap": (flat, u), "logmap": (flat, y),
        "transp": (flat, y, v), "inner": (flat, u, v), "norm": (flat, u), "dist": (flat, y),
        "egrad2rgrad": (flat, a), "ehess2rhess": (flat, a, b, u), "second_fundamental_form": (flat, u, v),
    }  # fmt: skip

    def error(name: str) -> Callable[[], Tensor]:
        def compare() -> Tensor:
            given = operation_named(manifold, name)

            def run(*tensors: Tensor) -> Tensor:
                found = given(*tensors)
                return found.dense() if isinstance(found, LowRank) else found

            together = run(*arguments[name])
            alone = torch.stack([run(*(tensor[i] for tensor in arguments[name])) for i in range(len(flat))])
            return relative_error(together, alone, 1)

        return compare

    return [at_most(f"{name} of a batch is that of each item", error(name), EXACT) for name in arguments]
