"""The metric that the rest of the network pulls back to a site, as factors `g = F^T F` of a few rows.

The Fisher metric of a distribution p over outputs with log-probability gradients `u_y = grad_h log p(y | h)`
is `g = E_{y~p} u_y u_y^T = J^T (diag p - p p^T) J` (J: Jacobian of the logits). Amari, Information Geometry
(2016), section 2.2; pulled back through a network as in Arvanitidis et al., AISTATS 2022, arXiv:2106.05367.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError


def sampled_factor(gradients: Float[Tensor, "rows samples width"]) -> Float[Tensor, "rows samples width"]:
    """Return the factor of the Fisher metric estimated from gradients of log p at labels drawn from p.

    `F_s = u_s / sqrt(S)`, so that `|F d|^2 = mean_s (u_s · d)^2`, unbiased for `d^T g d`. Where one label
    holds nearly all probability it is drawn every time and its gradient vanishes: there this estimate sees
    next to nothing.
    """
    return gradients / gradients.shape[1] ** 0.5


def categorical_factor(
    gradients: Float[Tensor, "rows answers width"],
    log_odds: Float[Tensor, "rows answers"],
    temperature: float = 1.0,
) -> Float[Tensor, "rows answers width"]:
    """Return the exact factor of the Fisher metric of the distribution over the answers alone.

    With `q = softmax(log_odds / temperature)` over the answers and gradients `u_k` of the answers' logits
    (any common part drops out): `F_k = sqrt(q_k) (u_k - sum_j q_j u_j)`, so `F^T F = J^T (diag q - q q^T) J`.
    A higher temperature keeps sight where the model is sure; an infinite one weighs all answers alike, which
    is the metric of the centred logits divided by their number.

    Raises:
        EditError: the temperature is not positive.
    """
    if not temperature > 0:
        raise EditError(
            f"temperature is {temperature}; it must be positive (float('inf') weighs answers alike)."
        )
    weights = torch.softmax(log_odds / temperature, dim=1)
    centred = gradients - torch.einsum("vk,vkd->vd", weights, gradients)[:, None]
    return rearrange(weights.sqrt(), "v k -> v k 1") * centred


def whitening_factor(
    residuals: Float[Tensor, "rows width"], shrinkage: float
) -> tuple[Float[Tensor, "rank width"], float]:
    """Return F and c such that the inverse of the shrunk covariance is `c I - F^T F`.

    The covariance is `S = (1 - a) R^T R / n + a m I`, with a the shrinkage and m the mean variance. From the
    thin SVD `R / sqrt(n) = U diag(s) V^T`: `S^-1 = (1 / am) I - V diag(1/am - 1/((1-a) s^2 + am)) V^T`; d x d
    is never formed.

    Raises:
        EditError: the residuals are all zero, or the shrinkage is not in (0, 1].
    """
    if not 0 < shrinkage <= 1:
        raise EditError(f"shrinkage is {shrinkage}; it must lie in (0, 1].")
    _, values, basis = torch.linalg.svd(residuals / residuals.shape[0] ** 0.5, full_matrices=False)
    floor = shrinkage * float(values.square().sum()) / residuals.shape[1]
    if floor <= 0:
        raise EditError("The within-class residuals are all zero, so that a spread can't be measured.")
    drop = 1 / floor - 1 / ((1 - shrinkage) * values.square() + floor)
    return drop.clamp_min(0).sqrt()[:, None] * basis, 1 / floor
