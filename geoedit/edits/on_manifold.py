"""What the edits along a manifold share: feet of states, what stays as it was, and manifolds in files."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import geoopt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geoedit.edits.activation import ActivationEdit, Selected
from geoedit.edits.manifold_io import describe_manifold, moved_manifold, rebuild_manifold, tensors_of
from geoedit.errors import EditError
from manifolds import ManifoldError
from manifolds.cloud.learned import LearnedManifold
from manifolds.operations import unchecked

AnyManifoldEdit = TypeVar("AnyManifoldEdit", bound="ManifoldEdit")

RESIDUALS = ("keep", "drop")
OUTSIDE = ("edit", "leave")
ROUNDING = 100
"""What is smaller than this many units of rounding, relative to what it was computed from, is zero."""


@dataclass(frozen=True, eq=False)
class Feet:
    """Where states stand on a manifold.

    Attributes:
        points: The foot of each state.
        inside: Whether the samples say anything about the state; on a known manifold, whether it has a foot.
        tangent: Orthonormal bases of the tangent spaces in columns; None on a known manifold, which projects
            without one.
    """

    points: Float[Tensor, "selected width"]
    inside: Bool[Tensor, " selected"]
    tangent: Float[Tensor, "selected width dim"] | None

    @classmethod
    def of(cls, states: Float[Tensor, "selected width"], manifold: geoopt.Manifold) -> Feet:
        """Project states onto a manifold."""
        if isinstance(manifold, LearnedManifold):
            found = manifold.project(states)
            return cls(found.foot, found.inside, found.tangent)
        points = manifold.projx(states)
        return cls(points, points.isfinite().all(-1), None)

    def tangent_part(
        self, vectors: Float[Tensor, "some width"], manifold: geoopt.Manifold
    ) -> Float[Tensor, "selected width"]:
        """The parts of vectors that are tangent at the feet."""
        vectors = vectors.expand_as(self.points)
        if self.tangent is None:
            return manifold.proju(self.points, vectors)
        return (self.tangent @ (self.tangent.mT @ vectors[..., None]))[..., 0]


@dataclass(frozen=True, eq=False, repr=False)
class ManifoldEdit(ActivationEdit):
    r"""An edit that moves the foot of each state along a manifold.

    With \(p\) the foot of the state \(x\), and \(q\) where a subclass moves it: \(x \mapsto q + (x - p)\), so
    that what the state holds besides the concept stays, or \(x \mapsto q\) with `residual="drop"`. A state
    whose foot does not move stays as it is, to the bit.

    Args:
        site: Where, and at which tokens.
        manifold: A manifold of vectors: one learned from states, or a known one (ours or geoopt's).
        residual: "keep" or "drop" the difference between the state and its foot.
        outside: "edit" every state, or "leave" those of which the samples say nothing
            (`Projection.inside`).

    Raises:
        EditError: the manifold is none, or its points are no vectors; when attached, it has another width
            than the site.
    """

    saved_apart: ClassVar[frozenset[str]] = frozenset({"manifold"})

    manifold: geoopt.Manifold
    residual: str = field(default="keep", kw_only=True)
    outside: str = field(default="edit", kw_only=True)

    def __post_init__(self) -> None:
        """Refuse what is no manifold of vectors."""
        super().__post_init__()
        name = type(self).__name__
        if not isinstance(self.manifold, geoopt.Manifold):
            raise EditError(
                f"{name}.manifold is a {type(self.manifold).__name__}; give a manifold, such as"
                " manifolds.PointCloud.fit(states) or manifolds.Sphere()."
            )
        if self.manifold.ndim != 1:
            raise EditError(
                f"{name}.manifold is {name_of(self.manifold)}, whose points have {self.manifold.ndim}"
                " dimensions; a state is a vector, so give a manifold with ndim=1."
            )
        for option, value, known in (
            ("residual", self.residual, RESIDUALS),
            ("outside", self.outside, OUTSIDE),
        ):
            if value not in known:
                raise EditError(f"{name}.{option} is {value!r}; it is one of {', '.join(map(repr, known))}.")
        width = getattr(self.manifold, "width", None)
        for field_name, tensor in self.tensors().items():
            if width is not None and field_name != "scale" and tensor.shape[-1] != width:
                raise EditError(
                    f"{name}.{field_name} has width {tensor.shape[-1]}, but {name_of(self.manifold)} lies in"
                    f" a space of width {width}; take both from states at one site."
                )

    @abstractmethod
    def move(
        self, feet: Feet, at: Selected
    ) -> tuple[Float[Tensor, "selected width"], Bool[Tensor, " selected"]]:
        """Say where the feet go, and which of them stay where they are."""

    @property
    def nbytes(self) -> int:
        """The memory of the edit's tensors and its manifold's; a file has a header of a few kB more."""
        if "_nbytes" not in self.__dict__:
            every = [*self.tensors().values(), *tensors_of(self.manifold).values()]
            object.__setattr__(self, "_nbytes", sum(each.numel() * each.element_size() for each in every))
        return self.__dict__["_nbytes"]

    def change(
        self, states: Float[Tensor, "selected width"], at: Selected
    ) -> Float[Tensor, "selected width"]:
        """Move the foot of each state."""
        with self._working():
            feet = Feet.of(states, self.manifold)
            new, unmoved = self.move(feet, at)
        if self.residual == "keep":
            new = states + (new - feet.points)
            # As it was to the bit, with the derivative of the formula: a direction may be learned from zero.
            new = torch.where(unmoved[:, None], states.detach() + (new - new.detach()), new)
        if self.outside == "leave":
            at.note("the samples of the manifold say nothing of the state (outside='leave')", ~feet.inside)
            new = torch.where(feet.inside[:, None], new, states)
        return new

    def check_width(self, width: int) -> None:
        """Refuse a site of another width than the manifold or a tensor.

        Raises:
            EditError: one does not fit.
        """
        own = getattr(self.manifold, "width", None)
        if own is not None and own != width:
            raise EditError(
                f"{type(self).__name__}.manifold ({name_of(self.manifold)}) lies in a space of width {own},"
                f" but the states at {self.site} have width {width}; fit it to states of that site."
            )
        super().check_width(width)

    def placed(self: AnyManifoldEdit, device: torch.device, dtype: torch.dtype) -> AnyManifoldEdit:
        """The same edit with its tensors and its manifold on a device and in a dtype."""
        found = super().placed(device, dtype)
        object.__setattr__(found, "manifold", moved_manifold(self.manifold, device, dtype))
        return found

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give what a file must hold: the fields, and the manifold."""
        values, tensors = super().describe()
        manifold, more = describe_manifold(self.manifold)
        return {**values, "manifold": manifold}, {
            **tensors,
            **{f"manifold.{name}": tensor for name, tensor in more.items()},
        }

    @classmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ActivationEdit:
        """Make the edit again from what `describe` gave."""
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith("manifold.")}
        more = {name.removeprefix("manifold."): tensors[name] for name in tensors.keys() - own.keys()}
        manifold = rebuild_manifold(values.get("manifold"), more)
        made = {name: value for name, value in values.items() if name != "manifold"}
        return super().rebuild(made, {**own, "manifold": manifold})

    def __repr__(self) -> str:
        return f"{super().__repr__()[:-1]}, on {name_of(self.manifold)}, {size_in_words(self.nbytes)})"

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Leave out the checks of values, and say whose operation failed."""
        try:
            with unchecked():
                yield
        except (ManifoldError, NotImplementedError) as error:
            reason = str(error) or "the manifold lacks an operation that the edit needs"
            raise EditError(f"{self}: {reason}") from error


def name_of(manifold: geoopt.Manifold) -> str:
    """What a message calls a manifold."""
    return getattr(manifold, "name", None) or type(manifold).__name__


def size_in_words(count: int) -> str:
    """A number of bytes, as 1.5 MB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"


def size_of(vectors: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch"]:
    """Euclidean lengths, without a derivative: they decide, and are no part of a result."""
    return torch.linalg.vector_norm(vectors.detach(), dim=-1)


def negligible(part: Tensor, whole: Tensor) -> Tensor:
    """Whether lengths are no more than the rounding of what they were computed from."""
    return part <= ROUNDING * torch.finfo(part.dtype).eps * whole


def lost(
    steps: Float[Tensor, "selected 1"], points: Float[Tensor, "selected width"]
) -> Bool[Tensor, " selected"]:
    """Whether steps of these lengths are zero, or lost in the rounding of the points that they start from."""
    return steps.detach()[:, 0].abs() <= torch.finfo(points.dtype).eps * size_of(points)
