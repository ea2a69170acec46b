"""The reach of a manifold known from charts."""

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.curvature.regression import pairs

TRUSTED = 0.02
"""The share of the charts, the most curved or nearest to another sheet, that may be wrong."""
BLOCK_ELEMENTS = 2**23
"""How many differences, or coefficients of forms, are looked at together."""


def estimate_reach(
    centres: Float[Tensor, "m r"],
    tangents: Float[Tensor, "m r d"],
    forms: Float[Tensor, "m p r"],
    radius: Float[Tensor, "m"],
    noise: Float[Tensor, "m"],
) -> float:
    """The distance within which each point has one nearest point on the manifold.

    Federer (Curvature measures, 1959, theorem 4.18): the least |y − x|² / (2 d(y − x, T_x)) over all pairs;
    Aamari et al. (Estimating the reach of a manifold, 2019) take it over a sample. Here pairs are centres
    of charts, whose noise is averaged out; pairs nearer than the charts' radius, where noise would decide,
    are represented by the second fundamental form, 1 / max |II(v, v)|. The rest of the noise is taken off
    the numerator. Of the charts' values the 2 % quantile is given, so that single charts, bad or at outliers,
    do not decide.
    """
    dim = tangents.shape[-1]
    rows = max(1, BLOCK_ELEMENTS // max(1, dim * dim * forms.shape[-1]))
    local = torch.cat([largest_bend(part, dim) for part in forms.split(rows)])
    far = torch.zeros_like(local)
    rows = max(1, BLOCK_ELEMENTS // centres.numel())
    for start in range(0, len(centres), rows):
        some = slice(start, start + rows)
        between = centres[None] - centres[some, None]
        along = between @ tangents[some]
        square = (between * between).sum(-1)
        off = (square - (along * along).sum(-1)).clamp_min(0).sqrt() - noise[None]
        known = square > radius[some, None] ** 2
        far[some] = torch.where(known, 2 * off.clamp_min(0) / square.clamp_min(1e-30), 0.0).amax(1)
    worst = torch.maximum(local, far)
    value = float(torch.quantile(worst.double(), 1 - TRUSTED))
    return 1 / value if value > 0 else float("inf")


def largest_bend(forms: Float[Tensor, "m p r"], dim: int, rounds: int = 30) -> Float[Tensor, "m"]:
    """Max |II(v, v)| over unit v, by power steps v ← II(v, ·) · II(v, v) from each axis and the diagonal."""
    first, second = pairs(dim, forms.device)
    place = torch.zeros(dim, dim, dtype=torch.long, device=forms.device)
    place[first, second] = torch.arange(len(first), device=forms.device)
    place[second, first] = place[first, second]
    whole = forms[:, place.flatten()].unflatten(1, (dim, dim))
    axes = torch.eye(dim, dtype=forms.dtype, device=forms.device)
    starts = torch.cat([axes, torch.ones_like(axes[:1]) / dim**0.5])
    best = torch.zeros_like(forms[:, 0, 0])
    for start in starts:
        v = start.expand(len(forms), dim)
        for _ in range(rounds):
            half = torch.einsum("mabr,ma->mbr", whole, v)
            value = torch.einsum("mbr,mb->mr", half, v)
            size = torch.linalg.vector_norm(value, dim=-1)
            best = torch.maximum(best, size)
            v = torch.einsum("mbr,mr->mb", half, value)
            v = v / torch.linalg.vector_norm(v, dim=-1, keepdim=True).clamp_min(1e-30)
    return best
