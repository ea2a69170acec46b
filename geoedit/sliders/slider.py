"""The noun of this room: a slider, what it changes in a model's modules at scale 1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from geoedit.errors import EditError
from manifolds import LowRank


@dataclass(frozen=True)
class ModuleChange:
    """What a slider adds to one module's weight at scale 1, in factors.

    Attributes:
        matrix: the difference (out, in), for a convolution (out, in · kernel height · kernel width).
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
            it was trained on), "measured" (ranges), ….
    """

    name: str
    changes: Mapping[str, Mapping[str, ModuleChange]]
    calibration: Any = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not any(self.changes.values()):
            raise EditError(f"slider {self.name!r} changes no module: there is nothing to apply")

    def __iter__(self) -> Iterator[tuple[str, str, ModuleChange]]:
        """Component, module path and change, one module after another."""
        for component, modules in self.changes.items():
            for path, change in modules.items():
                yield component, path, change

    def map(self, function: Callable[[LowRank], LowRank]) -> Slider:
        """The slider with every matrix replaced; its calibration and details no longer hold and are dropped."""
        changes = {
            component: {path: change.map(function) for path, change in modules.items()}
            for component, modules in self.changes.items()
        }
        return Slider(self.name, changes)

    def __matmul__(self, scale: float | int) -> Scaled:
        """``age @ 1.5``: the slider at a scale, a term of a composition."""
        return Scaled(self, float(scale))


@dataclass(frozen=True)
class Scaled:
    """A slider at a scale (in the slider's own units: natural standard deviations once calibrated)."""

    slider: Slider
    scale: float
