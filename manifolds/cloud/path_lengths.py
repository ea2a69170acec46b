"""Geodesics along a curve by its length, in closed form; and what a path looks like in one dtype."""

from abc import abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manifolds.base import frobenius_norm, plain, safe_sqrt
from manifolds.cloud.arcs import Arcs, measure
from manifolds.cloud.geodesics import ShortestPath
from manifolds.cloud.graph_paths import check_count
from manifolds.cloud.learned import LearnedManifold
from manifolds.cloud.nearest import Table, tabulate
from manifolds.cloud.neighbours import nearest_neighbours
from manifolds.cloud.splines import Curve, Sheet
from manifolds.errors import ManifoldError
from manifolds.operations import widened

CURVE = ("breaks", "pieces")
SHEET = ("centres", "weights", "polynomial", "shift", "scale")
LINKED = 400
"""How many places of a sheet are linked to a graph."""


class Parts:
    """A path in one dtype: its shape, its table and the frame it lies in."""

    def __init__(self, path: "MeasuredPath", dtype: torch.dtype) -> None:
        def get(name: str) -> Tensor:
            return getattr(path, name).to(dtype)

        # It is kept: made in inference mode it could not be used for gradients later, and made under autocast
        # it would have lost its digits.
        off = torch.autocast(path.means.device.type, enabled=False)
        with torch.inference_mode(False), torch.no_grad(), off:
            self.centre, self.frame, self.hull = get("centre"), get("frame"), get("hull")
            self.shape: Curve | Sheet
            if path.power is None:
                self.shape = Curve(*(get(name) for name in CURVE))
            else:
                self.shape = Sheet(**{name: get(name) for name in SHEET}, power=path.power)
            self.table: Table = tabulate(self.shape, path.closed)
            self.coarse: Table = tabulate(self.shape, path.closed, LINKED)
        self.arcs: Arcs | None = None
        self.size = float((self.table.values - self.table.values.mean(0)).square().sum(-1).mean().sqrt())


