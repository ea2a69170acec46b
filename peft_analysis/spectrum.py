"""The spectrum of a matrix and the numbers that are read from it."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.spectral_laws import MarchenkoPastur, PowerLaw, fit_bulk, fit_power_law

ENERGIES = (0.5, 0.9, 0.95, 0.99)
_SLAB = 8192  # rows that are widened to float64 at once
_BLOCK = 512  # columns of the Gram matrix that are computed at once


@dataclass(frozen=True)
class Spectrum:
    """The singular values σ₁ ≥ σ₂ ≥ … of one matrix, and what follows from them.

    Ranks and entropies of a zero matrix are 0. Values at or below σ₁ max(m, n) ε are rounding: they stay in
    `singular_values` and in sums, and `rank`, `power_law` and `marchenko_pastur` leave them out.

    Attributes:
        singular_values: (p,), largest first; p = min(m, n), or the stored rank if that is less (the others
            are zero).
        shape: (m, n).
        exact: whether the values come from factors; otherwise from a dense matrix.
        residual: |Σ σ² − ‖W‖²| / ‖W‖², with ‖W‖ from the entries: what the decomposition lost.
        rank: how many values are above σ₁ max(m, n) ε, as `numpy.linalg.matrix_rank` counts. In a
            matrix that was rounded to half precision it counts the rounding too; see `true_rank`.
        effective_rank: exp H(p) with p = σ / Σσ, of Roy and Vetterli (2007).
        entropy: H(q) / log(rank) with q = σ² / Σσ², from 0 (one value) to 1 (all the same), as in
            WeightWatcher's matrix entropy. 0 for a matrix of rank 1.
        stable_rank: Σσ² / σ₁².
        participation_ratio: (Σσ²)² / Σσ⁴.
        energy_ranks: how many of the largest values hold 50, 90, 95 and 99 % of Σσ².
        power_law: the tail of the eigenvalues σ².
        marchenko_pastur: the bulk that independent entries would have, and the values above it.
        nuclear: Σσ.
        frobenius: √Σσ².
        spectral: σ₁.
        relative: the three norms over those of the base, {"nuclear": …, "frobenius": …, "spectral": …}; None
            if no base was given, NaN over a zero base.
    """

    singular_values: Tensor
    shape: tuple[int, int]
    exact: bool
    residual: float
    rank: int
    effective_rank: float
    entropy: float
    stable_rank: float
    participation_ratio: float
    energy_ranks: Mapping[float, int]
    power_law: PowerLaw
    marchenko_pastur: MarchenkoPastur
    nuclear: float
    frobenius: float
    spectral: float
    relative: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain Python, for JSON; energies become text, numbers that are not finite None."""
        plain = asdict(self)
        plain["singular_values"] = self.singular_values.tolist()
        plain["shape"] = list(self.shape)
        plain["energy_ranks"] = {str(energy): rank for energy, rank in self.energy_ranks.items()}
        found: dict[str, Any] = _finite(plain)
        return found


def spectrum(matrix: LowRank | Tensor, *, base: "LowRank | Tensor | Spectrum | None" = None) -> Spectrum:
    """The singular values of a matrix, and its ranks, entropies, norms and laws.

    Args:
        matrix: (m, n), in factors or dense. A `LowRank` is never multiplied out: (m + n) r² work.
        base: the matrix that the update is added to, or its spectrum, for `relative`.

    Raises:
        UpdateError: for a matrix that is not two-dimensional, not real, not finite, or whose base has
            another shape.

    Example:
        >>> import torch
        >>> from manifolds import LowRank
        >>> from peft_analysis.spectrum import spectrum
        >>> found = spectrum(LowRank.from_svd(torch.eye(6, 2), torch.tensor([4.0, 3.0]), torch.eye(2, 9)))
        >>> found.frobenius, found.stable_rank, found.rank, found.energy_ranks[0.9]
        (5.0, 1.5625, 2, 2)
    """
    shape = _shape(matrix, "spectrum")
    values = singular_values(matrix)
    total = _squared_norm(matrix)
    found = values.double()
    energy = float(found.square().sum())
    largest = float(found[0]) if found.numel() else 0.0
    least = largest * max(*shape, 1) * torch.finfo(values.dtype).eps
    facts = measures(found, least=least)
    return Spectrum(
        singular_values=values,
        shape=shape,
        exact=isinstance(matrix, LowRank),
        residual=abs(energy - total) / total if total else 0.0,
        power_law=fit_power_law(found, least=least),
        marchenko_pastur=fit_bulk(found, shape, least=least),
        relative=None if base is None else _relative(facts, base, shape),
        **facts,
    )


def singular_values(matrix: LowRank | Tensor) -> Float[Tensor, "*batch p"]:
    """The singular values, largest first, by the cheapest route whose digits suffice.

    A `LowRank` goes through QR of its factors. A dense matrix in float32 or half precision goes through the
    eigenvalues of its smaller Gram matrix in float64, summed in slabs. The error of σᵢ is about ε₆₄ σ₁² / σᵢ,
    and √ε₆₄ σ₁ ≈ 1.5e-8 σ₁ at most up to a factor that grows slowly: less than the rounding of float32
    entries. Float64 goes through `torch.linalg.svdvals`, because there the Gram matrix would lose half of
    the digits.

    Args:
        matrix: (*batch, m, n), in factors or dense.

    Returns:
        (*batch, p) in the dtype of the matrix; float32 for half precision.

    Raises:
        UpdateError: for what is not a matrix of finite real numbers.
    """
    if isinstance(matrix, LowRank):
        left, right = _factors(matrix)
        left, right = (torch.linalg.qr(factor, mode="r")[1] for factor in (left, right.mT))
        return torch.linalg.svdvals(left @ right.mT)
    check_matrix(matrix, "singular_values")
    tall = matrix.detach() if matrix.shape[-2] >= matrix.shape[-1] else matrix.detach().mT
    out = torch.float64 if tall.dtype == torch.float64 else torch.float32
    if not tall.shape[-1]:
        return tall.new_zeros((*tall.shape[:-2], 0), dtype=out)
    scale = tall.abs().amax((-2, -1), keepdim=True).double()
    scale = torch.where(scale > 0, scale, 1.0)
    if tall.dtype == torch.float64:
        return torch.linalg.svdvals(tall / scale) * scale[..., 0]
    eigenvalues = torch.linalg.eigvalsh(gram(tall, scale))
    return (eigenvalues.clamp_min(0).sqrt().flip(-1) * scale[..., 0]).to(out)


