"""How a property is measured and told: vectors to try, errors to compare, one row of the table."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifolds.base import plain
from manifolds.slopes import Slope, measure_slopes

SLOPE_MARGIN = 0.1
"""How far below the whole number a fitted slope may lie."""


@dataclass(frozen=True)
class Measurement:
    """One property, as measured.

    Attributes:
        property: what should hold.
        value: the measured error, slope or dimension, at the worst item of the batch; None where nothing was
            measured.
        expected: what it should be, in words.
        passed: whether it is; None where the manifold lacks an operation or makes no such claim.
        note: where it was measured, or why not.
    """

    property: str
    value: float | None
    expected: str
    passed: bool | None
    note: str = ""


# Rows


def at_most(name: str, error: Callable[[], Any], limit: float, *, judged: bool = True) -> Measurement:
    """The largest entry of what `error` gives, against a limit.

    NaN fails. Where the manifold makes no claim, the number is told and not judged.
    """
    expected = f"≤ {limit:.0e}"
    try:
        value = float(torch.as_tensor(error()).detach().max())
    except NotImplementedError as missing:
        return Measurement(name, None, expected, None, _lacking(missing))
    except Exception as fault:
        return failed(name, fault, expected)
    if not judged:
        return Measurement(name, value, "not claimed", None, "the manifold makes no such claim")
    return Measurement(name, value, expected, value <= limit)


def slope_at_least(name: str, slopes: Callable[[], list[Slope]], order: int) -> Measurement:
    """The smallest slope of a batch, against a whole number; a slope that is higher passes, NaN fails."""
    expected = f"slope ≥ {order}"
    try:
        found = slopes()
    except NotImplementedError as missing:
        return Measurement(name, None, expected, None, _lacking(missing))
    except Exception as fault:
        return failed(name, fault, expected)
    worst = min(found, key=lambda slope: -math.inf if math.isnan(slope.value) else slope.value)
    note = (
        "equal up to rounding"
        if math.isinf(worst.value)
        else f"steps {worst.interval[0]:.0e} to {worst.interval[1]:.0e}"
    )
    return Measurement(name, worst.value, expected, worst.value >= order - SLOPE_MARGIN, note)


def unmeasured(name: str, reason: str) -> Measurement:
    """A row that says why there is no number."""
    return Measurement(name, None, "", None, f"not available: {reason}")


def failed(name: str, fault: Exception, expected: str = "no error") -> Measurement:
    """A row that says how an operation raised."""
    said = str(fault).splitlines() or [""]
    return Measurement(name, None, expected, False, f"raises {type(fault).__name__}: {said[0][:160]}")


def _lacking(missing: NotImplementedError) -> str:
    if str(missing):
        return f"not available: {missing}"
    frame = missing.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f"not available: no {frame.tb_frame.f_code.co_name if frame else 'operation'} is given"


# What is tried


def curves(manifold: geoopt.Manifold) -> list[tuple[str, Callable[..., Tensor], int]]:
    """Every retraction with its name and the order that it claims; the exponential claims the second.

    A manifold of others that does not say what its retraction is claims the first order.
    """
    orders: dict[str, int] = getattr(manifold, "retractions", {})
    chosen = getattr(manifold, "retraction", None) or (next(iter(orders)) if len(orders) == 1 else None)
    found = [("retr", manifold.retr, orders.get(chosen, 1) if chosen else 1)]
    found += [
        (f"retr_{name}", getattr(manifold, f"retr_{name}"), order)
        for name, order in orders.items()
        if hasattr(manifold, f"retr_{name}")
    ]
    if type(manifold).expmap is not geoopt.Manifold.expmap:
        found.append(("expmap", manifold.expmap, 2))
    return found


def operation_named(manifold: geoopt.Manifold, name: str) -> Callable[..., Tensor]:
    """The operation; where the manifold has none, an error that `at_most` reads as not available."""
    found = getattr(manifold, name, None)
    if found is None:
        raise NotImplementedError(f"{manifold.name} has no {name}")
    return found


def embed(manifold: geoopt.Manifold, x: Tensor) -> Tensor:
    """The point free of its representative: `manifold.embedding` where there is one, or the point itself."""
    embedding = getattr(manifold, "embedding", None)
    return plain(x if embedding is None else embedding(x))


def batch_dims(manifold: geoopt.Manifold, x: Tensor) -> int:
    """How many dimensions of x count points."""
    return x.ndim - manifold.ndim


def first_point(manifold: geoopt.Manifold, x: Tensor) -> Tensor:
    """The first point of a batch, without batch dimensions."""
    return plain(x).reshape(-1, *x.shape[batch_dims(manifold, x) :])[0]


def noise(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A standard normal tensor like x, drawn on the generator's device."""
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, dtype=x.dtype, device=device, generator=generator).to(x.device)


