"""Sliders at work: what they add is computed beside the modules that they change; no weight is touched."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from geoedit.errors import EditError
from geoedit.sliders.fit import Place, component_of, fitting, is_conv1d
from geoedit.sliders.regions import Region
from geoedit.sliders.scales import Term, Window
from geoedit.sliders.slider import Scaled, Slider

TIME, IDS = "timestep", "img_ids"
STEPS = 1000
"""Noise levels that a model was trained on where its scheduler does not say."""


def together(
    pipe: Any,
    terms: Sequence[Scaled | tuple[Slider, Any]],
    *,
    start: float | int = 0.0,
    stop: float | int = 1.0,
    region: Any = None,
    allow_other_base: bool = False,
) -> Active:
    """Put several sliders to work at once, for a ``with`` block.

    Every module y = W x + b that they change gives y + Σᵢ fᵢ Bᵢ Aᵢ x: the factors of all sliders lie side by
    side, so that k sliders cost two products of matrices, as one does. A factor fᵢ comes from the slider's
    scale through its calibration; sliders at factor 0 cost nothing, and leave every bit as it is.

    Progress is 1 − t / T, with the denoiser's own time t and the T noise levels of its training: it does not
    depend on the number of steps. Each row of a batch has the progress of its own time.

    With a region m, the denoiser runs twice and gives m · (with the sliders) + (1 − m) · (without them).

    Args:
        pipe: a diffusers pipeline, or a module.
        terms: `slider @ scale`, or pairs of a slider and a scale; a scale is a number, one for each sample
            (rows of guidance repeat the samples), or a function of progress. Tensors may carry derivatives.
        start: the progress from which the sliders work.
        stop: the progress at which they end; the step that lies on it is without them.
        region: a mask (height, width) or (samples, height, width) with values from 0 to 1.
        allow_other_base: use them even if the weights are not those that they were made for.

    Raises:
        EditError: a slider does not fit; a scale, a window or a region is not what it should be; a window, a
            schedule or a region for a slider that changes more than the denoiser; at the end of the block, a
            component that a slider changes never ran.

    Example:
        >>> import torch
        >>> from geoedit.sliders import ModuleChange, Slider
        >>> from manifolds import LowRank
        >>> layer = torch.nn.Sequential(torch.nn.Linear(2, 1, bias=False))
        >>> x = torch.ones(1, 2)
        >>> first, second = (
        ...     Slider(name, {"model": {"0": ModuleChange(LowRank(torch.ones(1, 1), torch.tensor([row])))}})
        ...     for name, row in (("age", [1.0, 0.0]), ("smile", [0.0, 1.0]))
        ... )
        >>> with together(layer, [first @ 1.5, second @ -0.5]):
        ...     moved = layer(x)
        >>> (moved - layer(x)).detach().round(decimals=4)
        tensor([[1.]])
    """
    if not terms:
        raise EditError("together: there is no slider to put to work; give at least one")
    found = [
        Term.of(term.slider, term.scale) if isinstance(term, Scaled) else Term.of(*term) for term in terms
    ]
    window = Window(float(start), float(stop))
    mask = None if region is None else Region.of(region)
    places: dict[tuple[str, str], list[tuple[int, Place]]] = defaultdict(list)
    for number, term in enumerate(found):
        for place in fitting(term.slider, pipe, allow_other_base=allow_other_base):
            places[place.component, place.path].append((number, place))
    names = list(dict.fromkeys(name for name, _ in places))
    parts = {}
    for name in names:
        root = cast(nn.Module, component_of(pipe, name, names))
        parts[name] = _Part(name, root, found, window, mask, _levels(pipe))
    return Active(parts, [_Branch(parts[name], of_module) for (name, _), of_module in places.items()])


class Active:
    """Sliders that are at work from ``__enter__`` to ``__exit__``; of the model only the hooks change."""

    def __init__(self, parts: Mapping[str, _Part], branches: Sequence[_Branch]) -> None:
        self._parts, self._branches = parts, branches
        self._hooks: list[Any] = []

    @property
    def ran(self) -> dict[str, bool]:
        """For each component, whether any of its changed modules ran so far."""
        return {name: part.ran for name, part in self._parts.items()}

    def check(self) -> None:
        """Ask whether the sliders had something to do.

        Raises:
            EditError: none of the changed modules of a component ran.
        """
        silent = [name for name, ran in self.ran.items() if not ran]
        if silent:
            raise EditError(
                f"the slider changes {', '.join(silent)}, none of whose changed modules ran: call the "
                "pipeline inside the block, encode prompts there too, and do not compile modules before; "
                "`slider.only(...)` gives the part for some components"
            )

    def remove(self) -> None:
        """Take the sliders off; once is enough, more does no harm."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Active:
        if self._hooks:
            raise EditError("these sliders are at work already; call `at` again for a second block")
        for part in self._parts.values():
            part.ran = False
            self._hooks += part.attach()
        self._hooks += [
            branch.module.register_forward_hook(branch, with_kwargs=True) for branch in self._branches
        ]
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.remove()
        if kind is None:
            self.check()


