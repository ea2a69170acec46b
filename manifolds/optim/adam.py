"""Adam on manifolds."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from manifolds.optim.base import Entry, RiemannianOptimizer, decay


class RiemannianAdam(RiemannianOptimizer):
    """Adam whose first moment lives in the tangent space and whose second moment is one number per point.

    With the Riemannian gradient r = grad f(x) and t counting steps,

        m ← β₁ m + (1 − β₁) r,    v ← β₂ v + (1 − β₂) ⟨r, r⟩_x,
        u = −η (m / (1 − β₁ᵗ)) / ((v / (1 − β₂ᵗ))^½ + ε),    x ← R_x(u),    m ← T(m),

    with the manifold's retraction R and transport T.

    Why one number per point. Adam divides each coordinate by its own root mean square. On a manifold there
    are no coordinates to speak of: dividing the entries of a tangent matrix one by one leaves the tangent
    space, and its result depends on the basis of the surrounding space. ⟨r, r⟩_x is the squared norm of the
    differential df in the manifold's own metric. It does not depend on coordinates, is the same along
    isometries, and needs no transport. It is right for every metric, as r already is the gradient in that
    metric: on Stiefel with the canonical metric, ⟨r, r⟩_x = ⟨df, r⟩ holds as it does with the Euclidean
    one. The learning rate then is a length: a step is about η long in the metric (radians on the
    sphere), whatever the size of the point.

    A plain tensor is a product of real lines, one per entry, so that the same rule is the usual Adam there.
    The components of a product manifold have a number each.

    Options shared by all optimizers here:

    - Parameters that are `geoopt.ManifoldParameter` move on their manifold, ours or geoopt's; others are
      Euclidean.
    - `foreach` stacks parameters of equal shape, dtype, device, manifold and age into one batch (default:
      on).
    - Half-precision parameters have states in float32 and are stepped in float32.
    - `maximize=True` climbs.
    - `max_norm` clips the group's gradient in the metric before the step, see `clip_grad_norm_`.
    - `stabilize=k` projects the points onto the manifold, and the moments into the tangent space, every k
      steps.
    - `nonfinite="skip"` leaves out the step of a group that has a gradient with NaN or infinity, and logs it;
      `"raise"` (default) raises. Either way nothing is half-written.
    - `capturable`, `differentiable` and `fused` are not possible and raise, with the reason.

    Args:
        params: parameters, or groups of them, as for every torch optimizer.
        lr: η, the length of a step.
        betas: β₁ and β₂.
        eps: ε, keeps the division finite.
        weight_decay: λ. Adds λx to the Euclidean gradient; where ‖x‖ is constant, as on the sphere, that
            does nothing.
        amsgrad: divides by the largest v so far.
        decoupled_weight_decay: adds −ηλ times the gradient of ‖x‖²/2 to the step instead (AdamW).

    Raises:
        ManifoldError: an option out of range, a point off its manifold, a sparse, complex or non-finite
            gradient.

    Source: Bécigneul and Ganea, "Riemannian Adaptive Optimization Methods" (2019); Kingma and Ba,
    "Adam" (2015).

    Example:
        >>> import geoopt, torch
        >>> from manifolds import Sphere
        >>> a = torch.diag(torch.tensor([1.0, 2.0, 5.0]))
        >>> x = geoopt.ManifoldParameter(torch.tensor([0.6, 0.8, 0.0]) , manifold=Sphere())
        >>> optimizer = RiemannianAdam([x], lr=0.1)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     (x @ a @ x).backward()
        ...     optimizer.step()
        >>> round(float(x @ a @ x), 3)
        1.0
    """

    tangents: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **shared: Any,
    ) -> None:
        own = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }  # fmt: skip
        super().__init__(params, own, **shared)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        self._require(
            group, "betas", lambda b: len(b) == 2 and all(0 <= x < 1 for x in b), "two numbers in [0, 1)"
        )
        self._require(group, "eps", lambda value: value >= 0, "a number ≥ 0")
        self._require(group, "weight_decay", lambda value: value >= 0, "a number ≥ 0")

    def _start(self, entry: Entry) -> dict[str, Any]:
        x = entry.point
        size = torch.zeros_like(entry.manifold.component_inner(x, torch.zeros_like(x)))
        state = {"exp_avg": torch.zeros_like(x), "exp_avg_sq": size}
        return {**state, "max_exp_avg_sq": size.clone()} if entry.group["amsgrad"] else state

    def _advance(
        self, manifold: Any, x: Tensor, g: Tensor, state: dict[str, Tensor], step: int, group: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        decoupled = group["decoupled_weight_decay"]
        r = manifold.egrad2rgrad(x, g if decoupled else decay(group, x, g))
        mean = state["exp_avg"].lerp_(r, 1 - beta1)
        square = state["exp_avg_sq"].mul_(beta2).add_(manifold.component_inner(x, r), alpha=1 - beta2)
        if group["amsgrad"]:
            largest = torch.maximum(state["max_exp_avg_sq"], square)
            state["max_exp_avg_sq"], square = largest, largest
        size = square.sqrt().div_(math.sqrt(1 - beta2**step)).add_(group["eps"])
        u = mean * size.reciprocal_().mul_(-lr / (1 - beta1**step))
        if decoupled and group["weight_decay"]:
            u.add_(manifold.egrad2rgrad(x, x), alpha=-lr * group["weight_decay"])
        x, state["exp_avg"] = manifold.retr_transp(x, u, mean)
        return x, state
