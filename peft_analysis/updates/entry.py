"""What an update does to one parameter, read only when it is asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from manifolds import LowRank

Layout = Literal["out_in", "in_out", "other"]


@dataclass(frozen=True)
class Entry:
    """One parameter's difference: its shape and origin now, its values when `read` is called.

    Attributes:
        shape: of the parameter as the model stores it.
        read: gives the difference: a `LowRank` of the matrix (m, n) of the stored layout (for a convolution
            (out, in · height · width)), or a dense tensor of the parameter's shape. In float32 or float64.
        kind: what made it: "lora", "dora", "difference", "bias", …
        layout: "out_in" as in Linear and convolutions (out first), "in_out" as in GPT-2's Conv1D, "other"
            for vectors, embeddings and norms, which are read as stored.
        rounded: the dtype to which the tuned values were rounded before the difference was taken; None where
            the difference is exact (an adapter's factors).
        base_rounded: the dtype in which the base's values were stored; None where no base took part.
        details: facts of the kind, plain JSON: {"rank": 8, "alpha": 16.0, "scaling": 2.0, …}.
        magnitude: DoRA's trained magnitude (out,), where there is one; read when called.
    """

    shape: torch.Size
    read: Callable[[], "LowRank | Tensor"] = field(repr=False)
    kind: str = "difference"
    layout: Layout = "out_in"
    rounded: torch.dtype | None = None
    base_rounded: torch.dtype | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    magnitude: Callable[[], Tensor] | None = field(default=None, repr=False)
