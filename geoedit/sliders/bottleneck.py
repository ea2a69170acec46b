"""The middle of a denoiser: where it is, what flows there, and how to change it while the denoiser runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from geoedit.errors import EditError

STREAM = "hidden_states"
"""What diffusers' blocks call the image's stream where they are given it by name."""


@dataclass(frozen=True)
class Bottleneck:
    """A place in a denoiser where all that is drawn passes through.

    Attributes:
        path: the module's path in the denoiser.
        side: whether the stream is what comes out of the module, or what goes into it.
    """

    path: str
    side: Literal["input", "output"] = "output"

    def module(self, denoiser: nn.Module) -> nn.Module:
        """The module at the path.

        Raises:
            EditError: this denoiser has no such module.
        """
        try:
            return denoiser.get_submodule(self.path)
        except AttributeError:
            raise EditError(
                f"{type(denoiser).__name__} has no module {self.path!r}: this is a place of another model."
            ) from None


def find_bottleneck(denoiser: nn.Module) -> Bottleneck:
    """The bottleneck of a denoiser, by its structure.

    Of a U-Net it is what comes out of the middle block (or, without one, of the last block on the way down):
    the fewest cells, which Kwon et al., "Diffusion models already have a semantic latent space" (2023), call
    h-space. Of a transformer it is what goes into the middle one of all blocks.

    Raises:
        EditError: there is neither.
    """
    if getattr(denoiser, "mid_block", None) is not None:
        return Bottleneck("mid_block")
    down = getattr(denoiser, "down_blocks", None)
    if isinstance(down, nn.ModuleList) and len(down):
        return Bottleneck(f"down_blocks.{len(down) - 1}")
    blocks = [
        f"{name}.{index}"
        for name, part in denoiser.named_children()
        if isinstance(part, nn.ModuleList)
        for index, block in enumerate(part)
        if any(hasattr(inner, "to_q") or hasattr(inner, "to_qkv") for inner in block.modules())
    ]
    if not blocks:
        raise EditError(
            f"{type(denoiser).__name__} has neither a middle block nor a list of attention blocks; name the "
            "place yourself: Bottleneck('path.of.module')."
        )
    return Bottleneck(blocks[len(blocks) // 2], "input")


@contextmanager
def shifted(denoiser: nn.Module, bottleneck: Bottleneck, change: Float[Tensor, "rows ..."]) -> Iterator[None]:
    """Within the context, the stream at the bottleneck has a change added to it.

    Args:
        denoiser: the module.
        bottleneck: where in it.
        change: one for each row of a forward pass, or one for all. A pass of k times as many rows (two
            halves under guidance) has it repeated k times.

    Raises:
        EditError: the place is not there, the shapes do not fit, or the module never ran.
    """

    def add(stream: Tensor) -> Tensor:
        if len(change) > 1 and len(stream) % len(change):
            raise EditError(f"a change of {len(change)} rows does not fit a pass of {len(stream)} rows.")
        repeated = change.repeat(len(stream) // len(change), *(1,) * (change.ndim - 1))
        try:
            moved = stream + repeated.to(stream)
        except RuntimeError:
            moved = stream.new_empty(0)
        if moved.shape != stream.shape:
            raise EditError(
                f"a change of shape {tuple(change.shape[1:])} does not fit the stream at {bottleneck.path}, "
                f"which has {tuple(stream.shape[1:])} a row: the direction is one of another model or size."
            )
        return moved

    with _watched(denoiser, bottleneck, add):
        yield


@contextmanager
def captured(denoiser: nn.Module, bottleneck: Bottleneck) -> Iterator[list[Tensor]]:
    """Within the context, the stream at the bottleneck is put into the list, once for each forward pass.

    Raises:
        EditError: the place is not there, or the module never ran.
    """
    kept: list[Tensor] = []

    def keep(stream: Tensor) -> Tensor:
        kept.append(stream)
        return stream

    with _watched(denoiser, bottleneck, keep):
        yield kept


@contextmanager
def _watched(
    denoiser: nn.Module, bottleneck: Bottleneck, function: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Hook a function of the stream; raise at the end if it was never called."""
    calls = 0

    def called(stream: Any) -> Tensor:
        nonlocal calls
        if not isinstance(stream, Tensor):
            raise EditError(f"the stream at {bottleneck.path} is a {type(stream).__name__}, not a tensor.")
        calls += 1
        return function(stream)

    handle = _hook(bottleneck.module(denoiser), bottleneck, called)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise EditError(f"the module {bottleneck.path} never ran, so nothing was changed or seen there.")


def _hook(module: nn.Module, bottleneck: Bottleneck, function: Callable[[Any], Tensor]) -> RemovableHandle:
    if bottleneck.side == "output":

        def after(module: nn.Module, inputs: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (function(output[0]), *output[1:])
            return function(output)

        return module.register_forward_hook(after)

    def before(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if inputs:
            return (function(inputs[0]), *inputs[1:]), options
        if STREAM not in options:
            raise EditError(f"{bottleneck.path} is given no {STREAM!r}; it has {', '.join(options)}.")
        return inputs, {**options, STREAM: function(options[STREAM])}

    return module.register_forward_pre_hook(before, with_kwargs=True)


def stream_of(run: Callable[[], Any], denoiser: nn.Module, bottleneck: Bottleneck) -> Tensor:
    """The stream at the bottleneck in one run of the denoiser.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    >>> stream_of(lambda: net(torch.zeros(5, 2)), net, Bottleneck("0")).shape
    torch.Size([5, 3])
    """
    with captured(denoiser, bottleneck) as kept:
        run()
    return kept[0]
