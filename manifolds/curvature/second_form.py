"""The second fundamental form of a manifold that is known from samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manifolds.cloud.neighbours import Block, Search, check_points
from manifolds.curvature.along import fit_tangent, form_along
from manifolds.curvature.regression import (
    RESOLVED,
    STRAY,
    fit_quadratic,
    pairs,
    rows_in_use,
    trusted,
    unknowns,
)
from manifolds.curvature.span import span
from manifolds.errors import ManifoldError

OUTSIDE = 3.0
"""How far, in root mean square radii of its neighbours, a point may lie from their mean."""
BLOCK_ELEMENTS = 2**21
SMALLEST, LARGEST = 1e-12, 1e12
"""Extents between these have squares that single precision holds."""
NAME = "second_fundamental_form"
NOISY, FLAT, FEW, ALONE, SAME, OFF = range(1, 7)
LOST = (FLAT, ALONE, SAME, OFF)
"""Where not even one direction is estimated."""


@dataclass(frozen=True)
class SecondFundamentalForm:
    """The second fundamental form II at b points, with all that follows from it.

    II(u, v) is the normal part of the acceleration: a curve on the manifold with velocity v accelerates by
    II(v, v). Curvature has the unit 1/length. Where `reliable` is false, every curvature is NaN and `reason`
    says why. Calling the object with two directions evaluates II, bilinearly; only their tangential parts
    count.

    Attributes:
        tangent: an orthonormal basis of the tangent space, in its columns.
        normal: an orthonormal basis of the normal directions that the manifold bends into.
        coefficients: II(eᵢ, eⱼ) on that basis, for the columns eᵢ of `tangent`.
        mean_curvature: the vector H = (1/d) Σᵢ II(eᵢ, eᵢ), a mean and not a sum: |H| = 1 on a unit sphere.
            Its length is cleared of the noise, which would make it too long.
        scalar: the scalar curvature Σᵢⱼ ⟨II(eᵢ, eᵢ), II(eⱼ, eⱼ)⟩ − |II(eᵢ, eⱼ)|² (Gauss); d(d−1) on a unit
            sphere.
        sectional: the mean sectional curvature, scalar / (d (d−1)); NaN for a curve, which has none.
        snr: the root mean square displacement by curvature over the neighbours, against its standard error.
        reliable: whether `snr` suffices.
        reason: why not, or an empty string; one for each point.
        noise: the standard deviation of a point about the manifold, over all normal directions together.
        neighbours: which points were used.
    """

    tangent: Float[Tensor, "b D d"]
    normal: Float[Tensor, "b D q"]
    coefficients: Float[Tensor, "b q d d"]
    mean_curvature: Float[Tensor, "b D"]
    scalar: Float[Tensor, "b"]
    sectional: Float[Tensor, "b"]
    snr: Float[Tensor, "b"]
    reliable: Bool[Tensor, "b"]
    reason: list[str]
    noise: Float[Tensor, "b"]
    neighbours: Int[Tensor, "b k"]
    _inner_noise: Float[Tensor, "b p p"]
    _points: Float[Tensor, "n D"]
    _queries: Float[Tensor, "b D"]
    _anchored: bool
    _lost: Bool[Tensor, "b"]

    def __call__(self, u: Float[Tensor, "*#one D"], v: Float[Tensor, "*#one D"]) -> Float[Tensor, "b D"]:
        """II(u, v) at each point, for one direction each or one for all."""
        values = self._components(self._inside(u), self._inside(v))
        return torch.einsum("bDq,bq->bD", self.normal, values)

    def sectional_of(self, u: Float[Tensor, "*#one D"], v: Float[Tensor, "*#one D"]) -> Float[Tensor, "b"]:
        """The sectional curvature of the plane of u and v at each point.

        (⟨II(u,u), II(v,v)⟩ − |II(u,v)|²) / (|u|²|v|² − ⟨u,v⟩²), by the equation of Gauss. Cleared of the
        variance of the fit; NaN where u and v are parallel.
        """
        left, right = self._inside(u), self._inside(v)
        lengths = (left * left).sum(-1) * (right * right).sum(-1)
        area = lengths - (left * right).sum(-1) ** 2
        one, other = self._components(left, left), self._components(right, right)
        mixed = self._components(left, right)
        noise = self._inner_noise
        excess = torch.einsum("bp,bpr,br->b", _products(left, left), noise, _products(right, right))
        steps = _products(left, right)
        excess = excess - torch.einsum("bp,bpr,br->b", steps, noise, steps)
        value = (one * other).sum(-1) - (mixed * mixed).sum(-1)
        parallel = area <= 1e-6 * lengths
        return torch.where(parallel, torch.nan, (value - excess) / area.masked_fill(parallel, 1.0))

    def along(self, v: Float[Tensor, "*#one D"]) -> Float[Tensor, "b D"]:
        """II(v, v) fitted for this one direction, which few neighbours suffice for in many dimensions.

        The neighbours' normal parts are explained by ½|y|² cos²φ II(v̂, v̂) + ½|y|² sin²φ II̅, where φ is
        the angle from v̂ and II̅ the mean over the directions across: two unknowns instead of d (d+1)/2,
        exact on spheres. Where the whole form has the smaller variance in this direction, it is taken from
        there. The length is cleared of the noise. Scales with |v|². NaN where noise drowns the curvature, and
        where the point lies off the manifold of its neighbours or these do not spread over its dimensions.

        Args:
            v: one direction for each point, or one for all; its tangential part counts.
        """
        inside = self._inside(v).double()
        length = torch.linalg.vector_norm(inside, dim=-1, keepdim=True)
        unit = inside / length.clamp_min(1e-300)
        rows = max(1, BLOCK_ELEMENTS // (self.neighbours.shape[1] * self.tangent.shape[1]))
        parts = []
        for start in range(0, len(unit), rows):
            some = slice(start, start + rows)
            between = self._points[self.neighbours[some]] - self._queries[some, None]
            tangent, noise = self.tangent[some].double(), self.noise[some].double() ** 2
            parts.append(form_along(between.double(), tangent, unit[some], noise, anchored=self._anchored))
        values, variance, across, radius = (torch.cat(part) for part in zip(*parts, strict=True))
        steps = _products(unit, unit)
        spread = torch.einsum("bp,bpr,br->b", steps, self._inner_noise.double(), steps)
        better = self.reliable & (spread < variance)
        whole = torch.einsum("bDq,bq->bD", self.normal.double(), self._components(unit, unit))
        values = torch.where(better[:, None], whole, values)
        variance = torch.where(better, spread, variance).clamp_min(1e-300)
        power = (values * values).sum(-1)
        # Where v runs straight on a curved manifold, zero is a finding: what is across it is signal too.
        ratio = ((torch.maximum(power, across) - variance) / variance).clamp_min(0).sqrt()
        sure = trusted(ratio, values.shape[1] - unit.shape[1]) | (variance * radius <= RESOLVED**2)
        sure &= ~self._lost
        shrink = (1 - variance / power.clamp_min(1e-300)).clamp_min(0).sqrt()
        values = torch.where(sure[:, None], values * (shrink[:, None] * length**2), torch.nan)
        return _narrowed(values, v.dtype)

    def _components(self, left: Tensor, right: Tensor) -> Tensor:
        """II of two directions in tangent coordinates, on the basis `normal`."""
        return torch.einsum("bqij,bi,bj->bq", self.coefficients.to(left), left, right)

    def _inside(self, v: Tensor) -> Tensor:
        """Tangent coordinates of one direction for each point."""
        count, ambient = self.tangent.shape[:2]
        if v.shape not in ((ambient,), (1, ambient), (count, ambient)):
            raise ManifoldError(
                f"SecondFundamentalForm: a direction has shape {tuple(v.shape)}; "
                f"give ({ambient},) or ({count}, {ambient})"
            )
        v = v.to(self.tangent).expand(count, ambient)
        return torch.einsum("bDd,bD->bd", self.tangent, v)


def _products(left: Float[Tensor, "b d"], right: Float[Tensor, "b d"]) -> Float[Tensor, "b p"]:
    """What II(u, v) weighs each coefficient with."""
    first, second = pairs(left.shape[-1], left.device)
    both = left[:, first] * right[:, second] + left[:, second] * right[:, first]
    return torch.where(first == second, both / 2, both)


@torch.no_grad()
def second_fundamental_form(
    points: Float[Tensor, "n D"],
    at: Float[Tensor, "b _"] | Int[Tensor, "b"] | Sequence[int] | None = None,
    *,
    dim: int,
    neighbors: int,
) -> SecondFundamentalForm:
    """The second fundamental form of the manifold that the points sample, by local quadratic regression.

    See `manifolds.curvature.regression` for the method. Computed in double precision, in blocks of queries:
    time is linear in their number, memory is that of the result. Nothing is random. No gradients pass.

    Args:
        points: the sample, with noise that may stand off the manifold.
        at: where: None for every point, indices of points, or places of their own. Of a place that is not in
            the sample, the foot on the manifold counts.
        dim: the dimension d of the manifold; see `intrinsic_dimension`.
        neighbors: how many neighbours the fit takes. All of it needs more than 1 + d + d(d+1)/2; with fewer,
            from d + 4 on, only `along` is given.

    Raises:
        ManifoldError: if the points are too few or not finite, or `dim` or `neighbors` does not fit them.

    >>> circle = torch.linspace(0, 2 * torch.pi, 101, dtype=torch.float64)[:-1]
    >>> circle = torch.stack([2 * circle.cos(), 2 * circle.sin()], 1)
    >>> form = second_fundamental_form(circle, dim=1, neighbors=8)
    >>> round(float(form.mean_curvature.norm(dim=-1).mean()), 6)
    0.5
    """
    if at is not None and not isinstance(at, Tensor):
        at = torch.tensor(list(at), dtype=torch.long, device=points.device)
    _check(points, dim, neighbors)
    wide = _widened(points)
    search = Search(wide, at, neighbors, NAME)
    anchored = search.own is not None
    rows = max(1, BLOCK_ELEMENTS // ((neighbors + 1) * max(unknowns(dim), points.shape[1])))
    parts = [(block.indices, *_estimate(block, dim, anchored)) for block in search.blocks(rows)]
    joined = [torch.cat(part) for part in zip(*parts, strict=True)]
    indices, tangent, normal, coefficients, mean, scalar, snr, noise, inner_noise, state = joined
    reliable = state == 0
    for value in (coefficients, mean, scalar):
        value[~reliable] = torch.nan
    planes = dim * (dim - 1)
    kind = points.dtype
    return SecondFundamentalForm(
        tangent=tangent.to(kind),
        normal=normal.to(kind),
        coefficients=_narrowed(coefficients, kind),
        mean_curvature=_narrowed(mean, kind),
        scalar=_narrowed(scalar, kind),
        sectional=_narrowed(scalar / planes if planes else torch.full_like(scalar, torch.nan), kind),
        snr=snr.to(kind),
        reliable=reliable,
        reason=[
            _reason(*values, dim, neighbors)
            for values in zip(state.tolist(), snr.tolist(), noise.sqrt().tolist(), strict=True)
        ],
        noise=noise.sqrt().to(kind),
        neighbours=indices,
        _inner_noise=inner_noise.to(kind),
        _points=wide,
        _queries=search.queries,
        _anchored=anchored,
        _lost=torch.isin(state, torch.tensor(LOST, device=state.device)),
    )


def _widened(points: Tensor) -> Tensor:
    """The points in single or double precision; in double where single cannot hold squares of distances."""
    if points.dtype in (torch.float16, torch.bfloat16):
        return points.float()
    if points.dtype == torch.float32:
        low, high = points.aminmax()
        extent = float(high) - float(low)
        return points if not extent or SMALLEST < extent < LARGEST else points.double()
    return points


def _narrowed(values: Tensor, kind: torch.dtype) -> Tensor:
    """The values in the dtype of the points; curvature that it cannot hold is refused."""
    narrow = values.to(kind)
    if narrow.isinf().any():
        most = float(values[values.isfinite()].abs().max())
        raise ManifoldError(
            f"{NAME}: curvature of {most:.3g} is beyond what {kind} holds; give the points in larger units, "
            "or in float64"
        )
    return narrow


def _estimate(block: Block, dim: int, anchored: bool) -> tuple[Tensor, ...]:
    """Everything that the result holds, for one block of base points."""
    found = span(block.between.double(), block.order, dim)
    if block.order.shape[1] + anchored <= unknowns(dim):
        tangent, noise = fit_tangent(found, dim, anchored=anchored)
        fit = None
    else:
        fit = fit_quadratic(found, dim, anchored=anchored)
        tangent, noise = fit.tangent, fit.noise
    count = dim * (dim + 1) // 2
    empty = torch.full_like(tangent[:, :1, :1], torch.nan)
    if fit is None:
        normal = torch.linalg.qr(tangent, mode="complete").Q[..., dim : dim + count]
        width = normal.shape[-1]
        whole = empty[..., None].expand(-1, width, dim, dim)
        trace = empty[:, 0].expand(-1, tangent.shape[1])
        scalar, ratio = empty[:, 0, 0], torch.zeros_like(empty[:, 0, 0])
        inner_noise = empty.expand(-1, count, count)
        state = torch.full_like(scalar, FEW, dtype=torch.long)
    else:
        # Joined with the tangent, the basis is normal even where the coefficients vanish.
        normal = torch.linalg.qr(torch.cat([tangent, fit.coefficients.mT], -1)).Q[..., dim:]
        width = normal.shape[-1]
        freedom = count * (found.coordinates.shape[-1] - dim)
        components = fit.coefficients @ normal
        first, second = pairs(dim, tangent.device)
        whole = tangent.new_empty(len(tangent), width, dim, dim)
        whole[:, :, first, second] = components.mT
        whole[:, :, second, first] = components.mT
        inner_noise = (fit.weights * fit.noise_of_rows[:, None]) @ fit.weights.mT
        diagonal = first == second
        trace = fit.coefficients[:, diagonal].sum(1)
        trace_noise = inner_noise[:, diagonal][:, :, diagonal].sum((1, 2))
        times = torch.where(diagonal, 1.0, 2.0).to(tangent.dtype)
        length = (trace * trace).sum(-1)
        squares = ((fit.coefficients**2).sum(-1) * times).sum(-1)
        squares_noise = (inner_noise.diagonal(dim1=1, dim2=2) * times).sum(-1)
        scalar = length - trace_noise - squares + squares_noise
        shrink = (1 - trace_noise / length.clamp_min(1e-300)).clamp(0, 1).sqrt()
        trace = trace * shrink[:, None]
        ratio = (fit.displacement / fit.displacement_noise.clamp_min(1e-300)).clamp_min(0).sqrt()
        radius = found.squares.mean(1)
        known = trusted(ratio, freedom) | (fit.displacement_noise.abs() <= RESOLVED**2 * radius)
        state = torch.where(known, 0, NOISY)
        state = torch.where(fit.singular, FLAT, state)
    state = torch.where(found.offset > OUTSIDE**2 * found.spread, ALONE, state)
    if fit is not None:
        state = torch.where((fit.stray > STRAY) & (state != ALONE), OFF, state)
    used = rows_in_use(found, anchored=anchored).sum(1)
    needed = dim + 4 if fit is None else unknowns(dim) + 1
    state = torch.where(used < needed, SAME, state)
    lifted = found.lift(torch.cat([tangent, normal, trace[..., None] / dim], -1))
    frame = lifted[..., :-1]
    if not found.full:
        # Some normals lift to nothing; QR puts others in their place and may turn the rest around.
        frame, triangle = torch.linalg.qr(frame)
        frame = frame * triangle.diagonal(dim1=1, dim2=2).sign()[:, None]
    bases = frame[..., :dim], frame[..., dim:]
    return (*bases, whole, lifted[..., -1], scalar, ratio, noise, inner_noise, state)


def _reason(state: int, ratio: float, noise: float, dim: int, neighbors: int) -> str:
    """Why there is no estimate, and what would help."""
    if state == FEW:
        return (
            f"{neighbors} neighbours; the whole form in {dim} dimensions needs more than {unknowns(dim)}: "
            "take more, or use along(v)"
        )
    return {
        0: "",
        NOISY: f"curvature displaces the neighbours by {ratio:.2g} times the error of the fit, with noise "
        f"{noise:.2g} off the manifold: take more or farther neighbours",
        FLAT: f"the neighbours do not spread over {dim} dimensions: take a lower dim, or drop duplicates",
        ALONE: "the point lies far outside of its neighbours",
        OFF: "the point lies off the manifold of its neighbours, by many times their scatter: leave it out, "
        "or ask for it as a place, whose foot counts",
        SAME: "too many of the neighbours are duplicates: keep one of each, or take more",
    }[state]


def _check(points: Tensor, dim: int, neighbors: int) -> None:
    """Refuses a dimension or a number of neighbours that cannot give anything."""
    check_points(points, NAME)
    count, ambient = points.shape
    if not 1 <= dim < ambient:
        raise ManifoldError(
            f"{NAME}: dim is {dim} and the points have {ambient} coordinates; "
            f"a manifold with normal directions has dim 1 to {ambient - 1}"
        )
    needed = unknowns(dim) + 2
    if count < needed:
        raise ManifoldError(
            f"{NAME}: {count} points are too few; in dim {dim} the fit needs {needed} or more"
        )
    if neighbors < dim + 4:
        raise ManifoldError(
            f"{NAME}: neighbors is {neighbors}; in dim {dim} one direction needs {dim + 4} or more, and the "
            f"whole form {needed - 1}"
        )
