"""Moving least squares on charts: one smooth manifold out of many local graphs, and the nearest point on it.

At a place y, each chart i near y says how far y lies off its graph, hᵢ(y) = yᵢ − Tᵢ tᵢ − bᵢ(tᵢ) with
yᵢ = y − cᵢ and tᵢ = Tᵢᵀ yᵢ. Weights wᵢ(y) with compact support blend them: G = Σ wᵢ hᵢ, and Π, the projector
onto the d leading directions of A = Σ wᵢ Tᵢ Tᵢᵀ. The manifold is the zero set of F = (I − Π) G, and Newton's
method finds on it the foot of x, where x − y is normal.

Sources: D. Levin, "Mesh-independent surface interpolation" (2003); B. Sober and D. Levin, "Manifold
approximation by moving least-squares" (2020), whose projection has the same two conditions. Here the local
fits are made once, at the charts, and not anew for every state.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manifolds.cloud.charts import bend, bend_with_slope
from manifolds.curvature.regression import pairs

SUPPORT_POWER = 4
"""The weight is (1 − |y − cᵢ|²/hᵢ²)⁴: three continuous derivatives at the rim."""
POWERS = 3
"""How often A is applied to the tangent of the nearest chart; each time what is not Π falls by (h κ)²."""
DAMPED = 0.9
"""The Newton step divides by I − S, S the curvature along x − y; beyond this norm S is scaled down."""
MOST_STEPS = 12
RESTED = {torch.float64: 1e-7, torch.float32: 1e-3}
"""The largest step, in units of the local support, after which only the polishing is left to do."""
POLISHING = {torch.float64: 6, torch.float32: 2}
"""How many steps follow, through which derivatives pass."""


@dataclass(frozen=True)
class Atlas:
    """Charts in the coordinates of their common span, as the blending needs them.

    Attributes:
        centres: the centres.
        tangent: tangent bases.
        form: the second fundamental forms.
        support: the radius hᵢ beyond which a chart has no weight.
        near: for each chart, the charts nearest to it, itself first.
    """

    centres: Float[Tensor, "m r"]
    tangent: Float[Tensor, "m r d"]
    form: Float[Tensor, "m p r"]
    support: Float[Tensor, "m"]
    near: Int[Tensor, "m l"]


@dataclass(frozen=True)
class Local:
    """The charts that have a say at each of b places, the nearest first."""

    centres: Float[Tensor, "b k r"]
    tangent: Float[Tensor, "b k r d"]
    form: Float[Tensor, "b k p r"]
    support: Float[Tensor, "b k"]
    which: Int[Tensor, "b k"]


@dataclass(frozen=True)
class Foot:
    """The foot of each state, a basis of the tangent space there, and the weights of the charts."""

    at: Float[Tensor, "b r"]
    tangent: Float[Tensor, "b r d"]
    share: Float[Tensor, "b k"]


def nearest_chart(atlas: Atlas, x: Float[Tensor, "b r"]) -> Int[Tensor, "b"]:
    """The chart whose centre is nearest, by one matrix product."""
    squares = (atlas.centres * atlas.centres).sum(-1)
    return (squares - 2 * (x @ atlas.centres.mT)).argmin(-1)


@torch.no_grad()
def localise(atlas: Atlas, x: Float[Tensor, "b r"], count: int) -> tuple[Local, Float[Tensor, "b r"]]:
    """The charts around the foot of each state, and the foot on the nearest of them to begin with."""
    which = nearest_chart(atlas, x)
    tangent = atlas.tangent[which]
    along = ((x - atlas.centres[which])[:, None] @ tangent)[:, 0]
    reach = atlas.support[which]
    along = along * (reach / torch.linalg.vector_norm(along, dim=-1).clamp_min(1e-30)).clamp_max(1)[:, None]
    start = atlas.centres[which] + (tangent @ along[..., None])[..., 0]
    start = start + bend(along[:, None], atlas.form[which])[:, 0]
    listed = atlas.near[which]
    apart = atlas.centres[listed] - start[:, None]
    scaled = (apart * apart).sum(-1) / atlas.support[listed] ** 2
    order = scaled.topk(min(count, scaled.shape[1]), largest=False).indices
    which = listed.gather(1, order)
    local = Local(atlas.centres[which], atlas.tangent[which], atlas.form[which], atlas.support[which], which)
    return local, start


def weights(local: Local, y: Float[Tensor, "b r"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k r"]]:
    """The weights of the charts, with sum 1, and their gradients.

    Beyond all supports, these are stretched to reach y.
    """
    apart = y[:, None] - local.centres
    scaled = (apart * apart).sum(-1) / local.support**2
    stretch = (1.2 * scaled.amin(-1, keepdim=True)).clamp_min(1.0)
    left = (1 - scaled / stretch).clamp_min(0)
    bump = left**SUPPORT_POWER
    total = bump.sum(-1, keepdim=True)
    steep = -2 * SUPPORT_POWER * left ** (SUPPORT_POWER - 1) / (local.support**2 * stretch * total)
    slope = steep[..., None] * apart
    share = bump / total
    return share, slope - share[..., None] * slope.sum(1, keepdim=True)


def blend(
    local: Local, y: Float[Tensor, "b r"]
) -> tuple[Float[Tensor, "b r"], Float[Tensor, "b r d"], Float[Tensor, "b k"]]:
    """F(y), how far y is off the manifold; an orthonormal basis of Π(y); and the weights."""
    share, gradient = weights(local, y)
    apart = y[:, None] - local.centres
    along = (apart[..., None, :] @ local.tangent)[..., 0, :]
    rise, slope = bend_with_slope(along, local.form)
    off = apart - (local.tangent @ along[..., None])[..., 0] - rise
    mean = (share[..., None] * off).sum(1)
    # I − ∂G is a sum of products of these columns and rows.
    count, depth, dim = local.tangent.shape[1:]
    columns = share[..., None, None] * (local.tangent + slope)
    columns = torch.cat([columns.transpose(1, 2).reshape(-1, depth, count * dim), -off.mT], -1)
    rows = torch.cat([local.tangent.mT.reshape(-1, count * dim, depth), gradient], 1)
    basis = local.tangent[:, 0]
    for _ in range(POWERS):
        basis = orthonormal(columns @ (rows @ basis))
    return mean - (basis @ (basis.mT @ mean[..., None]))[..., 0], basis, share


def orthonormal(vectors: Float[Tensor, "b r d"]) -> Float[Tensor, "b r d"]:
    """The columns made orthonormal, by the Cholesky factor of their products."""
    factor = torch.linalg.cholesky_ex(vectors.mT @ vectors).L
    return torch.linalg.solve_triangular(factor.mT, vectors, upper=True, left=False)


def bending(
    local: Local, share: Tensor, basis: Float[Tensor, "b r d"], normal: Float[Tensor, "b r"]
) -> Float[Tensor, "b d d"]:
    """⟨II(eᵢ, eⱼ), n⟩ on a basis, blended."""
    dim = basis.shape[-1]
    first, second = pairs(dim, basis.device)
    values = (local.form @ normal[:, None, :, None])[..., 0]
    place = torch.zeros(dim, dim, dtype=torch.long, device=basis.device)
    place[first, second] = torch.arange(len(first), device=basis.device)
    place[second, first] = place[first, second]
    whole = values[..., place.flatten()].unflatten(-1, (dim, dim))
    turn = local.tangent.mT @ basis[:, None]
    return (share[..., None, None] * (turn.mT @ whole @ turn)).sum(1)


def foot(local: Local, start: Float[Tensor, "b r"], x: Float[Tensor, "b r"]) -> Foot:
    """The foot of each state.

    The iteration runs to rest without derivatives. From there, which is a fixed point, a few more steps are
    taken that derivatives pass through: each makes their error smaller by the factor of convergence.
    """
    with torch.no_grad():
        y = start
        for _ in range(MOST_STEPS):
            step = newton_step(local, y, x)
            y = y + step
            if _at_rest(step, local, RESTED[x.dtype]):
                break
    for _ in range(POLISHING[x.dtype]):
        y = y + newton_step(local, y, x)
    _, basis, share = blend(local, y)
    return Foot(y, basis, share)


def newton_step(local: Local, y: Float[Tensor, "b r"], x: Float[Tensor, "b r"]) -> Float[Tensor, "b r"]:
    """The step from y to where F = 0 and x − y is normal, to first order."""
    off, basis, share = blend(local, y)
    rest = x - y
    curved = bending(local, share, basis, rest)
    size = (curved * curved).sum((-2, -1), keepdim=True).clamp_min(1e-30).sqrt()
    curved = curved * (DAMPED / size).clamp_max(1)
    identity = torch.eye(basis.shape[-1], dtype=x.dtype, device=x.device)
    along = torch.linalg.solve(identity - curved, basis.mT @ rest[..., None])
    return (basis @ along)[..., 0] - off


def _at_rest(step: Tensor, local: Local, limit: float) -> bool:
    """Whether no state moves any more; never where values cannot be read."""
    if torch.compiler.is_compiling():
        return False
    try:
        with torch.no_grad():
            return bool((torch.linalg.vector_norm(step, dim=-1) <= limit * local.support[:, 0]).all())
    except RuntimeError as unreadable:
        if "vmap" not in str(unreadable):
            raise
        return False


def bending_vector(
    local: Local, found: Foot, u: Float[Tensor, "b r"], v: Float[Tensor, "b r"]
) -> Float[Tensor, "b r"]:
    """II(u, v) from the charts, blended, normal to the manifold."""
    first, second = pairs(found.tangent.shape[-1], u.device)
    left, right = ((each[:, None, None] @ local.tangent)[..., 0, :] for each in (u, v))
    both = left[..., first] * right[..., second] + left[..., second] * right[..., first]
    both = torch.where(first == second, both / 2, both)
    value = (found.share[..., None] * (both[..., None, :] @ local.form)[..., 0, :]).sum(1)
    return value - (found.tangent @ (found.tangent.mT @ value[..., None]))[..., 0]
