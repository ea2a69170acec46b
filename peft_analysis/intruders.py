"""Intruder dimensions: leading singular vectors of a tuned matrix that are near none of its base."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD, SVDCache, check_matrix
from peft_analysis.errors import UpdateError
from peft_analysis.rotated import Triplets, top_triplets
from peft_analysis.subspaces import Side

SIDES: tuple[Side, ...] = ("left", "right")


@dataclass(frozen=True)
class IntruderSide:
    """The tuned matrix's leading singular vectors of one side, against all of the base's.

    Attributes:
        similarities: the largest |cosine| of each with a singular vector of the base (k,).
        matches: which base vector that is (k,), counted from 0.
        is_intruder: whether the similarity is below ε (k,).
        low: the least similarity over all choices of the base's singular vectors, where values are repeated
            (k,). Equal to `similarities` up to the error where the base's values differ.
        high: the largest similarity over all such choices (k,).
        errors: bounds on the numerical error of the similarities (k,).
        ambiguous: whether ε lies between low and high, or within the error (k,): no verdict is safe.
    """

    similarities: Float[Tensor, " k"]
    matches: Int[Tensor, " k"]
    is_intruder: Bool[Tensor, " k"]
    low: Float[Tensor, " k"]
    high: Float[Tensor, " k"]
    errors: Float[Tensor, " k"]
    ambiguous: Bool[Tensor, " k"]

    @property
    def indices(self) -> Int[Tensor, " q"]:
        """The intruders' places among the tuned singular vectors, counted from 0."""
        return self.is_intruder.nonzero()[:, 0]

    @property
    def count(self) -> int:
        """How many intruders there are."""
        return int(self.is_intruder.sum())


