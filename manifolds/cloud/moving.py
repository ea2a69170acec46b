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

from manifolds.cloud.charts import bend, bend_with_slope, symmetric
from manifolds.curvature.regression import pairs

SUPPORT_POWER = 4
"""The weight is (1 − |y − cᵢ|²/hᵢ²)⁴: three continuous derivatives at the rim."""
POWERS = 3
"""How often A is applied to the tangent of the nearest chart; each time what is not Π falls by (h κ)²."""
TURNS = 2
"""How many steps the exact tangent space takes at the foot, after one at each step to it."""
TERMS = {torch.float64: 4, torch.float32: 2}
"""How many terms of the series of (I − (I − Π) J)⁻¹ the normal Newton step takes, J = I − ∂G."""
DAMPED = 0.9
"""The Newton step divides by I − S, S the curvature along x − y; beyond this norm S is scaled down."""
MOST_STEPS = 12
RESTED = {torch.float64: 1e-7, torch.float32: 1e-2}
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
    centres = atlas.centres.to(x.dtype)
    return torch.addmm((centres * centres).sum(-1), x, centres.mT, alpha=-2).argmin(-1)


@torch.no_grad()
def localise(atlas: Atlas, x: Float[Tensor, "b r"], count: int) -> tuple[Local, Float[Tensor, "b r"]]:
    """The charts around the foot of each state, and the foot on the nearest of them to begin with."""
    kind, which = x.dtype, nearest_chart(atlas, x)
    centre, tangent = atlas.centres[which].to(kind), atlas.tangent[which].to(kind)
    along = ((x - centre)[:, None] @ tangent)[:, 0]
    reach = atlas.support[which].to(kind)
    along = along * (reach / torch.linalg.vector_norm(along, dim=-1).clamp_min(1e-30)).clamp_max(1)[:, None]
    start = centre + (tangent @ along[..., None])[..., 0]
    start = start + bend(along[:, None], atlas.form[which].to(kind))[:, 0]
    listed = atlas.near[which]
    apart = atlas.centres[listed].to(kind) - start[:, None]
    scaled = (apart * apart).sum(-1) / atlas.support[listed].to(kind) ** 2
    order = scaled.topk(min(count, scaled.shape[1]), largest=False).indices
    which = listed.gather(1, order)
    fields = (atlas.centres, atlas.tangent, atlas.form, atlas.support)
    return Local(*(field[which].to(kind) for field in fields), which), start


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


@dataclass(frozen=True)
class Blend:
    """What the charts say together at each place.

    Attributes:
        off: F(y), how far y is off the manifold; normal.
        basis: an orthonormal basis of the range of Π(y).
        share: the weights.
        columns: with `rows`, factors of J = I − ∂G.
        rows: the other factor.
    """

    off: Float[Tensor, "b r"]
    basis: Float[Tensor, "b r d"]
    share: Float[Tensor, "b k"]
    columns: Float[Tensor, "b r c"]
    rows: Float[Tensor, "b c r"]

    def solve(self, normal: Float[Tensor, "b r a"]) -> Float[Tensor, "b r a"]:
        """The normal s with (I − (I − Π) J) s = n, J = I − ∂G: a short series, for J is small there."""
        found = normal
        for _ in range(TERMS[normal.dtype]):
            found = self.columns @ (self.rows @ found)
            found = normal + found - self.basis @ (self.basis.mT @ found)
        return found


def blend(local: Local, y: Float[Tensor, "b r"], start: Float[Tensor, "b r d"] | None = None) -> Blend:
    """What the charts say together at y; `start` is a basis near that of Π, if one is known."""
    share, gradient = weights(local, y)
    apart = y[:, None] - local.centres
    along = (apart[..., None, :] @ local.tangent)[..., 0, :]
    rise, slope = bend_with_slope(along, local.form)
    off = apart - (local.tangent @ along[..., None])[..., 0] - rise
    mean = (share[..., None] * off).sum(1)[..., None]
    # I − ∂G is a sum of products of these columns and rows.
    count, depth, dim = local.tangent.shape[1:]
    columns = share[..., None, None] * (local.tangent + slope)
    columns = torch.cat([columns.transpose(1, 2).reshape(-1, depth, count * dim), -off.mT], -1)
    rows = torch.cat([local.tangent.mT.reshape(-1, count * dim, depth), gradient], 1)
    basis = local.tangent[:, 0] if start is None else start
    for _ in range(POWERS if start is None else 1):
        basis = orthonormal(columns @ (rows @ basis))
    normal = mean - basis @ (basis.mT @ mean)
    return Blend(normal[..., 0], basis, share, columns, rows)


