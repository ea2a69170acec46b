"""What an edit must keep: a subspace it may not touch, a ball it may not leave."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import geoopt
import torch
from torch import Tensor

from manifolds.base import plain
from manifolds.errors import ManifoldError


@dataclass(frozen=True)
class Lift:
    """X as a function of the unknowns V: V Qᵀ, or for stacked factors [L; R'] the pair [L; Q R'].

    Attributes:
        basis: Q (*#batch, n, d).
        rows: the rows of L; None for matrices.
    """

    basis: Tensor
    rows: int | None

    def __call__(self, v: Tensor) -> Tensor:
        """The points (*batch, *point)."""
        if self.rows is None:
            return v @ self.basis.mT
        left, right = v.split([self.rows, self.basis.shape[-1]], dim=-2)
        return torch.cat([left, self.basis @ right], dim=-2)

    def flat(self, batch: torch.Size) -> "Lift":
        """The same with one basis an item (N, n, d)."""
        shape = self.basis.shape[-2:]
        return replace(self, basis=self.basis.expand(*batch, *shape).reshape(batch.numel(), *shape))


@dataclass(frozen=True)
class Substitution:
    """A problem in fewer unknowns: a manifold of v, a start on it, and x as a function of v."""

    manifold: geoopt.Manifold
    start: Tensor
    lift: Lift


@dataclass(frozen=True)
class NullSpace:
    """The constraint X K₀ = 0: the change X maps the keys to zero, and leaves their outputs alone.

    For `Euclidean(ndim=2)` X is an m×n matrix, for `FixedRank(m, n)` the product L Rᵀ of the stacked factors.
    With Q an orthonormal basis of the vectors orthogonal to all keys, X = V Qᵀ (L stays, R = Q R') satisfies
    it for every V. The solver works on V, so that the constraint holds to rounding at every point where f is
    evaluated. A start that violates it is projected first, x₀ Q Qᵀ.

    Attributes:
        keys: K₀ (*#batch, n, k), its columns the keys; they may depend on each other, and be fewer in some
            items.
        tolerance: singular values of K₀ below this part of the largest count as zero; max(n, k) ε if not
            given.
    """

    keys: Tensor
    tolerance: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.keys, Tensor) or self.keys.ndim < 2 or not self.keys.is_floating_point():
            said = tuple(self.keys.shape) if isinstance(self.keys, Tensor) else type(self.keys).__name__
            raise ManifoldError(
                f"NullSpace: keys are {said}; a real tensor (*batch, n, k) with keys as columns is expected"
            )
        if not bool(self.keys.isfinite().all()):
            raise ManifoldError("NullSpace: keys have entries that are NaN or infinite")

    def substitute(self, manifold: geoopt.Manifold, x0: Tensor) -> Substitution:
        """The problem in the unknowns V.

        Raises:
            ManifoldError: another manifold; keys that do not fit; nothing left free.
        """
        split = factor_rows(manifold)
        if split is None and not (is_flat(manifold) and manifold.ndim == 2):
            raise ManifoldError(
                f"NullSpace: {manifold.name} is not a space of matrices; "
                "use Euclidean(ndim=2) or FixedRank(rows, columns)"
            )
        columns = x0.shape[-1] if split is None else x0.shape[-2] - split
        _same_device("NullSpace: keys", self.keys, x0)
        keys = self.keys.detach().to(x0.dtype)
        if keys.shape[-2] != columns:
            raise ManifoldError(
                f"NullSpace: keys have {keys.shape[-2]} rows, shape {tuple(keys.shape)}; "
                f"the matrices have {columns} columns"
            )
        _fits("NullSpace: keys", keys.shape[:-2], x0.shape[:-2])
        basis, free = self._complement(keys)
        needed = 1 if split is None else x0.shape[-1]
        if int(free.min()) < needed:
            raise ManifoldError(
                f"NullSpace: the keys leave {int(free.min())} of {columns} dimensions free"
                + ("; there is nothing to change" if split is None else f", fewer than the rank {needed}")
                + ". Give fewer keys, or a larger tolerance if they are dependent up to noise"
            )
        if split is None:
            return Substitution(manifold, x0 @ basis, Lift(basis, None))
        reduced: Any = type(manifold)(split, basis.shape[-1])
        left, right = x0.split([split, columns], dim=-2)
        start = torch.cat([left, basis.mT @ right], dim=-2)
        return Substitution(reduced, plain(reduced.projx(start)), Lift(basis, split))

    def _complement(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """An orthonormal basis of the complement (*batch, n, d) and its dimension in each item, at most d.

        An item with a smaller complement has zero columns, whose unknowns f does not see.
        """
        n, k = keys.shape[-2:]
        vectors, values, _ = torch.linalg.svd(keys, full_matrices=True)
        limit = max(n, k) * torch.finfo(keys.dtype).eps if self.tolerance is None else self.tolerance
        largest = values.amax(-1, keepdim=True) if k else values
        rank = (values > limit * largest).sum(-1)
        least = int(rank.min()) if rank.numel() else 0
        place = torch.arange(least, n, device=keys.device)
        return vectors[..., least:] * (place >= rank.unsqueeze(-1)).unsqueeze(-2), n - rank


@dataclass(frozen=True)
class TrustBall:
    """The constraint dist(center, x) ≤ radius.

    The distance is the manifold's. On `FixedRank` it is that of the surrounding space, the Frobenius norm ‖X
    − C‖, computed from the factors. A start outside is moved to the ball first.

    Attributes:
        center: C, a point or points (*#batch, *point); None is zero, for `FixedRank` and `Euclidean`.
        radius: one number, or one an item (*#batch), positive.
    """

    center: Tensor | None
    radius: float | Tensor

    def half_distance2(
        self, manifold: geoopt.Manifold, x0: Tensor
    ) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """Half of the squared distance as a function of x and the center, and the center (*#batch, *point).

        Raises:
            ManifoldError: a center that does not fit or lies off the manifold; no center where there is
                no zero.
        """
        split, ndim = factor_rows(manifold), manifold.ndim
        if self.center is None and split is None and not is_flat(manifold):
            raise ManifoldError(f"TrustBall: {manifold.name} has no zero; give a center")
        if self.center is None:
            center = torch.zeros_like(x0[..., :1] if split is not None else x0)
        else:
            center = plain(self.center.detach()).to(x0.dtype)
            _same_device("TrustBall: center", center, x0)
            if center.shape[center.ndim - ndim :] != x0.shape[x0.ndim - ndim :]:
                raise ManifoldError(
                    f"TrustBall: center has shape {tuple(center.shape)} and x0 {tuple(x0.shape)}; "
                    "points must be alike"
                )
            _fits("TrustBall: center", center.shape[: center.ndim - ndim], x0.shape[: x0.ndim - ndim])
            found = manifold.check_point_on_manifold(center, explain=True)
            if not found[0]:
                raise ManifoldError(f"TrustBall: center is not on {manifold.name}: {found[1]}; see projx")
        if split is not None:
            return (lambda x, center: _difference2(x, center, split) / 2), center
        return (lambda x, center: manifold.dist2(center, x) / 2), center

    def radii(self, x0: Tensor, batch: torch.Size) -> Tensor:
        """The radius of each item (N).

        Raises:
            ManifoldError: radii that are not positive, or do not fit the batch.
        """
        radius = torch.as_tensor(self.radius, dtype=x0.dtype, device=x0.device)
        _fits("TrustBall: radius", radius.shape, batch)
        if not bool((radius > 0).all()) or not bool(radius.isfinite().all()):
            raise ManifoldError(
                f"TrustBall: radius is {radius.min().item():.3g} at least; radii are positive numbers"
            )
        return radius.expand(batch).reshape(-1)


def is_flat(manifold: geoopt.Manifold) -> bool:
    """Whether points are the vectors of a Euclidean space; ours and geoopt's."""
    return isinstance(manifold, geoopt.Euclidean) or str(manifold.name).startswith("Euclidean")


def factor_rows(manifold: geoopt.Manifold) -> int | None:
    """The rows m of FixedRank(m, n), whose points are stacked factors; None for other manifolds."""
    from manifolds.fixed_rank import FixedRank

    return manifold.rows if isinstance(manifold, FixedRank) else None


def _difference2(x: Tensor, center: Tensor, rows: int) -> Tensor:
    """‖L Rᵀ − L_c R_cᵀ‖² from the Gram matrices of [L, −L_c] and [R, R_c]."""
    batch = torch.broadcast_shapes(x.shape[:-2], center.shape[:-2])
    both = torch.cat([x.expand(*batch, *x.shape[-2:]), center.expand(*batch, *center.shape[-2:])], dim=-1)
    left, right = both[..., :rows, :], both[..., rows:, :]
    sign = torch.ones(both.shape[-1], dtype=x.dtype, device=x.device)
    sign[x.shape[-1] :] = -1
    left = left * sign
    return ((left.mT @ left) * (right.mT @ right)).sum((-1, -2)).clamp(min=0)


def _fits(what: str, shape: torch.Size, batch: torch.Size) -> None:
    try:
        fits = torch.broadcast_shapes(shape, batch) == batch
    except RuntimeError:
        fits = False
    if not fits:
        raise ManifoldError(
            f"{what}: leading shape {tuple(shape)} does not fit the batch {tuple(batch)} of x0"
        )


def _same_device(what: str, tensor: Tensor, x0: Tensor) -> None:
    if tensor.device != x0.device:
        raise ManifoldError(f"{what} are on {tensor.device} and x0 on {x0.device}; move them to one device")