class MeasuredPath(LearnedManifold):
    """A curve whose geodesics are known by its length; a sheet is left to `LearnedManifold`.

    Attributes:
        q: the number of coordinates, 1 for a curve.
        closed: whether the curve is a loop.
        power: of a sheet's radial functions; None for a curve.
        means: the class means, whose dtype the path is in.
    """

    q: int
    closed: bool
    power: int | None
    means: Tensor

    @abstractmethod
    def at(self, coordinate: Tensor) -> Tensor:
        """The points at coordinates."""

    @abstractmethod
    def coordinate(self, x: Tensor) -> Tensor:
        """The coordinates of the feet of states."""

    @abstractmethod
    def _flat(self, x: Tensor) -> "tuple[Tensor, Parts]":
        """The states as (b, D), and the path in their dtype."""

    @abstractmethod
    def _in(self, like: Tensor) -> "Parts":
        """The path in the dtype of a tensor."""

    def length(self) -> Tensor:
        """The length of a curve, in the metric that the manifold carries.

        Raises:
            ManifoldError: the path is a sheet.
        """
        return self._arcs(self._in(widened(self.means)), "length").length.to(self.means.dtype)

    def shortest_path(self, x: Tensor, y: Tensor, points: int = 17) -> ShortestPath:
        """The way along a curve in closed form; on a sheet see `LearnedManifold.shortest_path`."""
        if self.q > 1:
            return super().shortest_path(x, y, points)
        x, y = torch.broadcast_tensors(plain(x), plain(y))
        check_count(self.name, points)
        here, there = self._flat(x)[0], self._flat(y)[0]
        arcs, start, way = self._way(here, there)
        share = torch.linspace(0, 1, points, dtype=way.dtype, device=way.device)
        t = self._place(arcs, (start[:, None] + way[:, None] * share).flatten())
        path = self.at(t[:, None]).unflatten(0, (len(way), points))
        path = torch.cat([here[:, None], path[:, 1:-1], there[:, None]], 1)
        batch = x.shape[:-1]
        return ShortestPath(
            path.reshape(*batch, points, self.width).to(x.dtype),
            way.abs().reshape(batch).to(x.dtype),
            torch.ones(batch, dtype=torch.bool, device=x.device),
            torch.zeros(batch, dtype=torch.long, device=x.device),
            torch.zeros(batch, dtype=x.dtype, device=x.device),
        )

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The point at the length of u along the curve; an open one ends at its end.

        On a sheet see `LearnedManifold.expmap`.
        """
        return super().expmap(x, u) if self.q > 1 else self._carried(x, u)[0]

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The point exp_x(u), and v carried there; on a curve parallel."""
        if self.q > 1:
            return super().expmap_transp(x, u, v)
        y, before, after = self._carried(x, u)
        return y, (v * before).sum(-1, keepdim=True) * after

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The vector v carried to exp_x(u); on a curve parallel."""
        return self.expmap_transp(x, u, v)[1]

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The tangent vector as long as the way along the curve.

        On a sheet see `LearnedManifold.logmap`.
        """
        if self.q > 1:
            return super().logmap(x, y)
        x, y = torch.broadcast_tensors(plain(x), plain(y))
        here, there = self._flat(x)[0], self._flat(y)[0]
        _, _, way = self._way(here, there)
        along = self._unit(here)
        return (way[:, None] * along).reshape(x.shape)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The length of the way along the curve; on a sheet see `LearnedManifold.dist`."""
        if self.q > 1:
            return super().dist(x, y, keepdim=keepdim)
        x, y = torch.broadcast_tensors(plain(x), plain(y))
        found = self._way(self._flat(x)[0], self._flat(y)[0])[2].abs().reshape(x.shape[:-1])
        return found[..., None] if keepdim else found

    @property
    def anchors(self) -> Float[Tensor, "m D"]:
        """Points all over the path."""
        parts = self._in(widened(self.means))
        return parts.centre + parts.coarse.values @ parts.frame.mT

    def graph(self) -> tuple[Int[Tensor, "m k"], Float[Tensor, "m k"]]:
        """For each anchor those next to it in coordinates, and how far they are as points."""
        parts = self._in(widened(self.means))
        places = parts.coarse.places / (parts.table.high - parts.table.low)
        found = nearest_neighbours(places, neighbors=min(3**self.q + 3, len(places) - 1)).indices
        apart = parts.coarse.values[found] - parts.coarse.values[:, None]
        return found, frobenius_norm(apart, 1)

    def _arcs(self, parts: "Parts", name: str) -> Arcs:
        if self.q > 1:
            raise ManifoldError(f"{self.name}.{name}: a sheet of {self.q} coordinates has no length")
        if parts.arcs is None:
            parts.arcs = measure(parts.table.places[:, 0], lambda t: self._speed(parts, t))
        return parts.arcs

    def _speed(self, parts: "Parts", t: Tensor) -> Tensor:
        value, first = parts.shape.derivatives(t, 1)
        if self.metric is None:
            return frobenius_norm(first[..., 0], 1)
        pushed = first[..., 0] @ parts.frame.mT
        return safe_sqrt(self.metric.inner(parts.centre + value @ parts.frame.mT, pushed, pushed))

    def _way(self, here: Tensor, there: Tensor) -> tuple[Arcs, Tensor, Tensor]:
        """The lengths of the curve, that up to x, and the signed length of the way from there to y."""
        arcs = self._arcs(self._in(here), "geodesic")
        start, end = (arcs.to_place(self.coordinate(z)[:, 0]) for z in (here, there))
        way = end - start
        if self.closed:
            way = way - arcs.length * (way.detach() / arcs.length).round()
        return arcs, start, way

    def _place(self, arcs: Arcs, length: Tensor) -> Tensor:
        if self.closed:
            length = torch.remainder(length, arcs.length)
        return arcs.place_at(length)

    def _unit(self, x: Tensor) -> Tensor:
        """The tangent of length one in the metric, the way that the coordinate grows."""
        along = self.project(x).tangent[..., 0]
        return along if self.metric is None else along / self.norm(x, along)[..., None]

    def _carried(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The point exp_x(u), and the tangents at both; what one takes as coordinates the other gives."""
        x, u = torch.broadcast_tensors(plain(x), plain(u))
        flat, parts = self._flat(x)
        arcs = self._arcs(parts, "expmap")
        before = self._unit(flat)
        size = (u.reshape(flat.shape) * before).sum(-1)
        if self.metric is not None:  # the tangent is of length one in the metric, not in space
            size = size / (before * before).sum(-1)
        t = self._place(arcs, arcs.to_place(self.coordinate(flat)[:, 0]) + size)
        y = self.at(t[:, None])
        after = self._unit(y)
        back = before / (before * before).sum(-1, keepdim=True)
        return y.reshape(x.shape), back.reshape(x.shape), after.reshape(x.shape)
