"""What every manifold learned from samples has: states are projected onto it, and the rest follows.

A learned manifold knows one thing of its own: for any state, the foot on the manifold and the tangent space
there. Tangent projection, retraction, transport, distances and geodesics are made of that.
"""

import os
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.base import RiemannianSubmanifold
from manifolds.cloud.io import read_manifold, write_manifold
from manifolds.operations import operation

STEPS = 16
"""How many retractions make an exponential."""


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

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The geodesic from x with velocity u at time 1, by `STEPS` retractions.

        After each, the velocity is projected and keeps its length; the error falls as the square of the
        number of steps.
        """
        length = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
        at, velocity = x, u / STEPS
        for _ in range(STEPS):
            at = self.retr(at, velocity)
            velocity = self.proju(at, velocity)
            size = torch.linalg.vector_norm(velocity, dim=-1, keepdim=True)
            velocity = velocity * (length / STEPS / torch.where(size > 0, size, 1.0))
        return at

    def point_defects(self, x: Tensor) -> dict[str, Tensor]:
        """The distance from the manifold, relative to the norm of the point."""
        size = torch.linalg.vector_norm(x, dim=-1)
        return {"x is its own foot": self.project(x).distance / torch.where(size > 0, size, 1.0)}

    def tangent_defects(self, x: Tensor, u: Tensor) -> dict[str, Tensor]:
        """The share of u that is normal."""
        size = torch.linalg.vector_norm(u, dim=-1)
        rest = torch.linalg.vector_norm(u - self.proju(x, u), dim=-1)
        return {"u is tangent": rest / torch.where(size > 0, size, 1.0)}
