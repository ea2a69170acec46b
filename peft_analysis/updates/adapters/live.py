"""A live model with adapters in it: its own base, and what each adapter holds."""

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.files import Stored
from peft_analysis.updates.weights import Weights


def is_live(model: nn.Module) -> bool:
    """Whether there are adapters in a module."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in model.modules())


def core(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, adapters included."""
    inner = getattr(model, "base_model", None)
    if inner is not None and hasattr(model, "peft_config"):
        return getattr(inner, "model", inner)
    return model


def places(module: nn.Module, live: str = "", base: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """Every module of the base inside a live model: its path there, its path in the base, itself.

    An adapter's layer stands for the layer that it wraps; what belongs to the adapter is left out.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    yield live, base, module
    if isinstance(module, BaseTunerLayer):
        yield from places(module.base_layer, _join(live, "base_layer"), base)
    elif isinstance(module, ModulesToSaveWrapper):
        yield from places(module.original_module, _join(live, "original_module"), base)
    elif isinstance(module, TrainableTokensWrapper):
        yield from places(module.token_adapter, _join(live, "token_adapter"), base)
    else:
        for name, child in module.named_children():
            yield from places(child, _join(live, name), _join(base, name))


def own_base(model: nn.Module) -> Foundation:
    """The base inside a live model, under the names that it had before: merged adapters are taken out again.

    Raises:
        UpdateError: for a layer whose weights are quantised.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    root = core(model)
    list(root.named_modules())  # nn.MultiheadAttention gets its parameters back when it is asked for modules
    readers, shapes, dtypes, layouts = {}, {}, {}, {}
    first: dict[int, str] = {}
    aliases = {}
    merged: dict[str, Any] = {}
    for _, path, module in places(root):
        if isinstance(module, BaseTunerLayer):
            if module.merged:
                merged[path] = module
            continue
        for name, value in module.named_parameters(recurse=False):
            full = _join(path, name)
            owner = first.setdefault(id(value), full)
            if owner != full:
                aliases[full] = owner
                continue
            readers[full] = partial(_unmerged, merged[path], name) if path in merged else value.detach
            shapes[full], dtypes[full] = value.shape, value.dtype
            if type(module).__name__ == "Conv1D":
                layouts[full] = "in_out"
            elif isinstance(module, nn.Embedding):
                layouts[full] = "other"
    weights = Weights(
        readers, shapes=shapes, dtypes=dtypes, layouts=layouts, source=f"the base of {type(root).__name__}"
    )
    devices = {parameter.device for parameter in root.parameters()}
    return Foundation(weights, aliases=aliases, device=devices.pop() if len(devices) == 1 else None)


def layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The adapters' layers, each with the path of what it wraps in the base."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for _, path, module in places(core(model)):
        if isinstance(module, BaseTunerLayer):
            yield path, module


def output_projections(model: nn.Module) -> set[str]:
    """The paths of the output projections inside `nn.MultiheadAttention`."""
    return {
        f"{path}.out_proj"
        for _, path, module in places(core(model))
        if isinstance(module, nn.MultiheadAttention)
    }


def active(layer: Any) -> list[str]:
    """The adapters that are in effect: those merged, or else those that are switched on."""
    return list(layer.merged_adapters) if layer.merged else list(layer.active_adapters)


def part_of(layer: Any, path: str, adapter: str, settings: dict[str, Any], times: int = 1) -> Part | None:
    """What an adapter holds in one layer; None if it is not in that layer."""
    tensors = {}
    for name, value in layer.state_dict(keep_vars=True).items():
        words = name.split(".")
        if words[0] != "base_layer" and adapter in words[1:]:
            at = words.index(adapter, 1)
            tensors[".".join(words[:at] + words[at + 1 :])] = Stored(value.shape, value.dtype, value.detach)
    if not tensors:
        return None
    parameter = getattr(layer, "parameter_name", None)
    if parameter is None:
        attention = isinstance(layer.get_base_layer(), nn.MultiheadAttention)
        parameter = "in_proj_weight" if attention else "weight"
    scaling = getattr(layer, "scaling", {}).get(adapter)
    return Part(path, tensors, settings, scaling=scaling, parameter=parameter, times=times)


def _unmerged(layer: Any, name: str) -> Tensor:
    single = copy.deepcopy(layer)
    with torch.no_grad():
        single.unmerge()
    value = getattr(single.get_base_layer(), name)
    if not isinstance(value, Tensor):
        raise UpdateError(f"a merged layer of type {type(layer).__name__} has no tensor {name}")
    return value.detach()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
