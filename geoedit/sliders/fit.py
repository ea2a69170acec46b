"""Whether a slider belongs to a model: its modules found, their shapes compared, another base refused."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from geoedit.errors import EditError
from geoedit.fingerprint import Fingerprint, fingerprint
from geoedit.sliders.slider import ModuleChange, Slider

MODEL = "model"
"""The one component of a model that is no pipeline."""
RELATED = 0.5
"""Least cosine of the weights sampled from a component and from what the slider was trained on. A fine-tune
keeps its weights close to its origin's, with a cosine of nearly 1; models trained apart have one near 0."""
COMPONENTS = ("unet", "transformer", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")
TEXT = "text_model."
"""The level inside CLIP's text encoders that some releases of transformers have and others lack."""
LISTED = 5


@dataclass(frozen=True)
class Place:
    """A module that a slider changes.

    Attributes:
        component: the component's name.
        path: the module's path in it.
        module: the module, without what peft put around it.
        outer: the module as the component calls it.
        change: what the slider adds to its weight.
    """

    component: str
    path: str
    module: nn.Module
    outer: nn.Module
    change: ModuleChange


def component_of(pipe: Any, name: str, among: Iterable[str]) -> nn.Module | None:
    """A component of a pipeline; a module that is no pipeline is the only component that a slider changes."""
    if isinstance(pipe, nn.Module):
        return pipe if name == MODEL or len(list(among)) == 1 else None
    found = getattr(pipe, name, None)
    return found if isinstance(found, nn.Module) else None


def components_of(pipe: Any) -> dict[str, nn.Module]:
    """The components of a pipeline that a slider may change; a module alone is its "model"."""
    if isinstance(pipe, nn.Module):
        return {MODEL: pipe}
    found = {name: part for name in COMPONENTS if isinstance(part := getattr(pipe, name, None), nn.Module)}
    if not found:
        raise EditError(
            f"a {type(pipe).__name__} has no component that a slider could change ({', '.join(COMPONENTS)}); "
            "give a diffusers pipeline or a module"
        )
    return found


def fitting(slider: Slider, pipe: Any, *, allow_other_base: bool = False) -> list[Place]:
    """Every module that a slider changes, found in a pipeline or a module.

    Raises:
        EditError: components or modules are missing, shapes or kinds differ, or the weights are those of
            another base than the slider was trained on; the names that do not fit are listed.
    """
    wrong: list[str] = []
    places: list[Place] = []
    for name, changes in slider.changes.items():
        part = component_of(pipe, name, slider.changes)
        if part is None:
            wrong.append(f"it has no {name}")
            continue
        modules = dict(part.named_modules())
        absent = [path for path in changes if _known(path, modules) is None]
        if absent:
            wrong.append(f"its {name} has no module {_listed(absent)}")
        for path, change in changes.items():
            known = _known(path, modules)
            if known is not None:
                inner = unwrapped(modules[known])
                places.append(Place(name, known, inner, modules[known], change))
                problem = _misfit(inner, change)
                if problem:
                    wrong.append(f"{name}.{path} {problem}")
    if wrong:
        raise EditError(
            f"slider {slider.name!r} was made for another base than this {type(pipe).__name__}: "
            f"{_listed(wrong, '; ')}"
        )
    if not allow_other_base:
        _check_origin(slider, pipe)
    return places


def describe_base(pipe: Any, components: Iterable[str]) -> dict[str, Any]:
    """What `details["base"]` of a slider holds: for each component its class and fingerprint, as plain JSON.

    Raises:
        EditError: the pipeline has no such component.
    """
    names = list(components)
    found = {}
    for name in names:
        part = component_of(pipe, name, names)
        if part is None:
            raise EditError(f"this {type(pipe).__name__} has no {name}")
        print_ = fingerprint(part)
        found[name] = {"class": type(part).__name__, "config": print_.to_dict()}
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """A module without the adapter layers around it."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape (out, in, *kernel) of a module that a slider can change; None for other kinds."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return tuple(module.weight.shape)
    if is_conv1d(module):
        rows, columns = module.weight.shape  # type: ignore[misc]
        return columns, rows
    return None


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D, a linear map with its weight stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _known(path: str, modules: Mapping[str, nn.Module]) -> str | None:
    """The path that a model has for a path of a slider, whatever release of transformers either is of."""
    return next((one for one in (path, path.removeprefix(TEXT), f"{TEXT}{path}") if one in modules), None)


def _misfit(module: nn.Module, change: ModuleChange) -> str | None:
    shape = weight_shape(module)
    if shape is None:
        return f"is a layer of kind {type(module).__name__}; linear ones and convolutions are changed"
    out, rest = shape[0], math.prod(shape[1:])
    if tuple(change.matrix.shape) != (out, rest) or (len(shape) > 2 and change.kernel != shape[2:]):
        kernel = f" with kernel {change.kernel}" if change.kernel else ""
        return f"has shape {shape}, the change {tuple(change.matrix.shape)}{kernel}"
    return None


def _check_origin(slider: Slider, pipe: Any) -> None:
    """Compare with the fingerprints that the slider carries, where it does."""
    base = slider.details.get("base")
    for name, facts in base.items() if isinstance(base, Mapping) else ():
        kept = facts.get("config") if isinstance(facts, Mapping) else None
        if name not in slider.changes or not isinstance(kept, Mapping) or "samples" not in kept:
            continue
        part = component_of(pipe, name, slider.changes)
        cosine = _cosine(Fingerprint.from_dict(kept).samples, fingerprint(part).samples) if part else None
        if cosine is not None and cosine < RELATED:
            raise EditError(
                f"slider {slider.name!r} was trained on another {name}: shapes agree, but the "
                f"weights of this one have cosine {cosine:.2f} with those (a fine-tune has nearly 1). Load "
                "its base, or give allow_other_base=True"
            )


def _cosine(first: tuple[float, ...], second: tuple[float, ...]) -> float | None:
    """The cosine of two lists of weights; None where it says nothing."""
    norms = math.hypot(*first) * math.hypot(*second) if first and second else 0.0
    if norms == 0.0 or len(first) != len(second):
        return None
    return sum(a * b for a, b in zip(first, second, strict=True)) / norms


def _listed(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return separator.join(names[:LISTED]) + more