def unit_tangent(manifold: geoopt.Manifold, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A random tangent vector of length one in the metric at each point; zero where there is no other."""
    u = plain(manifold.proju(plain(x), noise(x, generator)))
    u = scaled_to(u, u / positive(u.abs().amax()), batch_dims(manifold, x))
    lengths = positive(tangent_length(manifold, x, u))
    return u / lengths.reshape(*lengths.shape, *[1] * manifold.ndim)


def random_function(
    manifold: geoopt.Manifold, x: Tensor, generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """A smooth function (*batch) of points, not a polynomial, equal on all representatives of a point."""
    at = embed(manifold, x)
    lead = batch_dims(manifold, x)
    scale = positive(size(at, lead).mean())
    blank = at.new_empty(at.shape[lead:])
    slope, bend, wave, ripple = (noise(blank, generator) / scale for _ in range(4))

    def function(point: Tensor) -> Tensor:
        place = embed(manifold, point)
        shape = (*place.shape[:lead], -1)
        first, second, third = ((place * each).reshape(shape).sum(-1) for each in (slope, bend, wave))
        return first + second**2 / 2 + torch.sin(third) + ((ripple * place) ** 2).reshape(shape).sum(-1) / 2

    return function


def derivatives(f: Callable[[Tensor], Tensor], x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """The Euclidean gradient of a function (*batch) of points, and its derivative along u."""

    def total(points: Tensor) -> Tensor:
        return f(points).sum()

    found = torch.func.jvp(torch.func.grad(total), (plain(x),), (u,))
    return found[0], found[1]


def taylor_slopes(
    manifold: geoopt.Manifold,
    x: Tensor,
    run: Callable[..., Tensor],
    order: int,
    generator: torch.Generator | None,
) -> Callable[[], list[Slope]]:
    """The slopes of the error of Taylor's formula for a random function along t ↦ run(x, tu).

    Formula: |f(R(tu)) − f(x) − t ⟨grad f, u⟩ − t²/2 ⟨Hess f[u], u⟩|, the last term for order 2 only.
    """

    def slopes() -> list[Slope]:
        f = random_function(manifold, x, generator)
        u = unit_tangent(manifold, x, generator)
        g, h = derivatives(f, x, u)
        start = f(plain(x))
        first = inner_product(manifold, x, manifold.egrad2rgrad(x, g), u)
        second = torch.zeros_like(first)
        if order == 2:
            second = inner_product(manifold, x, operation_named(manifold, "ehess2rhess")(x, g, h, u), u)

        def error(t: float) -> Tensor:
            return (f(plain(run(x, t * u))) - start - t * first - t**2 / 2 * second).abs()

        return measure_slopes(error, start.abs() + first.abs() + 1)

    return slopes


# How far apart


def tangent_length(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    """The norm of tangent vectors in the metric (*batch)."""
    return _per_item(manifold, plain(manifold.norm(x, u, keepdim=True)))


def inner_product(manifold: geoopt.Manifold, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """⟨u, v⟩ (*batch), asked for with dimensions kept: geoopt's stereographic `inner` is wrong without."""
    return _per_item(manifold, plain(manifold.inner(x, u, v, keepdim=True)))


def _per_item(manifold: geoopt.Manifold, kept: Tensor) -> Tensor:
    return kept.reshape(kept.shape[: kept.ndim - manifold.ndim])


def size(value: Tensor, lead: int) -> Tensor:
    """The root of the sum of squares over all but the leading dimensions."""
    return torch.linalg.vector_norm(value.reshape(*value.shape[:lead], -1), dim=-1)


def positive(value: Tensor) -> Tensor:
    """The value where it is above zero, else one: a divisor."""
    return torch.where(value > 0, value, torch.ones_like(value))


def scaled_to(value: Tensor, model: Tensor, lead: int) -> Tensor:
    """The value with the size of the model, item by item."""
    factor = size(model, lead) / positive(size(value, lead))
    return value * factor.reshape(*factor.shape, *[1] * (value.ndim - lead))


def relative_error(found: Tensor, expected: Tensor, lead: int, origin: Tensor | None = None) -> Tensor:
    """‖found − expected‖ / ‖expected − origin‖ over all but the leading dimensions; not divided by zero."""
    base = expected if origin is None else expected - origin
    return size(plain(found) - plain(expected), lead) / positive(size(plain(base), lead))


def vector_error(manifold: geoopt.Manifold, x: Tensor, found: Tensor, expected: Tensor) -> Tensor:
    """‖found − expected‖ / ‖expected‖ in the metric at x."""
    return tangent_length(manifold, x, found - expected) / positive(tangent_length(manifold, x, expected))
