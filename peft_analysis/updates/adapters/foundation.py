"""The weights that an adapter stands on."""

import torch
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.weights import Weights

WIDE = (torch.float32, torch.float64)


class Foundation:
    """The base of an adapter, or the lack of one.

    Attributes:
        weights: the base's parameters; None for an adapter alone.
        source: the base in words.
        module: the base's modules, where it is a live one.
    """

    def __init__(
        self,
        weights: Weights | None,
        *,
        module: nn.Module | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.weights = weights
        self.source = weights.source if weights is not None else "no base"
        self.module = module
        self._device = device

    @classmethod
    def of(cls, base: "nn.Module | Weights | None") -> "Foundation":
        """From what `read_adapter` was given."""
        if isinstance(base, nn.Module):
            return cls(Weights.of_module(base), module=base, device=device_of(base))
        return cls(base)

    def __contains__(self, name: str) -> bool:
        return self.weights is not None and name in self.weights

    def quantised(self) -> list[str]:
        """Names of matrices whose numbers are codes: whole numbers, or floats of one byte."""
        if self.weights is None:
            return []
        return [
            name
            for name in self.weights
            if name.endswith(("weight", "qzeros"))
            and (not self.weights.dtype(name).is_floating_point or self.weights.dtype(name).itemsize < 2)
        ]

    def name(self, name: str) -> str:
        """The name under which the base lists a parameter: that of its first owner where it is tied."""
        return self.weights.name_of(name) if self.weights is not None else name

    def read(self, name: str) -> Tensor:
        """A parameter in float32, or float64 if it is stored so.

        Raises:
            UpdateError: without a base, or if the base has no such parameter.
        """
        return wide(self.stored(name))

    def stored(self, name: str) -> Tensor:
        """A parameter as it is stored; raises as `read` does."""
        if self.weights is None:
            raise UpdateError(f"{name}: the base's weights are needed; give them: read_update(base, tuned)")
        if name not in self.weights:
            raise UpdateError(f"{name} is not in {self.source}; is this the base of the adapter?")
        return present(self.weights[name], name)

    def placed(self, value: Tensor) -> Tensor:
        """An adapter's tensor where the base is, in float32 or float64."""
        value = present(value, "a tensor of the adapter")
        return wide(value.to(self._device) if self._device is not None else value)


def present(value: Tensor, name: str) -> Tensor:
    """The tensor itself, or an `UpdateError` if it has no values."""
    if value.is_meta:
        raise UpdateError(f"{name} has no values (meta device); load the model without offloading")
    return value


def wide(value: Tensor) -> Tensor:
    """In float32, unless it is float64."""
    return value if value.dtype in WIDE else value.float()


def device_of(model: nn.Module) -> torch.device | None:
    """The device of all parameters; None where they are on several."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None
