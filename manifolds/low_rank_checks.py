"""What the factors of a `LowRank` must be."""

from typing import Any

import torch
from torch import Tensor

from manifolds.errors import ManifoldError


def check_factors(left: Any, right: Any) -> None:
    """Refuses factors that have no product, or that differ in dtype or device."""
    if not isinstance(left, Tensor) or not isinstance(right, Tensor):
        raise ManifoldError(
            f"LowRank: the factors are {type(left).__name__} and {type(right).__name__}; give two tensors"
        )
    if left.ndim < 2 or right.ndim < 2 or left.shape[-1] != right.shape[-2]:
        raise ManifoldError(
            f"LowRank: factors of shapes {tuple(left.shape)} and {tuple(right.shape)} have no product; "
            "they are (*batch, m, k) and (*batch, k, n)"
        )
    if not left.is_floating_point() or left.dtype != right.dtype:
        raise ManifoldError(
            f"LowRank: the factors have dtypes {left.dtype} and {right.dtype}; convert them to one real "
            "floating-point dtype"
        )
    if left.device != right.device:
        raise ManifoldError(
            f"LowRank: the factors are on {left.device} and {right.device}; move them to one device"
        )
    try:
        torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    except RuntimeError:
        raise ManifoldError(
            f"LowRank: batches {tuple(left.shape[:-2])} and {tuple(right.shape[:-2])} do not broadcast"
        ) from None


def check_finite(left: Tensor, right: Tensor, operation: str) -> None:
    """Refuses factors with entries that are not finite; silent under `vmap` and `torch.compile`."""
    if torch.compiler.is_compiling():
        return
    try:
        finite = bool(left.isfinite().all()) and bool(right.isfinite().all())
    except RuntimeError as unreadable:
        if "vmap" not in str(unreadable):
            raise
        return
    if not finite:
        raise ManifoldError(f"LowRank.{operation}: the factors hold numbers that are not finite")
