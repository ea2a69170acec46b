"""Muon on matrices and on manifolds of matrices."""

import math
from typing import Any, ClassVar

import geoopt
import torch
from torch import Tensor

from manifolds.errors import ManifoldError
from manifolds.euclidean import Euclidean
from manifolds.fixed_rank import FixedRank
from manifolds.grassmann import Grassmann
from manifolds.matrix_functions import sym
from manifolds.optim.base import LINE, Entry, RiemannianOptimizer
from manifolds.optim.orthogonal import JORDAN, newton_schulz, orthogonal_factor, stiefel_direction
from manifolds.orthogonal import SpecialOrthogonal
from manifolds.stiefel import Stiefel

ADJUSTMENTS = ("original", "match_rms_adamw")


class RiemannianMuon(RiemannianOptimizer):
    """Steps whose length is a spectral norm: every singular direction of the step is used to the full.

    The momentum b ← T(μ b + (1 − μ) r) of the gradient r, looked ahead with `nesterov` to μ b + (1 − μ) r,
    is turned into a direction A, and x ← R_x(−η A). What A is depends on where the parameter lives:

    - A plain matrix gets Muon's own step, A ≈ U Vᵀ of b = U Σ Vᵀ by Newton–Schulz rounds, scaled by
      (max(1, m/n))^½ ("original") or 0.2 (max(m, n))^½ ("match_rms_adamw"). Leading dimensions are
      a batch of matrices.
    - A point W of Stiefel, of the orthogonal group or of Grassmann gets manifold Muon: the tangent A with
      ‖A‖₂ ≤ 1 and the largest ⟨b, A⟩; see `stiefel_direction`. It depends on the differential and the
      spectral norm alone, so that the Euclidean and the canonical metric give the same step. Where W
      is square, and on Grassmann, where WᵀA = 0, it is the orthogonal factor at once.
    - A point L Rᵀ of fixed rank r gets Riemannion: b, a matrix of rank 2r, is replaced by its orthogonal
      factor U Vᵀ, which is projected onto the tangent space. Nothing of size m×n is formed, and the step
      does not depend on how W is split into L and R.

    Moments are carried by orthogonal projection onto the new tangent space. The learning rate is the
    spectral norm of a step.

    Args:
        params: parameters, or groups of them; matrices.
        lr: η.
        momentum: μ in [0, 1).
        nesterov: looks ahead.
        weight_decay: λ, decoupled: adds −ηλ times the gradient of ‖x‖²/2 to the step.
        ns_coefficients: a, b, c of Newton–Schulz.
        ns_steps: its rounds.
        eps: the least norm that a plain matrix is divided by before them.
        adjust_lr_fn: how η is scaled for plain matrices.
        rounds: the most rounds for the direction on Stiefel. They converge slowly where the optimum loses
            rank: on nearly square frames (5×4) the slope can stay up to 5 % short of the best after 50.

    The other options are those of `RiemannianAdam`.

    Raises:
        ManifoldError: a parameter that is no matrix or lives on a manifold without such a step; an option
            out of range; a sparse, complex or non-finite gradient.

    Source: Jordan et al., "Muon" (2024); Bernstein, "Modular Manifolds" (2025); Bogachev et al., "LoRA meets
    Riemannion" (2025).
    """

    tangents: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        *,
        ns_coefficients: tuple[float, float, float] = JORDAN,
        ns_steps: int = 5,
        eps: float = 1e-7,
        adjust_lr_fn: str = "original",
        rounds: int = 50,
        **shared: Any,
    ) -> None:
        own = {
            "lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay,
            "ns_coefficients": tuple(ns_coefficients), "ns_steps": ns_steps, "eps": eps,
            "adjust_lr_fn": adjust_lr_fn, "rounds": rounds,
        }  # fmt: skip
        super().__init__(params, own, **shared)

    def _check_options(self, group: dict[str, Any]) -> None:
        super()._check_options(group)
        self._require(group, "momentum", lambda value: 0 <= value < 1, "a number in [0, 1)")
        self._require(group, "weight_decay", lambda value: value >= 0, "a number ≥ 0")
        self._require(group, "ns_steps", lambda k: k >= 1 and k == int(k), "a whole number ≥ 1")
        self._require(group, "rounds", lambda k: k >= 1 and k == int(k), "a whole number ≥ 1")
        self._require(group, "adjust_lr_fn", ADJUSTMENTS.__contains__, f"one of {ADJUSTMENTS}")

    def _check_parameter(self, entry: Entry) -> None:
        kind_of(entry.manifold)
        if entry.parameter.ndim < 2:
            raise ManifoldError(
                f"RiemannianMuon: parameter {entry.name} has shape {tuple(entry.parameter.shape)}; "
                "it moves matrices: give vectors and numbers to RiemannianAdam"
            )

    def _point_dims(self, manifold: Any) -> int:
        return 2

    def _start(self, entry: Entry) -> dict[str, Any]:
        return {"momentum_buffer": torch.zeros_like(entry.point)}

    def _advance(
        self, manifold: Any, x: Tensor, g: Tensor, state: dict[str, Tensor], step: int, group: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kind, lr, momentum = kind_of(manifold), float(group["lr"]), group["momentum"]
        r = tangent_gradient(kind, manifold, x, g)
        carried = state["momentum_buffer"].lerp_(r, 1 - momentum)
        ahead = torch.lerp(r, carried, momentum) if group["nesterov"] else carried
        if kind == "flat":
            a = newton_schulz(ahead, group["ns_steps"], group["ns_coefficients"], group["eps"])
            rows, columns = x.shape[-2:]
            original = group["adjust_lr_fn"] == "original"
            scale = math.sqrt(max(1, rows / columns)) if original else 0.2 * math.sqrt(max(rows, columns))
            shrunk = x * (1 - lr * group["weight_decay"])
            return shrunk.sub_(a, alpha=lr * scale), state
        if kind == "fixed rank":
            a = riemannion(manifold, x, ahead)
        else:
            a = stiefel_direction(x, ahead, max_iterations=group["rounds"]).vector
        if group["weight_decay"]:
            a = a + group["weight_decay"] * manifold.egrad2rgrad(x, x)
        y = manifold.retr(x, -lr * a)
        if kind == "fixed rank":
            carried = manifold.transp(x, y, carried)
        else:
            carried = tangent_gradient(kind, manifold, y, carried)
        state["momentum_buffer"] = carried
        return y, state


def kind_of(manifold: Any) -> str:
    """Which of Muon's steps a manifold gets: "flat", "orthonormal", "horizontal" or "fixed rank".

    Raises:
        ManifoldError: it gets none.
    """
    if manifold is LINE or isinstance(manifold, (Euclidean, geoopt.Euclidean)):
        return "flat"
    if isinstance(manifold, FixedRank):
        return "fixed rank"
    if isinstance(manifold, Grassmann):
        return "horizontal"
    if isinstance(manifold, (Stiefel, SpecialOrthogonal, geoopt.EuclideanStiefel)):
        return "orthonormal"
    raise ManifoldError(
        f"RiemannianMuon has no step on {manifold}; it has steps for plain matrices, Stiefel, "
        "SpecialOrthogonal, Grassmann and FixedRank, and geoopt's EuclideanStiefel (the retraction of its "
        "default Stiefel is not first order). "
        "RiemannianAdam moves on every manifold"
    )


def tangent_gradient(kind: str, manifold: Any, x: Tensor, g: Tensor) -> Tensor:
    """The tangent vector that stands for the differential by the Euclidean metric."""
    if kind == "orthonormal":
        return g - x @ sym(x.mT @ g)
    if kind == "horizontal":
        return g - x @ (x.mT @ g)
    return manifold.egrad2rgrad(x, g)


def riemannion(manifold: FixedRank, x: Tensor, u: Tensor) -> Tensor:
    """The orthogonal factor of a tangent vector of fixed rank, projected onto the tangent space."""
    return manifold.project_ambient(x, orthogonal_factor(manifold.tangent_lowrank(x, u)))
