"""`minimize`: the one call for all methods."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import geoopt
import torch
from torch import Tensor
from tqdm import tqdm

from manifolds.base import plain
from manifolds.errors import ManifoldError
from manifolds.operations import HALF
from manifolds.solvers.conjugate_gradient import ConjugateGradient
from manifolds.solvers.constraints import NullSpace, TrustBall
from manifolds.solvers.gauss_newton import GaussNewton
from manifolds.solvers.geometry import Geometry
from manifolds.solvers.gradient import Gradient
from manifolds.solvers.lbfgs import LBFGS
from manifolds.solvers.method import Method
from manifolds.solvers.objective import Problem
from manifolds.solvers.run import Callback, Limits, run
from manifolds.solvers.solution import Solution
from manifolds.solvers.trust_ball import Ball, minimize_in_ball
from manifolds.solvers.trust_region import TrustRegion

METHODS: dict[str, tuple[type[Method[Any]], dict[str, Any]]] = {
    "gradient": (Gradient, {}),
    "conjugate-gradient": (ConjugateGradient, {}),
    "lbfgs": (LBFGS, {}),
    "trust-region": (TrustRegion, {}),
    "gauss-newton": (GaussNewton, {}),
    "levenberg-marquardt": (GaussNewton, {"initial_damping": 1e-3}),
}

Constraint = NullSpace | TrustBall


def minimize(
    f: Callable[..., Tensor],
    x0: Tensor,
    manifold: geoopt.Manifold,
    method: str = "trust-region",
    *,
    data: Sequence[Tensor] | None = None,
    constraint: Constraint | Sequence[Constraint] | None = None,
    max_steps: int | None = None,
    max_time: float | None = None,
    gradient_tolerance: float | Tensor | None = None,
    step_tolerance: float = 0.0,
    value_tolerance: float = 0.0,
    callback: Callback | None = None,
    progress: bool = False,
    egrad: Callable[..., Tensor] | None = None,
    ehess: Callable[..., Tensor] | None = None,
    **options: Any,
) -> Solution:
    """Minimises a function on a manifold, one independent problem for each item of a batch.

    Every item has its own step length, radius, damping, restarts and end: a batch gives what as many single
    runs give. Items that have ended stay where they are while the others go on. The items must not depend on
    each other: f(x)[i] is a function of x[i] alone.

    Without `data`, f is always called with the whole batch, as long as its slowest item needs. With the
    tensors in which the items differ as `data`, f is called as f(x, *data) on those items alone that have
    work to do: x is (k, *point) and the data are (k, …), for any number k of the items, with one leading
    dimension whatever the batch. The result is the same, but for rounding, and comes sooner.

    Methods, with their options as keywords (see the class of each):

    - "trust-region": `TrustRegion`, second order, the most accurate;
    - "lbfgs": `LBFGS`; "conjugate-gradient": `ConjugateGradient`; "gradient": `Gradient`, of first order;
    - "gauss-newton", "levenberg-marquardt": `GaussNewton`, for f that returns residuals (*batch, k), whose
      half sum of squares is minimised.

    Works on our manifolds and on geoopt's own; `Geometry` says where the Hessian comes from. Half precision
    is computed in float32. Parameters that f uses get no gradient.

    Args:
        f: takes x (*batch, *point) and returns one value an item (*batch), differentiable; with `data` it
            takes x (k, *point) and the data of k items, and returns (k).
        x0: where to start (*batch, *point), on the manifold.
        manifold: one of ours or of geoopt's.
        method: its name.
        data: tensors (*batch, …) with a part for each item, in which the functions of the items differ.
        constraint: `NullSpace`, `TrustBall`, or one of each in a list.
        max_steps: most steps an item makes; by default the method's.
        max_time: seconds after which no step begins.
        gradient_tolerance: an item has CONVERGED when its gradient norm is at most this, one number or one an
            item (*#batch). By default 1e-9 (float64) or 1e-4 of the norm at the start, and not below that
            one's rounding.
        step_tolerance: an item has STALLED when a step is at most this long; 0 for no such test.
        value_tolerance: an item has STALLED when a step changes its value by at most this part; 0 for no such
            test.
        callback: called after every step with a `State`; returning True stops all items, a boolean tensor
            (*batch) those it marks. Under a trust ball it sees the augmented Lagrangian's value.
        progress: whether to show a bar.
        egrad: the Euclidean gradient as a function of x (and the data), in place of differentiating f.
        ehess: the Euclidean Hessian-vector product as a function of x and u (and the data), in place of
            differentiating twice.
        **options: the method's own.

    Raises:
        ManifoldError: an unknown method or option; a start that is NaN or off the manifold; an f that returns
            another shape, is not differentiable or lives on another device; a constraint that does not fit;
            data that do not have the batch as leading dimensions or live on another device.

    Example:
        >>> import torch
        >>> from manifolds import Sphere
        >>> from manifolds.solvers import minimize
        >>> matrices = torch.stack([torch.diag(torch.tensor([3.0, 1.0, 2.0])), torch.eye(3)]).double()
        >>> start = Sphere().projx(torch.ones(2, 3).double())
        >>> found = minimize(lambda x: torch.einsum("...i,...ij,...j", x, matrices, x), start, Sphere())
        >>> torch.allclose(found.value, torch.ones(2).double())
        True
        >>> found.statuses
        [<Status.CONVERGED: 0>, <Status.CONVERGED: 0>]
    """
    begun = time.monotonic()
    chosen = _method(method, options)
    x, geometry = _start(x0, manifold), Geometry(manifold)
    geometry.check_point(x)
    dtype, x = x.dtype, plain(geometry.manifold.projx(x.float())) if x.dtype in HALF else x
    batch = x.shape[: x.ndim - manifold.ndim]
    parts = _data(data, x, batch)
    divisible = data is not None
    seen = torch.Size([batch.numel()]) if divisible else batch
    null, ball = _constraints(constraint, egrad, ehess)
    lift = None
    if null is not None:
        substitution = null.substitute(geometry.manifold, x)
        lift, geometry = substitution.lift, Geometry(substitution.manifold)
        lift = lift.flat(batch) if divisible else lift
    start = x if null is None else substitution.start
    start = start.reshape(batch.numel(), *start.shape[len(batch) :]).contiguous()
    problem = Problem(
        f,
        geometry,
        seen,
        data=parts,
        divisible=divisible,
        residuals=chosen.residuals,
        egrad=egrad,
        ehess=ehess,
        lift=lift,
    )
    for name, given in (("step_tolerance", step_tolerance), ("value_tolerance", value_tolerance)):
        _check(given >= 0, f"{name} is {given}; it is not negative")
    with tqdm(total=max_steps or chosen.steps, disable=not progress, unit="step") as bar:
        limits = Limits(
            max_steps=_steps(max_steps, chosen),
            begun=begun,
            deadline=begun + _seconds(max_time),
            gradient=_tolerances(gradient_tolerance, start, batch),
            step=step_tolerance,
            value=value_tolerance,
            callback=callback,
            bar=bar,
            batch=batch,
        )
        if ball is None:
            ended = run(chosen, problem, start, limits)
            multiplier = None
        else:
            half, center = ball.half_distance2(manifold, x)
            if divisible:
                point = center.shape[center.ndim - manifold.ndim :]
                center = center.expand(batch + point).reshape(seen + point)
            distance = Problem(half, geometry, seen, data=(center,), divisible=divisible, lift=lift)
            inside = Ball(distance, ball.radii(x, batch))
            ended, found = minimize_in_ball(chosen, problem, start, limits, inside)
            multiplier = found.reshape(batch)
    with torch.no_grad():
        end = problem.shown(ended.x).to(dtype)
    return Solution(
        x=end.reshape(batch + end.shape[len(seen) :]),
        value=ended.value.reshape(batch),
        gradient_norm=ended.gradient_norm.reshape(batch),
        steps=ended.steps.reshape(batch),
        evaluations=ended.evaluations.reshape(batch),
        status=ended.status.reshape(batch),
        multiplier=multiplier,
    )


def _method(name: str, options: dict[str, Any]) -> Method[Any]:
    """The method of this name with its options.

    Raises:
        ManifoldError: no such method, or it has no such option.
    """
    _check(name in METHODS, f"there is no method {name!r}; there are {', '.join(map(repr, METHODS))}")
    kind, defaults = METHODS[name]
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    unknown = [option for option in options if option not in known]
    _check(
        not unknown,
        f"method {name!r} has no option {', '.join(map(repr, unknown))}; it has {', '.join(known)}",
    )
    return kind(**defaults | options)


def _start(x0: Tensor, manifold: geoopt.Manifold) -> Tensor:
    """x0 without graph or mark."""
    _check(
        isinstance(manifold, geoopt.Manifold),
        f"manifold is {type(manifold).__name__}; it is a geoopt.Manifold",
    )
    _check(isinstance(x0, Tensor), f"x0 is {type(x0).__name__}; it is a tensor")
    _check(
        x0.is_floating_point(),
        f"x0 has dtype {x0.dtype}; points of {manifold.name} are real floating-point tensors",
    )
    x0 = plain(x0.detach()).as_subclass(Tensor)
    return x0.clone() if x0.is_inference() else x0


def _data(data: Sequence[Tensor] | None, x: Tensor, batch: torch.Size) -> tuple[Tensor, ...]:
    """The data with one leading dimension (N, …), without graphs.

    Raises:
        ManifoldError: they are no tensors, do not begin with the batch, or live on another device.
    """
    if data is None:
        return ()
    _check(
        isinstance(data, Sequence) and not isinstance(data, str),
        f"data is {type(data).__name__}; it is a list or tuple of tensors, such as data=[matrices]",
    )
    for number, part in enumerate(data):
        _check(isinstance(part, Tensor), f"data[{number}] is {type(part).__name__}; it is a tensor")
        _check(
            part.shape[: len(batch)] == batch,
            f"data[{number}] has shape {tuple(part.shape)}; its leading dimensions are the batch of x0, "
            f"{tuple(batch)}. What all items share belongs into f, or expanded to the batch",
        )
        _check(
            part.device == x.device,
            f"data[{number}] is on {part.device} and x0 on {x.device}; move them to one device",
        )
    return tuple(plain(part.detach()).reshape(batch.numel(), *part.shape[len(batch) :]) for part in data)


def _constraints(constraint: Any, egrad: Any, ehess: Any) -> tuple[NullSpace | None, TrustBall | None]:
    """The null space and the ball, each if it is asked for."""
    given = (
        []
        if constraint is None
        else [constraint]
        if not isinstance(constraint, Sequence)
        else list(constraint)
    )
    nulls = [one for one in given if isinstance(one, NullSpace)]
    balls = [one for one in given if isinstance(one, TrustBall)]
    _check(
        len(nulls) + len(balls) == len(given) and len(nulls) < 2 and len(balls) < 2,
        f"constraint is {[type(one).__name__ for one in given]}; give NullSpace, TrustBall, or one of each",
    )
    _check(
        not given or (egrad is None and ehess is None), "egrad and ehess cannot be given with a constraint"
    )
    return (nulls[0] if nulls else None), (balls[0] if balls else None)


def _steps(max_steps: int | None, method: Method[Any]) -> int:
    if max_steps is None:
        return method.steps
    _check(isinstance(max_steps, int) and max_steps >= 0, f"max_steps is {max_steps!r}; it is a whole number")
    return max_steps


def _seconds(max_time: float | None) -> float:
    _check(max_time is None or max_time >= 0, f"max_time is {max_time}; it is a number of seconds")
    return math.inf if max_time is None else max_time


def _tolerances(tolerance: float | Tensor | None, x: Tensor, batch: torch.Size) -> Tensor | None:
    """One tolerance an item (N), or None for the default."""
    if tolerance is None:
        return None
    tolerances = torch.as_tensor(tolerance, dtype=x.dtype, device=x.device)
    try:
        tolerances = tolerances.expand(batch)
    except RuntimeError:
        raise ManifoldError(
            f"minimize: gradient_tolerance has shape {tuple(tolerances.shape)}; "
            f"it fits the batch {tuple(batch)} or is one number"
        ) from None
    _check(bool((tolerances >= 0).all()), "gradient_tolerance is negative or NaN; it is ≥ 0")
    return tolerances.reshape(-1)


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ManifoldError(f"minimize: {message}")