class _Part:
    """A component that is changed: its rows, their times, and the factors that follow."""

    def __init__(
        self,
        name: str,
        root: nn.Module,
        terms: Sequence[Term],
        window: Window,
        region: Region | None,
        levels: float,
    ) -> None:
        self.name, self.root, self.terms, self.window, self.region = name, root, terms, window, region
        self.parameters = inspect.signature(root.forward)
        self.timed = not window.whole or any(term.timed for term in terms)
        self.ran = self.off = False
        self.factors: Tensor | None = None  # (terms,) or (rows, terms) of the forward pass that runs
        constants = [term.constant for term in terms]
        self.constants = (
            None
            if self.timed or any(value is None for value in constants)
            else [float(value) for value in constants if value is not None]
        )
        config: Any = getattr(root, "config", None) or {}
        # A denoiser that is told its guidance (Flux) is told times from 0 to 1.
        self.longest = 1.0 if "guidance_embeds" in config else levels
        if (self.timed or region is not None) and TIME not in self.parameters.parameters:
            raise EditError(
                f"{name} has no time: a schedule or a region is for denoisers. Give the part of the slider "
                "that changes the denoiser: `slider.only(...)`"
            )

    def attach(self) -> list[Any]:
        """The hooks on the component as a whole."""
        hooks: list[Any] = []
        if self.constants is None:
            hooks.append(self.root.register_forward_pre_hook(self._before, with_kwargs=True))
        if self.region is not None:
            hooks.append(self.root.register_forward_hook(self._blend, with_kwargs=True))
        return hooks

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = self.parameters.bind_partial(*args, **kwargs).arguments
        first = next(
            (value for value in given.values() if isinstance(value, Tensor) and value.ndim > 1), None
        )
        if first is None:
            raise EditError(f"{self.name} was called without a tensor whose rows could be counted")
        rows = first.shape[0]
        progress = None
        if self.timed:
            time = torch.as_tensor(given[TIME], device=first.device).float()
            progress = (1 - time / self.longest).reshape(-1).expand(rows)
        found = [term.factors(rows, progress, first.device) for term in self.terms]
        if progress is not None and not self.window.whole:
            inside = self.window.holds(progress)
            found = [factor * inside for factor in found]
        each = any(factor.ndim for factor in found)
        self.factors = torch.stack([factor.expand(rows) if each else factor for factor in found], -1)

    def _blend(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any | None:
        if self.off or self.region is None:
            return None
        self.off = True
        try:
            without = _tensor(module(*args, **kwargs))
        finally:
            self.off = False
        given = self.parameters.bind_partial(*args, **kwargs).arguments
        moved = _tensor(output)
        mask = self.region.like(moved, given.get(IDS))
        return _with_tensor(output, without + mask * (moved - without))


class _Branch:
    """What all sliders together add to one module's output."""

    def __init__(self, part: _Part, places: Sequence[tuple[int, Place]]) -> None:
        place = places[0][1]
        self.part, self.module, self.inner, self.path = part, place.outer, place.module, place.path
        matrices = {number: place.change.matrix for number, place in places}
        if part.constants is not None:
            used = {number: matrix for number, matrix in matrices.items() if part.constants[number] != 0.0}
            scaled = {number: (matrix.left * part.constants[number]) for number, matrix in used.items()}
        else:
            used, scaled = matrices, {number: matrix.left for number, matrix in matrices.items()}
        self.owners = [number for number, matrix in used.items() for _ in range(matrix.rank)]
        self._left = list(scaled.values())
        self._right = [matrix.right for matrix in used.values()]
        self._kept: dict[tuple[torch.dtype, torch.device], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        self.part.ran = True
        if self.part.off or not self.owners:
            return None
        inputs = args[0] if args else next(iter(kwargs.values()))
        left, right, owners = self._factors(output)
        inputs = inputs.to(device=output.device, dtype=output.dtype)
        if isinstance(self.inner, nn.Linear) or is_conv1d(self.inner):
            inner = self._weighted(functional.linear(inputs, right), owners, -1)
            if output.is_contiguous() and not torch.is_autocast_enabled(output.device.type):
                return torch.addmm(output.flatten(0, -2), inner.flatten(0, -2), left.mT).view_as(output)
            return output + functional.linear(inner, left)
        return output + self._convolved(inputs, left, right, owners)

    def _convolved(self, inputs: Tensor, left: Tensor, right: Tensor, owners: Tensor) -> Tensor:
        """The same for a convolution: its own kernel, then one of 1; groups share the factors."""
        conv: Any = self.inner
        groups, kernel = conv.groups, conv.kernel_size
        ones = (1,) * len(kernel)
        down = right.unflatten(1, (-1, *kernel)).repeat(groups, *(1,) * (1 + len(kernel)))
        inner = self._weighted(conv._conv_forward(inputs, down, None), owners.repeat(groups), 1)
        convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
        return convolve(inner, left.reshape(*left.shape, *ones), groups=groups)

    def _weighted(self, inner: Tensor, owners: Tensor, axis: int) -> Tensor:
        """Each column of the factors times the factor of its slider, on its row."""
        if self.part.constants is not None:
            return inner
        factors = self.part.factors
        if factors is None:
            raise EditError(
                f"{self.path} ran on its own; with scales for each sample or time, call all of the "
                f"{self.part.name}"
            )
        if factors.ndim == 2 and factors.shape[0] != inner.shape[0]:
            raise EditError(
                f"{self.part.name}.{self.path} sees {inner.shape[0]} rows, the {self.part.name} has "
                f"{factors.shape[0]}: scales for each sample cannot be told apart there; give one scale"
            )
        factors = factors.to(inner.dtype)[..., owners]
        shape = [1] * inner.ndim
        shape[axis] = factors.shape[-1]
        if factors.ndim == 2:
            shape[0] = factors.shape[0]
        return inner * factors.reshape(shape)

    def _factors(self, output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        key = output.dtype, output.device
        if key not in self._kept:
            place: Any = {"dtype": output.dtype, "device": output.device}
            self._kept[key] = (
                torch.cat([left.to(**place) for left in self._left], -1),
                torch.cat([right.to(**place) for right in self._right], -2),
                torch.tensor(self.owners, device=output.device),
            )
        return self._kept[key]


def _levels(pipe: Any) -> float:
    scheduler = getattr(pipe, "scheduler", None)
    return float(getattr(getattr(scheduler, "config", None), "num_train_timesteps", STEPS))


def _tensor(output: Any) -> Tensor:
    """The tensor that a denoiser gives, bare, first of a tuple, or first field of an output of diffusers."""
    if isinstance(output, Tensor):
        return output
    return next(iter(output.values())) if hasattr(output, "values") else output[0]


def _with_tensor(output: Any, new: Tensor) -> Any:
    """The same output with another tensor."""
    if isinstance(output, Tensor):
        return new
    if hasattr(output, "items"):
        fields = dict(output.items())
        return type(output)(**{**fields, next(iter(fields)): new})
    return (new, *output[1:])
