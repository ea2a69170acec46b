"""From an adapter's folder or a live model to a weight update."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters import folder as files
from peft_analysis.updates.adapters import kinds, live, starts, through_peft, vera, whole
from peft_analysis.updates.adapters.attention import output_times
from peft_analysis.updates.adapters.change import Change, entry
from peft_analysis.updates.adapters.copies import copied
from peft_analysis.updates.adapters.folder import PREFIX
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.files import Stored
from peft_analysis.updates.names import listed
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights


class _Collected:
    """Changes by parameter, and what was wrong on the way: told in one error at the end."""

    def __init__(self, foundation: Foundation, source: str) -> None:
        self.foundation = foundation
        self.source = source
        self.changes: dict[str, list[Change]] = defaultdict(list)
        self.wrong: list[str] = []
        self.skipped: dict[str, str] = {}

    def add(self, changes: Iterator[Change]) -> None:
        try:
            for change in changes:
                self.changes[change.name].append(change)
        except UpdateError as error:
            self.wrong.append(str(error))

    def _by_owner(self) -> dict[str, list[Change]]:
        """Changes under the one name of a tied parameter; what was saved apart keeps its own."""
        found: dict[str, list[Change]] = defaultdict(list)
        for name, steps in self.changes.items():
            apart = any(step.kind == "modules_to_save" for step in steps)
            found[name if apart else self.foundation.name(name)] += steps
        return found

    def check(self, path: str, tensors: Mapping[str, Stored]) -> bool:
        """Whether all values are finite."""
        try:
            files.check_finite(tensors, path)
        except UpdateError as error:
            self.wrong.append(str(error))
            return False
        return True

    def refuse_quantised(self) -> None:
        """Raises an `UpdateError` where the base's numbers are codes, to which nothing can be added."""
        coded = self.foundation.quantised()
        if coded:
            raise UpdateError(
                f"{self.foundation.source} is quantised: the numbers of {listed(sorted(coded))} are codes; "
                "give the base as it was before"
            )

    def update(self) -> WeightUpdate:
        if self.wrong:
            raise UpdateError(f"{self.source} cannot be read: {'; '.join(dict.fromkeys(self.wrong))}")
        entries = {name: entry(steps, self.foundation) for name, steps in self._by_owner().items()}
        if not entries:
            raise UpdateError(f"{self.source} changes nothing")
        if all(found.details.get("needs_base") for found in entries.values()):
            raise UpdateError(
                f"{self.source} can be read only beside the base, which all of {listed(sorted(entries))} "
                "need; give it: read_update(base, tuned)"
            )
        return WeightUpdate(entries, base=self.foundation.weights, source=self.source, skipped=self.skipped)


def from_folder(base: "nn.Module | Weights | None", path: Path) -> WeightUpdate:
    """The update of an adapter folder; see `read_adapter`."""
    settings = files.read_settings(path)
    kind = kinds.kind_of(settings)
    tensors = files.read_tensors(path)
    foundation = Foundation.of(base)
    if isinstance(base, nn.Module) and live.is_live(base):
        foundation = live.own_base(base)
    collected = _Collected(foundation, f"the {kind} adapter {path}")
    collected.refuse_quantised()
    if kinds.has_formula(kind, settings) and not settings.get("target_parameters"):
        _by_formula(kind, settings, tensors, collected)
    else:
        _by_peft(kind, settings, tensors, collected)
    return collected.update()


