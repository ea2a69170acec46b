"""Local quadratic regression of a neighbourhood's normal part on its tangential part, in chords.

Over a point of a manifold, a neighbour y has a tangential part t and a normal part n = ½ II(t, t) + O(|t|³).
A least-squares fit of that is badly biased, for in d dimensions the neighbours are far. Five things mend it.

- **Chords.** On a sphere of any radius, n = ½ |y|² II(t̂, t̂) with t̂ = t/|t| holds exactly, at any
  distance: this is the formula by which Federer (Curvature measures, 1959, theorem 4.18) reads the reach off
  a set. So the regressors are tᵢtⱼ |y|²/|t|², which agree with tᵢtⱼ to the order that defines II.
- **Intercept, linear terms, re-tilts.** The intercept takes the noise of the base point, the linear terms the
  error of the tangent; the tangent is tilted by them and all is fitted again, twice.
- **The base point** is an observation too, at t = 0, with the noise of the others but without their misfit,
  for the expansion is about it. It weighs as much more as noise and misfit are more than noise.
- **Noise is not misfit.** The noise is read from directions that hold nothing else (`Span.noise`) and is at
  most the residual. Only that much is taken off |y|² and only so far is the base point moved.
- **Cross-fitting.** The square of a fitted coefficient is too large by its variance. Each neighbour's noise
  is taken against the prediction of all others, ⟨nᵢ, nᵢ − n̂₋ᵢ⟩, whose mean is the variance with nothing
  assumed about its size from point to point (Kline, Saggio and Sølvsten, "Leave-out estimation of variance
  components", 2020). It is the mean over all splits of ⟨II_a, II_b⟩, without the loss of half the neighbours.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.curvature.span import Span

TILTS = 2
PLAIN_IF_BETTER = 0.8
"""Where products without the chord factor predict left-out neighbours with this share of the error or less,
they are used: on a paraboloid, seen from its apex, they are exact."""
SURPRISING = 1.3
"""They are tried only where the error is more than noise accounts for, by this factor."""
HEAVIEST = 1000.0
"""The most that the base point may weigh; by then the fit passes through it."""
SINGULAR = 1e-9
"""Below this the squared pivot of a standardised regressor says that it follows from the others."""
RELIABLE = 1.0
"""The signal-to-noise ratio from which an estimate is given: curvature shows as much as error does."""
UNCERTAIN = 1 / 3
"""The standard error up to which it is given, as a share of what is estimated."""
STRAY = 5.0
"""A base point that is farther from what its neighbours predict for it than this many times their own root
mean square distance from the fit has left the manifold."""
RESOLVED = 1e-5
"""Where the error is below this share of the neighbourhood's radius, a curvature of zero is known too."""


@dataclass(frozen=True)
class QuadraticFit:
    """What the regression found at each base point, in coordinates of its span.

    Attributes:
        tangent: an orthonormal basis, in its columns.
        coefficients: II(eᵢ, eⱼ) for i ≤ j, in the order of `pairs(d)`.
        weights: the row of each coefficient as a combination of the rows of the neighbourhood.
        noise_of_rows: the cross-fitted variance of each row, over all normal directions.
        displacement: mean square of the fitted quadratic part over the neighbours, cleared of its variance.
        displacement_noise: that variance.
        noise: the variance of a point that is noise and not misfit, over all normal directions.
        singular: whether the regressors are dependent.
        stray: how far the base point is from the fit of its neighbours alone, in root mean square distances
            of theirs; 0 where both are rounding, or the base is no point of the sample.
    """

    tangent: Float[Tensor, "b r d"]
    coefficients: Float[Tensor, "b p r"]
    weights: Float[Tensor, "b p m"]
    noise_of_rows: Float[Tensor, "b m"]
    displacement: Float[Tensor, "b"]
    displacement_noise: Float[Tensor, "b"]
    noise: Float[Tensor, "b"]
    singular: Bool[Tensor, "b"]
    stray: Float[Tensor, "b"]


