"""LoRA layers in training: put into modules, scaled row by row, switched off, read out and taken away."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.errors import EditError
from geoedit.sliders.slider import ModuleChange
from manifolds import LowRank

ADAPTER = "slider"
"""The name under which peft keeps the LoRA that is being trained."""


class _Rows:
    """The scale of each row, read by the hooks of every layer of a component; None leaves the branch."""

    def __init__(self) -> None:
        self.scales: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        scales = self.scales
        if scales is None:
            return output
        times, rest = divmod(output.shape[0], scales.shape[0])
        if rest or not times:
            raise EditError(
                f"row_scales: {scales.shape[0]} scales for a layer whose input has {output.shape[0]} rows; "
                "give one scale for each row of the forward pass"
            )
        scales = scales.repeat(times)  # the halves of guidance stand one after the other
        return output * scales.to(output.dtype).reshape(-1, *(1,) * (output.ndim - 1))


class Adapters:
    """Fresh LoRA layers of peft in modules that stay frozen.

    The weights are kept in float32, whatever the module computes in. The first factor is drawn as peft draws
    it (uniform on ±1/√fan-in), from the generator; the second is zero, so that training starts at the base.

    Args:
        components: the modules by their names in the pipeline.
        targets: the paths of the layers in each component (see `training.targets.target_paths`).
        rank: the rank of every layer that no pattern names.
        alpha: the layer's change is alpha / rank · B A; the rank if None.
        rank_pattern: ranks by regular expression on the layer's path, as in peft.
        alpha_pattern: alphas, likewise.
        generator: draws the first factors, on the CPU.

    Raises:
        EditError: a component carries adapters already, has no such layers, or a rank is not positive.
    """

    def __init__(
        self,
        components: Mapping[str, nn.Module],
        targets: Mapping[str, Iterable[str]],
        *,
        rank: int = 4,
        alpha: float | int | None = None,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float | int] | None = None,
        generator: torch.Generator,
    ) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        if min([rank, *(rank_pattern or {}).values()]) < 1:
            raise EditError(f"Adapters: rank {rank} with {dict(rank_pattern or {})}; a rank is 1 or more")
        self.components = dict(components)
        self.layers: dict[str, dict[str, Any]] = {}
        self._frozen = [
            (p, p.requires_grad) for module in self.components.values() for p in module.parameters()
        ]
        for name, module in self.components.items():
            paths = list(targets[name])
            if not paths:
                raise EditError(f"Adapters: no layer of {name!r} is a target; choose other targets")
            if any(True for _ in lora_layers(module)):
                raise EditError(f"Adapters: {name!r} carries adapters already; fuse or unload them first")
            config = LoraConfig(
                r=rank,
                lora_alpha=rank if alpha is None else alpha,  # type: ignore[arg-type]
                target_modules="|".join(re.escape(path) for path in paths),
                rank_pattern=dict(rank_pattern or {}),
                alpha_pattern=dict(alpha_pattern or {}),
            )
            with torch.random.fork_rng():  # peft draws globally; what it draws is replaced below
                inject_adapter_in_model(config, module, adapter_name=ADAPTER)
            self.layers[name] = {path: module.get_submodule(path) for path in paths}
            self._begin(name, generator)

    def _begin(self, name: str, generator: torch.Generator) -> None:
        """Float32 factors drawn from the generator, all else frozen, one hook for the scales of rows."""
        self.components[name].requires_grad_(False)
        rows = _Rows()
        for layer in self.layers[name].values():
            down, up = _factors(layer)
            bound = 1 / math.sqrt(down.weight[0].numel())
            drawn = torch.empty(down.weight.shape, dtype=torch.float32).uniform_(
                -bound, bound, generator=generator
            )
            down.weight.data = drawn.to(down.weight.device)
            up.weight.data = torch.zeros_like(up.weight, dtype=torch.float32)
            down.weight.requires_grad_(True)
            up.weight.requires_grad_(True)
            up.register_forward_hook(rows)
            layer.slider_rows = rows

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every factor under "component.path.lora_A.weight" or "….lora_B.weight", in a fixed order."""
        for name, layers in self.layers.items():
            for path, layer in layers.items():
                down, up = _factors(layer)
                yield f"{name}.{path}.lora_A.weight", down.weight
                yield f"{name}.{path}.lora_B.weight", up.weight

    def parameters(self) -> list[nn.Parameter]:
        """Every factor, the first and the second of each layer in turn."""
        return [parameter for _, parameter in self.named_parameters()]

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """The second and the first factor of each layer (B, A): the change is scaling · B A."""
        return [
            (_factors(layer)[1].weight, _factors(layer)[0].weight)
            for layers in self.layers.values()
            for layer in layers.values()
        ]

    def state(self) -> dict[str, Tensor]:
        """Copies of all factors."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave.

        Raises:
            EditError: a factor is missing or has another shape.
        """
        for name, parameter in self.named_parameters():
            if name not in state or state[name].shape != parameter.shape:
                found = tuple(state[name].shape) if name in state else "missing"
                raise EditError(f"Adapters: {name} is {found}, {tuple(parameter.shape)} is needed")
            parameter.copy_(state[name])

    def changes(self) -> dict[str, dict[str, ModuleChange]]:
        """What the layers add to their weights at scale 1, as a slider holds it."""
        return {
            name: {path: _change(layer) for path, layer in layers.items()}
            for name, layers in self.layers.items()
        }

    def remove(self) -> None:
        """Take every layer away again and leave the modules as they were before, to the bit."""
        for name, layers in self.layers.items():
            module = self.components[name]
            for path, layer in layers.items():
                parent, _, child = path.rpartition(".")
                setattr(module.get_submodule(parent), child, layer.base_layer)
            if hasattr(module, "peft_config"):
                del module.peft_config
        for parameter, required in self._frozen:
            parameter.requires_grad_(required)
        self.layers = {}

    def __enter__(self) -> Adapters:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()


