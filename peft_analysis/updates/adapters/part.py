"""What an adapter stores for one module."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

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
    """

    path: str
    tensors: Mapping[str, Stored]
    settings: Mapping[str, Any]
    scaling: float | None = None
    tuned_path: str | None = None
    parameter: str = "weight"
    times: int = 1

    @property
    def weight(self) -> str:
        """The name of the parameter that is adapted."""
        return f"{self.path}.{self.parameter}" if self.path else self.parameter

    @property
    def bias(self) -> str:
        """The name of the bias beside it."""
        name = "in_proj_bias" if self.parameter == "in_proj_weight" else "bias"
        return f"{self.path}.{name}" if self.path else name

    def read(self, role: str) -> Tensor:
        """A tensor's values."""
        return self.tensors[role].read()
