"""What every manifold learned from samples has: states are projected onto it, and the rest follows.

A learned manifold knows one thing of its own: for any state, the foot on the manifold and the tangent space
there. Tangent projection, retraction, transport, distances and geodesics are made of that.
"""

import copy
import functools
import os
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manifolds.base import RiemannianSubmanifold, plain, safe_sqrt
from manifolds.cloud import geodesics
from manifolds.cloud.geodesics import ShortestPath
from manifolds.cloud.io import read_manifold, write_manifold
from manifolds.cloud.kept import in_single, usable
from manifolds.cloud.sampled_metric import SampledMetric
from manifolds.errors import ManifoldError, MissingOperationError, NoPathError
from manifolds.operations import operation, precise

FINE = 33
"""How many points the path has of which a distance is the length."""
START = (-11 / 6, 3.0, -3 / 2, 1 / 3)
"""The derivative at the first of four even points, to third order."""
ROUGH = 1e-2
"""The largest residual of a path that is given without its residual."""


@dataclass(frozen=True)
class Projection:
    """Feet of states on a learned manifold.

    Attributes:
        foot: the point of the manifold that belongs to each state.
        tangent: an orthonormal basis of the tangent space at the foot, in its columns.
        distance: how far the state is from its foot.
        inside: whether the samples say anything about that state: its foot lies among them (not beyond the
            end of a curve or the edge of a sheet) and the state is nearer than the reach, within which the
            foot is the only nearest point.
    """

    foot: Float[Tensor, "*batch D"]
    tangent: Float[Tensor, "*batch D d"]
    distance: Float[Tensor, "*batch"]
    inside: Bool[Tensor, "*batch"]


