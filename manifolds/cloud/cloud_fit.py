"""How a `PointCloud` is made: how many charts there are, where they stand, and the span they share."""

import math
from typing import Any

import torch
from torch import Tensor

from manifolds.cloud.charts import Charts, choose_neighbors, errors, fit_charts
from manifolds.cloud.cover import cover
from manifolds.cloud.neighbours import nearest_neighbours
from manifolds.cloud.subspace import common_subspace
from manifolds.curvature.dimension import intrinsic_dimension
from manifolds.curvature.regression import unknowns
from manifolds.errors import ManifoldError

NAME = "PointCloud.fit"
LEAST_CHARTS = 64
MOST_CHARTS = 2048
"""How many charts there are unless `neighbors` asks for smaller ones."""
MOST_ASKED = 16384
"""How many charts there are whatever is asked."""
MEMORY = 2**30
"""Bytes that the charts may take."""
NEIGHBOURHOOD = 2**25
"""How many numbers one neighbourhood may hold, as differences or as regressors: 256 MiB."""
LEAST_OVERLAP = 4
"""On how many charts a sample has a say at least, on average."""
OVERLAP = 16
"""On how many, where memory and `MOST_CHARTS` allow."""
SUPPORT = 1.5
"""How far beyond its cell a chart has weight."""
OUTLYING = 3.0
"""How many times the median distance a sample may be off the span to count for its place."""
ROWS = 4096
LISTED = 32
"""How many charts around the nearest one are looked at."""
ALIKE = 5000
"""On how many samples the dimension is estimated."""


def learn(
    samples: Tensor, times: Tensor, dim: int, neighbors: int | None
) -> tuple[dict[str, Any], dict[str, Tensor], Charts, Tensor]:
    """Charts, fitted again in the span that the first ones share, and joined as the samples ask for.

    Returns:
        The values and the tensors of a `PointCloud`, its charts, and which samples they stand for.
    """
    total = len(samples)
    charts, count = _charts(samples, dim, neighbors, shape=False)
    origin, frame = common_subspace(charts.centres, errors(charts, dim, count), total / count, dim + 1)
    origin = _centred(samples, origin, frame)
    inner = torch.cat([(part - origin) @ frame for part in samples.split(ROWS)])
    # Most of the noise is left outside: neighbours are truer, and fewer of them do.
    charts, count = _charts(inner, dim, neighbors, shape=True)
    centres = charts.centres
    nearest, apart = _nearest(inner, centres)
    outlying = apart > 2 * charts.radius[nearest]
    ours = ~outlying
    stands_for = torch.zeros_like(centres[:, 0])
    stands_for.index_add_(0, nearest[ours], times[ours].to(centres))
    near = torch.arange(len(centres), device=centres.device)[:, None]
    between = charts.radius
    listed = min(LISTED, len(centres))
    if listed > 1:
        found = nearest_neighbours(centres, neighbors=listed - 1)
        near = torch.cat([near, found.indices], 1)
        between = found.distances[:, min(dim + 1, listed - 1) - 1]
    cell = torch.zeros_like(between).scatter_reduce(0, nearest[ours], apart[ours], "amax")
    tensors = {
        "middle": origin, "frame": frame, "centres": centres, "tangents": charts.tangent,
        "forms": charts.form, "support": SUPPORT * torch.maximum(cell, between).minimum(2 * charts.radius),
        "extent": charts.extent, "shares": stands_for, "near": near,
    }  # fmt: skip
    values = {
        "dim": dim, "neighbors": count, "noise": math.nan, "reach": math.inf,
        "outliers": int(times[outlying].sum()), "curved": float(charts.curved.double().mean()),
    }  # fmt: skip
    return values, {name: value.contiguous() for name, value in tensors.items()}, charts, ours


