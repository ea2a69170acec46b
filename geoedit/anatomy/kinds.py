"""Telling kinds of modules apart by their weights and behaviour: projections, norms, adapters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from geoedit.anatomy.trace import first_tensor


def rows(tensor: Tensor) -> Tensor:
    """Flatten all axes but the last."""
    return tensor.reshape(-1, tensor.shape[-1])


def same_values(a: Tensor | None, b: Tensor | None) -> bool:
    """Say whether two tensors hold the same numbers in the same order, whatever their shapes."""
    return (
        a is not None
        and b is not None
        and a.numel() == b.numel()
        and torch.equal(a.reshape(-1), b.reshape(-1).to(a))
    )


def is_projection(module: nn.Module) -> bool:
    """Say whether a module is a matrix of weights (dense, transposed, quantised, or with an adapter)."""
    if isinstance(getattr(module, "base_layer", None), nn.Module):
        return not isinstance(module.base_layer, nn.Embedding)
    if isinstance(module, nn.Embedding):
        return False
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    sizes = {t.ndim for t in own}
    return 2 in sizes and max(sizes) == 2 and not any(True for _ in module.children())


def adapted(modules: Mapping[str, nn.Module]) -> set[str]:
    """Return the paths inside modules that wrap another one (adapters)."""
    wrappers = [p for p, m in modules.items() if p and isinstance(getattr(m, "base_layer", None), nn.Module)]
    return {p for p in modules for w in wrappers if p.startswith(f"{w}.")}


def is_norm(module: nn.Module, width: int, like: Tensor) -> bool:
    """Say whether a module normalises: an input three times as large gives the same output."""
    if any(
        is_projection(m) or isinstance(m, (nn.Embedding, nn.modules.conv._ConvNd)) for m in module.modules()
    ):
        return False
    if any(p.ndim > 1 and p.numel() > width for p in module.parameters()):
        return False
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.randn((1, 3, width), generator=generator).to(like.device, like.dtype)
    try:
        small, large = first_tensor(module(x)), first_tensor(module(3 * x))
    except Exception:
        return False
    if small is None or large is None or small.shape != x.shape or not small.is_floating_point():
        return False
    tolerance = max(4 * torch.finfo(small.dtype).eps, 1e-4) * small.abs().max()
    return bool((small - large).abs().max() <= tolerance) and bool(small.abs().max() > 0)
