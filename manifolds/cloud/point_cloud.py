"""A manifold learned from a cloud of samples."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manifolds.cloud.charts import Charts, choose_neighbors, directions, errors, fit_charts
from manifolds.cloud.cover import cover, distinct_rows
from manifolds.cloud.learned import LearnedManifold, Projection
from manifolds.cloud.moving import Atlas, Foot, Local, bending_vector, foot, localise
from manifolds.cloud.neighbours import check_points, nearest_neighbours
from manifolds.cloud.reach import estimate_reach
from manifolds.cloud.subspace import common_subspace
from manifolds.curvature.dimension import intrinsic_dimension
from manifolds.curvature.regression import unknowns
from manifolds.errors import ManifoldError

NAME = "PointCloud.fit"
MOST_CHARTS = 2048
"""How many charts there are unless `neighbors` asks for smaller ones."""
LEAST_CHARTS = 64
OVERLAP = 16
"""On how many charts a sample has a say, where memory and `MOST_CHARTS` allow."""
SUPPORT = 1.5
"""How far beyond its cell a chart has weight."""
OUTLYING = 3.0
"""How many times the median distance a sample may be off the span to count for its place."""
ROWS = 4096
MEMORY = 2**31
"""Bytes that the charts may take while they are fitted; where they would take more, there are fewer."""
ACTIVE = 12
"""How many charts are blended at a place, at most."""
LISTED = 32
"""How many charts around the nearest one are looked at."""
LINKS = 12
"""How many neighbours an anchor has in the graph, or twice the dimension and four more."""
MEASURED = 512
"""How many samples the noise is measured on."""
BUFFERS = ("middle", "frame", "centres", "tangents", "forms", "support", "extent", "shares", "near")


class PointCloud(LearnedManifold, kind="point-cloud"):
    """A manifold learned from samples: many curved charts, blended into one smooth surface.

    Charts stand on a cover of the samples (`fit_charts`); moving least squares joins them
    (`manifolds.cloud.moving`). All of it lives in the common span of the charts, of `rank` dimensions, so
    that a projection costs one product with the states and little more. `fit` makes one.

    A projection differentiates, in reverse and forward mode, and takes any batch. Tensors are buffers:
    `.to(device)` moves them, and states of another precision are computed in theirs.

    Attributes:
        dim: the dimension of the manifold.
        width: the dimension of the space around it.
        noise: the root mean square distance of the samples from the manifold.
        reach: the distance within which the nearest point is unique; see `manifolds.cloud.reach`.
        rank: the dimension of the span of the charts.
        neighbors: how many samples each chart was fitted to.
        outliers: how many samples lie so far from all others that no chart stands for them.
        curved: the share of the charts whose curvature was above the noise.
    """

    middle: Float[Tensor, "D"]
    frame: Float[Tensor, "D r"]
    centres: Float[Tensor, "m r"]
    tangents: Float[Tensor, "m r d"]
    forms: Float[Tensor, "m p r"]
    support: Float[Tensor, "m"]
    extent: Float[Tensor, "m e 2"]
    shares: Float[Tensor, "m"]
    near: Int[Tensor, "m l"]

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name in BUFFERS:
            self.register_buffer(name, tensors[name])
        self.dim, self.neighbors = int(values["dim"]), int(values["neighbors"])
        self.noise, self.reach = float(values["noise"]), float(values["reach"])
        self.outliers, self.curved = int(values["outliers"]), float(values["curved"])
        self.width, self.rank = self.frame.shape
        self.example_shape = (self.width,)
        self.name = f"PointCloud(dim={self.dim}, width={self.width})"

    # Made from samples

    @classmethod
    @torch.no_grad()
    def fit(
        cls, points: Float[Tensor, "n D"], dim: int | None = None, neighbors: int | None = None
    ) -> "PointCloud":
        """Learn the manifold that the points sample. Nothing in it is random to the caller.

        Args:
            points: the sample, with noise that may stand off the manifold. Duplicates count once.
            dim: the dimension; by `intrinsic_dimension` if not given.
            neighbors: how many samples a chart is fitted to; if not given, five for each coefficient of a
                quadratic in `dim` variables, and more where the samples are many.

        Raises:
            ManifoldError: if the points are too few or not finite, the dimension is none of theirs or cannot
                be told, or there are more neighbours than points.

        >>> angle = torch.linspace(0, 2 * torch.pi, 101, dtype=torch.float64)[:-1]
        >>> circle = PointCloud.fit(torch.stack([angle.cos(), angle.sin()], 1), dim=1)
        >>> circle.projx(torch.tensor([0.0, 1.5], dtype=torch.float64)).norm().item()
        1.0
        """
        check_points(points, NAME)
        wide = points if points.dtype in (torch.float32, torch.float64) else points.float()
        samples, times = distinct_rows(wide)
        dim = _dimension(samples, len(points), dim)
        given = _given_neighbors(samples, len(points), dim, neighbors)
        return _assemble(cls, samples, times, dim, given)

    # What a learned manifold gives

    def project(self, x: Float[Tensor, "*batch D"]) -> Projection:
        """The foot of each state on the blended charts, with the tangent space there.

        `inside` is false where the foot lies beyond the samples that its nearest chart was fitted to, or the
        state is farther than `reach`. Half precision is computed in float32.
        """
        ok, reason = self._check_shape(x.shape, "x")
        if not ok or not x.is_floating_point():
            raise ManifoldError(f"{self.name}.project: {reason or f'x has dtype {x.dtype}; give states'}")
        kind = x.dtype
        state = x if kind in (torch.float32, torch.float64) else x.float()
        flat = state.reshape(-1, self.width)
        frame, origin = self.frame.to(flat.dtype), self.middle.to(flat.dtype)
        found, local = self._foot((flat - origin) @ frame)
        point = origin + found.at @ frame.mT
        tangent = frame @ found.tangent
        distance = _length(flat - point)
        inside = self._within(found, local) & (distance <= self.reach)
        batch = x.shape[:-1]
        return Projection(
            foot=point.to(kind).reshape(x.shape),
            tangent=tangent.to(kind).reshape(*batch, self.width, self.dim),
            distance=distance.to(kind).reshape(batch),
            inside=inside.reshape(batch),
        )

    def second_fundamental_form(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """II(u, v) from the charts around x, for tangent u and v."""
        x, u, v = torch.broadcast_tensors(x, u, v)
        frame, origin = self.frame.to(x.dtype), self.middle.to(x.dtype)
        flat = (x.reshape(-1, self.width) - origin) @ frame
        found, local = self._foot(flat)
        left, right = (vector.reshape(-1, self.width) @ frame for vector in (u, v))
        return (bending_vector(local, found, left, right) @ frame.mT).reshape(x.shape)

    def random(
        self,
        *size: int | Sequence[int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Points spread as the samples are: even in a chart drawn by how many samples it stands for."""
        shape = torch.Size(size[0]) if size and not isinstance(size[0], int) else torch.Size(size)  # type: ignore[arg-type]
        ok, reason = self._check_shape(shape, "the point")
        if not ok:
            raise ManifoldError(f"{self.name}.random: {reason}")
        count = shape[:-1].numel()
        home = generator.device if generator is not None else torch.device("cpu")
        draw = torch.multinomial(
            self.shares.to(home, torch.float64), max(count, 1), True, generator=generator
        )
        step = torch.randn(len(draw), self.dim, generator=generator, device=home, dtype=torch.float64)
        part = torch.rand(len(draw), 1, generator=generator, device=home, dtype=torch.float64)
        step = step / torch.linalg.vector_norm(step, dim=-1, keepdim=True) * part ** (1 / self.dim)
        where, kind = self.centres.device, self.centres.dtype
        draw, step = draw[:count].to(where), step[:count].to(where, kind)
        low, high = self.extent[draw, : self.dim].unbind(-1)
        step = torch.minimum(torch.maximum(step * self.support[draw, None] / 2, low), high)
        flat = self.centres[draw] + (self.tangents[draw] @ step[..., None])[..., 0]
        point = (self.middle + flat @ self.frame.mT).to(device or where, dtype or kind)
        return self._point(self.projx(point.reshape(shape)))

    # What graphs over the manifold need

    @property
    def anchors(self) -> Float[Tensor, "m D"]:
        """The centres of the charts, points on the manifold or within its error of it."""
        return self.middle + self.centres @ self.frame.mT

    def graph(self) -> tuple[Int[Tensor, "m k"], Float[Tensor, "m k"]]:
        """For each anchor the nearest other ones, and how far they are; a graph for shortest paths."""
        count = min(len(self.centres) - 1, max(LINKS, 2 * self.dim + 4))
        if count < 1:
            empty = self.near[:, :0]
            return empty, self.support[:, None][:, :0]
        found = nearest_neighbours(self.centres, neighbors=count)
        return found.indices, found.distances

    @property
    def bytes(self) -> int:
        """The size of the tensors, in memory and, but for a header, in a file."""
        return sum(each.numel() * each.element_size() for each in self.buffers())

    # Files

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The numbers, and the tensors."""
        names = ("dim", "neighbors", "noise", "reach", "outliers", "curved")
        return {name: getattr(self, name) for name in names}, {name: getattr(self, name) for name in BUFFERS}

    @classmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "PointCloud":
        """The same manifold, to the bit."""
        return cls(values, tensors)

    def __repr__(self) -> str:
        return (
            f"PointCloud(dim={self.dim}, width={self.width}, charts={len(self.centres)}, rank={self.rank}, "
            f"noise={self.noise:.3g}, reach={self.reach:.3g}, {self.bytes / 2**20:.1f} MiB)"
        )

    # Inside

    def _check_shape(self, shape: Sequence[int], name: str) -> tuple[bool, str | None]:
        if len(shape) and shape[-1] == self.width:
            return True, None
        return False, (
            f"{name} has shape {tuple(shape)}; the manifold was learned from vectors of width {self.width}"
        )

    def _atlas(self, kind: torch.dtype) -> Atlas:
        return Atlas(
            centres=self.centres.to(kind),
            tangent=self.tangents.to(kind),
            form=self.forms.to(kind),
            support=self.support.to(kind),
            near=self.near,
        )

    def _foot(self, flat: Tensor, *, exact: bool | None = None) -> tuple[Foot, Local]:
        local, start = localise(self._atlas(flat.dtype), flat, ACTIVE)
        return foot(local, start, flat, exact=exact), local

    def _within(self, found: Foot, local: Local) -> Tensor:
        """Whether a chart that has a say was fitted to samples all around the foot."""
        with torch.no_grad():
            apart = found.at[:, None] - local.centres
            along = (apart[..., None, :] @ local.tangent)[..., 0, :]
            toward = along @ directions(self.dim, along).mT
            extent = self.extent.to(along.dtype)[local.which]
            held = ((toward >= extent[..., 0]) & (toward <= extent[..., 1])).all(-1)
            scaled = (apart * apart).sum(-1) <= local.support**2
            return (held & scaled).any(-1)


def _assemble(
    cls: type[PointCloud], samples: Tensor, times: Tensor, dim: int, neighbors: int | None
) -> PointCloud:
    """Charts, fitted again in the span that the first ones share, and joined as the samples ask for."""
    total = len(samples)
    charts, count = _charts(samples, dim, neighbors)
    origin, frame = common_subspace(charts.centres, errors(charts, dim, count), total / count, dim + 1)
    origin = _centred(samples, origin, frame)
    inner = torch.cat([(part - origin) @ frame for part in samples.split(ROWS)])
    # Most of the noise is left outside: neighbours are truer, and fewer of them do.
    charts, count = _charts(inner, dim, neighbors)
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
    made = cls(values, {name: value.contiguous() for name, value in tensors.items()})
    some = ours.nonzero()[:, 0]
    some = some[:: max(1, len(some) // MEASURED)]
    feet = torch.cat([made._foot(part, exact=False)[0].at for part in inner[some].split(256)])
    made.noise = float(
        _length(samples[some] - made.middle - feet @ made.frame.mT).double().square().mean() ** 0.5
    )
    made.reach = estimate_reach(centres, charts.tangent, charts.form, charts.radius, charts.noise)
    return made


def _charts(points: Tensor, dim: int, neighbors: int | None) -> tuple[Charts, int]:
    """Charts on a cover of the points, and how many neighbours they were fitted to."""
    total, width = points.shape
    if neighbors is None:
        least = min(total - 1, max(16, 5 * unknowns(dim), 4 * total // MOST_CHARTS))
        neighbors = choose_neighbors(points, dim, least)
    each = points.element_size() * width * (unknowns(dim) + 1)
    count = max(1, min(max(LEAST_CHARTS, OVERLAP * total // neighbors), MOST_CHARTS, MEMORY // each))
    which = cover(points, max(count, 4 * total // neighbors), neighbors=neighbors)
    charts = fit_charts(points, which, dim=dim, neighbors=neighbors)
    kept = ~charts.alone
    if not bool(kept.any()):
        raise ManifoldError(
            f"{NAME}: every chart centre lies far outside of its {neighbors} neighbours; "
            "the samples form no manifold at this size: take more neighbours"
        )
    return Charts(**{name: value[kept] for name, value in vars(charts).items()}), neighbors


def _centred(samples: Tensor, origin: Tensor, frame: Tensor) -> Tensor:
    """The origin, moved across the span to the mean of the samples that are not far off it."""
    normal, length = torch.zeros_like(origin), []
    parts = samples.split(ROWS)
    for part in parts:
        rest = part - origin
        length.append(_length(rest - rest @ frame @ frame.mT))
    limit = OUTLYING * torch.cat(length).median()
    kept = 0
    for part, far in zip(parts, length, strict=True):
        near = far <= limit
        normal, kept = normal + (part[near] - origin).sum(0), kept + int(near.sum())
    normal = normal / kept
    return origin + normal - frame @ (frame.mT @ normal)


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest chart of each sample and how far its centre is."""
    squares = (centres * centres).sum(1)
    which = torch.cat([(squares - 2 * part @ centres.mT).argmin(1) for part in points.split(1024)])
    return which, _length(points - centres[which])


def _length(vectors: Tensor) -> Tensor:
    """Euclidean lengths, with derivative 0 at 0."""
    squares = (vectors * vectors).sum(-1)
    positive = squares > 0
    return torch.where(positive, torch.where(positive, squares, 1.0).sqrt(), squares)


def _dimension(samples: Tensor, given: int, dim: int | None) -> int:
    """The dimension, given or estimated."""
    count, ambient = samples.shape
    if dim is None:
        if count < 8:
            raise ManifoldError(
                f"{NAME}: {_said(count, given)} are too few to tell a dimension by; give dim, "
                "or 8 or more points"
            )
        around = min(100, max(5, count // 10), count - 1)
        some = samples if count <= 5000 else samples[:: count // 5000]
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


def _given_neighbors(samples: Tensor, given: int, dim: int, neighbors: int | None) -> int | None:
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
