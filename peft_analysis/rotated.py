"""The largest singular triplets of a changed matrix, in the coordinates of its base's singular vectors.

With W = U diag(S) Vᵀ, the changed matrix W + BA reads there diag(S) + (UᵀB)(AV): a diagonal plus low rank.
No product of two large matrices is formed, and a component of a singular vector is its cosine with a
singular vector of the base.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD

SMALL = 192  # below this, one dense decomposition is faster than an iteration
EXTRA = 4  # pairs beyond those asked for, among which a gap is looked for
ROUNDS = 40
ACCURATE = 1e-9  # an error of a vector that is small enough to stop at
USABLE = 1e-6  # an error that is small enough to keep where rounding stops the iteration


@dataclass(frozen=True)
class Triplets:
    """The k largest singular triplets of a changed matrix.

    Attributes:
        values: singular values (k,), largest first.
        left: left singular vectors in the base's left singular basis (p, k); what is missing to norm one lies
            outside the space of that basis.
        right: the same for the right.
        left_errors: bounds on ‖û − u‖ of each left vector (k,), 1 where its value is repeated.
        right_errors: the same for the right.
        tied: whether a value is a repeated one (k,), so that its vectors are any basis of a space.
        iterated: whether they come from the iteration with its certificate, not from a dense decomposition.
    """

    values: Float[Tensor, " k"]
    left: Float[Tensor, "p k"]
    right: Float[Tensor, "p k"]
    left_errors: Float[Tensor, " k"]
    right_errors: Float[Tensor, " k"]
    tied: Bool[Tensor, " k"]
    iterated: bool

    def swapped(self) -> "Triplets":
        """Those of the transposed matrix."""
        return Triplets(
            self.values, self.right, self.left, self.right_errors, self.left_errors, self.tied, self.iterated
        )


def top_triplets(
    base: BaseSVD, update: Tensor | LowRank, k: int, *, thresholds: tuple[float, ...] = ()
) -> Triplets:
    """The k largest singular triplets of base + update, with error bounds.

    A `LowRank` takes (m + n) r p work for the rotation and p (r + k)² a round after it. Where the iteration
    does not reach a certificate, and for a dense update, the rotated matrix is decomposed whole.

    Args:
        base: decomposition of W (m, n), p = min(m, n).
        update: (m, n).
        k: how many; at most p.
        thresholds: stop as soon as every cosine with a base vector is known to be on one side of each. None
            given: go on to full accuracy.
    """
    if base.shape[0] < base.shape[1]:
        turned = BaseSVD(base.V, base.S, base.U, base.key)
        return top_triplets(turned, update.mT, k, thresholds=thresholds).swapped()
    if isinstance(update, LowRank) and 4 * update.rank <= base.S.numel() and base.S.numel() > SMALL:
        found = Rotated.of(base, update).top(k, thresholds)
        if found is not None:
            return found
    return dense_triplets(rotated_matrix(base, update), k, base.S.numel())


def rotated_matrix(base: BaseSVD, update: Tensor | LowRank) -> Float[Tensor, "q p"]:
    """[diag(S) + UᵀΔV; R] for m ≥ n, with R of what Δ has outside the columns of U; in float64."""
    inside, outside = _split(base, update)
    whole = inside + base.S.double().diag()
    return whole if outside is None else torch.cat([whole, outside])


def _split(base: BaseSVD, update: Tensor | LowRank) -> tuple[Tensor, Tensor | None]:
    U, V = base.U.double(), base.V.double()
    moved = update.to(torch.float64) @ V
    inside = U.mT @ moved
    if base.shape[0] == base.shape[1]:
        return inside, None
    return inside, torch.linalg.qr(moved - U @ inside, mode="r")[1]


def dense_triplets(rotated: Float[Tensor, "q p"], k: int, p: int) -> Triplets:
    """The k largest triplets by a decomposition of the whole rotated matrix."""
    left, values, right = torch.linalg.svd(rotated, full_matrices=False)
    gaps = _gaps(values.square(), k)
    scale = values[0].square()
    rounding = 8 * torch.finfo(values.dtype).eps * scale
    errors = (rounding / gaps).clamp(max=1)
    tied = gaps <= tie(values.dtype) * scale
    return Triplets(values[:k], left[:p, :k], right.mT[:, :k], errors, errors, tied, False)


def tie(dtype: torch.dtype) -> float:
    """Squares of singular values closer than this, relative to the largest, count as one."""
    return 64 * torch.finfo(dtype).eps


def _gaps(squares: Tensor, k: int) -> Tensor:
    """From each of the first k of falling numbers to its nearest neighbour."""
    ends = squares.new_full((1,), torch.inf)
    steps = torch.cat([ends, squares[:-1] - squares[1:], ends])
    return torch.minimum(steps[:-1], steps[1:])[:k]


@dataclass(frozen=True)
class Rotated:
    """K = [diag(d); 0] + X Yᵀ, with m ≥ n, in float64, scaled so that its largest entry of d or σ(XYᵀ) is 1.

    Attributes:
        d: the base's singular values (p,), over `scale`.
        X: (p + c, r), with c further rows for the part outside the base's columns.
        Y: (p, r), orthonormal columns.
        scale: what d and X were divided by.
    """

    d: Float[Tensor, " p"]
    X: Float[Tensor, "q r"]
    Y: Float[Tensor, "p r"]
    scale: float

    @classmethod
    def of(cls, base: BaseSVD, update: LowRank) -> "Rotated":
        """Rotate an update into the base's singular vectors, keeping the directions that are not rounding."""
        left, values, right = update.to(torch.float64).svd()
        kept = values > max(update.shape) * torch.finfo(torch.float64).eps * values.new_ones(1) * (
            values[0] if len(values) else 0
        )
        left, values, right = left[:, kept], values[kept], right[kept]
        U, V = base.U, base.V
        inside = U.mT @ left.to(U.dtype)
        X = inside.double()
        if base.shape[0] > base.shape[1] and left.shape[1]:
            outside = left - (U @ inside).double()
            X = torch.cat([X, torch.linalg.qr(outside, mode="r")[1]])
        Y = (V.mT @ right.mT.to(V.dtype)).double()
        scale = max(float(base.S[0]), float(values[0]) if len(values) else 0.0)
        scale = scale if scale > 0 else 1.0
        return cls(base.S.double() / scale, X * (values / scale), Y, scale)

    def times(self, vectors: Float[Tensor, "p b"]) -> Float[Tensor, "q b"]:
        """K v."""
        found = self.X @ (self.Y.mT @ vectors)
        found[: len(self.d)] += self.d[:, None] * vectors
        return found

    def back(self, vectors: Float[Tensor, "q b"]) -> Float[Tensor, "p b"]:
        """Kᵀ u."""
        return self.d[:, None] * vectors[: len(self.d)] + self.Y @ (self.X.mT @ vectors)

    def count(self, level: Float[Tensor, ""]) -> int:
        """How many squares of singular values are above a level, by Sylvester's law of inertia.

        Formula: KᵀK − τ = E + Z C Zᵀ with E = diag(d² − τ), Z = [diag(d) X, Y], C = [[0, I], [I, XᵀX]];
        Haynsworth's additivity gives n₊(E + ZCZᵀ) = n₊(E) + n₊(−C⁻¹ − ZᵀE⁻¹Z) − r.
        """
        r = self.Y.shape[1]
        p = len(self.d)
        poles = self.d.square() - level
        Z = torch.cat([self.d[:, None] * self.X[:p], self.Y], 1)
        eye, none = torch.eye(r, dtype=Z.dtype, device=Z.device), Z.new_zeros(r, r)
        inverse = torch.cat(
            [torch.cat([-self.X.mT @ self.X, eye], 1), torch.cat([eye, none], 1)]
        )  # fmt: skip
        small = -inverse - Z.mT @ (Z / poles[:, None])
        positive = torch.linalg.eigvalsh((small + small.mT) / 2) > 0
        return int((poles > 0).sum()) + int(positive.sum()) - r

    def top(self, k: int, thresholds: tuple[float, ...]) -> Triplets | None:
        """The k largest triplets, or None where no certificate is reached.

        Davidson's method on KᵀK. The space holds the first h base directions, what the update touches, and for
        each pair (d²ᵢ − θ)⁻¹ times its residual: as KᵀK is a diagonal plus low rank, that is the exact vector
        once the value θ is. As h > k + r, θ is above every d²ᵢ that is divided by (Weyl). That no value was
        missed is counted, not hoped (`count`); how far a vector is off follows from its residual and the gaps
        (Davis and Kahan).
        """
        p, r = self.Y.shape
        head = min(p, k + r + 32)
        tail = slice(head, p)
        basis = _orthonormal(torch.cat([self.Y[tail], (self.d[:, None] * self.X[:p])[tail]], 1))
        best, wanted = torch.inf, min(k + EXTRA, p)
        for _ in range(ROUNDS):
            values, vectors = self._ritz(head, basis)
            values, vectors = values[: wanted + 1], vectors[:, : wanted + 1]
            image = self.times(vectors)
            residual = self.back(image) - vectors * values
            found = self._certified(k, values, vectors, image, residual)
            if found is not None:
                worst = float(
                    torch.where(found.tied, 0, torch.maximum(found.left_errors, found.right_errors)).max()
                )
                if worst <= ACCURATE or (thresholds and _settled(found, thresholds)):
                    return found
                if worst > best / 2 or not float(residual[:, :wanted].norm()) > 0:
                    return found if worst <= USABLE else None
                best = worst
            step = residual[tail, :wanted] / (values[:wanted] - self.d[tail, None].square()).clamp(min=1e-12)
            fresh = _orthonormal(step, basis)
            if not fresh.shape[1] or head + basis.shape[1] + fresh.shape[1] > p // 2 + head:
                return found if found is not None and worst <= USABLE else None
            basis = torch.cat([basis, fresh], 1)
        return None

    def _ritz(self, head: int, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Values and vectors of KᵀK in the span of the first coordinates and a basis of the others."""
        p = len(self.d)
        first = torch.eye(p, head, dtype=self.d.dtype, device=self.d.device)
        whole = torch.cat([first, torch.nn.functional.pad(basis, (0, 0, head, 0))], 1)
        image = self.times(whole)
        values, inner = torch.linalg.eigh(image.mT @ image)
        return values.flip(0).clamp(min=0), whole @ inner.flip(1)

    def _certified(
        self, k: int, values: Tensor, vectors: Tensor, image: Tensor, residual: Tensor
    ) -> Triplets | None:
        """The first k pairs with their error bounds, if a count shows that none is missing."""
        p = len(self.d)
        rounding = 8 * torch.finfo(values.dtype).eps * values[0]
        sizes = residual.norm(dim=0) + rounding
        if len(values) < p:
            steps = (values[:-1] - values[1:])[k - 1 :]
            if not len(steps):
                return None
            cut = k + int(steps.argmax())
            level = (values[cut - 1] + values[cut]) / 2
            if not bool(level + sizes[cut - 1] < values[cut - 1]) or self.count(level) != cut:
                return None
            squares = torch.cat([values[:cut], level[None]])
        else:
            squares = values
        spread = torch.cat([sizes, sizes.new_zeros(1)])[: len(squares)]
        gaps = _gaps(squares, k) - spread[:k] - spread.cumsum(0)[-1].clamp(max=0)
        tied = _gaps(squares, k) <= tie(values.dtype) * values[0] + 2 * rounding
        roots = values[:k].sqrt()
        safe = torch.where(roots > 0, roots, 1.0)
        left = image[:, :k] / safe
        left_sizes = self.times(residual[:, :k]).norm(dim=0) / safe + rounding / safe
        bounds = [
            torch.where(gaps > 0, 2**0.5 * size / gaps.clamp(min=1e-300), torch.inf).clamp(max=1)
            for size in (left_sizes, sizes[:k])
        ]
        return Triplets(
            roots * self.scale, left[:p], vectors[:, :k], bounds[0], bounds[1], tied, True
        )  # fmt: skip


def _settled(found: Triplets, thresholds: tuple[float, ...]) -> bool:
    """Whether each largest cosine is surely on one side of each threshold."""
    levels = found.values.new_tensor(thresholds)
    for vectors, errors in ((found.left, found.left_errors), (found.right, found.right_errors)):
        distance = (vectors.abs().amax(0)[:, None] - levels).abs()
        if not bool((distance > errors[:, None]).all()):
            return False
    return True


def _orthonormal(vectors: Tensor, against: Tensor | None = None) -> Tensor:
    """An orthonormal basis of what vectors have outside a basis, without what is rounding."""
    sizes = vectors.norm(dim=0)
    vectors = vectors[:, sizes > 0] / sizes[sizes > 0]
    for _ in range(2 if against is not None else 0):
        vectors = vectors - against @ (against.mT @ vectors)  # type: ignore[union-attr]
    if not vectors.numel():
        return vectors[:, :0]
    left, values, _ = torch.linalg.svd(vectors, full_matrices=False)
    left = left[:, values > 1e-10]
    if against is not None:
        left = torch.linalg.qr(left - against @ (against.mT @ left))[0]
    return left
