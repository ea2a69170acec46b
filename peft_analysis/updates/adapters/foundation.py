"""The weights that an adapter stands on: where they are, what else they are called."""

from collections.abc import Mapping

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
    """

    def __init__(
        self,
        weights: Weights | None,
        *,
        aliases: Mapping[str, str] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.weights = weights
        self.source = weights.source if weights is not None else "no base"
        self._aliases = dict(aliases or {})
        self._device = device

    @classmethod
    def of(cls, base: "nn.Module | Weights | None") -> "Foundation":
        """From what `read_adapter` was given."""
        if isinstance(base, nn.Module):
            weights = Weights.of_module(base)
            return cls(weights, aliases=_tied(base), device=_device(base))
        return cls(base, aliases=getattr(base, "aliases", None))

    def __contains__(self, name: str) -> bool:
        return self.weights is not None and name in self.weights

    def name(self, name: str) -> str:
        """The name under which the base lists a parameter: that of its first owner where it is tied."""
        return name if name in self else self._aliases.get(name, name)

    def read(self, name: str) -> Tensor:
        """A parameter in float32, or float64 if it is stored so.

        Raises:
            UpdateError: without a base, or if the base has no such parameter.
        """
        if self.weights is None:
            raise UpdateError(f"{name}: the base's weights are needed; give them: read_update(base, tuned)")
        if name not in self.weights:
            raise UpdateError(f"{name} is not in {self.source}; is this the base of the adapter?")
        value = self.weights[name]
        return value if value.dtype in WIDE else value.float()

    def placed(self, value: Tensor) -> Tensor:
        """An adapter's tensor where the base is, in float32 or float64."""
        value = value.to(self._device) if self._device is not None else value
        return value if value.dtype in WIDE else value.float()


def _tied(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    aliases = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            aliases[name] = owner
    return aliases


def _device(model: nn.Module) -> torch.device | None:
    """The device of all parameters; None where they are on several."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None
