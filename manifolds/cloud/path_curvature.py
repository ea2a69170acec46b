"""The curvature of a path through class means, with what the noise of the means makes of it."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.base import frobenius_norm
from manifolds.cloud.splines import Curve

TOLD = 3.0
"""From how many standard errors on a curvature counts as known."""
MANY = 24
"""With fewer classes the curvature in the first and last piece of an open curve is off by up to a quarter."""
FEWEST = 5
"""The fewest classes whose curvature is more than the spline's own."""


@dataclass(frozen=True)
class PathCurvature:
    """The curvature of a curve at places of it, in 1 / length.

    Attributes:
        vector: the normal part of the acceleration by the squared speed, as the curve has it.
        value: ‖vector‖ without the noise in its square; NaN where it is not reliable.
        standard_error: of the value, by the standard errors of the class means; NaN where these are unknown.
        snr: the value by its standard error.
        reliable: whether the samples tell the curvature.
        reason: why not, where they do not for some place; empty else.
    """

    vector: Float[Tensor, "*batch D"]
    value: Float[Tensor, "*batch"]
    standard_error: Float[Tensor, "*batch"]
    snr: Float[Tensor, "*batch"]
    reliable: Bool[Tensor, "*batch"]
    reason: str


@dataclass(frozen=True)
class Noise:
    """The noise of class means.

    Attributes:
        variance: the expected ‖error‖² of each.
        covariance: of one sample, in the span of the path.
        total: the expected ‖deviation‖² of one sample.
        directions: in how many directions the noise goes.
    """

    variance: Float[Tensor, "c"]
    covariance: Float[Tensor, "r r"]
    total: float
    directions: float

    def along(self, unit: Float[Tensor, "b r"]) -> Float[Tensor, "b"]:
        """The share of the noise that is along unit vectors."""
        return torch.einsum("br,rs,bs->b", unit, self.covariance, unit) / max(self.total, 1e-300)


def path_curvature(
    shape: Curve, influence: Curve, t: Float[Tensor, "b 1"], noise: Noise, closed: bool
) -> PathCurvature:
    """The curvature of a curve (vectors in its span) and its standard error.

    The path is linear in the class means: S = Σ bᵢ(t) mᵢ. To first order their errors εᵢ change the curvature
    by Σ (b″ᵢ / v² − b′ᵢ a / v³) N εᵢ − 2κ Σ b′ᵢ ⟨T, εᵢ⟩ / v with the speed v and the acceleration a along
    the tangent. The squared length of that is what the noise adds to ‖κ‖², and is taken off.

    Args:
        shape: the curve.
        influence: bᵢ(t).
        t: where.
        noise: of the class means.
        closed: whether the curve is.
    """
    _, first, second = (each.reshape(len(t), -1) for each in shape.derivatives(t, 2))
    _, slope, bend = (each.reshape(len(t), -1) for each in influence.derivatives(t, 2))
    speed = frobenius_norm(first, 1, keepdim=True)
    speed = torch.where(speed > 0, speed, torch.nan)
    unit = first / speed
    along = (second * unit).sum(-1, keepdim=True)
    vector = (second - along * unit) / speed**2
    raw = frobenius_norm(vector, 1)
    rows = bend / speed**2 - slope * along / speed**3
    normal = (rows**2 * noise.variance).sum(-1)
    tangent = 4 * raw**2 * (slope**2 / speed**2 * noise.variance).sum(-1)
    shares = noise.along(unit), noise.along(vector / torch.where(raw > 0, raw, 1.0)[:, None])
    added = normal * (1 - shares[0]).clamp_min(0)
    square = raw**2 - added
    value = square.clamp_min(0).sqrt()
    variance = (
        normal * shares[1]
        + tangent * shares[0]
        + added**2
        / (2 * noise.directions)
        / torch.maximum(square, added).clamp_min(torch.finfo(raw.dtype).tiny)
    )
    error = variance.sqrt()
    snr = torch.where(error > 0, value / torch.where(error > 0, error, 1.0), torch.inf)
    snr = torch.where(variance.isnan(), torch.nan, snr)
    breaks = shape.breaks
    end = (t[:, 0] < breaks[1]) | (t[:, 0] > breaks[-2])
    classes = len(noise.variance)
    few = torch.full_like(end, classes < FEWEST)
    end = end & (not closed) & (classes < MANY)
    unknown, weak = snr.isnan(), snr < TOLD
    reasons = (
        (few, f"a path needs {FEWEST} classes for a curvature of its own, and there are {classes}"),
        (unknown, "no class has two samples, or the path stands still: nothing is known of the noise"),
        (weak, f"the curvature is less than {TOLD:g} of its standard errors"),
        (end, f"at the ends of an open path the curvature takes {MANY} classes"),
    )
    reliable = ~(few | unknown | weak | end)
    said = [reason for flag, reason in reasons if bool(flag.any())]
    return PathCurvature(
        vector, torch.where(reliable, value, torch.nan), error, snr, reliable, "; ".join(said)
    )
