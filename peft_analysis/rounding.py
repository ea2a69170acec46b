"""What rounding to a stored dtype makes of an update, simulated on the weights it was added to.

A tuned checkpoint holds T = round(W + U), and the difference that is read from it is D = T − W, not U. Where
the update is larger than the spacing of the dtype's numbers, the error D − U is noise of the size
spacing / √12. Where it is smaller, and the base lies on the same grid, most entries do not move at all, and
D is a thinned and distorted U. Nothing but the rounding itself describes both, so it is run on hypotheses.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

_GAIN_ROUNDS = 4  # that match the sizes of the components
_FIT_ROUNDS = 60  # that match the components themselves
_LEAST_GAIN = 0.15
_UNEVEN = 2.0  # binary digits between the noise of two rows that are more than chance
_BALANCE_ROUNDS = 4  # zeros couple the means of rows and columns


@dataclass(frozen=True)
class Rounding:
    """The rounding of base + update to a dtype.

    Attributes:
        base: the weights that the update was added to (m, n), in the dtype of the computation.
        dtype: that the sum was stored in.
        aligned: whether the base is made of numbers of that dtype; only then can entries stay in place.
        scale: powers of two that updates and readings are given in; see `balance`. None for ones.
    """

    base: Float[Tensor, "m n"]
    dtype: torch.dtype
    aligned: bool
    scale: Float[Tensor, "m n"] | None = None

    def read(self, update: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """The difference that is read after an update: round(W + U) − W; of S ∘ U it is S ∘ it."""
        largest = torch.finfo(self.dtype).max
        added = update if self.scale is None else update / self.scale
        read = (self.base + added).clamp(-largest, largest).to(self.dtype).to(update.dtype) - self.base
        return read if self.scale is None else read * self.scale

    def dithered(self, generator: torch.Generator) -> Float[Tensor, "m n"]:
        """Errors of rounding weights a random step beside the base: evenly spread, whatever the base."""
        step = torch.rand(self.base.shape, generator=generator, device=generator.device).to(self.base)
        beside = self.base * (1 + (2 * step - 1) * torch.finfo(self.dtype).eps)
        error = beside.to(self.dtype).to(self.base.dtype) - beside
        return error if self.scale is None else error * self.scale

    def fit(
        self,
        difference: Float[Tensor, "m n"],
        left: Float[Tensor, "m k"],
        values: Float[Tensor, " k"],
        right: Float[Tensor, "n k"],
    ) -> tuple[Float[Tensor, "m k"], Float[Tensor, " k"], Float[Tensor, "n k"]]:
        """The update of rank k whose rounded reading has the difference's leading part, as (U, σ, V).

        The leading part of the difference itself is a shrunk update where entries do not move. The sizes of
        its components are first matched to what is read of them; then X ← [X + (D − read(X)) / gain] of rank
        k, where the gain is the share of an update that is read.

        Args:
            difference: D = round(W + U) − W.
            left: its leading left singular vectors.
            values: its leading singular values.
            right: its leading right singular vectors.
        """
        if not values.numel() or not self.aligned:
            return left, values, right
        sizes = values.clone()
        for _ in range(_GAIN_ROUNDS):
            seen = (left * (self.read((left * sizes) @ right.mT) @ right)).sum(0)
            sizes = sizes * (values / seen.clamp_min(1e-12 * values[0])).clamp(0.5, 2)
        gain = float((values / sizes).mean().clamp(_LEAST_GAIN, 1))
        scaled, frame = left * sizes, right
        errors: list[float] = []
        for _ in range(_FIT_ROUNDS):
            guess = scaled @ frame.mT
            error = difference - self.read(guess)
            errors.append(float(torch.linalg.vector_norm(error)))
            if errors[-1] == 0 or (len(errors) > 5 and errors[-1] > 0.97 * errors[-6]):
                break
            guess = guess + error / gain
            basis = torch.linalg.qr(guess @ frame)[0]
            frame, scaled = torch.linalg.qr(guess.mT @ basis)
            scaled = basis @ scaled.mT
        outer, sizes, inner = torch.linalg.svd(scaled, full_matrices=False)
        return outer, sizes, frame @ inner.mT


def balance(stored: Float[Tensor, "m n"], dtype: torch.dtype) -> Float[Tensor, "m n"] | None:
    """S = r cᵀ of powers of two that makes the errors of rounding about as large in all rows and columns.

    S ∘ D has the rank of D, and r and c are the inverse geometric means of the spacing of numbers over rows
    and columns. Noise of unequal rows hides components behind the largest of them, and its largest singular
    values are single rows; even noise ends in a sharp edge. None where no row or column has four times
    the noise of another.

    Args:
        stored: the rounded values; those that are zero have no error and do not count.
        dtype: that they were rounded to.
    """
    exponent = torch.frexp(stored)[1].clamp_min(math.frexp(torch.finfo(dtype).smallest_normal)[1])
    counts = (stored != 0).to(stored.dtype)
    if not bool(counts.any()):
        return None
    size = exponent - (exponent * counts).sum() / counts.sum()
    per_row, per_column = counts.sum(1, keepdim=True).clamp_min(1), counts.sum(0, keepdim=True).clamp_min(1)
    columns = torch.zeros_like(per_column)
    for _ in range(_BALANCE_ROUNDS):
        rows = ((size - columns) * counts).sum(1, keepdim=True) / per_row
        columns = ((size - rows) * counts).sum(0, keepdim=True) / per_column
    uneven = [float(side.max() - side.min()) > _UNEVEN for side in (rows, columns)]
    return torch.exp2(-(rows.round() + columns.round())) if any(uneven) else None


def storage_dtype(
    values: Float[Tensor, "m n"], told: torch.dtype | None, *, slack: Tensor | float = 0.0
) -> torch.dtype:
    """The coarsest of bfloat16, float16 and float32 that holds every value, if that is coarser than told.

    Args:
        values: in float64.
        told: the dtype that they are said to have been stored in.
        slack: how far from a number of the dtype a value may lie; for sums of rounded terms.
    """
    known = told if told is not None else torch.float64
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if torch.finfo(dtype).eps <= torch.finfo(known).eps:
            continue
        if bool(((values.to(dtype).to(values.dtype) - values).abs() <= slack).all()):
            return dtype
    return known


def largest_singular_value(
    matrix: Float[Tensor, "m n"],
    left: Float[Tensor, "m k"],
    right: Float[Tensor, "n j"],
    *,
    generator: torch.Generator | None = None,
    steps: int = 48,
) -> float:
    """The largest singular value of (I − P Pᵀ) A (I − Q Qᵀ), by Golub, Kahan and Lanczos.

    With full reorthogonalisation. It approaches the value from below; 48 steps reach the edge of a bulk to
    less than one percent.

    Args:
        matrix: A.
        left: P, orthonormal columns.
        right: Q, orthonormal columns.
        generator: for the random start.
        steps: products with A, and as many with Aᵀ.
    """
    rows, columns = matrix.shape
    steps = min(steps, rows - left.shape[-1], columns - right.shape[-1])
    if steps <= 0:
        return 0.0
    start = torch.randn(columns, generator=generator, device=generator.device if generator else None).to(
        matrix
    )
    outer = matrix.new_zeros(rows, steps)
    inner = matrix.new_zeros(columns, steps + 1)
    core = matrix.new_zeros(steps, steps + 1)
    inner[:, 0] = _unit(_without(start, right))[0]
    for step in range(steps):
        along = _without(_without(matrix @ inner[:, step], left), outer[:, :step])
        outer[:, step], core[step, step] = _unit(_without(along, outer[:, :step]))
        back = _without(_without(matrix.mT @ outer[:, step], right), inner[:, : step + 1])
        inner[:, step + 1], core[step, step + 1] = _unit(_without(back, inner[:, : step + 1]))
    return float(torch.linalg.matrix_norm(core.double(), 2))


def _without(vector: Tensor, frame: Tensor) -> Tensor:
    return vector - frame @ (frame.mT @ vector)


def _unit(vector: Tensor) -> tuple[Tensor, Tensor]:
    size = torch.linalg.vector_norm(vector)
    return torch.where(size > 0, vector / torch.where(size > 0, size, 1.0), 0.0), size
