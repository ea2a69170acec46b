"""Tensors that a learned manifold keeps: usable for gradients, and with the digits they were given."""

from collections.abc import Callable

import torch
from torch import Tensor

from manifolds.operations import HALF


def usable(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy that gradients may pass, if it was made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def in_single(move: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A move to another device or dtype that goes no lower than single precision.

    Half precision is computed in float32, and what was kept in it would have lost its digits for that.
    """

    def moved(tensor: Tensor) -> Tensor:
        found = move(tensor)
        lowered = found.dtype in HALF and tensor.dtype not in HALF
        return tensor.to(device=found.device, dtype=torch.float32) if lowered else found

    return moved
