"""How straight a map is along a direction: two derivatives, and how far the first serves."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from manifolds.errors import ManifoldError
from manifolds.forward_mode import WrittenOut

NAME = "functional"


@dataclass(frozen=True)
class FunctionalCurvature:
    """The path t ↦ f(x + t v) to second order, f(x) + t f′ + ½ t² f″.

    Attributes:
        value: f(x).
        first: f′, the first derivative in direction v.
        second: f″, the second.
        first_norm: the length of f′ in the chosen norm, one number for each x.
        second_norm: the length of f″.
    """

    value: Tensor
    first: Tensor
    second: Tensor
    first_norm: Tensor
    second_norm: Tensor

    @property
    def ratio(self) -> Tensor:
        """|f″| / |f′|: the curvature of the map along v, in units of 1/t; infinite where only f′ vanishes."""
        ratio = self.second_norm / self.first_norm
        return torch.where(self.second_norm == 0, 0.0, ratio)

    def radius(self, eps: float) -> Tensor:
        """The |t| up to which the second-order term stays under `eps` of the first: 2 eps |f′| / |f″|.

        Infinite where the second derivative vanishes, 0 where only the first does.
        """
        if not eps > 0:
            raise ManifoldError(f"{NAME}: eps is {eps}; it is a share of the first-order term, above 0")
        return torch.where(self.second_norm == 0, torch.inf, 2 * eps * self.first_norm / self.second_norm)


def functional(
    f: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch n"],
    v: Float[Tensor, "*#batch n"],
    *,
    norm: Literal["euclidean", "fisher"] = "euclidean",
) -> FunctionalCurvature:
    """The first and the second derivative of f at x along v, by two nested forward passes and no Hessian.

    With ``norm="fisher"`` the output is taken as logits, and a change u of them has the length
    |u|² = Σᵢ pᵢ uᵢ² − (Σᵢ pᵢ uᵢ)², p = softmax(f(x)): the metric of the distributions, twice their
    Kullback-Leibler divergence for small u. What adds the same to all logits has no length.

    Args:
        f: maps a batch to a batch, each item by itself; any network whose forward pass is differentiable in
            forward mode. Attention and layer norms run in their plain forms for this.
        x: where; all dimensions but the last are the batch.
        v: the direction, one for each item or one for all.
        norm: how to measure the output, over all its dimensions behind the batch.

    Raises:
        ManifoldError: if the shapes or the dtypes do not fit, or f does not keep the batch.

    >>> def energy(x):
    ...     return x.square().sum(-1, keepdim=True)
    >>> found = functional(energy, torch.tensor([3.0, 0.0]), torch.tensor([1.0, 0.0]))
    >>> found.first.item(), found.second.item(), round(found.radius(0.1).item(), 3)
    (6.0, 2.0, 0.6)
    """
    if norm not in ("euclidean", "fisher"):
        raise ManifoldError(f"{NAME}: norm is {norm!r}; there are 'euclidean' and 'fisher'")
    if x.dtype != v.dtype or x.device != v.device:
        raise ManifoldError(
            f"{NAME}: x is {x.dtype} on {x.device} and v {v.dtype} on {v.device}; make them alike"
        )
    if not bool(x.isfinite().all() and v.isfinite().all()):
        raise ManifoldError(f"{NAME}: x or v holds NaN or infinity; there is no derivative to take")
    direction = v.expand_as(x).contiguous()
    batch = x.shape[:-1]

    def along(point: Tensor) -> Any:
        return jvp(f, (point,), (direction,))

    # The fused attention kernels know no forward mode.
    with sdpa_kernel(SDPBackend.MATH), WrittenOut():
        both: Any = jvp(along, (x,), (direction,))
    (value, first), (_, second) = both
    if value.shape[: len(batch)] != batch:
        raise ManifoldError(
            f"{NAME}: f maps shape {tuple(x.shape)} to {tuple(value.shape)}; "
            f"it must keep the batch {tuple(batch)}"
        )
    if norm == "fisher" and value.ndim == len(batch):
        raise ManifoldError(f"{NAME}: f gives one number for each x; the Fisher norm needs logits")
    return FunctionalCurvature(
        value=value,
        first=first,
        second=second,
        first_norm=_length(first, value, len(batch), norm),
        second_norm=_length(second, value, len(batch), norm),
    )


def _length(change: Tensor, value: Tensor, batch: int, norm: str) -> Tensor:
    """The norm of a change of the output, over all dimensions behind the batch."""
    squares = change * change
    if norm == "fisher":
        odds = value.softmax(-1)
        mean = (odds * change).sum(-1, keepdim=True)
        squares = odds * (change - mean) ** 2
    return squares.reshape(*squares.shape[:batch], -1).sum(-1).sqrt()
