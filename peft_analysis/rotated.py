"""The largest singular triplets of a changed matrix, in the coordinates of its base's singular vectors.

With W = U diag(S) Vᵀ, the changed matrix W + BA reads there diag(S) + (UᵀB)(AV): a diagonal plus low rank.
No product of two large matrices is formed, and a component of a singular vector is its cosine with a
singular vector of the base.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import LowRank
from peft_analysis.base_svd import BaseSVD, rounding

SMALL = 192  # below this, one dense decomposition is faster than an iteration
EXTRA = 4  # pairs beyond those asked for, among which a gap is looked for
ROUNDS = 40
ACCURATE = {torch.float32: 1e-6, torch.float64: 1e-9}  # an error of a vector to stop at, by the base's dtype
USABLE = 1e-6  # an error that is small enough to keep where rounding stops the iteration


@dataclass(frozen=True)
class Triplets:
    """The largest singular triplets of a changed matrix.

    Attributes:
        values: singular values (k,), largest first.
        left: left singular vectors in the base's left singular basis (p, k); what is missing to norm one lies
            outside the space of that basis.
        right: the same for the right.
        left_errors: bounds on ‖û − u‖ of each left vector (k,); infinite where its value is repeated.
        right_errors: the same for the right.
        gaps: from each singular value to the nearest other one (k,).
        iterated: whether they come from the iteration with its certificate, not from a dense decomposition.
    """

    values: Float[Tensor, " k"]
    left: Float[Tensor, "p k"]
    right: Float[Tensor, "p k"]
    left_errors: Float[Tensor, " k"]
    right_errors: Float[Tensor, " k"]
    gaps: Float[Tensor, " k"]
    iterated: bool

    def swapped(self) -> "Triplets":
        """Those of the transposed matrix."""
        return replace(
            self,
            left=self.right,
            right=self.left,
            left_errors=self.right_errors,
            right_errors=self.left_errors,
        )


def top_triplets(
    base: BaseSVD, update: Tensor | LowRank, k: int, *, thresholds: tuple[float, ...] = ()
) -> Triplets:
    """The k largest singular triplets of base + update, with error bounds; fewer where the rank is less.

    A `LowRank` takes (m + n) r p work for the rotation and about p (r + k)² a round after it. Where the
    iteration reaches no certificate, and for a dense update, the rotated matrix is decomposed whole. Errors
    hold the rounding of the base's decomposition too.

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
    p = base.S.numel()
    found = None
    if isinstance(update, LowRank) and p > SMALL and 8 * update.rank <= p:
        found = Rotated.of(base, update).top(k, thresholds, accurate=ACCURATE[base.S.dtype])
    if found is None:
        found = dense_triplets(rotated_matrix(base, update), k, p)
    eps = torch.finfo(base.S.dtype).eps
    largest = torch.maximum(found.values[:1], base.S[:1].double())
    kept = int((found.values > rounding(base.shape, base.S.dtype) * largest).sum())
    moved = 4 * eps * largest / found.gaps
    return Triplets(
        values=found.values[:kept],
        left=found.left[:, :kept],
        right=found.right[:, :kept],
        left_errors=(found.left_errors + moved)[:kept],
        right_errors=(found.right_errors + moved)[:kept],
        gaps=found.gaps[:kept],
        iterated=found.iterated,
    )


def rotated_matrix(base: BaseSVD, update: Tensor | LowRank) -> Float[Tensor, "q p"]:
    """[diag(S) + UᵀΔV; R] for m ≥ n, with R of what Δ has outside the columns of U; in float64."""
    U, V = base.U.double(), base.V.double()
    moved = update.to(torch.float64) @ V
    inside = U.mT @ moved
    whole = inside + base.S.double().diag()
    if base.shape[0] == base.shape[1]:
        return whole
    return torch.cat([whole, torch.linalg.qr(moved - U @ inside, mode="r")[1]])


def dense_triplets(rotated: Float[Tensor, "q p"], k: int, p: int) -> Triplets:
    """The k largest triplets by a decomposition of the whole rotated matrix.

    The eigenvectors of the Gram matrix take less than half of the time of the singular vectors. They are kept
    where their error, by the gaps of the squares, is below `USABLE`.
    """
    if p > SMALL:
        squares, right = torch.linalg.eigh(rotated.mT @ rotated)
        values, right = squares.flip(0).clamp(min=0).sqrt(), right.flip(1)[:, :k]
        noise = 8 * torch.finfo(values.dtype).eps * values[0].square()
        errors = noise / nearest(values.square(), k)
        roots = torch.where(values[:k] > 0, values[:k], 1.0)
        left_errors = errors * values[0] / roots
        if bool(values[k - 1] > 0) and bool((left_errors <= USABLE).all()):
            left = rotated @ right / roots
            gaps = nearest(values, k)
            return Triplets(values[:k], left[:p], right, left_errors, errors, gaps, False)
    left, values, right = torch.linalg.svd(rotated, full_matrices=False)
    gaps = nearest(values, k)
    errors = 8 * torch.finfo(values.dtype).eps * values[0] / gaps
    return Triplets(values[:k], left[:p, :k], right.mT[:, :k], errors, errors, gaps, False)


