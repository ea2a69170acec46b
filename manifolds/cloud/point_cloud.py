"""A manifold learned from a cloud of samples."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manifolds.cloud.charts import directions
from manifolds.cloud.cloud_fit import NAME, check_neighbors, decide_dimension, learn, length
from manifolds.cloud.cover import distinct_rows
from manifolds.cloud.learned import LearnedManifold, Projection
from manifolds.cloud.moving import Atlas, Foot, Local, bending_vector, foot, localise
from manifolds.cloud.neighbours import check_points, nearest_neighbours
from manifolds.cloud.reach import estimate_reach
from manifolds.errors import ManifoldError

ACTIVE = 12
"""How many charts are blended at a place, at most."""
LINKS = 12
"""How many neighbours an anchor has in the graph, or twice the dimension and four more."""
MEASURED = 512
"""How many samples the noise is measured on."""
TOGETHER = 2**22
"""How many numbers of charts are gathered for the states that are projected together."""
BUFFERS = ("middle", "frame", "support", "extent", "shares", "near")
SHAPES = ("centres", "tangents", "forms")


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
    charts: Float[Tensor, "m q r"]
    support: Float[Tensor, "m"]
    extent: Float[Tensor, "m e 2"]
    shares: Float[Tensor, "m"]
    near: Int[Tensor, "m l"]

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        parts = [tensors["centres"][:, None], tensors["tangents"].mT, tensors["forms"]]
        self.register_buffer("charts", torch.cat(parts, 1))
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

        Time grows with n · charts · D for the neighbours and with charts · neighbors · (D + p)² for the fits,
        p the coefficients of a quadratic. There are 64 to 2,048 charts, or 4 n / neighbors if that is more.

        Memory, besides the samples and two copies of them, is bounded: charts may take 1 GiB and be 16,384,
        and a neighbourhood may hold 2²⁵ numbers. What cannot be done within that is refused.

        Raises:
            ManifoldError: if the points are too few or not finite, the dimension is none of theirs or cannot
                be told, there are more neighbours than points, or charts of so few or so many neighbours
                would take more memory than they may.

        >>> angle = torch.linspace(0, 2 * torch.pi, 101, dtype=torch.float64)[:-1]
        >>> circle = PointCloud.fit(torch.stack([angle.cos(), angle.sin()], 1), dim=1)
        >>> round(circle.projx(torch.tensor([0.0, 1.5], dtype=torch.float64)).norm().item(), 9)
        1.0
        """
        check_points(points, NAME)
        wide = points if points.dtype in (torch.float32, torch.float64) else points.float()
        samples, times = distinct_rows(wide)
        dim = decide_dimension(samples, len(points), dim)
        given = check_neighbors(samples, len(points), dim, neighbors)
        values, tensors, charts, ours = learn(samples, times, dim, given)
        made = cls(values, tensors)
        some = ours.nonzero()[:, 0]
        some = samples[some[:: max(1, len(some) // MEASURED)]]
        off = length(some - made._project(some, exact=False)[0])
        made.noise = float(off.double().square().mean() ** 0.5)
        made.reach = estimate_reach(charts.centres, charts.tangent, charts.form, charts.radius, charts.noise)
        return made

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
        point, tangent, distance, inside = self._project(flat)
        batch = x.shape[:-1]
        return Projection(
            foot=point.to(kind).reshape(x.shape),
            tangent=tangent.to(kind).reshape(*batch, self.width, self.dim),
            distance=distance.to(kind).reshape(batch),
            inside=inside.reshape(batch),
        )

    def second_fundamental_form(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """II(u, v) from the charts around x, for tangent u and v.

        It is the curvature that was fitted, not the derivative of `proju`: they agree as far as the charts
        agree with each other, and a Hessian is second-order exact as far as that.
        """
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

    # The charts

    @property
    def centres(self) -> Float[Tensor, "m r"]:
        """The centres of the charts, in coordinates of the span."""
        return self.charts[:, 0]

    @property
    def tangents(self) -> Float[Tensor, "m r d"]:
        """Their tangent bases."""
        return self.charts[:, 1 : 1 + self.dim].mT

    @property
    def forms(self) -> Float[Tensor, "m p r"]:
        """Their second fundamental forms, in the order of `manifolds.curvature.regression.pairs`."""
        return self.charts[:, 1 + self.dim :]

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
        tensors = {name: getattr(self, name).contiguous() for name in (*BUFFERS, *SHAPES)}
        return {name: getattr(self, name) for name in names}, tensors

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

    def _project(self, flat: Tensor, *, exact: bool | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Foot, tangent basis, distance and `inside`, for so many states at a time that memory is bounded."""
        each = self.charts[0].numel() + (self.charts.shape[1] - self.dim - 1) ** 2
        rows = max(1, TOGETHER // (ACTIVE * each))
        if len(flat) > rows:
            parts = [self._project(part, exact=exact) for part in flat.split(rows)]
            return tuple(torch.cat(each) for each in zip(*parts, strict=True))  # type: ignore[return-value]
        frame, origin = self.frame.to(flat.dtype), self.middle.to(flat.dtype)
        found, local = self._foot((flat - origin) @ frame, exact=exact)
        point = origin + found.at @ frame.mT
        distance = length(flat - point)
        inside = self._within(found, local) & (distance <= self.reach)
        return point, frame @ found.tangent, distance, inside

    def _foot(self, flat: Tensor, *, exact: bool | None = None) -> tuple[Foot, Local]:
        atlas = Atlas(self.charts, self.dim, self.support, self.near)
        local, start = localise(atlas, flat, ACTIVE)
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
