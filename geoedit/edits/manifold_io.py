"""Manifolds in files and on devices: learned ones by what they hold, known ones by their name."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import geoopt
import torch
from torch import Tensor

import manifolds
from geoedit.edits.io import from_json, to_json
from geoedit.errors import EditError
from manifolds.cloud.learned import LearnedManifold

KNOWN: dict[str, tuple[type[geoopt.Manifold], tuple[str, ...]]] = {
    "manifolds.Euclidean": (manifolds.Euclidean, ("ndim",)),
    "manifolds.Sphere": (manifolds.Sphere, ("ndim",)),
    "geoopt.Euclidean": (geoopt.Euclidean, ("ndim",)),
    "geoopt.Sphere": (geoopt.Sphere, ()),
    "geoopt.SphereExact": (geoopt.SphereExact, ()),
    "geoopt.Lorentz": (geoopt.Lorentz, ()),
    "geoopt.PoincareBall": (geoopt.PoincareBall, ()),
    "geoopt.PoincareBallExact": (geoopt.PoincareBallExact, ()),
    "geoopt.Stereographic": (geoopt.Stereographic, ()),
    "geoopt.StereographicExact": (geoopt.StereographicExact, ()),
    "geoopt.SphereProjection": (geoopt.SphereProjection, ()),
    "geoopt.SphereProjectionExact": (geoopt.SphereProjectionExact, ()),
}
"""Known manifolds of vectors by name, with the attributes that their class is called with; a curvature is in
their state."""


def tensors_of(manifold: geoopt.Manifold) -> dict[str, Tensor]:
    """The tensors that a manifold holds, by name."""
    if isinstance(manifold, LearnedManifold):
        return manifold.describe()[1]
    return dict(manifold.state_dict())


def describe_manifold(manifold: geoopt.Manifold) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Give what a file must hold of a manifold: values for JSON, and tensors.

    Raises:
        EditError: no file can name it.
    """
    if isinstance(manifold, LearnedManifold) and manifold.kind is not None:
        values, tensors = manifold.describe()
        values = to_json(_packed(values), type(manifold).__name__)
        return {"learned": manifold.kind, "values": values}, tensors
    for name, (known, arguments) in KNOWN.items():
        if type(manifold) is known:
            given = {argument: getattr(manifold, argument) for argument in arguments}
            return {"known": name, "values": given}, tensors_of(manifold)
    raise EditError(
        f"A file cannot name the manifold {type(manifold).__name__}. It can hold {', '.join(KNOWN)}, and"
        " every LearnedManifold whose class has a kind."
    )


def rebuild_manifold(description: Any, tensors: Mapping[str, Tensor]) -> geoopt.Manifold:
    """Make a manifold from what `describe_manifold` gave.

    Raises:
        EditError: the kind is unknown, or values or tensors do not fit it.
    """
    if not isinstance(description, Mapping) or not isinstance(description.get("values"), Mapping):
        raise EditError("The edit has no manifold: the file is damaged.")
    values = _unpacked(from_json(dict(description["values"])))
    learned, known = description.get("learned"), description.get("known")
    if learned is not None and learned not in LearnedManifold._kinds:
        raise EditError(
            f"No learned manifold of kind {learned!r} is known; known are"
            f" {', '.join(sorted(LearnedManifold._kinds))}. Import the module that defines it first."
        )
    if learned is None and known not in KNOWN:
        raise EditError(f"No manifold is called {known!r}; known are {', '.join(KNOWN)}.")
    try:
        if learned is not None:
            return LearnedManifold._kinds[learned].rebuild(values, tensors)
        manifold = KNOWN[str(known)][0](**values)
        manifold.load_state_dict(dict(tensors))
        return manifold
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise EditError(f"The manifold {learned or known} cannot be made again: {error!r}.") from error


def moved_manifold(manifold: geoopt.Manifold, device: torch.device, dtype: torch.dtype) -> geoopt.Manifold:
    """The manifold on a device and in a dtype: itself if it is there already, else a copy."""
    tensors = tensors_of(manifold)
    moved = {name: _moved(tensor, device, dtype) for name, tensor in tensors.items()}
    if all(moved[name] is tensor for name, tensor in tensors.items()):
        return manifold
    if isinstance(manifold, LearnedManifold):
        return type(manifold).rebuild(manifold.describe()[0], moved)
    return copy.deepcopy(manifold).to(device=device, dtype=dtype)


def _moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else tensor.dtype)


def _packed(value: Any) -> Any:
    """A value with its infinite and undefined numbers as words: JSON has none, a reach may be infinite."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$number": str(value)}
    if isinstance(value, Mapping):
        return {key: _packed(item) for key, item in value.items()}
    return [_packed(item) for item in value] if isinstance(value, (list, tuple)) else value


def _unpacked(value: Any) -> Any:
    """Undo `_packed`."""
    if isinstance(value, dict):
        if value.keys() == {"$number"}:
            return float(value["$number"])
        return {key: _unpacked(item) for key, item in value.items()}
    return [_unpacked(item) for item in value] if isinstance(value, list) else value
