"""What an adapter stores for one module."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.entry import Layout
from peft_analysis.updates.files import Stored


@dataclass(frozen=True)
class Part:
    """What one adapter stores for one module.

    Attributes:
        path: of the module in the base.
        tensors: by role, such as "lora_A.weight"; never with an adapter's name.
        settings: the adapter's configuration.
        scaling: of a live layer, as it stands; None where the settings say it.
        tuned_path: the path by which the settings' patterns know the module, where it is another.
        parameter: of the module, the one that is adapted.
        times: how often peft applies it; see `output_times`.
        layer: peft's own layer, where the adapter is live.
        adapter: its name there.
    """

    path: str
    tensors: Mapping[str, Stored]
    settings: Mapping[str, Any]
    scaling: float | None = None
    tuned_path: str | None = None
    parameter: str = "weight"
    times: int = 1
    layer: Any = None
    adapter: str | None = None

    @property
    def weight(self) -> str:
        """The name of the parameter that is adapted."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @property
    def bias(self) -> str:
        """The name of the bias beside it."""
        name = "in_proj_bias" if self.parameter == "in_proj_weight" else "bias"
        return f"{self.path}.{name}" if self.path else name

    @property
    def patterned(self) -> str:
        """The path that the settings' patterns are matched with."""
        return self.path if self.tuned_path is None else self.tuned_path

    def read(self, role: str, foundation: Foundation) -> Tensor:
        """A tensor's values where the base is, in float32 or float64."""
        return foundation.placed(self.tensors[role].read())

    def need(self, *roles: str) -> None:
        """Raises an `UpdateError` that names the roles that are missing."""
        missing = [role for role in roles if role not in self.tensors]
        if missing:
            raise UpdateError(f"{self.path}: {' and '.join(missing)} is missing")


def stored_as(part: Part, foundation: Foundation, out: int, inputs: int | None) -> tuple[torch.Size, Layout]:
    """How the base stores the adapted weight, which must have so many outputs and inputs in all.

    Without a base it is (out, in), or (in, out) where the settings say `fan_in_fan_out`.

    Raises:
        UpdateError: if the base has no such parameter or one of another size, or if there is no base and the
            adapter does not tell the inputs.
    """
    if foundation.weights is None:
        if inputs is None:
            raise UpdateError(f"{part.weight}: its shape is not in the adapter; give the base")
        turned = bool(part.settings.get("fan_in_fan_out"))
        return torch.Size((inputs, out) if turned else (out, inputs)), "in_out" if turned else "out_in"
    if part.weight not in foundation:
        raise UpdateError(f"{part.weight} is not in {foundation.source}")
    shape, layout = foundation.weights.shape(part.weight), foundation.weights.layout(part.weight)
    rows, columns = (shape[1], shape[0]) if layout == "in_out" else (shape[0], shape[1:].numel())
    if rows != out or inputs not in (None, columns):
        raise UpdateError(
            f"{part.weight} has shape {tuple(shape)} in {foundation.source}; the adapter has {out} outputs"
            + (f" and {inputs} inputs" if inputs is not None else "")
        )
    return shape, layout