def pairs(dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """The index pairs i ≤ j, row by row."""
    first, second = torch.triu_indices(dim, dim, device=device)
    return first, second


def unknowns(dim: int) -> int:
    """How many coefficients a normal direction has: the intercept, the linear and the quadratic ones."""
    return 1 + dim + dim * (dim + 1) // 2


def fit_quadratic(neighbourhood: Span, dim: int, *, anchored: bool) -> QuadraticFit:
    """The regression at every base point; `anchored` says that the base points belong to the sample."""
    used = rows_in_use(neighbourhood, anchored=anchored)
    effective = (used > 0).sum(1)
    fit = _fit(neighbourhood, dim, used, anchored=anchored, chords=True)
    # Where noise alone explains the error, no other regressors can do better. With no more normal directions
    # than the curvature itself fills, noise is not known apart from it.
    size = neighbourhood.squares.mean(1)
    apart = neighbourhood.coordinates.shape[-1] - dim > dim * (dim + 1) // 2
    expected = RESOLVED**4 * size + (SURPRISING * neighbourhood.noise if apart else 0)
    misfits = fit.left_out_error * (effective - unknowns(dim)) > expected * effective**2
    if bool(misfits.any()):
        plain = _fit(neighbourhood, dim, used, anchored=anchored, chords=False)
        fit = _either(misfits & (plain.left_out_error < PLAIN_IF_BETTER * fit.left_out_error), plain, fit)
    design, tangent = fit.design, fit.tangent
    noise = noise_of(_total(fit.residual), neighbourhood, effective - design.shape[-1])
    weights, quadratic = fit.weights[:, 1 + dim :], fit.values[:, 1 + dim :]
    columns = design[..., 1 + dim :]
    fitted = ((columns @ quadratic) ** 2).sum((-2, -1)) / effective
    # How much each row's noise moves the fitted displacements; from its residual, where that is more than its
    # cross-fitted noise, which may come out negative.
    moved_by = torch.linalg.vector_norm(columns @ weights, dim=1) ** 2 / effective[:, None]
    spread = (moved_by * fit.noise_of_rows).sum(-1)
    at_least = (moved_by * torch.linalg.vector_norm(fit.residual, dim=-1) ** 2).sum(-1)
    floor = torch.finfo(size.dtype).eps * size
    return QuadraticFit(
        tangent=tangent,
        coefficients=quadratic,
        weights=weights,
        noise_of_rows=fit.noise_of_rows,
        displacement=fitted - spread,
        displacement_noise=torch.maximum(spread, at_least).maximum(floor),
        noise=noise,
        singular=fit.singular,
        stray=_stray(fit, effective, neighbourhood) if anchored else torch.zeros_like(noise),
    )


def _stray(fit: "Solution", effective: Tensor, neighbourhood: Span) -> Tensor:
    """The distance of the base from its prediction by the others, over theirs from the fit without it.

    Leaving row 0 out changes the residual of row i by hᵢ₀ r₀ / (1 − h₀₀), with h the hat matrix.
    """
    hat = fit.design @ fit.weights[:, :, :1]
    left_out = fit.residual[:, :1] / (1 - hat[:, :1]).clamp_min(1e-9)
    free = (effective - 1 - fit.design.shape[-1]).clamp_min(1)
    scatter = _total(fit.residual[:, 1:] + hat[:, 1:] * left_out) / free + neighbourhood.outside
    distance = _total(left_out) / fit.design[:, 0, 0] ** 2
    seen = distance > RESOLVED**2 * neighbourhood.squares.mean(1)
    return torch.where(seen, distance / scatter.clamp_min(1e-300), 0.0).sqrt()


def chord_factors(tangential: Float[Tensor, "b m d"], squares: Float[Tensor, "b m"]) -> Float[Tensor, "b m"]:
    """|y|²/|t|², held between 1 and 4: it is 1 at the base and 4 far outside of any neighbourhood in use."""
    flat = (tangential * tangential).sum(-1)
    tiny = 1e-12 * flat.mean(1, keepdim=True) + 1e-300
    return torch.where(flat > tiny, squares / flat.clamp_min(1e-300), 1.0).clamp(1.0, 4.0)


def _fit(neighbourhood: Span, dim: int, used: Tensor, *, anchored: bool, chords: bool) -> "Solution":
    """The regression with its re-tilts, in chords or in plain products."""
    rows, squares, tangent = neighbourhood.coordinates, neighbourhood.squares, neighbourhood.leading
    origin = torch.zeros_like(rows[:, :1])
    noise = torch.zeros_like(squares[:, 0])
    for _ in range(TILTS):
        design, moved, tangential = _design(rows, squares, tangent, origin, noise, used, chords=chords)
        values, left = _tilt(design, moved, tangential, tangent)
        free = (used > 0).sum(1) - design.shape[-1]
        noise = noise_of(left, neighbourhood, free)
        origin = origin + values[:, :1]
        if anchored:
            whole = left / free.clamp_min(1) + neighbourhood.outside
            used = torch.cat([base_weight(whole, noise)[:, None], used[:, 1:]], 1)
            length = (origin * origin).sum(-1, keepdim=True)
            origin = origin * (noise[:, None, None] / length.clamp_min(1e-300)).clamp_max(1).sqrt()
        tangent = torch.linalg.qr(tangent + values[:, 1 : 1 + dim].mT).Q
    design, moved, tangential = _design(rows, squares, tangent, origin, noise, used, chords=chords)
    normal = moved - tangential @ tangent.mT
    return replace(least_squares(design, normal, weights=True), tangent=tangent)


def _design(
    rows: Tensor,
    squares: Tensor,
    tangent: Tensor,
    origin: Tensor,
    noise: Tensor,
    used: Tensor,
    *,
    chords: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Regressors, rows and their tangential parts, seen from `origin`."""
    moved = rows - origin
    tangential = moved @ tangent
    lengths = squares - 2 * (rows @ origin.mT)[..., 0] + (origin * origin).sum(-1) - noise[:, None]
    first, second = pairs(tangent.shape[-1], rows.device)
    half = torch.where(first == second, 0.5, 1.0).to(rows.dtype)
    products = tangential[..., first] * tangential[..., second] * half
    if chords:
        products = products * chord_factors(tangential, lengths)[..., None]
    design = torch.cat([torch.ones_like(products[..., :1]), tangential, products], -1)
    return design * used[..., None], moved * used[..., None], tangential * used[..., None]


def base_weight(whole: Float[Tensor, "b"], noise: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """The factor of the base point's row, the root of (noise + misfit) / noise."""
    return (whole / noise.clamp_min(1e-300)).clamp(1, HEAVIEST).sqrt()


def _total(rows: Tensor) -> Tensor:
    """The sum of all squares of each matrix."""
    return torch.linalg.vector_norm(rows, dim=(1, 2)) ** 2


def _tilt(design: Tensor, moved: Tensor, tangential: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of the normal parts, and the squares that they leave; the parts are not formed."""
    factor, scale, _ = _factor(design)
    projected = design.mT @ moved
    projected = (projected - (projected @ tangent) @ tangent.mT) / scale.mT
    values = torch.cholesky_solve(projected, factor)
    whole = _total(moved) - _total(tangential)
    return values / scale.mT, (whole - (values * projected).sum((1, 2))).clamp_min(0)


def _factor(design: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factor of the standardised moments, the standard, and whether regressors are dependent."""
    scale = torch.linalg.vector_norm(design, dim=1, keepdim=True).clamp_min(1e-300)
    moments = design.mT @ design / (scale * scale.mT)
    moments.diagonal(dim1=-2, dim2=-1).add_(1e-13)
    factor, failed = torch.linalg.cholesky_ex(moments)
    singular = (failed > 0) | (factor.diagonal(dim1=-2, dim2=-1).amin(-1) ** 2 < SINGULAR)
    return factor, scale, singular


def trusted(ratio: Float[Tensor, "b"], freedom: int) -> Bool[Tensor, "b"]:
    """Whether a signal-to-noise ratio suffices.

    A squared length in `freedom` noisy numbers, cleared of its variance, has the relative standard error
    √(2/freedom)/ratio² + 2/(ratio √freedom): in few dimensions the ratio must be larger.
    """
    ratio = ratio.clamp_min(1e-300)
    error = (2 / freedom) ** 0.5 / ratio**2 + 2 / (ratio * freedom**0.5)
    return (ratio >= RELIABLE) & (error <= UNCERTAIN)


@dataclass(frozen=True)
class Solution:
    """A least-squares fit; what follows from leaving rows out only where it was asked for.

    Attributes:
        values: the coefficients.
        residual: what they leave.
        singular: whether the regressors are dependent.
        weights: each coefficient as a combination of the rows.
        noise_of_rows: ⟨row, row − its prediction by the others⟩, the cross-fitted variance.
        left_out_error: the sum of the squares of each row, but the first, less its prediction by the others.
        design: the regressors.
        tangent: the tangent basis that the rows were split by.
    """

    values: Tensor
    residual: Tensor
    singular: Tensor
    weights: Tensor
    noise_of_rows: Tensor
    left_out_error: Tensor
    design: Tensor
    tangent: Tensor


def least_squares(design: Tensor, normal: Tensor, *, weights: bool = False) -> Solution:
    """Least squares of each normal direction on the regressors, by the standardised normal equations."""
    factor, scale, singular = _factor(design)
    standard = design / scale
    if not weights:
        values = torch.cholesky_solve(standard.mT @ normal, factor)
        empty = normal[:, 0, :0]
        return Solution(
            values / scale.mT, normal - standard @ values, singular, empty, empty, empty, design, empty
        )
    rows = torch.cholesky_solve(standard.mT, factor)
    values = rows @ normal
    residual = normal - standard @ values
    kept = (1 - (standard * rows.mT).sum(-1)).clamp_min(1e-6)
    return Solution(
        values=values / scale.mT,
        residual=residual,
        singular=singular,
        weights=rows / scale.mT,
        noise_of_rows=(normal * residual).sum(-1) / kept,
        left_out_error=((residual * residual).sum(-1) / kept**2)[:, 1:].sum(-1),
        design=design,
        tangent=normal[:, :0],
    )


def _either(first: Tensor, one: Solution, other: Solution) -> Solution:
    """For each base point one of two solutions."""
    chosen = {}
    for name, value in vars(one).items():
        mask = first.reshape(-1, *[1] * (value.ndim - 1))
        chosen[name] = torch.where(mask, value, getattr(other, name))
    return Solution(**chosen)


def rows_in_use(neighbourhood: Span, *, anchored: bool) -> Float[Tensor, "b m"]:
    """1 for each row that is an observation of its own: no duplicate, and no base that is no sample."""
    used = neighbourhood.distinct.to(neighbourhood.squares.dtype)
    if not anchored:
        used[:, 0], used[:, 1] = 0.0, 1.0
    return used


def noise_of(left: Tensor, neighbourhood: Span, free: Tensor) -> Tensor:
    """The variance that is noise: at most that of the squares left over, at most what spreads evenly."""
    remaining = left / free.clamp_min(1) + neighbourhood.outside
    return torch.minimum(remaining, neighbourhood.noise)
