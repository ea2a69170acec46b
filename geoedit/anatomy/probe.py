"""What a residual block adds to its stream, found by touching tensors while it runs and seeing what moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.anatomy.kinds import adapted, is_norm, is_projection, rows, same_values
from geoedit.anatomy.trace import (
    Call,
    Recording,
    first_tensor,
    input_tensor,
    own_arguments,
    recording,
    replace_input,
)

INNER = ("attention_out", "heads", "mlp_hidden", "mlp_out")


@dataclass(frozen=True)
class Addend:
    """What the block adds to the stream: the output of the module at `path`, times `gain`."""

    path: str
    gain: float
    mixes: bool


@dataclass(frozen=True)
class Findings:
    """What was found in a block; paths are relative to it."""

    attention: Addend | None
    attention_projection: str | None
    mlp: Addend | None
    mlp_projection: str | None
    widths: Mapping[str, tuple[int, int]]
    addends: tuple[Addend, ...]
    causal: bool
    why: Mapping[str, str] = field(default_factory=dict)


class BlockProbe:
    """Runs one block again and again on the same input with small changes."""

    def __init__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = input_tensor(args, kwargs)
        if state is None:
            raise ValueError("the block takes no tensor")
        self.block, self.args, self.kwargs, self.state = block, args, kwargs, state
        self.modules = {path: module for path, module in block.named_modules() if path}
        self.output, self.base = self.run()
        self.noise = self._noise()
        self.touched = torch.zeros_like(rows(state))
        self.touched[::2] = rows(self.noise)[::2]
        self.touched = self.touched.reshape(state.shape)
        half = torch.finfo(state.dtype).bits < 32
        self.small, self.proportional = (4 * torch.finfo(state.dtype).eps, 0.05) if half else (3e-6, 2e-3)
        self.calls = self.base.by_path()
        self.projections = {p for p in self.calls if is_projection(self.modules[p])} - adapted(self.modules)
        self.norms = {p for p, c in self.calls.items() if p not in self.projections and self._norm(c[0])}

    def _noise(self) -> Tensor:
        """Draw noise of four times each row's size, so that what is added survives rounding."""
        state = self.state
        # Another seed than that of any inputs: a touch parallel to the state itself would be lost in a norm.
        generator = torch.Generator().manual_seed(24301)
        noise = torch.randn(state.shape, generator=generator).to(state.device)
        size = rows(state).float().pow(2).mean(-1).sqrt()
        if self.output.shape == state.shape:
            size = torch.maximum(size, rows(self.output).float().pow(2).mean(-1).sqrt().to(size.device))
        largest = min(torch.finfo(state.dtype).max, torch.finfo(size.dtype).max)
        size = (4 * size).clamp(1e-3, largest / 16)
        return (noise * size.reshape(*state.shape[:-1], 1)).to(state.dtype)

    def _norm(self, call: Call) -> bool:
        if call.input is None or call.output is None or call.input.shape != call.output.shape:
            return False
        return call.input.is_floating_point() and is_norm(call.module, call.input.shape[-1], call.input)

    def run(
        self, touch: Tensor | None = None, clamp: frozenset[str] = frozenset(), shift: str | None = None
    ) -> tuple[Tensor, Recording]:
        """Run the block with `touch` added to its input, outputs in `clamp` held, noise on `shift`'s."""

        def change(path: str, turn: int, output: Tensor) -> Tensor | None:
            if path in clamp and turn == 0:
                return self._output(path).clone()
            if path == shift and turn == 0:
                return output + self.noise.reshape(output.shape).to(output)
            return None

        state = self.state.clone() if touch is None else self.state + touch
        args, kwargs = replace_input(own_arguments(self.args), own_arguments(self.kwargs), state)
        with recording(self.modules, change=change) as record:
            result = first_tensor(self.block(*args, **kwargs))
        if result is None:
            raise ValueError("the block returns no tensor")
        return result.detach().clone(), record

    def _output(self, path: str) -> Tensor:
        output = self.calls[path][0].output
        if output is None:
            raise ValueError(f"{path} returns no tensor")
        return output

    def moved_rows(self, before: Tensor | None, after: Tensor | None) -> float:
        """Return the fraction of rows that differ."""
        if before is None or after is None or before.shape != after.shape or not before.is_floating_point():
            return 0.0
        change = rows((after.float() - before.float()).abs()).amax(-1)
        size = rows(before.float().abs()).amax(-1)
        return float(
            (change > self.small * torch.maximum(size, 1e-3 * size.max()).clamp_min(1e-30)).float().mean()
        )

    def ratio(self, moved: Tensor, by: Tensor) -> float | None:
        """Return c where moved = c * by, or None where no such number exists."""
        if moved.numel() != by.numel():
            return None
        a, b = moved.reshape(-1).double(), by.reshape(-1).double()
        c = float((a @ b) / (b @ b)) if bool(b.any()) else 0.0
        c = 1.0 if abs(c - 1) < self.proportional else c
        if abs(c) < 1e-3 or float((a - c * b).norm()) > self.proportional * float(a.norm()):
            return None
        return c

    def gain(self, path: str, clamp: frozenset[str]) -> float | None:
        """Return how much of a change of this output reaches a sum: the block's output, or a norm's input.

        None where it reaches none unchanged but for a factor, so that it is not what is added.
        """
        output, record = self.run(clamp=clamp, shift=path)
        by = self.noise
        c = self.ratio(output.float() - self.output.float(), by)
        if c is not None:
            return c
        own = self._output(path)
        for before, after in zip(self.base.calls, record.calls, strict=True):
            if before.path not in self.norms or same_values(before.input, own):
                continue
            if before.input is None or after.input is None:
                continue
            c = self.ratio(after.input.float() - before.input.float(), by)
            if c is not None:
                return c
        return None

    def movement(self, clamp: frozenset[str]) -> tuple[dict[str, tuple[float, float, bool]], bool]:
        """Touch every second row of the input and see what moves.

        Returns, for each module, the fractions of rows moved in its input and its output and whether its
        output is the stream itself (or the norm of it); and whether the block's output is, so that no addend
        is left to be found.
        """
        result_state, record = self.run(touch=self.touched, clamp=clamp)
        streams = [self.touched.float()]
        result: dict[str, tuple[float, float, bool]] = {}
        for before, after in zip(self.base.calls, record.calls, strict=True):
            went_in = self.moved_rows(before.input, after.input)
            came_out = self.moved_rows(before.output, after.output)
            is_stream = False
            if before.output is not None and after.output is not None and came_out:
                change = after.output.float() - before.output.float()
                is_stream = any(self.ratio(change, s) is not None for s in streams)
                if (
                    not is_stream
                    and before.path in self.norms
                    and before.input is not None
                    and after.input is not None
                ):
                    entered = after.input.float() - before.input.float()
                    if any(self.ratio(entered, s) is not None for s in streams):
                        streams.append(change)
                        is_stream = True
            result.setdefault(before.path, (went_in, came_out, is_stream))
        moved = result_state.float() - self.output.float()
        return result, any(self.ratio(moved, stream) is not None for stream in streams)

    def candidates(self) -> list[str]:
        """Return modules called once whose output has the stream's rows and width, in order of ending."""
        hidden = adapted(self.modules)
        size = rows(self.state).shape
        normed = [c.output for c in self.base.calls if c.path in self.norms and not self._whole(c.input)]
        return [
            call.path
            for call in self.base.calls
            if call.output is not None
            and call.output.is_floating_point()
            and call.output.ndim >= 2
            and rows(call.output).shape == size
            and len(self.calls[call.path]) == 1
            and call.path not in hidden
            and not same_values(call.output, self.output)
            and not any(same_values(call.output, state) for state in normed)
        ]

    def _whole(self, tensor: Tensor | None) -> bool:
        """Say whether a tensor is some module's output (the norm of a sum with the stream adds nothing)."""
        return any(same_values(call.output, tensor) for call in self.base.calls)

    def addends(self) -> list[Addend]:
        """Find, one after the other, the outputs that the block adds to the stream."""
        found: dict[str, float] = {}
        order = self.candidates()
        shaped = [path for path in order if self._output(path).shape == self.state.shape]
        for tries in (
            shaped,
            shaped,
            order,
        ):  # again, now that later addends can be held; then (batch * tokens, width)
            moved, explained = self.movement(frozenset(found))
            if explained and found:
                break
            for path in tries:
                went_in, came_out, is_stream = moved[path]
                changes = came_out or (path in self.projections and went_in)
                if path in found or not changes or is_stream:
                    continue
                gain = self.gain(path, frozenset(found))
                if gain is None:
                    continue
                scaled = self._scaled_by(path, frozenset(found))
                path, gain = scaled or (path, gain)
                found = {p: g for p, g in found.items() if not p.startswith(f"{path}.")}
                found[path] = gain
                moved, _ = self.movement(frozenset(found))
        before: frozenset[str] = frozenset()
        result = []
        for path in sorted(found, key=order.index):
            moved, _ = self.movement(before)
            went_in, came_out, _ = moved[path]
            share = went_in if path in self.projections else came_out
            parts = path.split(".")
            around = [".".join(parts[:depth]) for depth in range(1, len(parts))]
            entered = [moved[p][0] for p in around if p in moved]
            own = not entered or min(entered) <= self._touched_share()  # else the mixing came with the input
            result.append(Addend(path, found[path], share > self._touched_share() and own))
            before = before | {path}
        return result

    def _touched_share(self) -> float:
        count = rows(self.state).shape[0]
        return ((count + 1) // 2) / count + 1e-6

    def _scaled_by(self, path: str, clamp: frozenset[str]) -> tuple[str, float] | None:
        """Follow an addend into a module that scales its features (LayerScale) before it is added."""
        own = self._output(path)
        for call in self.base.calls:
            weights = list(call.module.parameters())
            if (
                call.path == path
                or not weights
                or any(w.ndim > 1 for w in weights)
                or call.path in self.norms
            ):
                continue
            if (
                same_values(call.input, own)
                and call.output is not None
                and call.output.shape == self.state.shape
            ):
                gain = self.gain(call.path, clamp)
                if gain is not None:
                    return call.path, gain
        return None

    def source(self, path: str) -> str | None:
        """Return the projection whose output is the addend, or is what a norm or scale turned into it."""
        if path in self.projections:
            return path
        call = self.calls[path][0]
        single = path in self.norms or not any(is_projection(m) for m in call.module.modules())
        target = call.input if single else call.output
        matching = [
            p for p in self.projections if len(self.calls[p]) == 1 and same_values(self._output(p), target)
        ]
        return matching[-1] if matching else None

    def causal(self) -> bool:
        """Say whether touching the second half of the rows leaves the first as it was."""
        half = rows(self.noise).shape[0] // 2
        touch = rows(self.noise).clone()
        touch[:half] = 0
        output, _ = self.run(touch=touch.reshape(self.state.shape))
        change = rows((output.float() - self.output.float()).abs()).amax(-1)
        return bool(change[:half].max() <= self.small * self.output.float().abs().max())


def probe(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Findings:
    """Find what `block` adds to its residual stream, and by which projections."""
    p = BlockProbe(block, args, kwargs)
    if p.state.ndim > 3:
        reason = f"its stream has shape {tuple(p.state.shape)}, where (batch, tokens, width) was expected"
        return Findings(None, None, None, None, {}, (), p.causal(), dict.fromkeys(INNER, reason))
    addends = p.addends()
    why: dict[str, str] = {}
    mixers = {a: _convolution(block, a.path, [b.path for b in addends]) for a in addends if a.mixes}
    attention = next((a for a, convolution in mixers.items() if convolution is None), None)
    mlp = next((a for a in reversed(addends) if not a.mixes), None)
    attention_projection = mlp_projection = None
    if attention is None and mixers:
        mixer, convolution = next(iter(mixers.items()))
        reason = (
            f"tokens are mixed by a convolution or state space ({convolution}), not by attention alone; "
            f"the mixer's output is {mixer.path!r} inside the block"
        )
        why |= {"attention_out": reason, "heads": reason}
    if attention is not None:
        attention_projection = p.source(attention.path)
        if attention_projection is None:
            why["heads"] = (
                f"no projection was seen to run inside {attention.path!r} ({_class(block, attention.path)})"
            )
    else:
        for stream in ("attention_out", "heads"):
            why.setdefault(
                stream, "no module was seen whose output mixes tokens and is added to the residual stream"
            )
    if mlp is not None:
        mlp_projection = p.source(mlp.path)
        if mlp_projection is None:
            why["mlp_hidden"] = (
                f"no single projection makes what is added: it is the joint output of {mlp.path!r} "
                f"({_class(block, mlp.path)}; a mixture of experts has no one hidden layer)"
            )
    else:
        for stream in ("mlp_hidden", "mlp_out"):
            why[stream] = (
                "no module was seen whose output is added to the residual stream without mixing tokens"
            )
    widths = {
        path: (_last(calls[0].input), _last(calls[0].output))
        for path, calls in p.calls.items()
        if calls[0].output is not None
    }
    return Findings(
        attention, attention_projection, mlp, mlp_projection, widths, tuple(addends), p.causal(), why
    )


def _last(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.ndim == 0 else int(tensor.shape[-1])


def _class(block: nn.Module, path: str) -> str:
    return type(block.get_submodule(path)).__name__


def _convolution(block: nn.Module, path: str, others: list[str]) -> str | None:
    """Return the path of a convolution in the largest module around `path` that holds no other addend."""
    parts = path.split(".")
    for depth in range(1, len(parts) + 1):
        around = ".".join(parts[:depth])
        if any(other != path and other.startswith(f"{around}.") for other in others):
            continue
        for name, module in block.get_submodule(around).named_modules():
            if isinstance(module, nn.modules.conv._ConvNd):
                return f"{around}.{name}".rstrip(".")
        return None
    return None
