"""What every operation of a manifold checks before it computes, written once.

`Manifold` wraps the operations of its subclasses in `operation`: devices and dtypes must agree, shapes must
fit, points must lie on the manifold and tangent vectors in the tangent space, half precision is computed in
float32. The checks of values cost about as much as a projection, and on a GPU they wait for it. They are made
once per call from outside, never for calls between operations; `unchecked` leaves them out, as the solvers
and optimizers do after their first look. Under `vmap` and `torch.compile`, where a value cannot be read, they
are left out too.
"""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from manifolds.errors import ManifoldError

POINTS = {"x", "y"}
TANGENTS: dict[str, set[str]] = {
    "retr": {"u"},
    "retr_qr": {"u"},
    "retr_polar": {"u"},
    "retr_cayley": {"u"},
    "expmap": {"u"},
    "transp": {"v"},
    "transp_follow_retr": {"u", "v"},
    "transp_follow_expmap": {"u", "v"},
    "ehess2rhess": {"u"},
    "second_fundamental_form": {"u", "v"},
    "weingarten": {"u"},
}
PROJECTED = {"retr_transp", "expmap_transp"}
"""Operations that project vectors that are not tangent, where others refuse them: geoopt's optimizers call
these, and its `RiemannianSGD` begins its momentum with the Euclidean gradient."""
OPERATIONS = {
    "projx", "proju", "inner", "norm", "dist", "dist2", "logmap", "egrad2rgrad", "normal",
    *TANGENTS, *PROJECTED,
}  # fmt: skip
OFF_MANIFOLD = {"projx", "distance"}
"""Operations on points that need not lie on the manifold."""
HALF = (torch.float16, torch.bfloat16)
OPERATION_TOLERANCE = 1e-3
"""How far off a point or a tangent may be before an operation refuses it. Coarse on purpose: finite
differences and long runs drift, a wrong argument is off by far more. `Manifold.contains` is the fine test."""


class _Local(threading.local):
    quiet = 0


_local = _Local()


@contextmanager
def unchecked() -> Iterator[None]:
    """Leaves out the checks of values, for loops whose points are right; shapes are still checked."""
    _local.quiet += 1
    try:
        yield
    finally:
        _local.quiet -= 1


