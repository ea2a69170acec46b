"""Moving least squares on charts: one smooth manifold out of many local graphs, and the nearest point on it.

At a place y, each chart i near y says how far y lies off its graph, hᵢ(y) = yᵢ − Tᵢ tᵢ − bᵢ(tᵢ) with
yᵢ = y − cᵢ and tᵢ = Tᵢᵀ yᵢ. Weights wᵢ(y) with compact support blend them: G = Σ wᵢ hᵢ, and Π, the projector
onto the d leading directions of A = Σ wᵢ Tᵢ Tᵢᵀ. The manifold is the zero set of F = (I − Π) G, and Newton's
method finds on it the foot of x, where x − y is normal.

Sources: D. Levin, "Mesh-independent surface interpolation" (2003); B. Sober and D. Levin, "Manifold
approximation by moving least-squares" (2020), whose projection has the same two conditions. Here the local
fits are made once, at the charts, and not anew for every state.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manifolds.cloud.charts import STEEPEST, bend, symmetric
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
        charts: for each chart its centre, its tangent basis and its second fundamental form, one below the
            other.
        dim: the dimension of the manifold.
        support: the radius hᵢ beyond which a chart has no weight.
        near: for each chart, the charts nearest to it, itself first.
    """

    charts: Float[Tensor, "m q r"]
    dim: int
    support: Float[Tensor, "m"]
    near: Int[Tensor, "m l"]


@dataclass(frozen=True)
class Local:
    """The charts that have a say at each of b places, the nearest first.

    Attributes:
        charts: as in the atlas, in one block for each place, so that one product reads them all.
        dim: the dimension of the manifold.
        support: the radii.
        which: their numbers in the atlas.
        offset: the tangential coordinates of the centres.
        gram: inner products of the second fundamental forms.
    """

    charts: Float[Tensor, "b k q r"]
    dim: int
    support: Float[Tensor, "b k"]
    which: Int[Tensor, "b k"]
    offset: Float[Tensor, "b k d"]
    gram: Float[Tensor, "b k p p"]

    @classmethod
    def of(cls, charts: Tensor, dim: int, support: Tensor, which: Tensor) -> "Local":
        """The charts, with what is needed of them at every step."""
        centre, tangent, form = charts[..., :1, :], charts[..., 1 : 1 + dim, :], charts[..., 1 + dim :, :]
        return cls(charts, dim, support, which, (tangent * centre).sum(-1), form @ form.mT)

    @property
    def centres(self) -> Float[Tensor, "b k r"]:
        """The centres."""
        return self.charts[..., 0, :]

    @property
    def tangent(self) -> Float[Tensor, "b k r d"]:
        """Tangent bases."""
        return self.charts[..., 1 : 1 + self.dim, :].mT

    @property
    def form(self) -> Float[Tensor, "b k p r"]:
        """Second fundamental forms."""
        return self.charts[..., 1 + self.dim :, :]


@dataclass(frozen=True)
class Foot:
    """The foot of each state, a basis of the tangent space there, and the weights of the charts."""

    at: Float[Tensor, "b r"]
    tangent: Float[Tensor, "b r d"]
    share: Float[Tensor, "b k"]


def nearest_chart(atlas: Atlas, x: Float[Tensor, "b r"]) -> Int[Tensor, "b"]:
    """The chart whose centre is nearest, by one matrix product."""
    centres = atlas.charts[:, 0].to(x.dtype)
    return torch.addmm((centres * centres).sum(-1), x, centres.mT, alpha=-2).argmin(-1)


@torch.no_grad()
def localise(atlas: Atlas, x: Float[Tensor, "b r"], count: int) -> tuple[Local, Float[Tensor, "b r"]]:
    """The charts around the foot of each state, and the foot on the nearest of them to begin with."""
    kind, dim, which = x.dtype, atlas.dim, nearest_chart(atlas, x)
    chart, reach = atlas.charts[which].to(kind), atlas.support[which].to(kind)
    centre, rows = chart[:, 0], chart[:, 1 : 1 + dim]
    along = (rows @ (x - centre)[..., None])[..., 0]
    along = along * (reach / torch.linalg.vector_norm(along, dim=-1).clamp_min(1e-30)).clamp_max(1)[:, None]
    start = centre + (along[:, None] @ rows)[:, 0] + bend(along[:, None], chart[:, 1 + dim :])[:, 0]
    listed = atlas.near[which]
    apart = atlas.charts[listed, 0].to(kind) - start[:, None]
    scaled = (apart * apart).sum(-1) / atlas.support[listed].to(kind) ** 2
    order = scaled.topk(min(count, scaled.shape[1]), largest=False).indices
    which = listed.gather(1, order)
    return Local.of(atlas.charts[which].to(kind), dim, atlas.support[which].to(kind), which), start


