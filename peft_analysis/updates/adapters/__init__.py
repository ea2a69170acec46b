"""Adapters of peft as weight updates: one family a file."""

import os
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters import folder as files
from peft_analysis.updates.adapters import live, lora, whole
from peft_analysis.updates.adapters.attention import output_times
from peft_analysis.updates.adapters.change import Change, entry
from peft_analysis.updates.adapters.folder import is_adapter, listed
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.files import Stored
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights

__all__ = ["is_adapter", "is_live", "read_adapter"]

is_live = live.is_live
Family = Callable[[Part, Foundation], Iterator[Change]]
FAMILIES: dict[str, tuple[Family, frozenset[str]]] = {"LORA": (lora.changes, lora.ROLES)}


def read_adapter(
    base: "nn.Module | Weights | None", source: "nn.Module | str | os.PathLike[str]"
) -> WeightUpdate:
    """An adapter of peft as a weight update.

    Args:
        base: the weights that it was trained on; None for an adapter alone, or for the base of a live model.
        source: an adapter folder, or a live model with adapters in it.

    Raises:
        UpdateError: for another base, values that are not finite, rank or alpha 0, a file that is cut short,
            a quantised base, or a kind that is no change of weights.
    """
    if isinstance(source, nn.Module):
        return _from_model(base, source)
    return _from_folder(base, Path(source))


def _from_folder(base: "nn.Module | Weights | None", path: Path) -> WeightUpdate:
    settings = files.read_settings(path)
    family, roles = _family(settings, str(path))
    tensors = files.read_tensors(path)
    foundation = Foundation.of(base)
    parts, rest = files.grouped(tensors, roles)
    found = [_part(module, held, set(parts), settings) for module, held in parts.items()]
    return _update(found, family, rest, settings, foundation, source=f"the adapter {path}")


def _part(raw: str, held: Mapping[str, Stored], every: Collection[str], settings: dict[str, Any]) -> Part:
    """A module's tensors with the names of the base; `raw` is the path in the file.

    The two projections of nn.MultiheadAttention are saved as one adapted module inside another.
    """
    inner = ".base_layer.out_proj"
    if f"{raw}{inner}" in every:
        return Part(whole.base_name(raw), held, settings, parameter="in_proj_weight")
    if raw.endswith(inner):
        outer = whole.base_name(raw.removesuffix(inner))
        return Part(f"{outer}.out_proj", held, settings, tuned_path=outer, times=output_times())
    return Part(whole.base_name(raw), held, settings)


def _from_model(base: "nn.Module | Weights | None", model: nn.Module) -> WeightUpdate:
    foundation = live.own_base(model) if base is None else Foundation.of(base)
    found, family, settings = [], None, {}
    doubled = live.output_projections(model)
    for path, layer in live.layers(model):
        for adapter in live.active(layer):
            settings = model.peft_config[adapter].to_dict()
            family, _ = _family(settings, adapter)
            part = live.part_of(layer, path, adapter, settings, output_times() if path in doubled else 1)
            if part is not None:
                found.append(part)
    if family is None:
        raise UpdateError(f"{type(model).__name__} has no adapters in it")
    return _update(found, family, {}, settings, foundation, source=f"the adapter in {type(model).__name__}")


def _update(
    parts: list[Part],
    family: Family,
    rest: Mapping[str, Any],
    settings: Mapping[str, Any],
    foundation: Foundation,
    *,
    source: str,
) -> WeightUpdate:
    wrong: list[str] = []
    changes: dict[str, list[Change]] = defaultdict(list)
    for part in parts:
        try:
            for change in family(part, foundation):
                changes[change.name].append(change)
        except UpdateError as error:
            wrong.append(str(error))
    try:
        for change in whole.changes(rest, foundation, settings):
            changes[change.name].append(change)
    except UpdateError as error:
        wrong.append(str(error))
    if wrong:
        raise UpdateError(f"{source} does not fit {foundation.source}: {listed(wrong, 8)}")
    entries = {name: entry(steps, foundation) for name, steps in changes.items()}
    return WeightUpdate(entries, base=foundation.weights, source=source)


def _family(settings: Mapping[str, Any], source: str) -> tuple[Family, frozenset[str]]:
    kind = str(getattr(settings["peft_type"], "value", settings["peft_type"]))
    if kind not in FAMILIES:
        raise UpdateError(f"{source} is of kind {kind}; known kinds: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind]
