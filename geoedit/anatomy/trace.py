"""Watching modules run: which tensors go in and come out, in which order."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

PREFERRED_ARGUMENTS = ("hidden_states", "input", "x", "src", "hidden_state", "inputs_embeds", "input_ids")


def first_tensor(value: Any) -> Tensor | None:
    """Return the value itself, or the first tensor of a tuple, list, mapping or ModelOutput, or None."""
    if isinstance(value, Tensor):
        return value
    items: Any = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    )
    return next((found for item in items if (found := first_tensor(item)) is not None), None)


def replace_first_tensor(value: Any, new: Tensor) -> Any:
    """Return `value` with the tensor that `first_tensor` finds in it replaced by `new`."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        key = next(k for k, v in value.items() if first_tensor(v) is not None)
        result = copy.copy(value)
        result[key] = replace_first_tensor(value[key], new)  # type: ignore[index]
        return result
    place = next(i for i, v in enumerate(value) if first_tensor(v) is not None)
    items = [replace_first_tensor(v, new) if i == place else v for i, v in enumerate(value)]
    if hasattr(value, "_fields"):
        return type(value)(*items)
    return type(value)(items)


def _place(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | str | None:
    for i, value in enumerate(args):
        if isinstance(value, Tensor):
            return i
    for name in (*PREFERRED_ARGUMENTS, *kwargs):
        if isinstance(kwargs.get(name), Tensor):
            return name
    return None


def input_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return a call's first tensor argument: positional, else by the usual keywords, else by any keyword."""
    place = _place(args, kwargs)
    if place is None:
        return None
    tensor: Tensor = args[place] if isinstance(place, int) else kwargs[place]
    return tensor


def replace_input(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], new: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a call's arguments with the tensor that `input_tensor` finds replaced by `new`, everywhere."""
    place = _place(args, kwargs)
    if place is None:
        return args, dict(kwargs)
    old = args[place] if isinstance(place, int) else kwargs[place]
    return tuple(new if a is old else a for a in args), {k: new if v is old else v for k, v in kwargs.items()}


def own_arguments(value: Any) -> Any:
    """Copy what a second run of a call could find changed: key-value caches and the like; tensors stay."""
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)(own_arguments(item) for item in value)
    if isinstance(value, dict):
        return {key: own_arguments(item) for key, item in value.items()}
    if hasattr(value, "update") and not isinstance(value, (Tensor, nn.Module)):
        return copy.deepcopy(value)
    return value


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module in a forward pass: its path, and copies of its first input and output tensors."""

    path: str
    module: nn.Module
    turn: int
    input: Tensor | None
    output: Tensor | None


@dataclass
class Recording:
    """All recorded calls, in the order in which they ended."""

    calls: list[Call] = field(default_factory=list)
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    _turns: dict[str, int] = field(default_factory=dict)
    _inputs: list[Tensor | None] = field(default_factory=list)

    def by_path(self) -> dict[str, list[Call]]:
        """Return the calls of each module path."""
        result: dict[str, list[Call]] = {}
        for call in self.calls:
            result.setdefault(call.path, []).append(call)
        return result


def _copied(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().clone()


@contextlib.contextmanager
def recording(
    modules: Mapping[str, nn.Module],
    *,
    keep_arguments: frozenset[str] = frozenset(),
    change: Callable[[str, int, Tensor], Tensor | None] | None = None,
) -> Iterator[Recording]:
    """Record calls of `modules` inside the `with`; `change(path, turn, output)` may give another output.

    Hooks come off again whatever happens inside.
    """
    record = Recording()
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            record._inputs.append(_copied(input_tensor(args, kwargs)))
            if path in keep_arguments and path not in record.arguments:
                state = input_tensor(args, kwargs)
                if state is not None:
                    args, kwargs = replace_input(args, kwargs, state.detach().clone())
                record.arguments[path] = (own_arguments(args), own_arguments(kwargs))

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            tensor = first_tensor(output)
            turn = record._turns.get(path, 0)
            record._turns[path] = turn + 1
            new = change(path, turn, tensor) if change is not None and tensor is not None else None
            record.calls.append(
                Call(path, module, turn, record._inputs.pop(), _copied(tensor if new is None else new))
            )
            return None if new is None else replace_first_tensor(output, new)

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))

    try:
        for path, module in modules.items():
            watch(path, module)
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run in eval mode without gradients; leave training flags and random number generators as they were."""
    flags = [(module, module.training) for module in model.modules()]
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in flags:
            module.training = training
