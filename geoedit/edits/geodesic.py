"""Steer along geodesics of a manifold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, cast

import geoopt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geoedit.edits.activation import Selected
from geoedit.edits.on_manifold import Feet, ManifoldEdit, lost, name_of, negligible, size_of
from geoedit.edits.swap import Means, mean_of
from geoedit.errors import EditError
from geoedit.fingerprint import Fingerprint
from geoedit.site import Site
from manifolds.cloud.learned import LearnedManifold
from manifolds.errors import NoPathError


@dataclass(frozen=True, eq=False, repr=False)
class GeodesicSteer(ManifoldEdit, kind="geodesic-steer"):
    r"""Move states along geodesics of a manifold: toward a target, or in a direction.

    \(x \mapsto \gamma(s) + (x - p)\), with \(p\) the foot of the state \(x\) on the manifold. To a target
    \(y\), \(\gamma\) is the shortest geodesic from \(p\) to the foot of \(y\), so that \(s\) is the share of
    the way: 0 stays, 1 arrives, more goes past. With a direction \(v\), \(\gamma(s) = \exp_p(s\,P_p v)\),
    with \(P_p\) the projection onto the tangent space. Geodesics are those of the metric that the manifold
    carries: of the space around it, or, after `manifold.with_metric(...)`, the Fisher metric that the network
    pulls back (`geoedit.pullback.sampled_metric`).

    Args:
        site: Where, and at which tokens.
        manifold: A manifold of vectors: one learned from states, or a known one (ours or geoopt's).
        target: \(y\), (width,), or one for each row of the batch (batch, width); see also `to_value`.
        direction: \(v\), (width,) or (batch, width), instead of a target.
        length: With a direction: the length of \(P_p v\) in the manifold's metric, set for every state, so
            that each goes as far as another. Not set if not given.
        points: How many points the path on a learned manifold has.
        residual: "keep" or "drop" \(x - p\), what the state holds besides the manifold.
        outside: "edit" every state, or "leave" those of which the samples say nothing
            (`Projection.inside`).

    Raises:
        EditError: neither a target nor a direction is given, or both; one is no vector, not floating-point,
            or holds NaN; the manifold holds no vectors, lacks geodesics, or has another width than the site;
            when running, no way leads from some state to the target (the message names its row).

    Source: do Carmo, Riemannian geometry (1992), chapter 3. Paths of a pulled-back metric: Arvanitidis et al.
    2022, Pulling back information geometry.

    >>> import torch
    >>> from geoedit import Site
    >>> from manifolds import Sphere
    >>> GeodesicSteer(Site(1), Sphere(), target=torch.ones(8), scale=0.5)
    GeodesicSteer(block 1 residual_out @ last, scale=0.5, on Sphere, 32 bytes)
    """

    target: Tensor | None = None
    direction: Tensor | None = field(default=None, kw_only=True)
    length: float | None = field(default=None, kw_only=True)
    points: int = field(default=17, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no target and no direction."""
        for name in ("target", "direction"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Tensor):
                raise EditError(
                    f"GeodesicSteer.{name} is a {type(value).__name__}; give a tensor (width,), for instance"
                    " torch.as_tensor(...)."
                )
            if value is not None and value.dim() not in (1, 2):
                raise EditError(
                    f"GeodesicSteer.{name} has shape {tuple(value.shape)}; give one vector (width,), or one a"
                    " row (batch, width)."
                )
        if (self.target is None) == (self.direction is None):
            given = "neither" if self.target is None else "both"
            raise EditError(f"GeodesicSteer needs a target or a direction, and {given} is given.")
        if self.length is not None:
            if self.direction is None:
                raise EditError(
                    "GeodesicSteer.length goes with a direction; a target lies where it lies, and scale is"
                    " the share of the way."
                )
            if not 0 < self.length < math.inf:
                raise EditError(f"GeodesicSteer.length is {self.length}; give a positive number.")
        if isinstance(self.points, bool) or not isinstance(self.points, int) or self.points < 2:
            raise EditError(f"GeodesicSteer.points is {self.points!r}; a path has at least 2.")
        super().__post_init__()

    @classmethod
    def to_value(
        cls, means: Means, value: str, *, site: Site, manifold: geoopt.Manifold, **others: Any
    ) -> GeodesicSteer:
        """Make the edit that goes to the mean of one value.

        Args:
            means: Statistics by label (`geoedit.statistics`), activations with a value for each prompt
                (`geoedit.collect`), or a mapping from value to mean (width,).
            value: The value to go to.
            site: Where, and at which tokens; for statistics and activations a site that they hold.
            manifold: The manifold to go along.
            others: Further fields, such as `scale`.

        Raises:
            EditError: there is no such value or site.
        """
        mark = getattr(means, "fingerprint", None)
        if isinstance(mark, Fingerprint):
            others.setdefault("fingerprint", mark)
        return cls(site, manifold, mean_of(means, site, value), **others)

    def move(
        self, feet: Feet, at: Selected
    ) -> tuple[Float[Tensor, "selected width"], Bool[Tensor, " selected"]]:
        """Follow the geodesics."""
        if self.target is not None:
            return self._toward(self.target, feet, at)
        return self._along(cast(Tensor, self.direction), feet, at)  # one of the two is there

    def unchanged_because(self) -> str | None:
        """Say that the direction is zero, if it is."""
        zero = self.direction is not None and not bool(self.direction.any())
        return "its direction is zero" if zero else None

    def _along(self, direction: Tensor, feet: Feet, at: Selected) -> tuple[Tensor, Tensor]:
        """The points exp_p(s P v), and which feet cannot move."""
        direction = at.of_rows(direction, "GeodesicSteer.direction").expand_as(feet.points)
        along = feet.tangent_part(direction, self.manifold)
        normal = negligible(size_of(along), size_of(direction))
        at.note("the direction is normal to the manifold", normal)
        if self.length is not None:
            size = self.manifold.norm(feet.points, along, keepdim=True)
            along = self.length * along / torch.where(normal[:, None], 1.0, size)
        points = self.manifold.expmap(feet.points, at.scale * along)
        return points, normal | lost(at.scale * size_of(along)[:, None], feet.points)

    def _toward(self, target: Tensor, feet: Feet, at: Selected) -> tuple[Tensor, Tensor]:
        """The points on the way to the target's foot, and which feet are there already."""
        whole = Feet.of(target.reshape(-1, target.shape[-1]), self.manifold).points  # one a row, not a state
        ends = at.of_rows(whole, "GeodesicSteer.target").expand_as(feet.points)
        near = negligible(size_of(ends - feet.points), size_of(ends))
        at.note("the foot of the state is that of the target", near)
        if isinstance(self.manifold, LearnedManifold):
            points = on_path(self.manifold, self._paths(self.manifold, feet, ends, at), at.scale)
        else:
            toward = self.manifold.logmap(feet.points, ends)
            at.note(
                f"no shortest geodesic on {name_of(self.manifold)} leads to the target, as between opposite"
                " points of a sphere",
                ~toward.isfinite().all(-1),
            )
            points = self.manifold.expmap(feet.points, at.scale * toward)
        return points, near | lost(at.scale * size_of(ends - feet.points)[:, None], feet.points)

    def _paths(self, manifold: LearnedManifold, feet: Feet, ends: Tensor, at: Selected) -> Tensor:
        """The shortest paths to the ends, of states that are edited; others are not asked for a way.

        Raises:
            EditError: there is none for some; the message names their rows.
        """
        asked = feet.points.isfinite().all(-1)
        if self.outside == "leave":
            asked = asked & feet.inside
        try:
            return manifold.geodesic(torch.where(asked[:, None], feet.points, ends), ends, points=self.points)
        except NoPathError as error:
            rows = at.rows[error.items].unique().tolist()
            more = "" if self.outside == "leave" else "; outside='leave' leaves states off the samples alone"
            raise EditError(
                f"{self}: no way to the target in {'row' if len(rows) == 1 else 'rows'} "
                f"{', '.join(map(str, rows))} of a batch of {at.batch}: {error}{more}."
            ) from error


def on_path(
    manifold: LearnedManifold, path: Float[Tensor, "some points width"], scale: float | int | Tensor
) -> Float[Tensor, "some width"]:
    """Where one is after a share of a path of equal steps; before its start and past its end, by exp.

    Between its points the path is the polynomial of degree four through the five around, put back onto the
    manifold: with 16 steps on a half circle it is right to 1e-6 of the radius.
    """
    count = path.shape[1] - 1
    share = torch.as_tensor(scale, device=path.device, dtype=path.dtype).reshape(-1, 1).expand(len(path), 1)
    inner = share.clamp(0, 1) * count
    degree = min(4, count)
    first = (inner.detach().round() - degree // 2).clamp(0, count - degree)
    nodes = torch.arange(degree + 1, dtype=torch.float64)
    # The coefficients of Lagrange's polynomials: the inverse of the matrix of the nodes' powers.
    powers, nodes = torch.linalg.inv(torch.linalg.vander(nodes)).to(path), nodes.to(path)
    near = path.gather(1, (first + nodes).long()[..., None].expand(-1, -1, path.shape[2]))
    at = inner - first
    here = ((at**nodes) @ powers)[:, None] @ near
    here = manifold.projx(here[:, 0])
    # At an end to the bit, with the derivative of the formula: a scale may be learned from 0 or from 1.
    exact = _ends(path, inner).detach() + (here - here.detach())
    here = torch.where((inner == 0) | (inner == count), exact, here)
    if not isinstance(scale, Tensor) and 0 <= scale <= 1:
        return here
    slope = torch.cat([torch.zeros_like(at), nodes[1:] * at ** nodes[:-1]], 1) @ powers
    velocity = manifold.proju(here, count * (slope[:, None] @ near)[:, 0])
    return manifold.expmap(here, (share - share.clamp(0, 1)) * velocity)


def _ends(path: Float[Tensor, "some points width"], inner: Float[Tensor, "some 1"]) -> Tensor:
    """The start of each path, or its end where that is asked for, to the bit."""
    return torch.where(inner > 0, path[:, -1], path[:, 0])
