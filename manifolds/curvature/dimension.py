"""The intrinsic dimension of a sample: local PCA, two nearest neighbours, maximum likelihood."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from scipy.stats import gamma
from torch import Tensor

from manifolds.cloud.neighbours import Search, check_points
from manifolds.errors import ManifoldError

NAME = "intrinsic_dimension"
ELBOW_FLOOR = 0.02
"""Variances are compared after adding this share of the largest: what is smaller makes no elbow."""
DISCARDED = 0.1
"""The share of the largest distance ratios that TwoNN leaves out; they come from outliers and edges."""
TINIEST, LARGEST = 1e-12, 1e12
"""Extents between these have squares that single precision holds."""
VANISHING = 1e-9
"""Logarithms of ratios of distances below this are rounding."""
METHODS = ("local_pca", "twonn", "mle")


@dataclass(frozen=True)
class Dimension:
    """An intrinsic dimension with its interval.

    Attributes:
        value: the estimate; a whole number for local PCA.
        low: the lower end of the interval. For local PCA it holds the dimension of nine points in ten. For
            the others it is the 95 % interval of the sampling error, widened to both sides by the distance
            to the limit of small scales: the estimate is made with half of the points, or an eighth of the
            neighbours, too, and the two are extrapolated with the exponent 1/d by which edges enter, the
            slowest. Where it is wide, nothing is known.
        high: the upper end.
        pointwise: the dimension around each point; NaN where its neighbours are all equally far, as they are
            from a far outlier.
        method: how it was found.
    """

    value: float
    low: float
    high: float
    pointwise: Float[Tensor, "n"]
    method: str


@torch.no_grad()
def intrinsic_dimension(
    points: Float[Tensor, "n D"],
    method: Literal["local_pca", "twonn", "mle"] = "local_pca",
    neighbors: int = 100,
) -> Dimension:
    """The dimension of the manifold that the points sample.

    - ``local_pca`` (Fukunaga and Olsen 1971): the elbow in the variances of each neighbourhood, the place of
      the largest drop. Noise in many directions does not raise it. It needs neighbourhoods small against the
      radius of curvature, and clearly more neighbours than dimensions.
    - ``twonn`` (Facco, d'Errico, Rodriguez and Laio 2017): the ratio of the distances to the two nearest
      neighbours follows a Pareto law with exponent d. Here its maximum likelihood, with the largest tenth
      censored.
    - ``mle`` (Levina and Bickel 2004, averaged as MacKay and Ghahramani 2005): the distances to k neighbours.

    The last two underestimate from about ten dimensions on, where edges are everywhere, and overestimate
    where the noise is as large as the distances they use.

    Args:
        points: the sample. Duplicates count once in the last two methods.
        method: the estimator.
        neighbors: the neighbourhood, at most one less than there are points; `twonn` uses it for `pointwise`
            alone.

    Raises:
        ManifoldError: if the method is unknown, or the points are too few or not finite.

    >>> g = torch.Generator().manual_seed(0)
    >>> plane = torch.randn(500, 2, generator=g) @ torch.randn(2, 10, generator=g)
    >>> intrinsic_dimension(plane, neighbors=20).value
    2.0
    """
    if method not in METHODS:
        raise ManifoldError(f"{NAME}: method is {method!r}; there are {', '.join(METHODS)}")
    check_points(points, NAME)
    if neighbors < 3:
        raise ManifoldError(f"{NAME}: neighbors is {neighbors}; take 3 or more")
    wide = points if points.dtype in (torch.float32, torch.float64) else points.float()
    kept = _in_range(wide)
    if method == "local_pca":
        return _local_pca(kept, neighbors, extreme=kept is not wide, kind=points.dtype)
    wide = kept
    distinct = torch.unique(wide, dim=0)
    if len(distinct) < len(wide):
        _, place = torch.unique(wide, dim=0, return_inverse=True)
    else:
        distinct, place = wide, torch.arange(len(wide), device=wide.device)
    if len(distinct) <= max(neighbors, 6):
        raise ManifoldError(
            f"{NAME}: {len(distinct)} distinct points are too few for {neighbors} neighbours; "
            f"{max(neighbors, 6) + 1} or more are needed, or fewer neighbours"
        )
    search = Search(distinct, None, neighbors, NAME)
    found = [(block.distances, block.indices) for block in search.blocks()]
    distances, indices = (torch.cat(part) for part in zip(*found, strict=True))
    estimate = _twonn if method == "twonn" else _mle
    value, low, high, pointwise = estimate(distinct, distances.double(), indices)
    return Dimension(value, low, high, pointwise[place].to(points.dtype), method)


def _in_range(points: Tensor) -> Tensor:
    """The points, or, where squares of them would leave the range, in double precision and other units.

    The unit is then the median extent of a point from the median of all, and what lies 1e100 of them out is
    drawn in to that: it stays the farthest.
    """
    centre = points.median(0).values
    extent = (points - centre).abs().amax(1)
    most = float(extent.max())
    if most == 0 or TINIEST < most < LARGEST:
        return points
    wide = points.double() - centre.double()
    extent = wide.abs().amax(1)
    unit = extent.median()
    unit = torch.where(unit > 0, unit, extent.max())
    return (wide / unit).clamp(-1e100, 1e100)


def _local_pca(points: Tensor, neighbors: int, *, extreme: bool, kind: torch.dtype) -> Dimension:
    """The largest drop among the variances of each neighbourhood."""
    search = Search(points, None, neighbors, NAME)
    parts = []
    for block in search.blocks():
        count, ambient = block.order.shape[1], points.shape[1]
        # The differences are exact; for an elbow, single precision is enough from here on.
        rows = block.between
        if extreme:
            rows = rows / block.distances[:, -1:, None].clamp_min(1e-300)
            rows = rows.clamp(-1, 1)
        rows = rows.float()
        if count < ambient:
            which = torch.arange(len(rows), device=rows.device)[:, None, None]
            gram = (rows @ rows.mT)[which, block.order[:, :, None], block.order[:, None]]
            means = gram.mean(1)
            gram = gram - means[:, None] - means[..., None] + means.mean(1)[:, None, None]
        else:
            rows = rows.gather(1, block.order[..., None].expand(-1, -1, ambient))
            rows = rows - rows.mean(1, keepdim=True)
            gram = rows.mT @ rows
        trace = gram.diagonal(dim1=1, dim2=2).sum(-1).clamp_min(torch.finfo(gram.dtype).tiny)
        variances = torch.linalg.eigvalsh(gram / trace[:, None, None]).flip(-1).clamp_min(0)
        parts.append(elbow(variances[:, : min(count - 1, ambient)]))
    pointwise = torch.cat(parts).to(kind)
    low, value, high = torch.quantile(
        pointwise.double(), pointwise.new_tensor([0.05, 0.5, 0.95]).double(), interpolation="nearest"
    ).tolist()
    return Dimension(value=value, low=low, high=high, pointwise=pointwise, method="local_pca")


def elbow(variances: Float[Tensor, "b m"]) -> Float[Tensor, "b"]:
    """How many of the descending variances stand before the largest relative drop; 0 where all are 0."""
    lead = variances[:, :1]
    shifted = variances + ELBOW_FLOOR * lead
    behind = torch.cat([shifted[:, 1:], ELBOW_FLOOR * lead], 1)
    drops = shifted / behind.clamp_min(torch.finfo(variances.dtype).tiny)
    place = drops.argmax(1) + 1
    return torch.where(lead[:, 0] > 0, place, 0).to(variances.dtype)


def _twonn(points: Tensor, distances: Tensor, indices: Tensor) -> tuple[float, float, float, Tensor]:
    """Censored maximum likelihood of the Pareto law of the ratio of the first two distances."""
    logs = (distances[:, 1] / distances[:, 0]).log()
    value, kept = _pareto(logs)
    if value < 0.5:
        raise ManifoldError(
            f"{NAME}: the nearest neighbours are so much nearer than the second ones that twonn would give "
            f"{value:.2g}; many points are nearly the same: keep one of each"
        )
    # Half of the points in an order that is not theirs: copies of a point often stand at even distances.
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).to(points.device)
    half = Search(points[order[: len(points) // 2]], None, 2, NAME)
    thin = torch.cat([block.distances.double() for block in half.blocks()])
    coarse, _ = _pareto((thin[:, 1] / thin[:, 0]).log())
    drift = abs(value - coarse) / (2 ** (1 / value) - 1)
    # A point and its neighbour share distances: about half of the ratios are independent.
    low, high = (value * float(gamma.ppf(q, kept / 2)) / (kept / 2) for q in (0.025, 0.975))
    around = torch.cat([logs[:, None], logs[indices]], 1)
    pointwise = _inverse(around.sum(1) / (around.shape[1] - 1))
    return value, max(0.0, low - drift), high + drift, pointwise


def _pareto(logs: Tensor) -> tuple[float, int]:
    """The exponent, and how many ratios were not censored."""
    ordered = logs.sort().values
    kept = max(2, math.ceil(len(ordered) * (1 - DISCARDED)))
    total = float(ordered[:kept].sum() + (len(ordered) - kept) * ordered[kept - 1])
    if total <= VANISHING * kept:
        raise ManifoldError(
            f"{NAME}: nearly every point has its two nearest neighbours equally far, as on a grid; "
            "twonn reads the dimension from the ratio of these distances: take method='local_pca'"
        )
    return kept / total, kept


def _mle(points: Tensor, distances: Tensor, indices: Tensor) -> tuple[float, float, float, Tensor]:
    """The inverse of the mean of the inverse estimates, each from the distances to k neighbours."""

    def inverse(count: int) -> Tensor:
        logs = distances[:, :count].log()
        return (logs[:, -1:] - logs[:, :-1]).sum(1) / max(count - 2, 1)

    count = distances.shape[1]
    each = inverse(count)
    value = 1 / max(float(each.mean()), 1e-300)
    small = max(3, count // 8)
    near = 1 / max(float(inverse(small).mean()), 1e-300)
    # Neighbourhoods overlap; about n/k of them are independent, each with k − 1 distances.
    error = 1.96 * value / math.sqrt(max(1.0, len(points) / count) * (count - 1))
    drift = abs(value - near) / (1 - (small / count) ** (1 / value)) if small < count else 0.0
    return value, max(0.0, value - error - drift), value + error + drift, _inverse(each)


def _inverse(values: Tensor) -> Tensor:
    """1 / values; NaN where they vanish, for the distances say nothing there."""
    return torch.where(values > VANISHING, 1 / values.clamp_min(VANISHING), torch.nan)
