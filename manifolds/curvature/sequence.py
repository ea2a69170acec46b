"""The curvature of a curve that is known at few points in their order, such as the means of ordered classes.

Neighbourhoods are no help where a curve has seven points; their order is. At the i-th point, with chords of
lengths a and b to the points ℓ places before and after it,

    κ⃗ᵢ = 2/(a + b) · [ (m_{i+ℓ} − m_i)/b − (m_i − m_{i−ℓ})/a ],

a divided second difference in chords, which on evenly spaced points of a circle is exact at any spacing. Its
error is that of the points. Fourth differences see only what is rough from one point to the next, for they
leave next to nothing of a smooth curve: their mean square gives the variance τ² of one point (Gasser, Sroka
and Jennen-Steinmetz, "Residual variance and residual pattern in nonlinear regression", 1986, who take second
differences). Points in general position, as orthogonal ones, are all roughness: their curvature is refused.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.cloud.neighbours import check_points
from manifolds.curvature.regression import RESOLVED, trusted
from manifolds.errors import ManifoldError

NAME = "sequence_curvature"
FEWEST = 5
SECOND, FOURTH = (1.0, -2.0, 1.0), (1.0, -4.0, 6.0, -4.0, 1.0)


@dataclass(frozen=True)
class SequenceCurvature:
    """The curvature of a curve at the points that are known of it.

    Attributes:
        vectors: the curvature vector at each point, in 1/length, cleared of the length that roughness adds;
            NaN at the ends of an open curve, and everywhere if it is not reliable.
        curvature: their lengths.
        typical: the median of these lengths.
        snr: root mean square of the second differences against their error, cleared of it.
        reliable: whether `snr` suffices.
        reason: why not, or an empty string.
        roughness: τ, the root mean square distance of a point from a smooth curve.
        lag: ℓ, how many places apart the compared points are: the fewest that suffice.
    """

    vectors: Float[Tensor, "n D"]
    curvature: Float[Tensor, "n"]
    typical: float
    snr: float
    reliable: bool
    reason: str
    roughness: float
    lag: int


@torch.no_grad()
def sequence_curvature(
    points: Float[Tensor, "n D"], *, closed: bool, error: Float[Tensor, "_"] | None = None
) -> SequenceCurvature:
    """Estimate the curvature of a curve from points on it, given in their order.

    Where neighbours in the order lie too close together for their roughness, points farther apart are
    compared, up to a quarter of the curve.

    Args:
        points: in the order of the curve, with roughly even steps.
        closed: whether the last is followed by the first.
        error: the standard error of each point, over all directions together, where it is known; the
            roughness is then taken to be at least that.

    Raises:
        ManifoldError: fewer than 5 points, points that are not finite, an error that does not fit them.

    >>> angle = torch.arange(12, dtype=torch.float64) * (torch.pi / 6)
    >>> found = sequence_curvature(torch.stack([2 * angle.cos(), 2 * angle.sin()], 1), closed=True)
    >>> round(found.typical, 2), found.reliable
    (0.5, True)
    """
    check_points(points, NAME)
    count = len(points)
    if count < FEWEST:
        raise ManifoldError(
            f"{NAME}: {count} points are too few to tell a curve from its roughness; "
            f"{FEWEST} or more are needed"
        )
    if error is not None and (error.shape != (count,) or not bool((error >= 0).all())):
        raise ManifoldError(
            f"{NAME}: error has shape {tuple(error.shape)} for {count} points; "
            "give one number of at least 0 for each"
        )
    wide = points.double() - points.double().mean(0)
    rough = _differences(wide, FOURTH, 1, closed)
    variance = float(rough.square().sum(-1).mean()) / _power(FOURTH, count, 1, closed)
    if error is not None:
        variance = max(variance, float(error.double().square().mean()))
    spectrum = torch.linalg.svdvals(rough).square()
    dimensions = (
        float(spectrum.sum() ** 2 / spectrum.square().sum().clamp_min(1e-300)) if variance > 0 else 1.0
    )
    tried = [_at_lag(wide, lag, closed, variance, dimensions) for lag in range(1, _most(count, closed) + 1)]
    found = next((one for one in tried if one[3]), max(tried, key=lambda one: one[2]))
    vectors, lag, snr, reliable = found
    if not reliable:
        vectors = torch.full_like(vectors, torch.nan)
    lengths = torch.linalg.vector_norm(vectors, dim=-1)
    reason = ""
    if not reliable:
        reason = (
            f"{count} points in order show no bend above their own roughness ({variance**0.5:.2g} off a "
            f"smooth curve; signal to noise {snr:.2g}): more points, or points with less noise, would tell"
        )
    return SequenceCurvature(
        vectors=vectors.to(points.dtype),
        curvature=lengths.to(points.dtype),
        typical=float(lengths.nanmedian()),
        snr=snr,
        reliable=reliable,
        reason=reason,
        roughness=variance**0.5,
        lag=lag,
    )


def _at_lag(
    points: Tensor, lag: int, closed: bool, variance: float, dimensions: float
) -> tuple[Tensor, int, float, bool]:
    """Curvature vectors from points `lag` places apart, their signal-to-noise ratio, whether it suffices."""
    ahead, behind = points.roll(-lag, 0) - points, points - points.roll(lag, 0)
    # A chord is longer than the curve's by the roughness of its two ends.
    b = (ahead.square().sum(-1) - 2 * variance).clamp_min(0).sqrt()
    a = (behind.square().sum(-1) - 2 * variance).clamp_min(0).sqrt()
    inner = torch.ones_like(a, dtype=torch.bool)
    if not closed:
        inner[:lag] = inner[len(points) - lag :] = False
    lost = inner & ((a == 0) | (b == 0))
    a, b = (side.masked_fill(side == 0, 1.0) for side in (a, b))
    vectors = (ahead / b[:, None] - behind / a[:, None]) * (2 / (a + b))[:, None]
    noise = variance * (1 / a.square() + (1 / a + 1 / b).square() + 1 / b.square()) * (2 / (a + b)).square()
    power = vectors.square().sum(-1)
    vectors = vectors * (1 - noise / power.clamp_min(1e-300)).clamp_min(0).sqrt()[:, None]
    vectors = torch.where(inner[:, None], vectors, torch.nan)
    if bool(lost.any()):
        return vectors, lag, 0.0, False
    signal, error = float(power[inner].mean()), float(noise[inner].mean())
    ratio = max(0.0, signal / max(error, 1e-300) - 1) ** 0.5
    freedom = max(1, round(int(inner.sum()) * min(dimensions, points.shape[1] - 1)))
    # Where the error bends no chord visibly, a curvature of zero is known too.
    exact = error * float((a + b)[inner].mean()) ** 2 <= (8 * RESOLVED) ** 2
    return vectors, lag, ratio, exact or bool(trusted(torch.tensor([ratio]), freedom)[0])


def _differences(points: Tensor, stencil: tuple[float, ...], lag: int, closed: bool) -> Tensor:
    """The stencil's combination of points `lag` places apart, at each place where all of them are."""
    half = len(stencil) // 2
    total = sum(
        (weight * points.roll(-lag * (place - half), 0) for place, weight in enumerate(stencil)),
        torch.zeros_like(points),
    )
    return total if closed else total[half * lag : len(points) - half * lag]


def _power(stencil: tuple[float, ...], count: int, lag: int, closed: bool) -> float:
    """The variance of that combination for points of variance one; on short cycles, some of them coincide."""
    if not closed:
        return sum(weight**2 for weight in stencil)
    one = torch.zeros(count, 1, dtype=torch.float64)
    one[0] = 1.0
    return float(_differences(one, stencil, lag, True).square().sum())


def _most(count: int, closed: bool) -> int:
    """The largest lag: a quarter of the curve."""
    return max(1, (count if closed else count - 1) // 4)
