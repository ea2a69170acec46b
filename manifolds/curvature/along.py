"""II(v, v) in one direction, and a tangent space, from fewer neighbours than the whole form needs."""

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.curvature.regression import TILTS, base_weight, least_squares, noise_of, rows_in_use
from manifolds.curvature.span import Span

ROUNDS = 2
"""How often the base point is moved by the intercept and all is fitted again."""


def form_along(
    between: Float[Tensor, "b k D"],
    tangent: Float[Tensor, "b D d"],
    unit: Float[Tensor, "b d"],
    noise: Float[Tensor, "b"],
    *,
    anchored: bool,
) -> tuple[Float[Tensor, "b D"], Float[Tensor, "b"], Float[Tensor, "b"], Float[Tensor, "b"]]:
    """II(v, v) for a unit vector v, its variance, |II̅|² across v, and the mean squared length of the rows.

    Args:
        between: neighbour − base.
        tangent: an orthonormal basis.
        unit: v in tangent coordinates.
        noise: the variance of a point about the manifold, over all normal directions.
        anchored: whether the base points belong to the sample.
    """
    rows = torch.cat([torch.zeros_like(between[:, :1]), between], 1) if anchored else between
    tangential = rows @ tangent
    normal = rows - tangential @ tangent.mT
    squares = (rows * rows).sum(-1)
    flat = (tangential * tangential).sum(-1)
    cosine = (tangential @ unit[..., None])[..., 0] ** 2 / flat.clamp_min(1e-300)
    origin, used = torch.zeros_like(normal[:, :1]), torch.ones_like(flat)[..., None]
    for step in range(ROUNDS + 1):
        moved = squares - 2 * (normal @ origin.mT)[..., 0] + (origin * origin).sum(-1) - noise[:, None]
        half = torch.where(flat > 1e-12 * flat.mean(1, keepdim=True), moved.clamp_min(0) / 2, 0.0)
        bends = torch.stack([half * cosine, half * (1 - cosine)], -1)
        design = torch.cat([torch.ones_like(bends[..., :1]), tangential, bends], -1)
        fit = least_squares(design * used, (normal - origin) * used, weights=step == ROUNDS)
        if step < ROUNDS:
            origin = origin + fit.values[:, :1]
            if anchored:
                whole = torch.linalg.vector_norm(fit.residual, dim=(1, 2)) ** 2
                whole = whole / max(1, design.shape[1] - design.shape[2])
                used = torch.cat([base_weight(whole, noise)[:, None, None], used[:, 1:]], 1)
                size = (origin * origin).sum(-1, keepdim=True)
                origin = origin * (noise[:, None, None] / size.clamp_min(1e-300)).clamp_max(1).sqrt()
    values, weights = fit.values[:, -2:], fit.weights[:, -2:]
    variance = (weights**2 * fit.noise_of_rows[:, None]).sum(-1)
    at_least = (weights**2 * torch.linalg.vector_norm(fit.residual, dim=-1)[:, None] ** 2).sum(-1)
    variance = torch.maximum(variance, at_least)
    variance = torch.where(fit.singular[:, None], torch.inf, variance)
    across = (values[:, 1] ** 2).sum(-1) - variance[:, 1] + variance[:, 0]
    return values[:, 0], variance[:, 0], across, squares.mean(1)


def fit_tangent(
    neighbourhood: Span, dim: int, *, anchored: bool
) -> tuple[Float[Tensor, "b r d"], Float[Tensor, "b"]]:
    """A tangent basis in coordinates of the span, and the variance of the noise.

    The leading directions, tilted by the linear terms of a regression whose only bend is ½|y|² H: d + 2
    unknowns.
    """
    rows, squares = neighbourhood.coordinates, neighbourhood.squares
    used = rows_in_use(neighbourhood, anchored=anchored)
    tangent = neighbourhood.leading
    for step in range(TILTS + 1):
        tangential = rows @ tangent
        normal = rows - tangential @ tangent.mT
        design = torch.cat([torch.ones_like(squares)[..., None], tangential, squares[..., None] / 2], -1)
        fit = least_squares(design * used[..., None], normal * used[..., None])
        if step < TILTS:
            tangent = torch.linalg.qr(tangent + fit.values[:, 1 : 1 + dim].mT).Q
    left = torch.linalg.vector_norm(fit.residual, dim=(1, 2)) ** 2
    return tangent, noise_of(left, neighbourhood, used.sum(1) - design.shape[-1])
