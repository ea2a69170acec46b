"""What a denoiser is told beside the latents: encoded prompts, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from geoedit.errors import EditError


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts, a row each: "words" (rows, tokens, width) and whatever else the family needs.

    Every tensor has the rows first: SDXL's "pooled" and "time_ids", SD3's "pooled", Flux's "pooled".
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, index: Int[Tensor, " rows"]) -> Conditioning:
        """Some rows, in the order of the index; rows may be repeated."""
        return Conditioning({name: tensor[index] for name, tensor in self.tensors.items()})

    def repeat(self, count: int) -> Conditioning:
        """All rows, and all of them again, so many times."""
        return Conditioning(
            {
                name: tensor.repeat(count, *(1 for _ in tensor.shape[1:]))
                for name, tensor in self.tensors.items()
            }
        )

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of several, one after another.

        Raises:
            EditError: they are of different bases: other names, or other shapes.
        """
        shapes = [{name: tuple(t.shape[1:]) for name, t in part.tensors.items()} for part in parts]
        if not parts or any(shape != shapes[0] for shape in shapes):
            raise EditError(
                f"cannot join these conditionings, a row of each is {shapes}: encode all with one base"
            )
        return Conditioning(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )

    def to(self, *args: object, **options: object) -> Conditioning:
        """The same on another device or in another type, as `Tensor.to`."""
        return Conditioning(
            {name: tensor.to(*args, **options) for name, tensor in self.tensors.items()}  # type: ignore[call-overload]
        )
