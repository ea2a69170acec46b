"""Copies of peft's layers, and of models, that may be changed."""

import copy
from typing import Any

from torch import Tensor, nn


def copied(layer: Any) -> Any:
    """A live layer's copy, with nothing merged."""
    single = copy.deepcopy(layer, computed(layer))
    single.merged_adapters = []
    return single


def computed(layer: nn.Module) -> dict[int, Any]:
    """What `deepcopy` shall take for tensors that a layer keeps from a computation, and refuses to copy."""
    found = {}
    waiting: list[Any] = [vars(module) for module in layer.modules()]
    while waiting:
        for value in waiting.pop().values():
            if isinstance(value, Tensor) and not value.is_leaf:
                found[id(value)] = value.detach().clone()
            elif isinstance(value, dict):
                waiting.append(value)
    return found


def skeleton(module: nn.Module) -> nn.Module:
    """A model that shares all tensors with another, and that peft may put its layers into."""
    made = copy.copy(module)
    made.__dict__.update(
        {name: copy.copy(held) for name, held in vars(module).items() if isinstance(held, dict)}
    )
    for name, child in module.named_children():
        made._modules[name] = skeleton(child)
    for name, value in module.named_parameters(recurse=False):
        made._parameters[name] = nn.Parameter(value.detach(), requires_grad=False)
    return made