def tangent_space(
    local: Local, y: Float[Tensor, "b r"], found: Blend, start: Float[Tensor, "b r d"]
) -> Float[Tensor, "b r d"]:
    """A basis of the kernel of ∂F at y, by a Newton step on ∂F V = 0 from a basis that is near.

    The range of Π is the kernel up to how Π itself turns with y.
    """
    vectors = orthonormal(start)
    dim = vectors.shape[-1]
    copies = Local(*(tensor.repeat_interleave(dim, 0) for tensor in vars(local).values()))
    moved = torch.func.jvp(
        lambda place: blend(copies, place).off,
        (y.repeat_interleave(dim, 0),),
        (vectors.mT.flatten(0, 1),),
    )[1]
    left = moved.unflatten(0, (-1, dim)).mT
    return vectors - found.solve(left - found.basis @ (found.basis.mT @ left))


def orthonormal(vectors: Float[Tensor, "b r d"]) -> Float[Tensor, "b r d"]:
    """The columns made orthonormal, by the Cholesky factor of their products."""
    factor = torch.linalg.cholesky_ex(vectors.mT @ vectors).L
    return torch.linalg.solve_triangular(factor.mT, vectors, upper=True, left=False)


def bending(
    local: Local, share: Float[Tensor, "b k"], basis: Float[Tensor, "b r d"], normal: Float[Tensor, "b r"]
) -> Float[Tensor, "b d d"]:
    """⟨II(eᵢ, eⱼ), n⟩ on a basis, blended from the charts."""
    whole = symmetric(local.form @ normal[:, None, :, None])[..., 0]
    turn = local.tangent.mT @ basis[:, None]
    return (share[..., None, None] * (turn.mT @ whole @ turn)).sum(1)


def foot(
    local: Local, start: Float[Tensor, "b r"], x: Float[Tensor, "b r"], *, exact: bool | None = None
) -> Foot:
    """The foot of each state.

    The iteration runs to rest without derivatives, with Π for the tangent space. From there a few more steps
    are taken that derivatives pass through: each makes their error smaller by the factor of convergence. In
    double precision these take the exact tangent space; in single precision Π stays, from which it differs by
    less than the charts do from the manifold they were learned from.
    """
    exact = x.dtype == torch.float64 if exact is None else exact
    with torch.no_grad():
        y, basis = start, local.tangent[:, 0]
        for _ in range(MOST_STEPS):
            found = blend(local, y, basis)
            step = newton_step(local, found, found.basis, x - y)
            y, basis = y + step, found.basis
            if _at_rest(step, local, RESTED[x.dtype]):
                break
    for _ in range(POLISHING[x.dtype]):
        found = blend(local, y, None if exact else basis)
        basis = tangent_space(local, y, found, basis) if exact else found.basis
        y = y + newton_step(local, found, orthonormal(basis) if exact else basis, x - y)
    found = blend(local, y, None if exact else basis)
    if not exact:
        return Foot(y, found.basis, found.share)
    for _ in range(TURNS):
        basis = tangent_space(local, y, found, basis)
    return Foot(y, orthonormal(basis), found.share)


def newton_step(
    local: Local, found: Blend, basis: Float[Tensor, "b r d"], rest: Float[Tensor, "b r"]
) -> Float[Tensor, "b r"]:
    """The step to where F = 0 and x − y, here `rest`, is normal to the basis, to first order."""
    curved = bending(local, found.share, basis, rest)
    size = (curved * curved).sum((-2, -1), keepdim=True).clamp_min(1e-30).sqrt()
    curved = curved * (DAMPED / size).clamp_max(1)
    identity = torch.eye(basis.shape[-1], dtype=rest.dtype, device=rest.device)
    along = torch.linalg.solve(identity - curved, basis.mT @ rest[..., None])
    return (basis @ along - found.solve(found.off[..., None]))[..., 0]


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