def lora_layers(modules: nn.Module | Iterable[nn.Module]) -> Iterator[nn.Module]:
    """The layers of peft in one or several modules."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in [modules] if isinstance(modules, nn.Module) else modules:
        yield from (layer for layer in module.modules() if isinstance(layer, BaseTunerLayer))


@contextmanager
def row_scales(
    modules: nn.Module | Iterable[nn.Module], scales: Float[Tensor, " rows"] | None
) -> Iterator[None]:
    """Within the context, each row of a forward pass has the adapter at its own scale.

    What a layer's adapter adds to row i is multiplied by ``scales[i]``; the rows are the first dimension of
    every layer's input. A pass of a multiple of so many rows (the two halves of guidance) takes the scales
    again and again. None is scale 1 for all. Scales may be differentiable.

    Args:
        modules: modules with layers that `Adapters` put there.
        scales: a scale for each row.

    Raises:
        EditError: no such layers; at the forward pass, rows that are no multiple of the scales.
    """
    states = {id(rows): rows for layer in lora_layers(modules) if (rows := _rows_of(layer)) is not None}
    if not states:
        raise EditError("row_scales: the modules have no layers that `Adapters` put there")
    before = [(rows, rows.scales) for rows in states.values()]
    for rows in states.values():
        rows.scales = scales
    try:
        yield
    finally:
        for rows, scales_before in before:
            rows.scales = scales_before


@contextmanager
def adapter_off(modules: nn.Module | Iterable[nn.Module]) -> Iterator[None]:
    """Within the context, the modules compute as before: adapters are skipped, not multiplied by zero.

    peft's own switch (`enable_adapters`) also freezes the factors, which would cut a graph that is still in
    use; here only the flag that the forward pass reads is turned.
    """
    layers: list[Any] = list(lora_layers(modules))
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


@contextmanager
def checkpointing(module: nn.Module) -> Iterator[None]:
    """Within the context, gradient checkpointing in which a recomputed block sees its own forward's scales.

    The backward pass computes blocks again after `row_scales` has ended; the scales are remembered with the
    block. The flags and functions of the module's blocks are put back afterwards.

    Raises:
        EditError: the module has no gradient checkpointing.
    """
    from torch.utils.checkpoint import checkpoint

    parts: list[Any] = [part for part in module.modules() if hasattr(part, "gradient_checkpointing")]
    if not parts:
        raise EditError(f"{type(module).__name__} has no gradient checkpointing; train without it")

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        found = (rows for layer in lora_layers(module) if (rows := _rows_of(layer)) is not None)
        scales = next((rows.scales for rows in found), None)
        return nullcontext(), row_scales(module, scales)

    function = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    before = [(part, dict(part.__dict__)) for part in parts]
    for part in parts:
        part._gradient_checkpointing_func = function
        part.gradient_checkpointing = True
    try:
        yield
    finally:
        for part, attributes in before:
            for name in ("_gradient_checkpointing_func", "gradient_checkpointing"):
                if name in attributes:
                    part.__dict__[name] = attributes[name]
                else:
                    part.__dict__.pop(name, None)


def _rows_of(layer: nn.Module) -> _Rows | None:
    rows = layer.__dict__.get("slider_rows")
    return rows if isinstance(rows, _Rows) else None


def _factors(layer: Any) -> tuple[Any, Any]:
    return layer.lora_A[ADAPTER], layer.lora_B[ADAPTER]


def _change(layer: Any) -> ModuleChange:
    """Scaling · B A as (out, in · kernel), detached copies."""
    down, up = (factor.weight.detach() for factor in _factors(layer))
    scaling = layer.scaling[ADAPTER]
    matrix = LowRank.from_factors(up.flatten(1) * scaling, down.flatten(1).clone())
    return ModuleChange(matrix, tuple(down.shape[2:]))
