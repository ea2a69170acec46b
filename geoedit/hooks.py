"""Read and write the states at a site while the model runs."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.anatomy import Location, anatomy
from geoedit.errors import EditError
from geoedit.passes import Pass, Watch, resolve, unwatch, watch
from geoedit.site import Site
from geoedit.tokens import check_phase, select

Function = Callable[[Tensor, Tensor, Pass], Tensor | None]
"""From states (batch, tokens, width), selected (batch, tokens) and the pass to new states, or None."""


class StopForward(Exception):  # noqa: N818 (it reports no error)
    """Raised by a function to end a forward pass whose remainder nobody needs; the caller catches it."""


@dataclass(eq=False)
class _Seen:
    """A pass with gradients, and enough of its states to know it again when a checkpoint computes it anew."""

    this_pass: Pass
    shape: tuple[int, ...]
    sample: Tensor


class Tally:
    """A count or a flag that is kept on the device until somebody asks: asking would wait for the device."""

    def __init__(self) -> None:
        self._totals: dict[torch.device, Tensor] = {}

    def add(self, value: Tensor) -> None:
        """Count a number, or raise the flag if any value is true."""
        value = _plain(value.detach())
        value = value.any() if value.dtype == torch.bool else value.sum()
        before = self._totals.get(value.device)
        if before is not None:
            value = before | value if value.dtype == torch.bool else before + value
        self._totals[value.device] = value

    def __int__(self) -> int:
        return sum(int(total) for total in self._totals.values())

    def __bool__(self) -> bool:
        return any(bool(total) for total in self._totals.values())


class Handle:
    """A function at work at a site. Remove it, or use it as a context manager.

    Attributes:
        site: The site.
        path: The module that the hook sits on.
        calls: How often the site's module ran.
        model_calls: How often the model ran.
    """

    def __init__(
        self,
        model: nn.Module,
        site: Site,
        place: Location,
        function: Function,
        phase: str,
        value_ids: Sequence[Sequence[int]] | None,
        positions: Tensor | None,
    ) -> None:
        self.site = site
        self.path = place.path
        self.calls = 0
        self.model_calls = 0
        self._place = place
        self._function = function
        self._choose: dict[str, Any] = {"phase": phase, "value_ids": value_ids, "positions": positions}
        self._changed, self._selected = Tally(), Tally()
        self._seen: deque[_Seen] = deque(maxlen=256)
        self._modules = _around(model, place)
        self._watches: list[Watch] = [watch(module) for module in self._modules]
        count = model.register_forward_pre_hook(self._count)
        if place.side == "input":
            hook = place.module.register_forward_pre_hook(self._on_input, with_kwargs=True)
        else:
            hook = place.module.register_forward_hook(self._on_output)
        self._hooks = [hook, count]
        self._attached = True

    @property
    def selected(self) -> int:
        """How many tokens were selected, over all passes."""
        return int(self._selected)

    @property
    def changed(self) -> bool:
        """Whether any selected state came out different from what went in."""
        return bool(self._changed)

    @property
    def attached(self) -> bool:
        """Whether the function is still at work."""
        return self._attached

    def remove(self) -> None:
        """Take the function out and leave the model as it was; once is enough, more does no harm."""
        if not self._attached:
            return
        self._attached = False
        for hook in self._hooks:
            hook.remove()
        for module in self._modules:
            unwatch(module)
        self._seen.clear()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _count(self, module: nn.Module, args: tuple) -> None:
        self.model_calls += 1

    def _on_input(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        for index, value in enumerate(args):
            if isinstance(value, Tensor):
                new = self._apply(value)
                return None if new is None else ((*args[:index], new, *args[index + 1 :]), kwargs)
        names = [name for name in ("hidden_states", "input", "x") if isinstance(kwargs.get(name), Tensor)]
        names += [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.dim() == 3]
        if not names:
            raise EditError(
                f"{self.path} was called without a tensor that could be the state at {self.site}."
            )
        new = self._apply(kwargs[names[0]])
        return None if new is None else (args, {**kwargs, names[0]: new})

    def _on_output(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, Tensor):
            return self._apply(output)
        key, value = _first_tensor(output)
        if value is None:
            raise EditError(
                f"{self.path} returned {type(output).__name__}, without a tensor that could be the state"
                f" at {self.site}."
            )
        new = self._apply(value)
        return None if new is None else _with_first(output, key, new)

    def _apply(self, whole: Tensor) -> Tensor | None:
        self.calls += 1
        states, this_pass = self._read(whole)
        selected = select(this_pass, self.site.token, **self._choose)
        new = self._function(states, selected, this_pass)
        self._selected.add(selected.long())
        if new is None:
            return None
        if new.shape != states.shape:
            raise EditError(
                f"A function at {self.site} returned shape {tuple(new.shape)} for states of shape"
                f" {tuple(states.shape)}; it must keep the shape."
            )
        new = new.to(device=states.device, dtype=states.dtype)
        after, before = new.detach(), states.detach()
        self._changed.add((after != before) & ~(after.isnan() & before.isnan()))
        return self._write(whole, new)

    def _read(self, whole: Tensor) -> tuple[Tensor, Pass]:
        if whole.dim() < 2 or not whole.is_floating_point():
            raise EditError(
                f"{self.path} gives {whole.dtype} of shape {tuple(whole.shape)}: no states"
                f" (batch, tokens, width). Choose another place than {self.site}."
            )
        features = self._place.features
        states = whole if features is None else whole[..., features]
        if whole.dim() == 2:
            rows = self._rows(whole.shape[0])
            states = states.unflatten(0, (rows, -1))
        elif whole.dim() > 3:
            raise EditError(
                f"The state at {self.site} ({self.path}) has shape {tuple(whole.shape)}; a site's states are"
                " (batch, tokens, width). Choose a module that keeps them so."
            )
        return states, self._recall(states)

    def _rows(self, flat: int) -> int:
        """Rows of a state (batch x tokens, width); a state (batch, width) has one token a row."""
        frames = [found.running for found in self._watches]
        shapes = [frame.tokens for frame in frames if frame is not None and frame.tokens is not None]
        return shapes[-1][0] if shapes and flat == math.prod(shapes[-1]) else flat

    def _recall(self, states: Tensor) -> Pass:
        """Build the pass; or find it again, when a checkpoint runs a piece of the model anew."""
        *around, own = self._watches
        frames = [frame for frame in (found.running for found in around) if frame is not None]
        if _in_backward() and not any(frame.entry for frame in frames):
            return self._known_again(states)
        this_pass = resolve(around, own, states)
        if any(frame.grad for frame in frames):
            self._seen.append(_Seen(this_pass, tuple(states.shape), _sample(states)))
        return this_pass

    def _known_again(self, states: Tensor) -> Pass:
        shape, sample = tuple(states.shape), _sample(states)
        alike = [seen for seen in self._seen if seen.shape == shape and seen.sample.shape == sample.shape]
        if not alike:
            raise EditError(
                f"A checkpoint recomputes {self.path} in the backward pass, but the forward pass ran before"
                " this was attached. Attach it around the forward and the backward pass."
            )
        distances = torch.stack([(seen.sample - sample).abs().max() for seen in alike])
        return alike[int(distances.argmin())].this_pass

    def _write(self, whole: Tensor, new: Tensor) -> Tensor:
        new = new.reshape(*whole.shape[:-1], new.shape[-1])
        features = self._place.features
        if features is None:
            return new
        start, stop, _ = features.indices(whole.shape[-1])
        return torch.cat([whole[..., :start], new, whole[..., stop:]], -1)


def intercept(
    model: nn.Module,
    site: Site,
    function: Function,
    *,
    phase: str = "both",
    value_ids: Sequence[Sequence[int]] | None = None,
    positions: Tensor | None = None,
    location: Location | None = None,
) -> Handle:
    """Call a function on the states at a site, whenever the model runs, and put its result in their place.

    The function gets the states (batch, tokens, width), the mask (batch, tokens) of the tokens that the site
    means in this pass, and the pass itself. It returns states of the same shape, or None to leave them. It
    must not change the states in place.

    Args:
        model: The model that will be called; a wrapper such as PEFT's is fine.
        site: Where, and at which tokens.
        function: What to do there.
        phase: "prompt", "new" (generated tokens) or "both".
        value_ids: For token "value": the ways to spell the values in ids (see `geoedit.tokens.spellings`).
        positions: Positions (batch,) in the padded prompt or a mask (batch, tokens), not the site's token.
        location: The site's location, if the caller has it already.

    Raises:
        EditError: the site does not exist in the model, or the phase can never hold the site's token.
    """
    check_phase(phase, site.token)
    if site.token == "value" and not value_ids and positions is None:
        raise EditError(
            f"{site} needs to know how the values are spelled in ids: give value_ids,"
            " for instance spellings(tokenizer, values)."
        )
    location = location or find(model, site)
    return Handle(model, site, location, function, phase, value_ids, positions)


def find(model: nn.Module, site: Site) -> Location:
    """Find a site's location; one that names its module is found even in a model that has no anatomy.

    Raises:
        EditError: the site does not exist in the model.
    """
    try:
        known = anatomy(model)
    except EditError:
        path, _, side = (site.module or "").partition(":")
        modules = dict(model.named_modules())
        if path not in modules or side not in ("", "input"):
            raise
        return Location(path, modules[path], "input" if side else "output", width=0)
    return known.locate(site)


def _around(model: nn.Module, place: Location) -> list[nn.Module]:
    """Give the modules from the model down to the site's own, without mere containers."""
    modules, module = [model], model
    for name in place.path.split(".")[:-1] if place.path else []:
        module = getattr(module, name)
        if not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            modules.append(module)
    return modules if modules[-1] is place.module else [*modules, place.module]


def _first_tensor(output: Any) -> tuple[Any, Tensor | None]:
    items = (
        output.items()
        if hasattr(output, "items")
        else enumerate(output)
        if isinstance(output, (tuple, list))
        else ()
    )
    return next(((key, value) for key, value in items if isinstance(value, Tensor)), (None, None))


def _with_first(output: Any, key: Any, new: Tensor) -> Any:
    """A copy of an output, of its own type, with one tensor replaced."""
    if isinstance(output, tuple):
        values = (*output[:key], new, *output[key + 1 :])
        return type(output)(*values) if hasattr(output, "_fields") else values
    if isinstance(output, list):
        return [*output[:key], new, *output[key + 1 :]]
    return type(output)(**{**dict(output.items()), key: new})


def _plain(value: Tensor) -> Tensor:
    """Take off the wrappers of torch.func, so that a count outlives the transform it was made in."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    return value


def _sample(states: Tensor) -> Tensor:
    flat = _plain(states.detach()).flatten()
    step = max(flat.numel() // 64, 1)
    return flat[::step].float()


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
