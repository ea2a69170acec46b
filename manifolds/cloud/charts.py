"""Local charts of a sample: at each centre a tangent basis, the curved graph over it, and how far it holds.

A chart is the graph t ↦ c + T t + b(t) over the tangent space at its centre c, with the bend

    b(t) = II(t, t) / (1 + √(1 − |II(t, t)|²/|t|²)),

the solution of b = ½ (|t|² + |b|²) II(t̂, t̂): what the chord regressors of `manifolds.curvature.regression`
fit, exact on spheres of any radius. Where curvature does not rise above noise, or the neighbours are too few
for it, the chart is a plane.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.cloud.neighbours import Block, Search
from manifolds.curvature.along import fit_tangent
from manifolds.curvature.regression import RELIABLE, fit_quadratic, pairs, rows_in_use, unknowns
from manifolds.curvature.second_form import OUTSIDE
from manifolds.curvature.span import span

NAME = "PointCloud.fit"
BLOCK_ELEMENTS = 2**21
PILOTS = 48
"""On how many charts the number of neighbours is chosen."""
STEEPEST = 0.96
"""The largest |II(t, t)|²/|t|² that the bend follows: there a sphere has fallen by 0.8 of its radius."""


@dataclass(frozen=True)
class Charts:
    """Charts at m centres.

    Attributes:
        centres: points on the manifold: a sample, moved by the intercept of its fit.
        tangent: an orthonormal basis of the tangent space, in the columns.
        form: II(eᵢ, eⱼ) for i ≤ j in the order of `pairs(d)`, on that basis; 0 in a flat chart.
        noise: the standard deviation of a sample about the manifold, over all normal directions together.
        misfit: the mean square of what the chart leaves of its neighbours beyond noise: it bends otherwise.
        radius: the distance of the farthest neighbour that the chart was fitted to.
        extent: the least and the largest ⟨t, e⟩ of the neighbours, for the `directions` e.
        curved: whether `form` was given.
        alone: whether the centre lies far outside of its neighbours: an outlier, and no chart.
    """

    centres: Float[Tensor, "m D"]
    tangent: Float[Tensor, "m D d"]
    form: Float[Tensor, "m p D"]
    noise: Float[Tensor, "m"]
    misfit: Float[Tensor, "m"]
    radius: Float[Tensor, "m"]
    extent: Float[Tensor, "m e 2"]
    curved: Bool[Tensor, "m"]
    alone: Bool[Tensor, "m"]


@torch.no_grad()
def fit_charts(
    points: Float[Tensor, "n D"], which: Tensor, *, dim: int, neighbors: int, shape: bool = True
) -> Charts:
    """A chart at each of the named samples, fitted to its neighbours in double precision.

    Without `shape`, `tangent` and `form`, which take the most memory, are left empty.
    """
    search = Search(points, which, neighbors, NAME)
    width, count = points.shape[1], unknowns(dim)
    size = max((neighbors + 1) * max(count, width), width * count if shape else 0)
    fields: list[Tensor] = []
    for block in search.blocks(max(1, BLOCK_ELEMENTS // size)):
        found = _fit_block(block, search.queries[block.rows], dim, shape=shape)
        if not fields:
            fields = [each.new_empty(len(which), *each.shape[1:]) for each in found]
        for into, each in zip(fields, found, strict=True):
            into[block.rows] = each
    return Charts(*fields)


def bend(tangential: Float[Tensor, "*b m d"], form: Float[Tensor, "*b p r"]) -> Float[Tensor, "*b m r"]:
    """b(t) of each chart at m tangential coordinates."""
    return _bend(tangential, form)[0]


def bend_with_slope(
    tangential: Float[Tensor, "*b d"], form: Float[Tensor, "*b p r"]
) -> tuple[Float[Tensor, "*b r"], Float[Tensor, "*b r d"]]:
    """b(t) and its derivative ∂b/∂t of each chart."""
    dim = tangential.shape[-1]
    value, whole, flat, steep, root = _bend(tangential[..., None, :], form)
    first, second = pairs(dim, form.device)
    # d II(t, t) = 2 II(t, ·): in it, II(eᵢ, eⱼ) has the factor 2 tⱼ in column i and 2 tᵢ in column j.
    mixing = tangential.new_zeros(len(first), dim, dim)
    count = torch.arange(len(first), device=form.device)
    mixing[count, first, second] = 2
    mixing[count, second, first] = 2
    factors = (mixing @ tangential[..., None, :, None])[..., 0]
    slope = form.mT @ factors
    steepening = (slope.mT @ whole.mT)[..., 0] - steep[..., 0] * tangential
    steepening = 2 * steepening / torch.where(flat > 0, flat, 1.0)[..., 0]
    inner = (steep < STEEPEST)[..., 0]
    change = torch.where(inner, steepening / (2 * root * (1 + root) ** 2)[..., 0], 0.0)
    return value[..., 0, :], slope / (1 + root) + whole.mT * change[..., None, :]


def _bend(tangential: Tensor, form: Tensor) -> tuple[Tensor, ...]:
    first, second = pairs(tangential.shape[-1], tangential.device)
    times = torch.where(first == second, 1.0, 2.0).to(tangential.dtype)
    whole = (tangential[..., first] * tangential[..., second] * times) @ form
    flat = (tangential * tangential).sum(-1, keepdim=True)
    steep = (whole * whole).sum(-1, keepdim=True) / torch.where(flat > 0, flat, 1.0)
    root = (1 - steep.clamp_max(STEEPEST)).sqrt()
    return whole / (1 + root), whole, flat, steep, root


def symmetric(values: Float[Tensor, "*b p a"]) -> Float[Tensor, "*b d d a"]:
    """The symmetric matrices whose entries i ≤ j are given in the order of `pairs(d)`."""
    dim = int((2 * values.shape[-2]) ** 0.5)
    first, second = pairs(dim, values.device)
    place = torch.empty(dim, dim, dtype=torch.long, device=values.device)
    place[first, second] = torch.arange(len(first), device=values.device)
    place[second, first] = place[first, second]
    return values[..., place.flatten(), :].unflatten(-2, (dim, dim))


def directions(dim: int, like: Tensor) -> Float[Tensor, "e d"]:
    """The directions in which a chart knows how far its neighbours reach: axes, and diagonals between two."""
    axes = torch.eye(dim, dtype=like.dtype, device=like.device)
    if not 2 <= dim <= 8:
        return axes
    first, second = torch.triu_indices(dim, dim, 1, device=like.device)
    plus, minus = axes[first] + axes[second], axes[first] - axes[second]
    return torch.cat([axes, plus * 0.5**0.5, minus * 0.5**0.5])


def _fit_block(block: Block, queries: Tensor, dim: int, *, shape: bool) -> tuple[Tensor, ...]:
    """The fields of `Charts` for one block of centres."""
    found = span(block.between.double(), block.order, dim)
    used = rows_in_use(found, anchored=True)
    count = dim * (dim + 1) // 2
    tangent, noise = fit_tangent(found, dim, anchored=True)
    form = tangent.new_zeros(len(tangent), count, tangent.shape[1])
    curved = torch.zeros_like(noise, dtype=torch.bool)
    if block.order.shape[1] > unknowns(dim):
        fit = fit_quadratic(found, dim, anchored=True)
        ratio = fit.displacement / fit.displacement_noise.clamp_min(1e-300)
        curved = (ratio >= RELIABLE**2) & ~fit.singular & (used.sum(1) > unknowns(dim))
        tangent = torch.where(curved[:, None, None], fit.tangent, tangent)
        form = torch.where(curved[:, None, None], fit.coefficients, form)
        noise = torch.where(curved, fit.noise, noise)
    tangential = found.coordinates @ tangent
    left = found.coordinates - tangential @ tangent.mT - bend(tangential, form)
    intercept = (left * used[..., None]).sum(1) / used.sum(1, keepdim=True)
    free = used.sum(1) - torch.where(curved, float(unknowns(dim)), dim + 1.0)
    rest = ((left - intercept[:, None]) * used[..., None]).square().sum((1, 2)) / free.clamp_min(1)
    misfit = (rest + found.outside - noise).clamp_min(0)
    along = tangential @ directions(dim, tangential).mT
    radius = found.squares.amax(1).sqrt()
    spacing = radius / block.order.shape[1] ** (1 / dim)
    low, high = along.amin(1) - spacing[:, None], along.amax(1) + spacing[:, None]
    moved = found.lift(intercept[..., None])[..., 0]
    frame, bends = moved.new_empty(*moved.shape, 0), moved.new_empty(len(moved), 0, moved.shape[1])
    if shape:
        lifted = found.lift(torch.cat([tangent, form.mT], -1))
        frame = _orthonormal(lifted[..., :dim])
        bends = lifted[..., dim:]
        bends = (bends - frame @ (frame.mT @ bends)).mT
    alone = found.offset > OUTSIDE**2 * found.spread
    kind, spread = queries.dtype, noise.clamp_min(0).sqrt()
    return (
        queries + moved.to(kind), frame.to(kind), bends.to(kind), spread.to(kind),
        misfit.to(kind), radius.to(kind), torch.stack([low, high], -1).to(kind), curved, alone,
    )  # fmt: skip


def _orthonormal(frame: Tensor) -> Tensor:
    """The basis, orthonormal to rounding; directions without extent, which lift to nothing, get others."""
    turned, triangle = torch.linalg.qr(frame)
    sign = triangle.diagonal(dim1=1, dim2=2).sign()
    return turned * torch.where(sign == 0, 1.0, sign)[:, None]


def errors(charts: Charts, dim: int, neighbors: int) -> Float[Tensor, "m"]:
    """The expected square of how far a chart is off the manifold: its misfit, and the variance of its fit."""
    count = torch.where(charts.curved, float(unknowns(dim)), dim + 1.0)
    return charts.misfit + charts.noise**2 * count / neighbors


def choose_neighbors(points: Float[Tensor, "n D"], dim: int, least: int, most: int) -> int:
    """The number of neighbours that errs least, of `least` and its doubles to `most` or a quarter of all.

    Noise asks for many neighbours and the shape for few; the median of `errors` over some charts weighs them.
    """
    total = len(points)
    some = torch.arange(0, total, max(1, total // PILOTS), device=points.device)
    best, lowest = least, float("inf")
    count = least
    while count == least or count <= min(most, total // 4):
        charts = fit_charts(points, some, dim=dim, neighbors=count, shape=False)
        error = float(errors(charts, dim, count).median())
        if error < lowest:
            best, lowest = count, error
        elif error > 2 * lowest:
            break
        count *= 2
    return best