def precise(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with autocast off, where it is on: products of float32 would be taken in half precision."""

    @functools.wraps(method)
    def run(self: Any, x: Tensor, *args: Any, **options: Any) -> Any:
        kind = x.device.type
        if torch.compiler.is_compiling() or not torch.is_autocast_enabled(kind):
            return method(self, x, *args, **options)
        with torch.autocast(kind, enabled=False):
            return method(self, x, *args, **options)

    return run


def operation(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method with its arguments checked and half precision computed in float32."""
    if getattr(method, "_is_operation", False):
        return method
    name = method.__name__
    names = list(inspect.signature(inspect.unwrap(method)).parameters)[1:]

    @functools.wraps(method)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        tensors = {key: value for key, value in zip(names, args, strict=False) if isinstance(value, Tensor)}
        tensors.update({key: value for key, value in options.items() if isinstance(value, Tensor)})
        half = _agree(self, name, tensors)
        if torch.compiler.is_compiling():
            return _compute(method, self, args, options, half)
        kind = next(iter(tensors.values())).device.type
        if torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                return run(self, *args, **options)
        outside = not _local.quiet
        if outside:
            _check_values(self, name, tensors)
        _local.quiet += 1
        try:
            if outside and name in PROJECTED and {"x", "u", "v"} <= tensors.keys():
                args, options = (tensors["x"], *_tangent(self, tensors)), {}
            return _compute(method, self, args, options, half)
        finally:
            _local.quiet -= 1

    run._is_operation = True  # type: ignore[attr-defined]
    return run


def _compute(
    method: Callable[..., Any],
    manifold: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
    half: torch.dtype | None,
) -> Any:
    if half is None:
        return method(manifold, *args, **options)
    wide = [value.float() if isinstance(value, Tensor) else value for value in args]
    more = {key: value.float() if isinstance(value, Tensor) else value for key, value in options.items()}
    found = method(manifold, *wide, **more)
    if isinstance(found, Tensor):
        return found.to(half)
    return tuple(part.to(half) for part in found) if isinstance(found, tuple) else found


def _agree(manifold: Any, name: str, tensors: dict[str, Tensor]) -> torch.dtype | None:
    """Checks devices, dtypes and shapes; gives the half-precision dtype, if that is what it is."""
    if not tensors:
        raise _error(manifold, name, "no argument is a tensor")
    (first, lead), *others = tensors.items()
    if not lead.is_floating_point():
        raise _error(
            manifold, name, f"{first} has dtype {lead.dtype}; points are real floating-point tensors"
        )
    if all(
        value.shape == lead.shape and value.dtype == lead.dtype and value.device == lead.device
        for _, value in others
    ):
        others = []
        tensors = {first: lead}
    for key, value in others:
        if value.device != lead.device:
            raise _error(
                manifold,
                name,
                f"{first} is on {lead.device} and {key} on {value.device}; move them to one device",
            )
        if value.dtype != lead.dtype:
            raise _error(
                manifold, name, f"{first} has dtype {lead.dtype} and {key} {value.dtype}; convert one of them"
            )
    for key, value in tensors.items():
        ok, reason = manifold._check_shape(value.shape, key)
        if not ok:
            raise _error(manifold, name, reason)
        trailing = value.shape[value.ndim - manifold.ndim :]
        if trailing != lead.shape[lead.ndim - manifold.ndim :]:
            raise _error(
                manifold, name,
                f"{first} has shape {tuple(lead.shape)} and {key} {tuple(value.shape)}; "
                f"their last {manifold.ndim} dimensions must be equal",
            )  # fmt: skip
    if others and not torch.compiler.is_compiling():
        _check_batches(manifold, name, tensors)
    return lead.dtype if lead.dtype in HALF else None


def _check_batches(manifold: Any, name: str, tensors: dict[str, Tensor]) -> None:
    try:
        torch.broadcast_shapes(*(value.shape[: value.ndim - manifold.ndim] for value in tensors.values()))
    except RuntimeError:
        shapes = ", ".join(f"{key} has shape {tuple(value.shape)}" for key, value in tensors.items())
        raise _error(
            manifold, name, f"{shapes}; the dimensions before the last {manifold.ndim} must broadcast"
        ) from None


def _check_values(manifold: Any, name: str, tensors: dict[str, Tensor]) -> None:
    """Refuses what is not on the manifold or not tangent to it."""
    if name in OFF_MANIFOLD:
        return
    tangents = TANGENTS.get(name, set()) & tensors.keys()
    _local.quiet += 1
    try:
        with torch.no_grad():
            for key in sorted(POINTS & tensors.keys()):
                limit = _coarse(tensors[key])
                if not _within(manifold.point_defects(widened(tensors[key])), limit):
                    found = manifold.contains(tensors[key], tolerance=limit)
                    raise _error(manifold, name, f"{key} is not on the manifold: {found.reason}; see projx")
            for key in sorted(tangents):
                limit = _coarse(tensors[key])
                x, u = widened(tensors["x"]), widened(tensors[key])
                defects = manifold.tangent_defects(x, u)
                if not _within(defects, limit):
                    small = _is_rounding(manifold, x, u, _noise(tensors[key]))
                    defects = {formula: defect.masked_fill(small, 0.0) for formula, defect in defects.items()}
                if not _within(defects, limit):
                    found = manifold.contains_tangent(tensors["x"], tensors[key], tolerance=limit)
                    raise _error(manifold, name, f"{key} is not tangent at x: {found.reason}; see proju")
            for key in sorted(tensors.keys() - POINTS - tangents):
                if not bool(tensors[key].isfinite().all()):
                    count = int((~tensors[key].isfinite()).sum())
                    raise _error(manifold, name, f"{key} has {count} entries that are not finite")
    except RuntimeError as unreadable:
        if "vmap" not in str(unreadable):
            raise
    finally:
        _local.quiet -= 1


def _tangent(manifold: Any, tensors: dict[str, Tensor]) -> list[Tensor]:
    """The vectors u and v, projected where they are not tangent."""
    x, found = tensors["x"], []
    for vector in (tensors["u"], tensors["v"]):
        try:
            with torch.no_grad():
                tangent = _within(manifold.tangent_defects(widened(x), widened(vector)), _coarse(vector))
        except RuntimeError as unreadable:
            if "vmap" not in str(unreadable):
                raise
            tangent = True
        found.append(vector if tangent else manifold.proju(x, vector))
    return found


def _within(defects: dict[str, Tensor], limit: float) -> bool:
    return all(bool((defect <= limit).all()) for defect in defects.values())


def _is_rounding(manifold: Any, x: Tensor, u: Tensor, noise: float) -> Tensor:
    """For each item, whether all that is not tangent of u is as small as the rounding of a projection.

    A gradient at a minimum is nothing but that; relative to its own size it is never tangent.
    """
    rest = (u - manifold.proju(x, u)).abs()
    return rest.flatten(rest.ndim - manifold.ndim).amax(-1) <= noise if manifold.ndim else rest <= noise


def widened(x: Tensor) -> Tensor:
    """The tensor in float32 if it is in half precision, else as it is."""
    return x.float() if x.dtype in HALF else x


def _coarse(tensor: Tensor) -> float:
    return 3e-2 if tensor.dtype in HALF else OPERATION_TOLERANCE


def _noise(tensor: Tensor) -> float:
    """The size of the rounding of a projection of entries up to about 100, in half precision up to 4."""
    return (4 if tensor.dtype in HALF else 100) * torch.finfo(tensor.dtype).eps


def _error(manifold: Any, name: str, defect: str | None) -> ManifoldError:
    return ManifoldError(f"{manifold.name}.{name}: {defect}")
