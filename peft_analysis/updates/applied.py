"""An update added to a live model in place: the whole of it, or nothing."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.anatomy import quantised_dtype
from peft_analysis.updates.names import listed, prefix_between

if TYPE_CHECKING:
    from peft_analysis.updates.weight_update import WeightUpdate


class Applied:
    """An update that stands in a model; `remove` puts back every original value to the bit.

    As a context manager it removes the update at the end. Once it is dropped, the originals are gone.

    Attributes:
        names: the parameters that changed, by the model's names.
    """

    def __init__(self, targets: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> None:
        self._targets = dict(targets)
        self._originals = dict(originals)
        self.names = list(originals)

    def remove(self) -> None:
        """Puts the original values back; a second call does nothing."""
        with torch.no_grad():
            for name in list(self._originals):
                self._targets[name].copy_(self._originals[name])
                del self._originals[name]

    def __enter__(self) -> "Applied":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


@dataclass(frozen=True)
class _Target:
    """A tensor to change, and the names of the update's entries that change it."""

    name: str
    value: Tensor
    entries: list[str]


def apply_update(update: "WeightUpdate", model: nn.Module, scale: float | int) -> Applied:
    """Adds `scale` times an update to a model in place; see `WeightUpdate.apply`."""
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UpdateError(f"scale is {scale!r}; give a finite number")
    if not isinstance(model, nn.Module):
        raise UpdateError(f"an update is applied to a torch module, not to a {type(model).__name__}")
    targets = _targets(update, model)
    done = Applied({target.name: target.value for target in targets}, {})
    try:
        with torch.no_grad():
            for target in targets:
                changed = _sum(update, target, scale)
                done._originals[target.name] = target.value.detach().to("cpu", copy=True)
                done.names.append(target.name)
                target.value.copy_(changed)
    except BaseException:
        done.remove()
        raise
    return done


def _targets(update: "WeightUpdate", model: nn.Module) -> list[_Target]:
    """Where each entry goes, checked as far as it can be without a value."""
    owned: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    owned.update({name: value for name, value in buffers.items() if name not in owned})
    to_model = prefix_between(list(update), list(owned))
    first = {id(value): name for name, value in model.named_parameters()}
    tied = {name: first[id(value)] for name, value in owned.items() if first.get(id(value), name) != name}
    found: dict[tuple[Any, ...], _Target] = {}
    absent, wrong = [], []
    for name, entry in update.entries.items():
        place = to_model(name)
        value = owned.get(place)
        if value is None:
            absent.append(name)
        elif reason := _unfit(value, entry.shape):
            wrong.append(f"{place} {reason}")
        elif place in tied and _apart(update, name, tied[place], to_model):
            wrong.append(
                f"{place} is tied to {tied[place]} here, and the update changes it alone: untie them first"
            )
        elif _memory(value) in found:
            found[_memory(value)].entries.append(name)
        else:
            found[_memory(value)] = _Target(place, value, [name])
    if absent or wrong:
        parts = [f"it has no {listed(absent)}"] if absent else []
        parts += [listed(wrong, "; ")] if wrong else []
        raise UpdateError(
            f"{update.source} does not fit {type(model).__name__}: {'; '.join(parts)}. Give the model that "
            "the update was read for, or a part of the update: update.only(...)"
        )
    return list(found.values())


def _memory(value: Tensor) -> tuple[Any, ...]:
    """What two names of one tensor have in common, be they one parameter or two that share their memory."""
    if value.is_meta or not value.numel():
        return (id(value),)
    return (value.device, value.data_ptr(), value.shape, value.stride())


def _apart(update: "WeightUpdate", name: str, first: str, to_model: Callable[[str], str]) -> bool:
    """Whether the update's base has both of two tied names, and only the second of them changes."""
    if update.base is None or name not in update.base:
        return False
    return not any(to_model(other) == first for other in update) and any(
        to_model(other) == first for other in update.base
    )


def _unfit(value: Tensor, shape: torch.Size) -> str | None:
    if value.is_meta:
        return "is on the meta device; load the model without offloading"
    if quantised_dtype(value.dtype) or hasattr(value, "quant_state"):
        return f"is stored as {value.dtype}, codes that need a scale; load the model in full precision"
    if value.dtype.is_complex:
        return f"is complex ({value.dtype})"
    if value.shape != shape:
        return f"has shape {tuple(value.shape)}, the update {tuple(shape)}"
    return None


def _sum(update: "WeightUpdate", target: _Target, scale: float | int) -> Tensor:
    """The parameter's new value; NaN, overflow and entries of tied parameters that disagree raise."""
    value = target.value
    difference = update.dense(target.entries[0])
    for other in target.entries[1:]:
        if not torch.equal(difference, update.dense(other)):
            raise UpdateError(
                f"{target.entries[0]} and {other} are one parameter in this model (tied), and the update "
                "changes them differently; untie them, or leave one out: update.only(names)"
            )
    if difference.shape != value.shape:
        raise UpdateError(
            f"{target.name} has shape {tuple(value.shape)}, its difference {tuple(difference.shape)}"
        )
    wide = torch.promote_types(torch.promote_types(value.dtype, difference.dtype), torch.float32)
    added = difference.to(value.device, wide) * scale
    changed = added.add_(value.to(wide)).to(value.dtype)
    if not torch.isfinite(changed).all() and not _only_where_it_was(changed, value):
        raise UpdateError(
            f"{target.name} would hold NaN or infinite values; the update holds them, or {value.dtype} "
            f"cannot hold the sum at scale {scale:g}"
        )
    return changed


def _only_where_it_was(changed: Tensor, value: Tensor) -> bool:
    """Masks may hold −∞ that the update leaves alone."""
    return bool((torch.isfinite(changed) | (changed == value)).all())