def weights(local: Local, y: Float[Tensor, "b r"]) -> tuple[Float[Tensor, "b k"], Float[Tensor, "b k"]]:
    """The weights wᵢ of the charts, with sum 1, and sᵢ with ∇wᵢ = sᵢ (y − cᵢ) − wᵢ Σⱼ sⱼ (y − cⱼ).

    Beyond all supports, these are stretched to reach y.
    """
    apart = y[:, None] - local.centres
    scaled = (apart * apart).sum(-1) / local.support**2
    stretch = (1.2 * scaled.amin(-1, keepdim=True)).clamp_min(1.0)
    left = (1 - scaled / stretch).clamp_min(0)
    cube = left ** (SUPPORT_POWER - 1)
    bump = cube * left
    total = bump.sum(-1, keepdim=True)
    return bump / total, -2 * SUPPORT_POWER * cube / (local.support**2 * stretch * total)


@dataclass(frozen=True)
class Blend:
    """What the charts say together at each place.

    Attributes:
        off: F(y), how far y is off the manifold; normal.
        basis: an orthonormal basis of the range of Π(y).
        share: the weights.
        image: v ↦ J v, J = I − ∂G.
    """

    off: Float[Tensor, "b r"]
    basis: Float[Tensor, "b r d"]
    share: Float[Tensor, "b k"]
    image: Callable[[Tensor], Tensor]

    def solve(self, normal: Float[Tensor, "b r a"]) -> Float[Tensor, "b r a"]:
        """The normal s with (I − (I − Π) J) s = n, J = I − ∂G: a short series, for J is small there."""
        found = normal
        for _ in range(TERMS[normal.dtype]):
            found = self.image(found)
            found = normal + found - self.basis @ (self.basis.mT @ found)
        return found


def blend(local: Local, y: Float[Tensor, "b r"], start: Float[Tensor, "b r d"] | None = None) -> Blend:
    """What the charts say together at y; `start` is a basis near that of Π, if one is known.

    With the charts as rows R, y − G is a combination of them, and so is J v: all that is computed besides
    products with R is a few numbers for each chart.
    """
    share, steepness = weights(local, y)
    dim, rows = local.dim, local.charts.flatten(1, 2)
    along = (local.charts[..., 1 : 1 + dim, :] @ y[:, None, :, None])[..., 0] - local.offset
    first, second = pairs(dim, y.device)
    times = torch.where(first == second, 1.0, 2.0).to(y.dtype)
    products = along[..., first] * along[..., second] * times
    weighted = (local.gram @ products[..., None])[..., 0]
    flat = (along * along).sum(-1)
    flat = torch.where(flat > 0, flat, 1.0)
    steep = (products * weighted).sum(-1) / flat
    root = (1 - steep.clamp_max(STEEPEST)).sqrt()
    bends = products / (1 + root)[..., None]
    turning = torch.where(steep < STEEPEST, 1 / (flat * root * (1 + root) ** 2), 0.0)
    parts = torch.cat([torch.ones_like(along[..., :1]), along, bends], -1)
    mean = y - ((share[..., None] * parts).flatten(1)[:, None] @ rows)[:, 0]

    def image(vectors: Tensor) -> Tensor:
        seen = (rows @ vectors).unflatten(1, local.charts.shape[1:3])
        turned = steepness[..., None] * ((y[:, None] @ vectors) - seen[..., 0, :])
        turned = (turned - share[..., None] * turned.sum(1, keepdim=True))[:, :, None]
        step = seen[..., 1 : 1 + dim, :]
        change = (
            along[..., first, None] * step[..., second, :] + along[..., second, None] * step[..., first, :]
        )
        change = change * times[:, None]
        bending = (weighted[..., None] * change).sum(2) - (
            steep[..., None] * (along[..., None] * step).sum(2)
        )
        change = change / (1 + root)[..., None, None]
        change = change + products[..., None] * (turning[..., None] * bending)[:, :, None]
        own = torch.cat([step, change], 2) * share[..., None, None]
        own = torch.nn.functional.pad(own, (0, 0, 1, 0)) + turned * parts[..., None]
        return rows.mT @ own.flatten(1, 2)

    basis = local.tangent[:, 0] if start is None else start
    for _ in range(POWERS if start is None else 1):
        basis = orthonormal(image(basis))
    off = mean - (basis @ (basis.mT @ mean[..., None]))[..., 0]
    return Blend(off, basis, share, image)


def tangent_space(
    local: Local, y: Float[Tensor, "b r"], found: Blend, start: Float[Tensor, "b r d"]
) -> Float[Tensor, "b r d"]:
    """A basis of the kernel of ∂F at y, by a Newton step on ∂F V = 0 from a basis that is near.

    The range of Π is the kernel up to how Π itself turns with y.
    """
    vectors = orthonormal(start)

    def pushed(direction: Tensor) -> Tensor:
        return torch.func.jvp(lambda place: blend(local, place).off, (y,), (direction,))[1]

    left = torch.func.vmap(pushed, in_dims=-1, out_dims=-1)(vectors)
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