def from_model(
    base: "nn.Module | Weights | None", model: nn.Module, chosen: Sequence[str] | None
) -> WeightUpdate:
    """The update of the adapters in a live model; see `read_adapter`."""
    settings = {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    for name, one in settings.items():
        if chosen is None or name in chosen:
            kinds.kind_of(one)
    if not live.is_live(model):
        raise UpdateError(f"{type(model).__name__} has no adapters in it; were they merged and unloaded?")
    unknown = sorted(set(chosen or ()) - settings.keys())
    if unknown:
        raise UpdateError(f"there is no adapter {listed(unknown)}; the model has {listed(sorted(settings))}")
    inside = base is None or _injected(base)
    foundation = (
        live.own_base(base if isinstance(base, nn.Module) else model) if inside else Foundation.of(base)
    )
    collected = _Collected(foundation, f"the adapters in {type(model).__name__}")
    collected.refuse_quantised()
    working = [settings[name] for name in _names_in_effect(model, chosen) if name in settings]
    taken = {str(one.get("init_lora_weights")).lower() for one in working} & starts.TAKEN
    if inside and taken:
        collected.source += f" upon the base inside it, from which {listed(sorted(taken))} took its start"
    merged = _live_parts(model, settings, chosen, collected)
    for name, kind, stored in live.saved(model, chosen):
        collected.check(name, {name: stored})
        collected.add(whole.changes(name, stored, foundation, kind))
    if not inside:
        own = live.own_base(model)
        collected.add(live.moved(own, foundation, {own.name(name): back for name, back in merged.items()}))
    if inside and any(one.get("bias", "none") != "none" for one in working):
        collected.wrong.append(
            "biases were trained in place, and what they were is not in the model; give the base as it was"
        )
    return collected.update()


def _by_formula(
    kind: str, settings: dict[str, Any], tensors: Mapping[str, Stored], collected: _Collected
) -> None:
    family, roles = kinds.FAMILIES.get(kind, (None, frozenset()))
    short = {name.removeprefix(PREFIX): stored for name, stored in tensors.items()}
    shared = {}
    if kind == "VERA":
        shared = {
            role: short.pop(f"base_model.{role}") for role in vera.SHARED if f"base_model.{role}" in short
        }
        if not shared:
            return _by_peft(kind, settings, tensors, collected)
    parts, rest = files.grouped(short, roles | {whole.TOKENS})
    for raw, held in parts.items():
        part = _part(raw, {**held, **shared}, parts.keys(), settings)
        if whole.TOKENS in held:
            collected.add(whole.tokens(part, collected.foundation))
        if held.keys() & roles and family is not None:
            if kind in ("LORA", "DORA"):
                collected.add(starts.changes(part, collected.foundation))
            collected.add(family(part, collected.foundation))
    _whole(rest, settings, collected)
    return None


def _by_peft(
    kind: str, settings: dict[str, Any], tensors: Mapping[str, Stored], collected: _Collected
) -> None:
    """Puts the adapter into copies of the base's modules by peft, and reads these."""
    foundation = collected.foundation
    if foundation.weights is None:
        raise UpdateError(f"{collected.source} can be read only beside its base; give it")
    try:
        prefix, together = through_peft.known(str(settings["peft_type"]))
        paths, own, rest = through_peft.sorted_out(tensors, prefix)
        stacked = bool(settings.get("target_parameters"))
        lost = [path for path in paths if f"{path}.weight" not in foundation]
        if lost and not stacked:
            raise UpdateError(f"{foundation.source} has no {listed(sorted(lost))}")
        made = through_peft.Rebuilt(settings, own, foundation, paths, together=together or stacked)
    except UpdateError as error:
        collected.wrong.append(str(error))
        return
    _whole(rest, settings, collected)
    if kinds.has_formula(kind, settings):
        for path, layer in made.layers():
            part = live.part_of(layer, path, "default", settings)
            if part is not None:
                collected.add(kinds.FAMILIES[kind][0](part, foundation))
        return
    for path in made.paths:
        make = partial(made.layer, path)
        collected.add(through_peft.changes(make, path, ("default",), kind, foundation, fresh=True))


def _whole(rest: Mapping[str, Stored], settings: Mapping[str, Any], collected: _Collected) -> None:
    for name, stored in rest.items():
        if any(word.startswith(kinds.IGNORED) for word in name.split(".")):
            collected.skipped[name] = "it serves training and is not merged"
            continue
        if not stored.dtype.is_floating_point:
            collected.skipped[whole.base_name(name)] = f"it is of {stored.dtype}: it counts, and is no weight"
            continue
        kind = whole.kind_of(name, settings)
        collected.add(whole.changes(name, stored, collected.foundation, kind))


def _part(raw: str, held: Mapping[str, Stored], every: Collection[str], settings: Mapping[str, Any]) -> Part:
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


def _live_parts(
    model: nn.Module,
    settings: Mapping[str, dict[str, Any]],
    chosen: Sequence[str] | None,
    collected: _Collected,
) -> dict[str, bool]:
    """Adds the changes of all layers.

    Returns:
        The names of parameters with something merged into them, and whether peft can take it out again.
    """
    foundation = collected.foundation
    doubled = live.output_projections(model)
    merged: dict[str, bool] = {}
    for path, layer in live.layers(model):
        if layer.merged:
            back = live.comes_back(layer)
            merged |= {f"{path}.{name}": back for name, _ in layer.get_base_layer().named_parameters()}
        others: list[str] = []
        for adapter in live.in_effect(layer, chosen):
            part = live.part_of(
                layer, path, adapter, settings.get(adapter, {}), output_times() if path in doubled else 1
            )
            if part is None or not collected.check(path, part.tensors):
                continue
            if whole.TOKENS in part.tensors:
                collected.add(whole.tokens(part, foundation))
                continue
            kind = kinds.kind_of(part.settings)
            if kind == "LN_TUNING":
                continue  # its values are among those stored whole
            if kinds.has_formula(kind, part.settings):
                collected.add(kinds.FAMILIES[kind][0](part, foundation))
            else:
                others.append(adapter)
        if others:
            kind = kinds.kind_of(settings[others[0]])
            make = partial(copied, layer)
            collected.add(through_peft.changes(make, path, others, kind, foundation))
    return merged


def _names_in_effect(model: nn.Module, chosen: Sequence[str] | None) -> list[str]:
    found = [name for _, layer in live.layers(model) for name in live.in_effect(layer, chosen)]
    return list(dict.fromkeys(found))


def _injected(base: Any) -> bool:
    return isinstance(base, nn.Module) and live.is_live(base)