class LearnedManifold(RiemannianSubmanifold):
    """A manifold known from samples, in a Euclidean space; a point is a vector of that space.

    A subclass gives `project`, `width`, `dim`, `noise`, `reach`, `describe` and `rebuild`; with
    `kind="name"` in its class statement a file can name it.

    Attributes:
        dim: the dimension of the manifold.
        width: the dimension of the space around it.
        noise: the root mean square distance of the samples from the manifold.
        reach: the distance from the manifold within which the nearest point is unique, estimated: at most
            the smallest radius of curvature.
    """

    ndim = 1
    retractions: ClassVar[dict[str, int]] = {"projection": 2}
    kind: ClassVar[str | None] = None
    dim: int
    width: int
    noise: float
    reach: float

    _kinds: ClassVar[dict[str, type["LearnedManifold"]]] = {}

    def __init_subclass__(cls, kind: str | None = None, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.kind = kind
        if "project" in cls.__dict__:
            cls.project = precise(cls.__dict__["project"])  # type: ignore[method-assign]
        if "describe" in cls.__dict__:
            cls.describe = _described(cls.__dict__["describe"])  # type: ignore[method-assign]
        if "rebuild" in cls.__dict__:
            cls.rebuild = classmethod(_rebuilt(cls.__dict__["rebuild"].__func__))  # type: ignore[assignment]
        if kind is not None:
            LearnedManifold._kinds[kind] = cls

    @abstractmethod
    def project(self, x: Float[Tensor, "*batch D"]) -> Projection:
        """The foot of each state, with the tangent space there; differentiable in x."""

    @abstractmethod
    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file must hold to make the manifold again: values for JSON, and tensors."""

    @classmethod
    @abstractmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "LearnedManifold":
        """Make the manifold again from what `describe` gave, to the bit."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the manifold to a safetensors file: whole or not at all; see `manifolds.cloud.io`."""
        write_manifold(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str | None = None
    ) -> "LearnedManifold":
        """Read a manifold that `save` wrote, of whatever kind.

        Raises:
            ManifoldError: there is no such file, it is cut off or no manifold, or of another kind than the
                class that is asked.
        """
        return read_manifold(cls, path, device)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Keeps a tensor with the manifold; of one made in inference mode a copy that gradients may pass."""
        super().register_buffer(name, None if tensor is None else usable(tensor), persistent)

    def _apply(self, fn: Any, *args: Any, **options: Any) -> Any:
        return super()._apply(in_single(fn), *args, **options)

    def dimension(self, point: Tensor | Sequence[int]) -> int:
        """The dimension of the manifold, whatever the point."""
        return self.dim

    @operation
    def distance(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch"]:
        """How far each state is from the manifold."""
        return self.project(x).distance

    def projx(self, x: Tensor) -> Tensor:
        """The foot of each state."""
        return self.project(x).foot

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The part of a vector that is tangent at the foot of x: T Tᵀ u."""
        tangent = self.project(x).tangent
        return (tangent @ (tangent.mT @ u[..., None]))[..., 0]

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The foot of x + u."""
        return self.projx(x + u)

    # Geodesics

    @operation
    def shortest_path(self, x: Tensor, y: Tensor, points: int = 17) -> ShortestPath:
        """The shortest path from each x to its y, and whether it was found; see `ShortestPath`.

        It starts along the shortest way through the graph of `anchors`, and is relaxed on the manifold. The
        points carry their first derivative in both ends, the length too; in another metric the length alone.

        Args:
            x: starts (*batch, D), on the manifold.
            y: ends.
            points: of each path, both ends among them.

        Raises:
            ManifoldError: no way through the samples leads from an x to its y.
        """
        x, y = torch.broadcast_tensors(plain(x), plain(y))
        found = geodesics.shortest_path(
            self, x.reshape(-1, self.width), y.reshape(-1, self.width), points=points
        )
        batch = x.shape[:-1]
        return ShortestPath(
            found.path.reshape(*batch, points, self.width), found.length.reshape(batch),
            found.converged.reshape(batch), found.iterations.reshape(batch), found.residual.reshape(batch),
        )  # fmt: skip

    @operation
    def geodesic(self, x: Tensor, y: Tensor, points: int = 17) -> Tensor:
        """Points (*batch, points, D) that stand evenly along the shortest path from each x to its y.

        Raises:
            ManifoldError: no way leads through the samples, or the path is off by more than a hundredth of
                its length; `shortest_path` gives it all the same, with its residual.
        """
        return self._found("geodesic", x, y, points).path

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Where the geodesic from x with velocity u is after unit time, by retractions.

        There are as many as the reach asks for, and the error falls as the square of their number.
        """
        x, u = torch.broadcast_tensors(plain(x), plain(u))
        found, _ = geodesics.exponential(self, x.reshape(-1, self.width), u.reshape(-1, self.width))
        return found.reshape(x.shape)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The initial velocity of the shortest path from x to y, as long as the path."""
        found = self._found("logmap", x, y, FINE)
        # In another metric a path bends within the manifold: its first chord is not its direction.
        start = torch.tensor(START, dtype=found.path.dtype, device=found.path.device)
        way = self.proju(found.path[..., 0, :], start @ found.path[..., : len(START), :])
        size = self.norm(found.path[..., 0, :], way)
        return (found.length / torch.where(size > 0, size, 1.0))[..., None] * way

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """The length of the shortest path."""
        found = self._found("dist", x, y, FINE).length
        return found[..., None] if keepdim else found

    @property
    def anchors(self) -> Float[Tensor, "m D"]:
        """Points all over the manifold, between which `graph` knows the ways."""
        raise MissingOperationError(f"{self.name} has no anchors")

    def graph(self) -> tuple[Int[Tensor, "m k"], Float[Tensor, "m k"]]:
        """For each anchor some near ones, and how far they are."""
        raise MissingOperationError(f"{self.name} has no graph of its anchors")

    def _found(self, name: str, x: Tensor, y: Tensor, points: int) -> ShortestPath:
        found = self.shortest_path(x, y, points)
        rough = ~(found.residual <= ROUGH)
        if bool(rough.any()):
            raise NoPathError(
                f"{self.name}.{name}: no shortest path was found for {int(rough.sum())} of {rough.numel()} "
                f"pairs (largest residual {float(found.residual.max()):.1g}); the manifold is rough there: "
                "fit it with more samples, or see shortest_path",
                rough.flatten().nonzero()[:, 0].tolist(),
            )
        return found

    # Another metric

    @property
    def metric(self) -> SampledMetric | None:
        """What lengths are taken in, as `with_metric` was told; None for the surrounding space's."""
        return cast(SampledMetric | None, self._modules.get("sampled_metric"))

    def with_metric(self, metric: SampledMetric | None) -> "LearnedManifold":
        """The same set with another metric: inner products, gradients, lengths and geodesics are taken in it.

        Tangent spaces, projections, retraction and the second fundamental form are those of the
        surrounding space as before. It shares its tensors with this one, and is saved with the metric.

        Args:
            metric: None for that of the surrounding space.

        Raises:
            ManifoldError: the metric is of another width.
        """
        if metric is not None and metric.width != self.width:
            raise ManifoldError(
                f"{self.name}.with_metric: the metric holds for vectors of {metric.width}, and the manifold "
                f"lies in {self.width} dimensions"
            )
        other = copy.copy(self)
        other.__dict__ = {key: value for key, value in self.__dict__.items() if key != "_graph_links"}
        other._buffers, other._modules = dict(self._buffers), dict(self._modules)
        other._modules["sampled_metric"] = metric
        other.metric_is_ambient = metric is None
        other._metric_changed()
        return other

    def _metric_changed(self) -> None:
        """What a subclass keeps of lengths is void; nothing here."""

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """⟨u, v⟩, in the metric that the manifold carries."""
        if self.metric is None:
            return super().inner(x, u, v, keepdim=keepdim)
        found = self.metric.inner(*torch.broadcast_tensors(x, u, u if v is None else v))
        return found[..., None] if keepdim else found

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """The norm of a tangent vector, in the metric that the manifold carries."""
        if self.metric is None:
            return super().norm(x, u, keepdim=keepdim)
        return safe_sqrt(self.inner(x, u, keepdim=keepdim))

    def egrad2rgrad(self, x: Tensor, g: Tensor) -> Tensor:
        """The Riemannian gradient: the tangent vector a with ⟨a, v⟩ = ⟨g, v⟩ for all tangent v."""
        return (
            super().egrad2rgrad(x, g)
            if self.metric is None
            else self.metric.solve(x, self.project(x).tangent, g)
        )

    def ehess2rhess(self, x: Tensor, g: Tensor, h: Tensor, u: Tensor) -> Tensor:
        """The Riemannian Hessian applied to u; in the metric of the surrounding space only."""
        if self.metric is not None:
            raise MissingOperationError(f"{self.name} has no conversion of the Hessian in a sampled metric")
        return super().ehess2rhess(x, g, h, u)

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """The distance from the manifold, relative to the norm of the point."""
        size = torch.linalg.vector_norm(x, dim=-1)
        return {"x is its own foot": self.project(x).distance / torch.where(size > 0, size, 1.0)}

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """The share of u that is normal."""
        size = torch.linalg.vector_norm(u, dim=-1)
        rest = torch.linalg.vector_norm(u - self.proju(x, u), dim=-1)
        return {"u is tangent": rest / torch.where(size > 0, size, 1.0)}


def _described(describe: Callable[..., Any]) -> Callable[..., Any]:
    """The description with that of the metric, if the manifold carries one."""

    @functools.wraps(describe)
    def run(self: LearnedManifold) -> tuple[dict[str, Any], dict[str, Tensor]]:
        values, tensors = describe(self)
        if self.metric is None:
            return values, tensors
        more, held = self.metric.describe()
        return {**values, "metric": more}, {
            **tensors,
            **{f"metric.{key}": each for key, each in held.items()},
        }

    return run


def _rebuilt(rebuild: Callable[..., Any]) -> Callable[..., Any]:
    """The manifold with its metric, if one was described."""

    @functools.wraps(rebuild)
    def run(cls: type[LearnedManifold], values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
        if values.get("metric") is None:
            return rebuild(cls, values, tensors)
        held = {
            key.removeprefix("metric."): each for key, each in tensors.items() if key.startswith("metric.")
        }
        rest = {key: each for key, each in tensors.items() if not key.startswith("metric.")}
        bare = rebuild(cls, {key: each for key, each in values.items() if key != "metric"}, rest)
        return bare.with_metric(SampledMetric.rebuild(values["metric"], held))

    return run
