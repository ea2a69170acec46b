"""Steer along the tangent space of a manifold."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor

from geoedit.edits.activation import Selected
from geoedit.edits.on_manifold import Feet, ManifoldEdit, lost, negligible, size_of
from geoedit.errors import EditError


@dataclass(frozen=True, eq=False, repr=False)
class TangentSteer(ManifoldEdit, kind="tangent-steer"):
    r"""Move states by the part of a vector that is tangent to a manifold, and put them back onto it.

    \(x \mapsto R_p(s\,P_p v) + (x - p)\), with \(p\) the foot of the state \(x\) on the manifold, \(P_p\) the
    projection onto the tangent space there, and \(R_p\) the manifold's retraction. One vector moves every
    state in its own direction, along the manifold; a `LinearSteer` by the same vector leaves it.

    Args:
        site: Where, and at which tokens.
        manifold: A manifold of vectors: one learned from states, or a known one (ours or geoopt's).
        direction: \(v\), (width,), or one for each row of the batch (batch, width). It is not normalised; it
            may require a gradient.
        steps: In how many equal steps; before each, the direction is projected anew. With many, states
            follow the flow of the projected direction on the manifold.
        residual: "keep" or "drop" \(x - p\), what the state holds besides the manifold.
        outside: "edit" every state, or "leave" those of which the samples say nothing
            (`Projection.inside`).

    Raises:
        EditError: the direction is no vector, not floating-point, or holds NaN; the manifold holds no
            vectors, or, when attached, has another width than the site; and, after running, the direction was
            normal to the manifold at every state.

    Source: Absil, Mahony and Sepulchre, Optimization algorithms on matrix manifolds (2008), section 4.1
    (retractions).

    >>> import torch
    >>> from geoedit import Site
    >>> from manifolds import Sphere
    >>> TangentSteer(Site(1), Sphere(), torch.ones(8), scale=0.5)
    TangentSteer(block 1 residual_out @ last, scale=0.5, on Sphere, 32 bytes)
    """

    direction: Tensor
    steps: int = field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        """Refuse a direction that is no vector."""
        super().__post_init__()
        if self.direction.dim() not in (1, 2):
            raise EditError(
                f"TangentSteer.direction has shape {tuple(self.direction.shape)}; give one vector (width,),"
                " or one a row (batch, width)."
            )
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise EditError(f"TangentSteer.steps is {self.steps!r}; give a whole number, 1 or more.")

    def move(
        self, feet: Feet, at: Selected
    ) -> tuple[Float[Tensor, "selected width"], Bool[Tensor, " selected"]]:
        """Take the steps."""
        direction = at.of_rows(self.direction, "TangentSteer.direction").expand_as(feet.points)
        points, along = feet.points, feet.tangent_part(direction, self.manifold)
        normal = negligible(size_of(along), size_of(direction))
        unmoved = normal | lost(at.scale * size_of(along)[:, None], points)
        at.note("the direction is normal to the manifold", normal)
        for step in range(self.steps):
            if step:
                along = self.manifold.proju(points, direction)
            points = self.manifold.retr(points, (at.scale / self.steps) * along)
        return points, unmoved

    def unchanged_because(self) -> str | None:
        """Say that the direction is zero, if it is."""
        return None if bool(self.direction.any()) else "its direction is zero"
