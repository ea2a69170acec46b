"""The noun of this room: a slider, what it changes in a model's modules at scale 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from geoedit.errors import EditError
from geoedit.sliders.calibration import Calibration
from manifolds import LowRank

if TYPE_CHECKING:
    from geoedit.sliders.apply import Active
    from peft_analysis.updates import WeightUpdate

Format = Literal["diffusers", "kohya", "peft"]


@dataclass(frozen=True)
class ModuleChange:
    """What a slider adds to one module's weight at scale 1, in factors.

    Attributes:
        matrix: the difference (out, in), for a convolution (out, in / groups · kernel), whatever way round
            the module stores its weight.
        kernel: the kernel of a convolution, such as (3, 3); empty for a linear map.
    """

    matrix: LowRank
    kernel: tuple[int, ...] = ()

    def map(self, function: Callable[[LowRank], LowRank]) -> ModuleChange:
        """The same module's change with another matrix."""
        return replace(self, matrix=function(self.matrix))


@dataclass(frozen=True)
class Slider:
    """A LoRA that moves one attribute up and down by its scale.

    Attributes:
        name: what it moves.
        changes: for each component of a pipeline ("unet", "transformer", "text_encoder", …; "model" for a
            language model) the modules that change, by their path in the component.
        calibration: how a scale in natural standard deviations becomes a factor on the changes; None if
            scales are factors as they stand.
        details: what is known of it and goes into its file, as plain JSON: "spec", "settings", "base" (what
            it was trained on, by component; see `geoedit.sliders.fit.describe_base`), "measured" (ranges; its
            "safe_range" [low, high] is what `at` warns by), ….

    Example:
        >>> import torch
        >>> from manifolds import LowRank
        >>> change = ModuleChange(LowRank(torch.ones(2, 1), torch.ones(1, 3)))
        >>> slider = Slider("size", {"model": {"0": change}})
        >>> layer = torch.nn.Sequential(torch.nn.Linear(3, 2, bias=False))
        >>> x = torch.ones(1, 3)
        >>> with slider.at(layer, 2.0):
        ...     moved = layer(x)
        >>> (moved - layer(x)).detach().round(decimals=4)
        tensor([[6., 6.]])
    """

    name: str
    changes: Mapping[str, Mapping[str, ModuleChange]]
    calibration: Calibration | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(self.changes.values()):
            raise EditError(f"slider {self.name!r} changes no module: there is nothing to apply")

    def __iter__(self) -> Iterator[tuple[str, str, ModuleChange]]:
        """Component, module path and change, one module after another."""
        for component, modules in self.changes.items():
            for path, change in modules.items():
                yield component, path, change

    def __len__(self) -> int:
        """How many modules it changes."""
        return sum(map(len, self.changes.values()))

    def __repr__(self) -> str:
        ranks = sorted({change.matrix.rank for _, _, change in self})
        told = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}–{ranks[-1]}"
        places = ", ".join(f"{len(modules)} in {name}" for name, modules in self.changes.items())
        return f"Slider({self.name!r}, {told}, modules: {places})"

    def map(self, function: Callable[[LowRank], LowRank]) -> Slider:
        """The slider with every matrix replaced; calibration and details no longer hold and are dropped."""
        changes = {
            component: {path: change.map(function) for path, change in modules.items()}
            for component, modules in self.changes.items()
        }
        return Slider(self.name, changes)

    def to(self, *args: Any, **options: Any) -> Slider:
        """The same slider in another dtype or on another device, as `Tensor.to`."""
        moved = self.map(lambda matrix: matrix.to(*args, **options))
        return replace(self, changes=moved.changes)

    def only(self, *components: str) -> Slider:
        """The part of the slider in some components; its details stay.

        Raises:
            EditError: it changes nothing in a component that is named.
        """
        absent = [name for name in components if not self.changes.get(name)]
        if absent or not components:
            raise EditError(
                f"slider {self.name!r} changes nothing in {', '.join(absent) or 'no component at all'}; it "
                f"changes {', '.join(self.changes)}"
            )
        return replace(self, changes={name: self.changes[name] for name in components})

    def __matmul__(self, scale: float | int) -> Scaled:
        """``age @ 1.5``: the slider at a scale, a term of a composition."""
        return Scaled(self, float(scale))

    def factor(self, scale: float | int | Tensor) -> float | Tensor:
        """What multiplies the changes at a scale, or at each of a tensor; the scale, if not calibrated."""
        if isinstance(scale, Tensor):
            return scale if self.calibration is None else self.calibration.factor(scale)
        return float(scale) if self.calibration is None else self.calibration.factor(float(scale))

    @property
    def safe_range(self) -> tuple[float, float] | None:
        """The scales (low, high) between which it is safe, as its details tell; None where they do not.

        Raises:
            EditError: the details hold something else than two numbers, the lower first.
        """
        found = self.details.get("measured", {}).get("safe_range")
        if found is None:
            return None
        try:
            low, high = (found["low"], found["high"]) if isinstance(found, Mapping) else found
            low, high = float(low), float(high)
        except (KeyError, TypeError, ValueError) as wrong:
            raise EditError(f"slider {self.name!r}: {found!r} is no range [low, high] ({wrong!r})") from wrong
        if math.isnan(low) or math.isnan(high):
            return None
        if low >= high:
            raise EditError(f"slider {self.name!r}: its safe range [{low:g}, {high:g}] is empty")
        return low, high

    # Use

    def at(
        self,
        pipe: Any,
        scale: Any = 1.0,
        *,
        start: float | int = 0.0,
        stop: float | int = 1.0,
        region: Any = None,
        allow_other_base: bool = False,
    ) -> Active:
        """Put the slider to work for a ``with`` block: ``with slider.at(pipe, 1.5): pipe(...)``.

        See `geoedit.sliders.apply.together`, which does the same with several sliders at once.

        Args:
            pipe: a diffusers pipeline, or a module (a language model, a denoiser alone).
            scale: in the slider's own units: a number, one for each sample of the batch (a list or a tensor),
                or a function of progress, which runs from 0 at pure noise to 1 at the clean image.
            start: the progress from which the slider works. Starting late keeps layout and identity.
            stop: the progress at which it ends.
            region: a mask (height, width) or (samples, height, width) with values from 0 to 1, of any
                resolution, as a tensor, an array or an image: where the slider works.
            allow_other_base: use it even if the weights are not those that it was made for.

        Raises:
            EditError: the slider does not fit the pipeline; a scale, a window or a region is not what it
                should be; at the end of the block, none of a component's modules ran.
        """
        from geoedit.sliders.apply import together

        return together(
            pipe, [(self, scale)], start=start, stop=stop, region=region, allow_other_base=allow_other_base
        )

    # Files and weight updates

    def save(self, path: str | PathLike[str], format: Format = "diffusers") -> None:
        """Write the slider to a safetensors file: a LoRA for diffusers, or with "kohya" for other programs.

        See `geoedit.sliders.files.save`.

        Raises:
            EditError: no such folder or format; a value is not finite; details that JSON cannot hold.
        """
        from geoedit.sliders.files import save

        save(self, path, format)

    def update(self, component: str, base: nn.Module | None = None) -> WeightUpdate:
        """What factor 1 adds to a component's weights, as a `WeightUpdate` of parameter names.

        Args:
            component: one of `changes`.
            base: the component itself; tells which weights are stored transposed (GPT-2's) and the shapes of
                convolutions' kernels.

        Raises:
            EditError: the slider changes nothing there, or the base has no such modules.
        """
        from geoedit.sliders.fit import fitting
        from peft_analysis.updates import WeightUpdate
        from peft_analysis.updates.weights import Weights

        changes = self.only(component).changes[component]
        if base is None:
            shaped = {f"{path}.weight": change.matrix for path, change in changes.items()}
            return WeightUpdate.from_tensors(shaped)
        fitting(replace(self, changes={component: changes}), base)
        weights = Weights.of(base)
        values: dict[str, LowRank | Tensor] = {}
        for path, change in changes.items():
            name = f"{path}.weight"
            values[name] = change.matrix.T if weights.layout(name) == "in_out" else change.matrix
        return WeightUpdate.from_tensors(values, base=weights)


@dataclass(frozen=True)
class Scaled:
    """A slider at a scale (in the slider's own units: natural standard deviations once calibrated)."""

    slider: Slider
    scale: float

    @property
    def factor(self) -> float:
        """What multiplies the slider's changes at this scale."""
        return float(torch.as_tensor(self.slider.factor(self.scale)))
