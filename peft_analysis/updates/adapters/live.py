"""A live model with adapters in it: its own base, and what each adapter holds."""

import copy
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.copies import computed
from peft_analysis.updates.adapters.foundation import Foundation, device_of, wide
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.adapters.whole import TOKENS
from peft_analysis.updates.entry import Layout
from peft_analysis.updates.files import Stored
from peft_analysis.updates.names import listed
from peft_analysis.updates.weights import Weights


def is_live(model: nn.Module) -> bool:
    """Whether there are adapters in a module."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())


def core(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, adapters included."""
    if not hasattr(model, "peft_config") or not isinstance(getattr(model, "base_model", None), nn.Module):
        return model
    inner = getattr(model.base_model, "model", None)
    return inner if hasattr(model.base_model, "peft_config") and isinstance(inner, nn.Module) else model


def places(module: nn.Module, base: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every module of the base inside a live model by its path in the base, and the adapters' layers.

    A layer stands for what it wraps and comes before it; what belongs to the adapter is left out.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    yield base, module
    if isinstance(module, BaseTunerLayer):
        yield from places(_wrapped(module), base)
    elif isinstance(module, ModulesToSaveWrapper):
        yield from places(module.original_module, base)
    elif isinstance(module, TrainableTokensWrapper):
        yield from places(module.token_adapter, base)
    else:
        for name, child in module.named_children():
            yield from places(child, f"{base}.{name}" if base else name)


def _wrapped(layer: Any) -> nn.Module:
    """What a layer wraps; LN tuning has swapped it with its own where it is merged."""
    if layer.merged and hasattr(layer, "ln_tuning_layers"):
        return layer.ln_tuning_layers[layer.merged_adapters[0]]
    return layer.base_layer


def own_base(model: nn.Module) -> Foundation:
    """The base inside a live model by the names that it had before; merged adapters are taken out again."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    root = core(model)
    list(root.named_modules())  # nn.MultiheadAttention gets its parameters back when it is asked for modules
    readers: dict[str, Read] = {}
    values: dict[str, Tensor] = {}
    layouts: dict[str, Layout] = {}
    tied: dict[str, str] = {}
    first: dict[int, str] = {}
    merged: dict[str, Callable[[str], Tensor]] = {}
    for path, module in places(root):
        if isinstance(module, BaseTunerLayer):
            if module.merged and path not in merged and not hasattr(module, "ln_tuning_layers"):
                merged[path] = partial(_unmerged, module, "")
                if isinstance(module.get_base_layer(), nn.MultiheadAttention):
                    merged[f"{path}.out_proj"] = partial(_unmerged, module, "out_proj")
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            continue
        for name, value in (*module.named_parameters(recurse=False), *_buffers(module)):
            full = f"{path}.{name}" if path else name
            owner = first.setdefault(id(value), full)
            if owner != full:
                tied[full] = owner
                if path in merged:
                    readers[owner] = partial(merged[path], name)
                continue
            values[full] = value
            readers[full] = partial(merged[path], name) if path in merged else value.detach
            if type(module).__name__ == "Conv1D":
                layouts[full] = "in_out"
            elif isinstance(module, nn.Embedding):
                layouts[full] = "other"
    weights = Weights(
        readers,
        shapes={name: value.shape for name, value in values.items()},
        dtypes={name: value.dtype for name, value in values.items()},
        layouts=layouts,
        tied=tied,
        source=f"the base inside {type(root).__name__}",
    )
    return Foundation(weights, device=device_of(root))


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapters' layers, each with the path of what it wraps in the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in places(core(model)):
        if isinstance(module, BaseTunerLayer):
            yield path, module


def output_projections(model: nn.Module) -> set[str]:
    """The paths of the output projections inside `nn.MultiheadAttention`."""
    return {
        f"{path}.out_proj"
        for path, module in places(core(model))
        if isinstance(module, nn.MultiheadAttention)
    }


def in_effect(layer: Any, chosen: Collection[str] | None) -> list[str]:
    """The adapters of a layer that count: those chosen, or those merged, or else those switched on."""
    if chosen is not None:
        return list(chosen)
    return list(dict.fromkeys(layer.merged_adapters if layer.merged else layer.active_adapters))


def saved(model: nn.Module, chosen: Collection[str] | None) -> Iterator[tuple[str, str, Stored]]:
    """The values of modules to save and of LN tuning: their names in the base, kinds and values."""
    from peft.utils.other import ModulesToSaveWrapper

    for path, module in places(core(model)):
        copies: Any
        if isinstance(module, ModulesToSaveWrapper):
            adapters = list(chosen) if chosen is not None else list(module.active_adapters)
            kind, copies = "modules_to_save", module.modules_to_save
        elif hasattr(module, "ln_tuning_layers"):
            adapters = in_effect(module, chosen)
            kind, copies = "ln_tuning", module.ln_tuning_layers
        else:
            continue
        for adapter in adapters:
            if adapter not in copies:
                continue
            trained: Any = (
                module.base_layer if adapter in getattr(module, "merged_adapters", ()) else copies[adapter]
            )
            for name, value in (*trained.named_parameters(), *_buffers(trained, recurse=True)):
                yield f"{path}.{name}", kind, Stored(value.shape, value.dtype, value.detach)


def part_of(layer: Any, path: str, adapter: str, settings: Mapping[str, Any], times: int = 1) -> Part | None:
    """What an adapter holds in one layer; None if it is not in that layer."""
    if adapter in getattr(layer, TOKENS, {}):
        if layer.tied_adapter:
            return None
        rows = layer.trainable_tokens_delta[adapter]
        stored = {TOKENS: Stored(rows.shape, rows.dtype, rows.detach)}
        return Part(path, stored, {"token_indices": layer.token_indices[adapter]}, layer=layer)
    tensors = {}
    held = (*layer.named_parameters(remove_duplicate=False), *layer.named_buffers(remove_duplicate=False))
    for name, value in held:
        words = name.split(".")
        if words[0] != "base_layer" and adapter in words[1:]:
            at = words.index(adapter, 1)
            role = ".".join(words[:at] + words[at + 1 :])
            tensors[role] = Stored(value.shape, value.dtype, value.detach)
    if not tensors:
        return None
    scaling = getattr(layer, "scaling", {}).get(adapter)
    parameter = getattr(layer, "parameter_name", None)
    if parameter is None:
        attention = isinstance(layer.get_base_layer(), nn.MultiheadAttention)
        parameter = "in_proj_weight" if attention else "weight"
    return Part(
        path,
        tensors,
        settings,
        scaling=None if scaling is None else float(scaling),
        parameter=parameter,
        times=times,
        layer=layer,
        adapter=adapter,
    )


def moved(own: Foundation, given: Foundation, merged: Mapping[str, bool]) -> Iterator[Change]:
    """Where the base inside a live model is no longer the one that was given.

    Biases are trained in place; PiSSA and its like take their start off the base.

    Args:
        own: the base inside the model.
        given: the base as it was before.
        merged: parameters into which an adapter is merged, and whether peft can take it out again. Without it
            they are known but to rounding; where it stays in, they are taken to be as given.

    Raises:
        UpdateError: for names that the given base lacks or has in another shape.
    """
    inside, before = own.weights, given.weights
    if inside is None or before is None:
        return
    coded = set(own.quantised())
    lost = [name for name in inside if name not in before and name not in coded]
    other = [
        name
        for name in inside
        if name in before and name not in coded and inside.shape(name) != before.shape(name)
    ]
    if lost or other:
        raise UpdateError(
            f"{given.source} is not the base of this model: "
            + "; ".join(
                f"{what}: {listed(sorted(names))}"
                for what, names in (("it lacks", lost), ("of another shape", other))
                if names
            )
        )
    for name in inside:
        if name in coded or not merged.get(name, True):
            continue
        if not _same(inside[name], before[name], name in merged):
            yield Change(
                name=before.name_of(name),
                shape=before.shape(name),
                delta=partial(_from, own, name),
                kind="base",
                layout=before.layout(name),
                needs_base=True,
                rounded=inside.dtype(name),
                moves_start=True,
            )


def _from(own: Foundation, name: str, current: Read, start: Read) -> Tensor:
    base = current()
    return wide(own.stored(name)).to(base) - base


def _same(inside: Tensor, before: Tensor, nearly: bool) -> bool:
    before = before.to(device=inside.device, dtype=inside.dtype)
    if torch.equal(inside, before):
        return True
    tolerance = max(4 * torch.finfo(inside.dtype).eps, 1e-4)
    return nearly and bool((wide(inside) - wide(before)).norm() <= tolerance * wide(before).norm())


def _buffers(module: nn.Module, recurse: bool = False) -> list[tuple[str, Tensor]]:
    """Floating-point buffers that are saved with a model."""
    kept = module.state_dict(keep_vars=True) if recurse else None
    return [
        (name, value)
        for name, value in module.named_buffers(recurse=recurse)
        if value.is_floating_point()
        and (name in kept if kept is not None else name not in module._non_persistent_buffers_set)
    ]


def comes_back(layer: Any) -> bool:
    """Whether peft can take a merged adapter out again; OSF changes the weight for good."""
    return not hasattr(layer, "osf_svd_params")


def _unmerged(layer: Any, inner: str, name: str) -> Tensor:
    """A parameter of what a layer wraps, with everything taken out that was merged into it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not comes_back(layer):
        raise UpdateError("OSF changes merged weights for good; give the base as it was")
    single = copy.deepcopy(layer, computed(layer))
    module: Any = single
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while isinstance(module, BaseTunerLayer):  # one kind of adapter may wrap another
            if module.merged:
                module.unmerge()
            module = module.base_layer  # type: ignore[attr-defined]
    if inner:
        module = module.get_submodule(inner)
        module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    value = getattr(module, name)
    return value.detach()