def _charts(points: Tensor, dim: int, neighbors: int | None, *, shape: bool) -> tuple[Charts, int]:
    """Charts on a cover of the points, and how many neighbours they were fitted to.

    Without `shape` the charts keep their centres alone, which is what the common span is made of.
    """
    total, width = points.shape
    each = points.element_size() * width * (unknowns(dim) if shape else 1)
    affordable = min(MEMORY // each, total)
    held = min(affordable, MOST_ASKED)
    least = max(dim + 4, -(-LEAST_OVERLAP * total // max(held, 1)))
    most = min(NEIGHBOURHOOD // max(width, unknowns(dim)), total - 1)
    if neighbors is None and least <= most:
        wanted = max(16, 5 * unknowns(dim), -(-LEAST_OVERLAP * total // MOST_CHARTS), least)
        neighbors = choose_neighbors(points, dim, min(most, wanted), most)
    elif neighbors is None or not least <= neighbors <= most:
        asked = "the number of neighbours" if neighbors is None else f"neighbors is {neighbors}; it"
        raise ManifoldError(
            f"{NAME}: {asked} must be at least {least}, for {total} samples in dim {dim} may have {held} "
            f"charts of {dim + 4} neighbours or more, and at most {most}, the most that memory may hold; "
            + ("take another" if least <= most else "no number is both: take a lower dim, or fewer points")
        )
    floor = -(-LEAST_OVERLAP * total // neighbors)
    count = min(max(min(max(LEAST_CHARTS, OVERLAP * total // neighbors), MOST_CHARTS), floor), affordable)
    which = cover(points, count, neighbors=neighbors)
    charts = fit_charts(points, which, dim=dim, neighbors=neighbors, shape=shape)
    kept = ~charts.alone
    if not bool(kept.any()):
        raise ManifoldError(
            f"{NAME}: every chart centre lies far outside of its {neighbors} neighbours; "
            "the samples form no manifold at this size: take more neighbours"
        )
    if bool(kept.all()):
        return charts, neighbors
    return Charts(**{name: value[kept] for name, value in vars(charts).items()}), neighbors


def _centred(samples: Tensor, origin: Tensor, frame: Tensor) -> Tensor:
    """The origin, moved across the span to the mean of the samples that are not far off it."""
    normal, off = torch.zeros_like(origin), []
    parts = samples.split(ROWS)
    for part in parts:
        rest = part - origin
        off.append(length(rest - rest @ frame @ frame.mT))
    limit = OUTLYING * torch.cat(off).median()
    kept = 0
    for part, far in zip(parts, off, strict=True):
        near = far <= limit
        normal, kept = normal + (part[near] - origin).sum(0), kept + int(near.sum())
    normal = normal / kept
    return origin + normal - frame @ (frame.mT @ normal)


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest chart of each sample and how far its centre is."""
    squares = (centres * centres).sum(1)
    which = torch.cat([(squares - 2 * part @ centres.mT).argmin(1) for part in points.split(1024)])
    return which, length(points - centres[which])


def length(vectors: Tensor) -> Tensor:
    """Euclidean lengths, with derivative 0 at 0."""
    squares = (vectors * vectors).sum(-1)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), squares)


def decide_dimension(samples: Tensor, given: int, dim: int | None) -> int:
    """The dimension, given or estimated."""
    count, ambient = samples.shape
    if dim is None:
        if count < 8:
            raise ManifoldError(
                f"{NAME}: {_said(count, given)} are too few to tell a dimension by; give dim, "
                "or 8 or more points"
            )
        around = min(100, max(5, count // 10), count - 1)
        some = samples[:: max(1, count // ALIKE)]
        found = intrinsic_dimension(some, neighbors=min(around, len(some) - 1))
        dim = round(found.value)
        if not 1 <= dim < ambient:
            raise ManifoldError(
                f"{NAME}: the dimension of the sample is estimated as {dim} (between {found.low:g} and "
                f"{found.high:g}) in {ambient} coordinates, which is no manifold with normal directions; "
                "give dim, or more points"
            )
    if not 1 <= dim < ambient:
        raise ManifoldError(
            f"{NAME}: dim is {dim} and the points have {ambient} coordinates; "
            f"a manifold with normal directions has dim 1 to {ambient - 1}"
        )
    if count < dim + 5:
        raise ManifoldError(
            f"{NAME}: {_said(count, given)} are too few; in dim {dim} a chart needs {dim + 5} or more, "
            f"and {unknowns(dim) + 2} or more to be curved"
        )
    return dim


def check_neighbors(samples: Tensor, given: int, dim: int, neighbors: int | None) -> int | None:
    """The number of neighbours, if one is given and fits."""
    count = len(samples)
    if neighbors is not None and not dim + 4 <= neighbors < count:
        raise ManifoldError(
            f"{NAME}: neighbors is {neighbors}; with {_said(count, given)} in dim {dim} it can be "
            f"{dim + 4} to {count - 1}"
        )
    return neighbors


def _said(count: int, given: int) -> str:
    return f"{count} points" if count == given else f"{count} distinct points (of {given})"