def gram(
    tall: Float[Tensor, "*batch m n"], scale: Float[Tensor, "*#batch 1 1"]
) -> Float[Tensor, "*batch n n"]:
    """The lower triangle of WᵀW / scale² in float64; slabs of rows are widened one at a time."""
    columns = tall.shape[-1]
    found = torch.zeros(*tall.shape[:-2], columns, columns, dtype=torch.float64, device=tall.device)
    for slab in tall.split(_SLAB, -2):
        wide = slab.double() / scale
        for start in range(0, columns, _BLOCK):
            stop = min(start + _BLOCK, columns)
            found[..., start:, start:stop] += wide[..., start:].mT @ wide[..., start:stop]
    return found


def measures(values: Float[Tensor, " p"], *, least: float = 0.0) -> dict[str, Any]:
    """Ranks, entropies and norms of a list of singular values; the fields of `Spectrum` of these names.

    Args:
        values: singular values, largest first.
        least: values at or below it do not count in `rank`.
    """
    values = values.detach().double()
    top = float(values[0]) if values.numel() else 0.0
    if top == 0:
        zeros = ("effective_rank", "entropy", "stable_rank", "participation_ratio", *_NORMS)
        return {"rank": 0, "energy_ranks": dict.fromkeys(ENERGIES, 0), **dict.fromkeys(zeros, 0.0)}
    sizes = values / top
    squares = sizes.square()
    energy = squares.sum()
    rank = int((values > least).sum())
    shares = squares / energy
    entropy = float(torch.special.entr(shares).sum()) / math.log(rank) if rank > 1 else 0.0
    held = shares.cumsum(0)
    return {
        "rank": rank,
        "effective_rank": float(torch.special.entr(sizes / sizes.sum()).sum().exp()),
        "entropy": min(entropy, 1.0),
        "stable_rank": float(energy),
        "participation_ratio": float(energy.square() / squares.square().sum()),
        "energy_ranks": {share: int((held < share * (1 - 1e-12)).sum()) + 1 for share in ENERGIES},
        "nuclear": float(sizes.sum()) * top,
        "frobenius": math.sqrt(float(energy)) * top,
        "spectral": top,
    }


_NORMS = ("nuclear", "frobenius", "spectral")


def check_matrix(matrix: Tensor, where: str) -> None:
    """Refuses what is not a matrix (or a batch of them) of finite real numbers."""
    if matrix.ndim < 2 or not matrix.is_floating_point():
        raise UpdateError(
            f"{where}: a tensor of shape {tuple(matrix.shape)} and dtype {matrix.dtype} is not a real "
            "matrix; flatten a convolution with update.matrix(name)"
        )
    wrong = int(matrix.numel() - matrix.isfinite().sum())
    if wrong:
        raise UpdateError(
            f"{where}: {wrong} of {matrix.numel()} entries (shape {tuple(matrix.shape)}) are NaN "
            "or infinite; look at the checkpoint it was read from"
        )


def _shape(matrix: LowRank | Tensor, where: str) -> tuple[int, int]:
    if matrix.ndim != 2:
        raise UpdateError(
            f"{where}: shape {tuple(matrix.shape)}; give one matrix (m, n). update.matrix(name) flattens a "
            "convolution"
        )
    return int(matrix.shape[0]), int(matrix.shape[1])


def _factors(matrix: LowRank) -> tuple[Tensor, Tensor]:
    """Both factors, in float32 at least, without the graph."""
    half = matrix.dtype in (torch.float16, torch.bfloat16)
    left, right = (side.detach().float() if half else side.detach() for side in (matrix.left, matrix.right))
    for side in (left, right):
        check_matrix(side, "a factor of the update")
    return left, right


def _squared_norm(matrix: LowRank | Tensor) -> float:
    """‖W‖², from the entries or from the factors."""
    if isinstance(matrix, LowRank):
        left, right = (factor.double() for factor in _factors(matrix))
        return float(((left.mT @ left) * (right @ right.mT)).sum().clamp_min(0))
    return float(torch.linalg.vector_norm(matrix.detach(), dtype=torch.float64).square())


def _relative(
    facts: Mapping[str, Any], base: "LowRank | Tensor | Spectrum", shape: tuple[int, int]
) -> dict[str, float]:
    if tuple(base.shape) != shape:
        raise UpdateError(f"spectrum: a matrix of shape {shape} and a base of {tuple(base.shape)} do not fit")
    below = vars(base) if isinstance(base, Spectrum) else measures(singular_values(base))
    return {name: facts[name] / below[name] if below[name] else math.nan for name in _NORMS}


def _finite(value: Any) -> Any:
    """The same, with None for numbers that JSON has not."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
