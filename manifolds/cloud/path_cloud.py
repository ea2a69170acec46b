"""The manifold of a concept with few values: a smooth path through the means of its classes."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manifolds.base import frobenius_norm, plain
from manifolds.cloud.closing import Closing
from manifolds.cloud.learned import Projection
from manifolds.cloud.nearest import Nearest, nearest
from manifolds.cloud.path_curvature import Noise, PathCurvature, path_curvature
from manifolds.cloud.path_fit import fit_path
from manifolds.cloud.path_lengths import CURVE, SHEET, MeasuredPath, Parts
from manifolds.cloud.splines import Curve
from manifolds.errors import ManifoldError
from manifolds.operations import precise, widened

SHARED = (
    "means", "knots", "coordinates", "spread", "standard_error", "centre", "frame", "covariance",
    "influence", "hull",
)  # fmt: skip
NUMBERS = ("noise", "reach", "period", "smoothing", "freedom", "directions", "pooled", "margin", "slack")


class PathCloud(MeasuredPath, kind="path-cloud"):
    """A curve, or with coordinates of several columns a sheet, through the means of classes.

    The means are smoothed as far as their standard errors ask for, then a spline of degree five goes through
    them (see `manifolds.cloud.splines`). A state is projected to the nearest point of all of the path.

    A point of the manifold is a vector of the space around it; where it lies along the path is its
    coordinate: the length of the chords up to there, or what was given. Points in half precision are
    computed in float32, and the path follows the dtype of the points.

    Use `PathCloud.fit`.

    Attributes:
        closed: whether the curve is a loop.
        closing: the evidence for that; None where the caller said so, or for a sheet.
        means: the class means.
        knots: the points of the path that belong to the classes: the means without their noise.
        coordinates: the coordinates of the classes.
        period: of the coordinate of a closed curve; NaN for an open one.
        spread: the root mean square distance of the samples of each class from their mean; NaN of one sample.
        standard_error: the expected distance of each mean from the true one; NaN where no class has more
            than one sample.
        outliers: samples that were left out: farther from the median of their class than ten times what
            samples usually are.
        smoothing: its strength λ; 0 where the path goes through the means.

    Example:
        >>> angle = torch.arange(120) % 12 * (torch.pi / 6)
        >>> loop = PathCloud.fit(torch.stack([angle.cos(), angle.sin()], -1), torch.arange(120) % 12)
        >>> loop.closed, loop.projx(torch.tensor([1.0, 1.0]))
        (True, tensor([0.7071, 0.7071]))
    """

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.q = self.dim = int(values["columns"])
        names = (*SHARED, *(CURVE if values["power"] is None else SHEET))
        missing = sorted({*names, "outliers"} - tensors.keys())
        if missing:
            raise ManifoldError(f"PathCloud: the tensors {missing} are missing; the file is not whole")
        for name in (*names, "outliers"):
            self.register_buffer(name, tensors[name])
        for name in NUMBERS:
            setattr(self, name, float(values[name]))
        self.width = self.means.shape[-1]
        self.closed: bool = bool(values["closed"])
        self.power: int | None = values["power"]
        found = values["closing"]
        self.closing = None if found is None else Closing(**found)
        self.example_shape = (self.width,)
        self._parts: dict[torch.dtype, Parts] = {}
        what = "closed" if self.closed else "open" if self.q == 1 else f"{self.q} coordinates"
        self.name = f"PathCloud({len(self.means)} classes in {self.width} dimensions, {what})"

    means: Tensor
    knots: Tensor
    coordinates: Tensor
    spread: Tensor
    standard_error: Tensor
    outliers: Tensor
    period: float
    smoothing: float
    freedom: float
    directions: float
    pooled: float
    margin: float
    slack: float

    @classmethod
    def fit(
        cls,
        points: Float[Tensor, "n D"],
        labels: Int[Tensor, "..."],
        *,
        coordinates: Float[Tensor, "..."] | None = None,
        closed: bool | None = None,
    ) -> "PathCloud":
        """The path through the classes of the samples.

        Args:
            points: samples.
            labels: the class of each, 0 to c − 1 in the order of the path; each at least once.
            coordinates: one row a class, in any units; a curve's increase. The length of the chords if not
                given. Two columns make a sheet.
            closed: whether a curve is a loop; decided from the samples if not given, and taken as open where
                they do not tell.

        Raises:
            ManifoldError: something is not finite, or does not fit; a class has no sample; two neighbouring
                classes have the same mean; there are too few classes.
        """
        return cls(*fit_path(points, labels, coordinates, closed))

    # The path and its coordinates

    def at(self, coordinate: Float[Tensor, "*batch q"]) -> Float[Tensor, "*batch D"]:
        """The points of the path; beyond an end or an edge, that end or edge."""
        return self._derivative(coordinate, 0)

    def velocity(self, coordinate: Float[Tensor, "*batch q"]) -> Float[Tensor, "*batch D q"]:
        """The derivative of the points in the coordinates."""
        return self._derivative(coordinate, 1)

    def acceleration(self, coordinate: Float[Tensor, "*batch q"]) -> Float[Tensor, "*batch D q q"]:
        """The second derivative of the points in the coordinates."""
        return self._derivative(coordinate, 2)

    @precise
    def coordinate(self, x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch q"]:
        """The coordinates of the feet of states."""
        flat, parts = self._flat(x)
        found = nearest(parts.shape, parts.table, (flat - parts.centre) @ parts.frame).coordinate
        return found.reshape(*x.shape[:-1], self.q).to(x.dtype)

    @precise
    def curvature(self, coordinate: Float[Tensor, "*batch 1"]) -> PathCurvature:
        """The curvature of a curve, with its standard error and whether the samples tell it.

        Raises:
            ManifoldError: the path is a sheet, which has a `second_fundamental_form`.
        """
        t, parts = self._coordinates(coordinate)
        shape = parts.shape
        if not isinstance(shape, Curve):
            raise ManifoldError(f"{self.name}.curvature: a sheet has a second_fundamental_form")
        noise = Noise(self.standard_error.to(t) ** 2, self.covariance.to(t), self.pooled, self.directions)
        influence = Curve(shape.breaks, self.influence.to(t))
        found = path_curvature(shape, influence, t, noise, self.closed)
        batch, kind = coordinate.shape[:-1], coordinate.dtype
        return PathCurvature(
            vector=(found.vector @ parts.frame.mT).reshape(*batch, self.width).to(kind),
            value=found.value.reshape(batch).to(kind),
            standard_error=found.standard_error.reshape(batch).to(kind),
            snr=found.snr.reshape(batch).to(kind),
            reliable=found.reliable.reshape(batch),
            reason=found.reason,
        )

    # What makes it a learned manifold

    def project(self, x: Float[Tensor, "*batch D"]) -> Projection:
        """The nearest point of the path to each state; exact, and differentiable twice in x.

        `inside` is false where the nearest point is an end and the state lies beyond it by more than twice
        the noise; outside the hull of the coordinates; and where the state is farther than the reach,
        measured in the span of the path, as what is normal to all of it does not change the foot. A state
        that is not finite has the foot NaN.
        """
        flat, parts = self._flat(x)
        y = (flat - parts.centre) @ parts.frame
        found = nearest(parts.shape, parts.table, y)
        value, first = parts.shape.derivatives(found.coordinate, 1)
        basis = orthonormal(first)
        foot = _where_finite(flat, parts.centre + value @ parts.frame.mT)
        batch = x.shape[:-1]
        return Projection(
            foot.reshape(x.shape).to(x.dtype),
            (parts.frame @ basis).reshape(*batch, self.width, self.q).to(x.dtype),
            frobenius_norm(flat - foot, 1).reshape(batch).to(x.dtype),
            self._inside(parts, found, y - value, basis).reshape(batch),
        )

    @precise
    def second_fundamental_form(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The normal part of the second derivative of the path along u and v."""
        x, u, v = torch.broadcast_tensors(x, u, v)
        flat, parts = self._flat(x)
        t = nearest(parts.shape, parts.table, (flat - parts.centre) @ parts.frame).coordinate
        _, first, second = parts.shape.derivatives(t, 2)
        pairs = [w.reshape(-1, self.width, 1) for w in (u, v)]
        # No least-squares routine: it would stop the whole batch at one state that is not finite.
        basis, triangle = torch.linalg.qr(first)
        a, b = (
            torch.linalg.solve_triangular(triangle, basis.mT @ (parts.frame.mT @ w), upper=True)[..., 0]
            for w in pairs
        )
        bend = torch.einsum("brij,bi,bj->br", second, a, b)
        basis = orthonormal(first)
        bend = bend - (basis @ (basis.mT @ bend[..., None]))[..., 0]
        return _where_finite(flat, bend @ parts.frame.mT).reshape(x.shape)

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file must hold to make the path again."""
        names = (*SHARED, *(CURVE if self.power is None else SHEET), "outliers")
        values = {
            "columns": self.q,
            "closed": self.closed,
            "power": self.power,
            "closing": None if self.closing is None else asdict(self.closing),
            **{name: getattr(self, name) for name in NUMBERS},
        }
        return values, {name: getattr(self, name) for name in names}

    @classmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "PathCloud":
        """Makes the path again from what `describe` gave, to the bit."""
        return cls(values, tensors)

    # Inside

    def _metric_changed(self) -> None:
        self._parts = {}

    def _apply(self, *args: Any, **options: Any) -> Any:
        self._parts = {}
        return super()._apply(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied: not what can be computed again."""
        return {**self.__dict__, "_parts": {}}

    def _check_shape(self, shape: Any, name: str) -> tuple[bool, str | None]:
        if len(shape) >= 1 and shape[-1] == self.width:
            return True, None
        return False, f"{name} has shape {tuple(shape)}; a point is a vector of {self.width}"

    def _flat(self, x: Tensor) -> tuple[Tensor, Parts]:
        ok, reason = self._check_shape(x.shape, "x")
        if not ok:
            raise ManifoldError(f"{self.name}: {reason}")
        if not x.is_floating_point():
            raise ManifoldError(f"{self.name}: x has dtype {x.dtype}; states are real floating-point tensors")
        wide = widened(plain(x)).reshape(-1, self.width)
        return wide, self._in(wide)

    def _in(self, like: Tensor) -> Parts:
        """The path in the dtype of a tensor; what is made of it is kept."""
        if like.device != self.means.device:
            raise ManifoldError(
                f"{self.name}: the state is on {like.device} and the manifold on {self.means.device}; "
                "move one of them with .to"
            )
        if like.dtype not in self._parts:
            self._parts[like.dtype] = Parts(self, like.dtype)
        return self._parts[like.dtype]

    def _coordinates(self, coordinate: Tensor) -> tuple[Tensor, Parts]:
        """The coordinates (b, q), within those of the path."""
        if coordinate.shape[-1:] != (self.q,) or not coordinate.is_floating_point():
            raise ManifoldError(
                f"{self.name}: coordinates have shape {tuple(coordinate.shape)} and dtype "
                f"{coordinate.dtype}; give real numbers of shape (…, {self.q})"
            )
        t = widened(coordinate).reshape(-1, self.q)
        parts = self._in(t)
        low, high = parts.table.low, parts.table.high
        if self.closed:
            t = low + torch.remainder(t - low, high - low)
        else:
            t = torch.minimum(torch.maximum(t, low), high)
        return t, parts

    @precise
    def _derivative(self, coordinate: Tensor, order: int) -> Tensor:
        t, parts = self._coordinates(coordinate)
        found = parts.shape.derivatives(t, order)[order]
        found = torch.einsum("Dr,br...->bD...", parts.frame, found)
        found = found + parts.centre if order == 0 else found
        return found.reshape(*coordinate.shape[:-1], *found.shape[1:]).to(coordinate.dtype)

    def _inside(self, parts: Parts, found: Nearest, away: Tensor, basis: Tensor) -> Tensor:
        away, basis, t = away.detach(), basis.detach(), found.coordinate.detach()
        beyond = frobenius_norm((basis.mT @ away[..., None])[..., 0], 1)
        room = max(self.margin, torch.finfo(away.dtype).eps ** 0.5 * parts.size)
        inside = (beyond <= room) & (frobenius_norm(away, 1) < self.reach)
        if len(parts.hull):
            inside = inside & (t @ parts.hull[:, :-1].mT + parts.hull[:, -1] <= self.slack).all(-1)
        return inside


def orthonormal(first: Float[Tensor, "b r q"]) -> Float[Tensor, "b r q"]:
    """An orthonormal basis of the span of the columns, one after the other."""
    columns: list[Tensor] = []
    for index in range(first.shape[-1]):
        column = first[..., index]
        for _ in range(2):  # once more takes out the rounding
            for other in columns:
                column = column - (column * other).sum(-1, keepdim=True) * other
        size = frobenius_norm(column, 1, keepdim=True)
        columns.append(column / torch.where(size > 0, size, 1.0))
    return torch.stack(columns, -1)


def _where_finite(states: Float[Tensor, "b D"], found: Float[Tensor, "b D"]) -> Float[Tensor, "b D"]:
    """What was found for each state, and NaN for a state that is not finite."""
    return torch.where(states.isfinite().all(-1, keepdim=True), found, torch.nan)
