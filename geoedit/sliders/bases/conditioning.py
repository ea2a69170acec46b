"""What a denoiser is told beside the latents: encoded prompts, row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


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

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of several, one after another."""
        return Conditioning(
            {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        )

    def to(self, *args: object, **options: object) -> Conditioning:
        """The same on another device or in another type, as `Tensor.to`."""
        return Conditioning(
            {name: tensor.to(*args, **options) for name, tensor in self.tensors.items()}  # type: ignore[call-overload]
        )
