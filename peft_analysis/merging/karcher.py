"""The mean of matrices of one rank along the manifold that they form."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import FixedRank, LowRank, ManifoldError
from manifolds.fixed_rank import Logarithm
from peft_analysis.errors import UpdateError

HALVINGS = 4  # of a step that raises the sum of squares
SHOTS = 20  # corrections of a logarithm; matrices that are near to each other take a few
ROUNDING = 1e-10  # by which the sum may seem to rise: relative, float64, some thousand operations


@dataclass(frozen=True)
class KarcherMean:
    """What `karcher_mean` found.

    Attributes:
        mean: the last point of the search; the mean only if it converged.
        converged: whether the gradient vanished.
        iterations: steps taken.
        gradient: the length of the weighted mean of the logarithms, relative to the root mean square
            distance; NaN where a logarithm was not found.
        distances: of each matrix from `mean` along the manifold; NaN where not found.
        reason: why the search ended before it converged; empty if it did converge.
    """

    mean: LowRank
    converged: bool
    iterations: int
    gradient: float
    distances: Float[Tensor, " n"]
    reason: str


def karcher_mean(
    matrices: Sequence[LowRank],
    weights: Sequence[float | int] | None = None,
    *,
    rank: int | None = None,
    tolerance: float = 1e-8,
    max_iterations: int = 30,
) -> KarcherMean:
    """The matrix of rank r with the least Σ wᵢ d(X, Wᵢ)², d the geodesic distance of `manifolds.FixedRank`.

    From the nearest matrix of rank r to the weighted arithmetic mean, steps X ← exp_X(Σ wᵢ log_X Wᵢ) are
    taken until the step vanishes; a step that does not lower the sum is halved. The search runs in float64,
    in the spaces that the columns and rows of all matrices span: the mean lies in them by symmetry.

    The manifold is not complete, and its logarithm is found only for matrices that are near to each other
    against their smallest singular value, as adapters that were trained on from one adapter may be. Adapters
    trained apart have almost orthogonal spaces: no mean of them is found, and the result says so.

    Args:
        matrices: (m, n), all of one rank.
        weights: positive; only their ratios count. Equal ones if not given.
        rank: all matrices are cut to this rank first; if not given, they must have one rank.
        tolerance: of the gradient, relative to the root mean square distance.
        max_iterations: after which the search ends.

    Raises:
        UpdateError: no matrix, other shapes, ranks that differ, weights that are not positive.

    Source: Karcher, "Riemannian center of mass and mollifier smoothing" (1977).
    """
    points, shares = _checked(matrices, weights, rank)
    first, dtype = points[0], matrices[0].dtype
    if first.rank == 0:
        nothing = LowRank.zeros(*first.shape, dtype=dtype, device=first.device)
        return KarcherMean(nothing, True, 0, 0.0, torch.zeros(len(points)).to(nothing.left), "")
    columns, rows = _span([p.left for p in points]), _span([p.right.mT for p in points])
    inside = [LowRank(columns.mT @ point.left, point.right @ rows) for point in points]
    search = _Search.of(inside, shares)
    search.run(tolerance, max_iterations)
    x = search.manifold.to_lowrank(search.x)
    mean = LowRank(columns @ x.left, x.right @ rows.mT).to(dtype)
    distances = search.distances.to(dtype)
    return KarcherMean(mean, not search.reason, search.iterations, search.gradient, distances, search.reason)


@dataclass
class _Search:
    """The search for a mean: where it is, and why it ended; `reason` is empty once it has converged."""

    manifold: FixedRank
    ends: Float[Tensor, "n p r"]
    weights: Float[Tensor, " n"]
    x: Float[Tensor, "p r"]
    distances: Float[Tensor, " n"]
    iterations: int = 0
    gradient: float = math.nan
    reason: str = ""

    @classmethod
    def of(cls, points: Sequence[LowRank], shares: Sequence[float]) -> "_Search":
        """At the nearest point to the arithmetic mean, where that has the rank of the points."""
        rows, columns = points[0].shape
        manifold = FixedRank(rows, columns)
        stack = LowRank.stack(list(points))
        ends = manifold.from_lowrank(stack)
        arithmetic = LowRank.concatenate([p * share for p, share in zip(points, shares, strict=True)])
        values = arithmetic.singular_values()
        floor = stack.singular_values().max() * max(rows, columns) * torch.finfo(values.dtype).eps
        whole = bool((values > floor).sum() >= points[0].rank)
        start = manifold.from_lowrank(arithmetic, points[0].rank) if whole else ends[0]
        weights = ends.new_tensor(list(shares))
        found = cls(manifold, ends, weights, start, torch.full_like(weights, math.nan))
        found.reason = "" if whole else "their arithmetic mean, where the search begins, is of a lower rank"
        return found

    def run(self, tolerance: float, max_iterations: int) -> None:
        """Steps until the gradient vanishes, or as far as there are any."""
        if self.reason:
            return
        look = self.manifold.logarithm(self.x, self.ends, max_iterations=SHOTS)
        if not bool(look.converged.all()):
            apart = (~look.converged).nonzero().flatten().tolist()
            self.reason = (
                f"no geodesic was found from where the search begins to matrix {', '.join(map(str, apart))}; "
                'they are too far apart against their smallest singular value. Use method="svd", or a '
                "smaller rank"
            )
            return
        for self.iterations in range(max_iterations + 1):
            squares = self.manifold.inner(self.x, look.vector)
            self.distances = squares.clamp(min=0).sqrt()
            step = (self.weights[:, None, None] * look.vector).sum(0)
            spread = self._spread(self.x, look)
            size = float(self.x.square().sum()) * torch.finfo(self.x.dtype).eps  # ‖x‖² = 2 Σσ
            if spread <= size**2:  # all matrices are one
                self.gradient, self.reason = 0.0, ""
                return
            self.gradient = float(self.manifold.norm(self.x, step)) / math.sqrt(spread)
            if self.gradient <= tolerance:
                self.reason = ""
                return
            moved = self._lower(step, spread) if self.iterations < max_iterations else None
            if moved is None:
                break
            self.x, look = moved
        self.reason = (
            f"after {self.iterations} steps the gradient is {self.gradient:.1e} of the distances; "
            "the matrices are far apart"
        )

    def _lower(self, step: Tensor, spread: float) -> tuple[Tensor, Logarithm] | None:
        """The longest of the halved steps that does not raise the sum of squares, and what is seen there."""
        for halving in range(HALVINGS):
            try:
                moved = self.manifold.expmap(self.x, step * 0.5**halving)
            except ManifoldError:  # the geodesic ran into a loss of rank
                continue
            look = self.manifold.logarithm(moved, self.ends, max_iterations=SHOTS)
            if bool(look.converged.all()) and self._spread(moved, look) <= spread * (1 + ROUNDING):
                return moved, look
        return None

    def _spread(self, x: Tensor, look: Logarithm) -> float:
        """The weighted mean of the squared distances."""
        return float((self.weights * self.manifold.inner(x, look.vector)).sum())


def _checked(
    matrices: Sequence[LowRank], weights: Sequence[float | int] | None, rank: int | None
) -> tuple[list[LowRank], list[float]]:
    """Matrices in float64 with as many columns in their factors as their rank is, and weights of sum one."""
    if not matrices:
        raise UpdateError("a mean of no matrices; give at least one")
    shapes = sorted({tuple(matrix.shape) for matrix in matrices})
    if len(shapes) > 1 or matrices[0].ndim != 2:
        raise UpdateError(f"a Karcher mean is one of matrices (m, n) of one shape; these have {shapes}")
    numbers = [1.0] * len(matrices) if weights is None else [float(weight) for weight in weights]
    if len(numbers) != len(matrices) or not all(0 < number < math.inf for number in numbers):
        raise UpdateError(
            f"the weights of a Karcher mean are {numbers} for {len(matrices)} matrices; they have to be "
            'positive, one for each. For a difference of updates use method="svd"'
        )
    ranks = [int(matrix.numerical_rank()) for matrix in matrices]
    least = min(ranks)
    if rank is None and len(set(ranks)) > 1:
        raise UpdateError(
            f"the matrices have ranks {ranks}; a Karcher mean is one of matrices of one rank: give rank= to "
            f"cut them all, at most {least}"
        )
    kept = least if rank is None else rank
    if not 0 <= kept <= least:
        raise UpdateError(f"rank is {kept}, and the matrices have ranks {ranks}; give at most {least}")
    whole = math.fsum(numbers)
    return [m.to(torch.float64).truncate(kept) for m in matrices], [number / whole for number in numbers]


def _span(factors: Sequence[Float[Tensor, "m k"]]) -> Float[Tensor, "m p"]:
    """An orthonormal basis of what the columns of all factors span, or of more."""
    return torch.linalg.qr(torch.cat(list(factors), -1))[0]
