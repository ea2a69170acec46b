"""How a concept's manifold bends at the means of its values, wherever the samples tell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manifolds.curvature import second_fundamental_form
from manifolds.curvature.sequence import sequence_curvature
from manifolds.errors import ManifoldError

CHUNK = 128
MOST_NEIGHBORS = 40
"""A form is fitted to no more neighbours than this: those farther away belong to another bend."""


@dataclass(frozen=True)
class Bends:
    """The second fundamental form at each value, on orthonormal bases of tangent and normal directions.

    Attributes:
        coefficients: II(eᵢ, eⱼ); zero where it is not known.
        known: where it is: at no value if the whole is not reliable.
        curvature: the median length of the mean curvature vector (on a curve, of the curvature), in
            1/length; NaN if not reliable.
        snr: curvature against its error. NaN where nothing could be fitted.
        reliable: whether it suffices.
        reason: why not, or an empty string.
    """

    coefficients: Float[Tensor, "values q d d"]
    known: Bool[Tensor, " values"]
    curvature: float
    snr: float
    reliable: bool
    reason: str
    _means: Float[Tensor, "values width"]
    _tangent: Float[Tensor, "values width d"] | None
    _closed: bool

    def steps(
        self, at: Int[Tensor, " edits"], start: Int[Tensor, " edits"], end: Int[Tensor, " edits"]
    ) -> Float[Tensor, "edits d"]:
        """The chord from one value's mean to another's in the tangent space of a third, at its full length.

        The tangent part gives the direction and the chord the length: with that, ½ ‖II(v, v)‖ is the height
        of a sphere over its tangent space, at any distance. On a curve the order of the values gives the
        sign; round a cycle it is that of the shorter way.
        """
        if self._tangent is None:
            count = len(self._means)
            way = end - start
            if self._closed:
                way = (way + (count - 1) // 2) % count - (count - 1) // 2
            length = torch.linalg.vector_norm(self._means[end] - self._means[start], dim=1)
            return (length * way.sign())[:, None]
        found = []
        for some in torch.arange(len(at)).split(CHUNK):
            chord = self._means[end[some]] - self._means[start[some]]
            inside = torch.einsum("ewd,ew->ed", self._tangent[at[some]], chord)
            length = torch.linalg.vector_norm(chord, dim=1, keepdim=True)
            size = torch.linalg.vector_norm(inside, dim=1, keepdim=True)
            found.append(inside * (length / torch.where(size > 0, size, 1.0)))
        return torch.cat(found)

    def form(
        self, at: Int[Tensor, " edits"], u: Float[Tensor, "edits d"], v: Float[Tensor, "edits d"]
    ) -> Float[Tensor, "edits q"]:
        """II(u, v) at values, on the normal basis there."""
        return torch.einsum("eqij,ei,ej->eq", self.coefficients[at], u, v)


def of_curve(
    means: Float[Tensor, "values width"], error: Float[Tensor, " values"] | None, *, closed: bool
) -> Bends:
    """How a curve through the means of the values, in their order, bends at each.

    Args:
        means: in the order of the curve.
        error: their standard errors.
        closed: whether the last is followed by the first.
    """
    try:
        found = sequence_curvature(means, closed=closed, error=error)
    except ManifoldError as problem:
        return unknown(means, str(problem))
    known = found.curvature.isfinite()
    return Bends(
        coefficients=found.curvature.nan_to_num(0.0)[:, None, None, None],
        known=known,
        curvature=found.typical,
        snr=found.snr,
        reliable=found.reliable,
        reason=found.reason,
        _means=means,
        _tangent=None,
        _closed=closed,
    )


def of_samples(points: Float[Tensor, "n width"], means: Float[Tensor, "values width"], *, dim: int) -> Bends:
    """How a manifold that is known from points bends at the means of the values.

    The points may be the means themselves, as for a grid. Reliable where it is so at half of the values.

    Args:
        points: on the manifold, up to noise.
        means: of the values; where they are points, they are not their own neighbours.
        dim: of the manifold.
    """
    unknowns = 1 + dim + dim * (dim + 1) // 2
    same = points.shape == means.shape and torch.equal(points, means)
    count = min(len(points) - same, max(2 * unknowns, min(MOST_NEIGHBORS, len(points) // 4)))
    try:
        found = second_fundamental_form(points, None if same else means, dim=dim, neighbors=count)
    except ManifoldError as problem:
        return unknown(means, str(problem))
    known = found.reliable
    reliable = bool(known.double().mean() >= 0.5)
    lengths = torch.linalg.vector_norm(found.mean_curvature, dim=1)
    reasons = [reason for reason in found.reason if reason]
    return Bends(
        coefficients=found.coefficients.nan_to_num(0.0),
        known=known & reliable,
        curvature=float(lengths[known].median()) if reliable else float("nan"),
        snr=float(found.snr.nanmedian()),
        reliable=reliable,
        reason="" if reliable else max(set(reasons), key=lambda text: (reasons.count(text), text)),
        _means=means,
        _tangent=found.tangent,
        _closed=False,
    )


def unknown(means: Float[Tensor, "values width"], reason: str) -> Bends:
    """Bends of which nothing is known, and why."""
    count = len(means)
    return Bends(
        coefficients=means.new_zeros(count, 1, 1, 1),
        known=torch.zeros(count, dtype=torch.bool, device=means.device),
        curvature=float("nan"),
        snr=float("nan"),
        reliable=False,
        reason=reason,
        _means=means,
        _tangent=None,
        _closed=False,
    )