def nearest(values: Float[Tensor, " q"], k: int) -> Float[Tensor, " k"]:
    """From each of the first k of falling numbers to its nearest neighbour; infinite where there is none."""
    ends = values.new_full((1,), torch.inf)
    steps = torch.cat([ends, values[:-1] - values[1:], ends])
    return torch.minimum(steps[:-1], steps[1:])[:k]


@dataclass(frozen=True)
class Rotated:
    """K = [diag(d); 0] + X Yᵀ, with as many rows as columns or more, in float64, of size about one.

    Attributes:
        d: the base's singular values (p,), over `scale`.
        X: (p + c, r), with c further rows for what the update has outside the base's columns; over `scale`.
        Y: (p, r), orthonormal columns.
        scale: the larger of the base's and the update's largest singular value.
        zero: values below this are the rounding of the base's decomposition.
    """

    d: Float[Tensor, " p"]
    X: Float[Tensor, "q r"]
    Y: Float[Tensor, "p r"]
    scale: float
    zero: float

    @classmethod
    def of(cls, base: BaseSVD, update: LowRank) -> "Rotated":
        """Rotate an update into the base's singular vectors, without the directions that are rounding."""
        left, values, right = update.to(torch.float64).svd()
        eps = max(update.shape) * torch.finfo(torch.float64).eps
        rank = int((values > eps * values[:1]).sum())
        left, values, right = left[:, :rank], values[:rank], right[:rank].mT
        U, V = base.U, base.V
        inside = U.mT @ left.to(U.dtype)
        X = inside.double()
        if base.shape[0] > base.shape[1] and rank:
            outside = left - (U @ inside).double()
            X = torch.cat([X, torch.linalg.qr(outside, mode="r")[1]])
        Y = (V.mT @ right.to(V.dtype)).double()
        scale = max([float(base.S[0]), *values[:1].tolist()])
        scale = scale if scale > 0 else 1.0
        zero = rounding(base.shape, base.S.dtype)
        return cls(base.S.double() / scale, X * (values / scale), Y, scale, zero)

    def times(self, vectors: Float[Tensor, "p b"]) -> Float[Tensor, "q b"]:
        """K v."""
        found = self.X @ (self.Y.mT @ vectors)
        found[: len(self.d)] += self.d[:, None] * vectors
        return found

    def back(self, vectors: Float[Tensor, "q b"]) -> Float[Tensor, "p b"]:
        """Kᵀ u."""
        return self.d[:, None] * vectors[: len(self.d)] + self.Y @ (self.X.mT @ vectors)

    def border(self) -> Float[Tensor, "p s"]:
        """Z = [diag(d) X, Y] of KᵀK = diag(d²) + Z C Zᵀ with C = [[0, I], [I, XᵀX]]."""
        return torch.cat([self.d[:, None] * self.X[: len(self.d)], self.Y], 1)

    def count(self, level: float) -> int:
        """How many squares of singular values are above a level, by Sylvester's law of inertia.

        Formula: with E = diag(d² − τ), Haynsworth's additivity of inertia gives
        n₊(KᵀK − τ) = n₊(E) + n₊(−C⁻¹ − ZᵀE⁻¹Z) − r, and C⁻¹ = [[−XᵀX, I], [I, 0]].
        """
        r, Z = self.Y.shape[1], self.border()
        poles = self.d.square() - level
        poles = torch.where(poles == 0, torch.finfo(poles.dtype).tiny ** 0.5, poles)
        small = Z.mT @ (Z / poles[:, None])
        small[:r, :r] -= self.X.mT @ self.X
        small[:r, r:] += torch.eye(r, dtype=Z.dtype, device=Z.device)
        small[r:, :r] += torch.eye(r, dtype=Z.dtype, device=Z.device)
        negative = torch.linalg.eigvalsh((small + small.mT) / 2) < 0
        return int((poles > 0).sum()) + int(negative.sum()) - r

    def top(
        self, k: int, thresholds: tuple[float, ...] = (), *, accurate: float = ACCURATE[torch.float64]
    ) -> Triplets | None:
        """The k largest triplets (or as many as there are above `zero`), or None without a certificate.

        Davidson's method on KᵀK. The space holds the first h base directions, what the update touches, and
        for each pair (θ − d²ᵢ)⁻¹ times its residual: as KᵀK is a diagonal plus low rank, that is the exact
        vector once the value θ is. As h > k + r, θ is above every d²ᵢ that is subtracted (Weyl). That no
        value was missed is counted, not hoped (`count`); how far a vector is off follows from its residual
        and the gaps (Davis and Kahan).
        """
        p, r = self.Y.shape
        wanted = min(k + EXTRA, p)
        head = min(p, wanted + r + 32)
        border = self.border()
        basis = orthonormal(border[head:])
        best, found = torch.inf, None
        for _ in range(ROUNDS):
            open_pairs = torch.ones(wanted, dtype=torch.bool, device=self.d.device)
            squares, vectors = self._ritz(border, head, basis, wanted + 1)
            image = self.times(vectors)
            residual = self.back(image) - vectors * squares
            found = self._certified(k, squares, vectors, image, residual)
            if found is not None:
                errors = torch.maximum(found.left_errors, found.right_errors)
                worst = float(errors.max())
                if worst <= accurate or (thresholds and settled(found, thresholds)):
                    return found
                if worst > best / 2:
                    break
                best = worst
                open_pairs = torch.nn.functional.pad(errors > accurate / 4, (0, wanted - len(errors)))
            lower = (squares - self.d[head:, None].square()).clamp(min=torch.finfo(squares.dtype).eps)
            fresh = orthonormal((residual[head:] / lower)[:, :wanted][:, open_pairs], basis)
            if not fresh.shape[1] or 2 * (basis.shape[1] + fresh.shape[1]) > p:
                break
            basis = torch.cat([basis, fresh], 1)
        usable = found is not None and bool(
            torch.maximum(found.left_errors, found.right_errors).max() <= USABLE
        )
        return found if usable else None

    def _ritz(self, border: Tensor, head: int, basis: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """The largest values and vectors of KᵀK on the first coordinates and a basis of the others."""
        r, squared = self.Y.shape[1], self.d.square()
        seen = torch.cat([border[:head], basis.mT @ border[head:]])
        touched, turned = seen[:, :r], seen[:, r:]
        projected = touched @ turned.mT
        projected = projected + projected.mT + turned @ (self.X.mT @ self.X) @ turned.mT
        projected[:head, :head] += squared[:head].diag()
        projected[head:, head:] += basis.mT @ (squared[head:, None] * basis)
        values, inner = torch.linalg.eigh((projected + projected.mT) / 2)
        values, inner = values.flip(0)[:most].clamp(min=0), inner.flip(1)[:, :most]
        return values, torch.cat([inner[:head], basis @ inner[head:]])

    def _certified(
        self, k: int, squares: Tensor, vectors: Tensor, image: Tensor, residual: Tensor
    ) -> Triplets | None:
        """The first k pairs with their error bounds, if a count shows that none is missing."""
        p = len(self.d)
        k = min(k, int((squares > self.zero**2).sum()))
        noise = 8 * torch.finfo(squares.dtype).eps * float(squares[0])
        sizes = residual.norm(dim=0) + noise
        if not k:
            return None
        if len(squares) < p:
            cut = k + int((squares[k - 1 : -1] - squares[k:]).argmax())
            level = float(squares[cut - 1] + squares[cut]) / 2
            if float(squares[cut - 1] - sizes[cut - 1]) <= level or self.count(level) != cut:
                return None
            squares = torch.cat([squares[:cut], squares.new_tensor([level])])
            sizes = torch.cat([sizes[:cut], sizes.new_zeros(1)])
        steps = squares[:-1] - squares[1:] - sizes[:-1] - sizes[1:]
        ends = steps.new_full((1,), torch.inf)
        gaps = torch.minimum(torch.cat([ends, steps]), torch.cat([steps, ends]))[:k].clamp(min=0)
        roots = squares[:k].sqrt()
        left_sizes = (self.times(residual[:, :k]).norm(dim=0) + noise) / roots
        return Triplets(
            values=roots * self.scale,
            left=(image[:, :k] / roots)[:p],
            right=vectors[:, :k],
            left_errors=2**0.5 * left_sizes / gaps,
            right_errors=2**0.5 * sizes[:k] / gaps,
            gaps=nearest(squares.sqrt(), k) * self.scale,
            iterated=True,
        )


def settled(found: Triplets, thresholds: tuple[float, ...]) -> bool:
    """Whether each largest cosine is surely on one side of each threshold."""
    levels = found.values.new_tensor(thresholds)
    for vectors, errors in ((found.left, found.left_errors), (found.right, found.right_errors)):
        distance = (vectors.abs().amax(0)[:, None] - levels).abs()
        if not bool((distance > errors[:, None]).all()):
            return False
    return True


def orthonormal(
    vectors: Float[Tensor, "p a"], against: Float[Tensor, "p b"] | None = None
) -> Float[Tensor, "p c"]:
    """An orthonormal basis of what vectors have outside a basis, without what is rounding."""
    sizes = vectors.norm(dim=0)
    vectors = vectors[:, sizes > 0] / sizes[sizes > 0]
    if against is not None:
        for _ in range(2):
            vectors = vectors - against @ (against.mT @ vectors)
    if not vectors.numel():
        return vectors[:, :0]
    left, values, _ = torch.linalg.svd(vectors, full_matrices=False)
    left = left[:, values > 1e-10]
    if against is not None:
        left = torch.linalg.qr(left - against @ (against.mT @ left))[0]
    return left