@dataclass(frozen=True)
class Intruders:
    """The intruder dimensions of one tuned matrix.

    `indices`, `similarities`, `matches` and `count` are those of the left side, which the paper counts, or of
    the right where only the right was asked for.

    Attributes:
        epsilon: the threshold.
        k: how many leading singular vectors were asked for.
        examined: how many were looked at: k, or the tuned matrix's numerical rank where that is less.
        singular_values: of the tuned matrix, those examined.
        left: left singular vectors (output side), or None.
        right: right singular vectors (input side), or None.
        method: "rotated" for the certified iteration in the base's singular basis, "dense" for a
            decomposition of the whole matrix.
    """

    epsilon: float
    k: int
    examined: int
    singular_values: Float[Tensor, " k"]
    left: IntruderSide | None
    right: IntruderSide | None
    method: Literal["rotated", "dense"]

    @property
    def main(self) -> IntruderSide:
        """The left side, or the right where the left was not asked for."""
        side = self.left if self.left is not None else self.right
        if side is None:
            raise UpdateError("these Intruders hold no side; intruders(...) always gives one")
        return side

    @property
    def indices(self) -> Int[Tensor, " q"]:
        """The intruders' places among the tuned singular vectors, counted from 0."""
        return self.main.indices

    @property
    def similarities(self) -> Float[Tensor, " k"]:
        """The largest |cosine| of each vector with a singular vector of the base."""
        return self.main.similarities

    @property
    def matches(self) -> Int[Tensor, " k"]:
        """Which base vector each is nearest to."""
        return self.main.matches

    @property
    def count(self) -> int:
        """How many intruders there are."""
        return self.main.count

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for a JSON file."""
        facts: dict[str, Any] = {
            "epsilon": self.epsilon, "k": self.k, "examined": self.examined, "method": self.method,
            "singular_values": self.singular_values.tolist(),
        }  # fmt: skip
        for name in ("left", "right"):
            side: IntruderSide | None = getattr(self, name)
            facts[name] = side and {
                "count": side.count,
                "indices": side.indices.tolist(),
                "similarities": side.similarities.tolist(),
                "matches": side.matches.tolist(),
                "ambiguous": side.ambiguous.tolist(),
            }
        return facts


def intruders(
    base_matrix: Tensor,
    update_matrix: Tensor | LowRank,
    epsilon: float | int = 0.5,
    k: int = 10,
    *,
    side: Side | None = None,
    base_svd: BaseSVD | None = None,
    cache: SVDCache | None = None,
    early: bool = False,
) -> Intruders:
    """Find the intruder dimensions of base + update (Shuttleworth et al. 2024, Algorithm 1).

    A leading singular vector y of the tuned matrix is an intruder if maxᵢ |cos(y, xᵢ)| < ε over the singular
    vectors xᵢ of the base: the min(m, n) of the thin decomposition, as in the paper. With a cached base and a
    `LowRank` update, the tuned matrix is never formed: see `rotated`. Tuned singular values that are rounding
    have no vectors; they are not examined.

    Where the base repeats a singular value (zero included), any rotation of its vectors is as good, and the
    similarity depends on the one that was found; `low`, `high` and `ambiguous` say how far.

    Args:
        base_matrix: W (m, n) as (out, in); more dimensions, as of a convolution, are flattened to (m, ·).
        update_matrix: ΔW, a `LowRank` or dense, of the same shape.
        epsilon: the threshold, above 0 and at most 1.
        k: how many leading singular vectors of the tuned matrix to examine.
        side: "left" (output directions), "right" (input directions), or None for both.
        base_svd: the base's decomposition, where it is known.
        cache: keeps the base's decomposition for the next update of the same base.
        early: stop as soon as every vector is surely above or below ε; `errors` are larger then.

    Raises:
        UpdateError: shapes differ; NaN; epsilon or k out of range; `base_svd` of another shape.

    Example:
        >>> import torch
        >>> W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
        >>> new = torch.full((4, 1), 0.5)  # as near to every base vector as to any other
        >>> found = intruders(W, LowRank(20 * new, new.mT), k=2, epsilon=0.7)
        >>> found.count, found.indices
        (1, tensor([0]))
    """
    check_settings(epsilon, k, side)
    base_matrix, update_matrix = fitting(base_matrix, update_matrix)
    base = decomposed(base_matrix, base_svd, cache)
    found = top_triplets(
        base, update_matrix, min(k, base.S.numel()), thresholds=(float(epsilon),) if early else ()
    )
    sides = {name: judged(base, found, epsilon, name) for name in SIDES if side in (None, name)}
    return Intruders(
        epsilon=float(epsilon),
        k=k,
        examined=len(found.values),
        singular_values=found.values.to(base.S.dtype),
        left=sides.get("left"),
        right=sides.get("right"),
        method="rotated" if found.iterated else "dense",
    )


def judged(base: BaseSVD, found: Triplets, epsilon: float | int, side: Side) -> IntruderSide:
    """The verdicts on one side of the leading triplets."""
    left = side == "left"
    vectors, errors = (found.left, found.left_errors) if left else (found.right, found.right_errors)
    similarities, matches = vectors.abs().max(0)
    low, high = _range(base, vectors, base.shape[0 if left else 1])
    low, high = torch.minimum(low, similarities), torch.maximum(high, similarities)
    return IntruderSide(
        similarities=similarities.to(base.S.dtype),
        matches=matches,
        is_intruder=similarities < epsilon,
        low=low.to(base.S.dtype),
        high=high.to(base.S.dtype),
        errors=errors.to(base.S.dtype),
        ambiguous=(low - errors < epsilon) & (high + errors >= epsilon),
    )


def _range(base: BaseSVD, vectors: Tensor, complete: int) -> tuple[Tensor, Tensor]:
    """The least and largest possible similarity, over all bases of the spaces of equal singular values.

    A vector with a part of norm g in a space of s base vectors has a largest cosine between g / √s and g with
    them. To value zero belongs the whole space outside the others; where the thin decomposition shows only
    some of its vectors, they may all be orthogonal to the given one.
    """
    values = base.S.double()
    steps = (values[:-1] - values[1:]) > 4 * torch.finfo(base.S.dtype).eps * values[0]
    groups = torch.cat([steps.new_zeros(1, dtype=torch.long), steps.long().cumsum(0)])
    null = values <= base.zero
    if bool(null.any()):
        groups = torch.where(null, groups[null].min(), groups)
    mass = vectors.new_zeros(int(groups.max()) + 1, vectors.shape[1]).index_add_(0, groups, vectors.square())
    sizes = mass.new_zeros(len(mass)).index_add_(0, groups, torch.ones_like(values)).clamp(min=1)
    if bool(null.any()):
        place = int(groups[null][0])
        mass[place] = (1 - vectors[~null].square().sum(0)).clamp(min=0)
        if complete > len(values):
            sizes[place] = math.inf
    mass = mass.sqrt()
    return (mass / sizes.sqrt()[:, None]).amax(0), mass.amax(0)


def check_settings(epsilon: float | int, k: int, side: Side | None) -> None:
    """Refuse a threshold, a number of vectors or a side that there is not."""
    if not 0 < epsilon <= 1:
        raise UpdateError(f"epsilon is {epsilon}; it is a cosine above 0 and at most 1")
    if k < 1:
        raise UpdateError(f"k is {k}; at least one singular vector is to be examined")
    if side not in (None, "left", "right"):
        raise UpdateError(f"side is {side!r}; it is 'left', 'right' or None for both")


def fitting(base: Tensor, update: Tensor | LowRank) -> tuple[Tensor, Tensor | LowRank]:
    """A base and its update as matrices that fit. The base's values are for its decomposition to look at."""
    base = base.flatten(1) if base.ndim > 2 else base
    if isinstance(update, Tensor):
        update = update.flatten(1) if update.ndim > 2 else update
        check_matrix(update, "the update")
    elif not (update.left.isfinite().all() and update.right.isfinite().all()):
        raise UpdateError(f"the update {update} holds NaN or infinity in its factors")
    if base.shape != update.shape or base.device != update.device:
        raise UpdateError(
            f"the base has shape {tuple(base.shape)} on {base.device}, the update {tuple(update.shape)} on "
            f"{update.device}; both as (out, in): update.base_matrix(name) and update.matrix(name) fit"
        )
    return base.detach(), update.detach()


def decomposed(matrix: Tensor, base_svd: BaseSVD | None, cache: SVDCache | None) -> BaseSVD:
    """The base's decomposition: given, from the cache, or computed."""
    if base_svd is None:
        return cache(matrix) if cache is not None else BaseSVD.of(matrix)
    if base_svd.shape != matrix.shape:
        raise UpdateError(
            f"base_svd is of shape {tuple(base_svd.shape)}, the base matrix {tuple(matrix.shape)}; "
            "give BaseSVD.of(base_matrix)"
        )
    return base_svd if base_svd.U.device == matrix.device else base_svd.to(matrix.device)
