"""Gradients before a step: are they finite, and how long are they in the metric."""

from collections.abc import Iterable, Sequence
from typing import Any

import geoopt
import torch
from geoopt import ManifoldTensor
from torch import Tensor

from manifolds.base import plain
from manifolds.errors import ManifoldError
from manifolds.operations import unchecked, widened


@torch.no_grad()
def clip_grad_norm_(parameters: Tensor | Iterable[Tensor], max_norm: float) -> Tensor:
    """Scales the gradients of all parameters together so that their norm in the metric is at most `max_norm`.

    The norm of a covector df is that of its Riemannian gradient, ‖df‖ = ‖grad f‖_x; over several parameters
    it is the root of the sum of squares. Conversion of gradients is linear, so scaling the Euclidean
    gradient scales the Riemannian one. What points off the tangent space does not count. Plain tensors are
    Euclidean, as in `torch.nn.utils.clip_grad_norm_`.

    Args:
        parameters: one or many; those without a gradient are left alone.
        max_norm: the largest norm to allow, > 0.

    Returns:
        The norm before clipping, a scalar tensor.

    Raises:
        ManifoldError: `max_norm` is not positive, or a gradient is sparse or not finite; nothing is changed
            then.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if not max_norm > 0:
        raise ManifoldError(f"clip_grad_norm_: max_norm is {max_norm}; it is a number > 0")
    with_gradient = [(str(i), p) for i, p in enumerate(given) if p.grad is not None]
    if not with_gradient:
        return torch.zeros(())
    for name, parameter in with_gradient:
        if parameter.grad.layout != torch.strided:  # type: ignore[union-attr]
            raise ManifoldError(
                f"clip_grad_norm_: the gradient of parameter {name} is sparse; ask for dense ones"
            )
    bad = refuse_nonfinite([(name, p.grad) for name, p in with_gradient])  # type: ignore[misc]
    if bad:
        name, count = next(iter(bad.items()))
        raise ManifoldError(
            f"clip_grad_norm_: the gradient of parameter {name} has {count} entries that are not finite"
        )
    points: list[tuple[Any, Tensor, Tensor]] = [
        (
            p.manifold if isinstance(p, ManifoldTensor) else geoopt.Euclidean(),
            widened(plain(p.detach())),
            widened(plain(p.grad)),  # type: ignore[arg-type]
        )
        for _, p in with_gradient
    ]
    with unchecked():
        norm, scale = clip_scale(points, max_norm)
    for _, parameter in with_gradient:
        parameter.grad.mul_(scale.to(parameter.grad))  # type: ignore[union-attr]
    return norm


def clip_scale(points: Sequence[tuple[Any, Tensor, Tensor]], max_norm: float) -> tuple[Tensor, Tensor]:
    """The norm of gradients at (manifold, point, Euclidean gradient), and the factor that brings it down."""
    device = points[0][1].device
    squares = []
    for manifold, x, g in points:
        r = manifold.egrad2rgrad(x, g)
        squares.append(manifold.inner(x, r).double().sum().to(device))
    norm = torch.stack(squares).sum().sqrt()
    return norm, (max_norm / norm.clamp_min(torch.finfo(norm.dtype).tiny)).clamp(max=1.0)


def refuse_nonfinite(gradients: Sequence[tuple[str, Tensor]]) -> dict[str, int]:
    """The names of gradients that are not finite, with their number of bad entries.

    The sum of the norms is finite only if all entries are. Where it is not, huge entries may have
    overflowed, so that each gradient is then looked at by itself.
    """
    if not gradients:
        return {}
    device = gradients[0][1].device
    norms = torch._foreach_norm([plain(g) for _, g in gradients])
    if bool(torch.stack([norm.to(device, torch.float64) for norm in norms]).sum().isfinite()):
        return {}
    counts = {name: int((~g.isfinite()).sum()) for name, g in gradients}
    return {name: count for name, count in counts.items() if count}
