"""What a slider is taught: the interface between the loop and everything that can be learned."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from geoedit.errors import EditError

if TYPE_CHECKING:
    from geoedit.sliders.training.settings import TrainSettings


@dataclass(frozen=True)
class Batch:
    """What one step learns from: tensors with the rows first, so that any row can go to any process.

    What is the same for all rows (encoded prompts, say) stays with the task, and a tensor of numbers points
    at it.

    Example:
        >>> batch = Batch({"latents": torch.zeros(4, 8, 2), "scales": torch.tensor([1.0, -1.0, 0.5, -0.5])})
        >>> len(batch), batch.rows(torch.tensor([0, 2]))["scales"]
        (4, tensor([1.0000, 0.5000]))
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, index: Int[Tensor, " rows"] | slice) -> Batch:
        """Some rows, in the order of the index."""
        return Batch({name: tensor[index] for name, tensor in self.tensors.items()})

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        return Batch({name: tensor.to(device) for name, tensor in self.tensors.items()})

    @staticmethod
    def concatenate(parts: Sequence[Batch]) -> Batch:
        """The rows of several, one after another."""
        return Batch({name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors})


class Task(ABC):
    """What a slider is taught. The loop gives ``components`` adapters, draws batches and lowers the loss.

    The loop's order: `Adapters` are put on the components, ``prepare``, (``load_state`` after a resume,) then
    ``draw`` and ``loss`` for each step. The loss of a step is the mean over all rows of the batch, wherever
    they are computed, so a row's loss must not depend on the other rows.

    Attributes:
        name: what the slider moves, in words.
        components: the modules that get adapters, by their names in the pipeline ("unet", "transformer",
            "text_encoder", …; "model" for a language model).
    """

    name: str
    components: Mapping[str, nn.Module]

    @abstractmethod
    def prepare(self, settings: TrainSettings, generator: torch.Generator) -> None:
        """Compute what stays the same for all steps (encoded prompts, first cache of latents)."""

    @abstractmethod
    def draw(self, step: int, generator: torch.Generator) -> Batch:
        """All rows of a step, the same in every process: a function of step, generator, state and adapters.

        Latents that are drawn on-policy are drawn with the adapter at work. No gradients are kept.
        """

    @abstractmethod
    def loss(self, batch: Batch) -> Float[Tensor, " rows"]:
        """The loss of each row, with gradients, with each row's scale on the adapter (see `row_scales`)."""

    def describe(self, batch: Batch, row: int) -> str:
        """Say which row this is (timestep and prompt), for the message when its loss is not a number."""
        return f"row {row}"

    def state(self) -> dict[str, Tensor]:
        """What a resumed run cannot draw again: cached latents and the like."""
        return {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state` gave."""
        if state:
            raise EditError(f"{type(self).__name__} keeps no state, and was given {sorted(state)}")
