"""Stochastic gradient descent on manifolds."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from manifolds.errors import ManifoldError
from manifolds.optim.base import Entry, RiemannianOptimizer, decay


class RiemannianSGD(RiemannianOptimizer):
    """Gradient descent with momentum that is carried along from tangent space to tangent space.

    With the Riemannian gradient r = grad f(x), momentum μ and dampening τ,

        b ← μ b + (1 − τ) r    (b ← r at the first step),
        d = b, or r + μ b with `nesterov`, or r without momentum,
        x ← R_x(−η d),    b ← T(b),

    with the manifold's retraction R and transport T. On plain tensors it is `torch.optim.SGD`.

    Args:
        params: parameters, or groups of them.
        lr: η. A step is η times the gradient.
        momentum: μ ≥ 0.
        dampening: τ.
        weight_decay: λ. Adds λx to the Euclidean gradient.
        nesterov: looks ahead; needs momentum and no dampening.

    The other options are those of `RiemannianAdam`.

    Raises:
        ManifoldError: an option out of range, a point off its manifold, a sparse, complex or non-finite
            gradient.

    Source: Bonnabel, "Stochastic gradient descent on Riemannian manifolds" (2013).
    """

    tangents: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        **shared: Any,
    ) -> None:
        own = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov,
        }  # fmt: skip
        super().__init__(params, own, **shared)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        self._require(group, "momentum", lambda value: value >= 0, "a number ≥ 0")
        self._require(group, "weight_decay", lambda value: value >= 0, "a number ≥ 0")
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ManifoldError(
                f"RiemannianSGD: nesterov needs momentum > 0 and dampening 0; they are {group['momentum']} "
                f"and {group['dampening']}"
            )

    def _start(self, entry: Entry) -> dict[str, Any]:
        return {"momentum_buffer": torch.zeros_like(entry.point)} if entry.group["momentum"] else {}

    def _advance(
        self, manifold: Any, x: Tensor, g: Tensor, state: dict[str, Tensor], step: int, group: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lr, momentum = float(group["lr"]), group["momentum"]
        r = manifold.egrad2rgrad(x, decay(group, x, g))
        if "momentum_buffer" not in state:
            return manifold.retr(x, r * -lr), state
        share = 1.0 if step == 1 else 1 - group["dampening"]
        carried = state["momentum_buffer"].mul_(momentum).add_(r, alpha=share)
        direction = r.add(carried, alpha=momentum) if group["nesterov"] else carried
        x, state["momentum_buffer"] = manifold.retr_transp(x, direction * -lr, carried)
        return x, state
