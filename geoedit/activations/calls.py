"""How a model is called: what its forward takes, where its inputs must lie, and how it is left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Names that the forward of the model's class takes (placement tools may wrap the model's own)."""
    return frozenset(_parameters(model))


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of the model must lie: where accelerate runs it, else where its first weight is."""
    placed = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if placed is not None:
        return torch.device(placed)
    for parameter in model.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    return torch.device("cpu")


@contextmanager
def reading(model: nn.Module) -> Iterator[None]:
    """Run a model in evaluation mode and without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def takes_anything(model: nn.Module) -> bool:
    """Whether the model's forward takes keyword arguments that it does not name."""
    return any(found.kind is inspect.Parameter.VAR_KEYWORD for found in _parameters(model).values())


def call_arguments(model: nn.Module, inputs: Mapping[str, Tensor], *, ready: bool) -> dict[str, Any]:
    """Inputs on their device, without a cache; names that the forward does not take go, unless `ready`."""
    accepted, device, free = accepted_arguments(model), input_device(model), takes_anything(model)
    found: dict[str, Any] = {
        name: part.to(device) for name, part in inputs.items() if ready or free or name in accepted
    }
    return {**found, "use_cache": False} if "use_cache" in accepted else found


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    base: Any = model
    while callable(getattr(base, "get_base_model", None)):  # an adapter's wrapper, which passes everything on
        base = base.get_base_model()
    return inspect.signature(type(base).forward).parameters
