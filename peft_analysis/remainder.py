"""What is left of a difference after its leading part, against what rounding leaves.

A tuned weight that was rounded to a grid of spacing u (its unit in the last place) carries an error that is
uniform in [−u/2, u/2]: its variance u²/12 differs from entry to entry by orders of magnitude, and is known.
Several merges, each rounded, add as many such variances. A full-rank part of an update does not follow u.
So the squares of what is left after the leading r singular directions are regressed on

    e²ᵢⱼ = roundings · vᵢⱼ + excess · v̄ + product · pᵢⱼ,

with v the variances of one rounding, carried through the projection that took the leading part away, v̄ their
mean, and p those of a product of factors that was itself rounded before it was added. The entries with the
finest grid tell the second term, those with the coarsest the first.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from peft_analysis.rounding import balance

HALF = (torch.bfloat16, torch.float16)
ROWS = 512
"""At most so many rows, drawn at random, are looked at entry by entry."""
FEWEST = 200
"""Fewer entries than that tell nothing."""
MOST = 64.0
"""More roundings than that are none: the remainder is an update's own."""
FLATTEST, STEEPEST, FEW = 0.3, 1.5, 4
"""Exponents of a falling spectrum, and how many values it takes to fit one."""
WHOLE = 1024
"""Up to this side, the leading directions come from all eigenvalues of the Gram matrix."""


@dataclass(frozen=True)
class Remainder:
    """What the remainder of a difference is made of.

    Attributes:
        roundings: by how many roundings of the weights its size is explained; 1 after one merge.
        roundings_error: its standard error.
        excess: energy that follows no grid, in units of the energy of one rounding.
        excess_error: its standard error.
        hidden_rank: in how many directions the excess must lie at least, if none of them shows above the
            edge of the noise: excess · m n / (√m + √n)².
        moved: the share of entries that changed.
        seen: the share of entries that the regression could use.
        noise: root mean square of one rounding, with rows and columns made even.
        tail: the excess that there would be if the spectrum went on below the leading values as a power law
            of their own exponent (fitted to the last three quarters of them, between 0.3 and 1.5, and 1.5
            where they are fewer than four); NaN where none is leading.
        singular_values: the leading ones of the difference itself, as they are seen.
    """

    roundings: float
    roundings_error: float
    excess: float
    excess_error: float
    hidden_rank: float
    moved: float
    seen: float
    noise: float
    tail: float
    singular_values: tuple[float, ...]


def remainder(
    difference: Float[Tensor, "m n"],
    base: Float[Tensor, "m n"],
    rank: int,
    *,
    rounded: torch.dtype,
    same_grid: bool,
    generator: torch.Generator,
) -> Remainder:
    """Take the leading singular directions away and read what is left.

    Rows and columns are first multiplied so that the noise is even over them, as in `noise_edge`.

    Args:
        difference: tuned − base.
        base: the base's values.
        rank: how many leading directions to take away.
        rounded: the dtype that the tuned values were rounded to.
        same_grid: whether the base lies on that grid too. Then an entry that moved by less than its spacing
            was rounded to no change, which is no uniform error; only entries that the leading part moves
            by a whole step are used.
        generator: draws the rows of a large matrix.
    """
    if difference.shape[0] > difference.shape[1]:
        difference, base = difference.mT, base.mT
    d, w = difference.double(), base.double()
    size = torch.maximum(torch.maximum(w.abs(), (w + d).abs()), d.abs())
    step, own, fine = spacing(size, rounded), spacing(d, rounded), spacing(d, torch.float32)
    scale, plain = balance(w + d, rounded), d
    if scale is not None:
        d, step, own, fine = (part * scale for part in (d, step, own, fine))
    left, right, values, leading = leading_part(d, rank, generator)
    left_out = d - leading
    once = step.square() / 12 + fine.square() / 12
    rows = torch.arange(len(d), device=d.device)
    if len(rows) > ROWS:
        drawn = torch.randperm(len(rows), generator=generator, device=generator.device)
        rows = drawn[:ROWS].to(d.device).sort().values
    carried = _carried(once, left, right, rows)
    product = own[rows].square() / 12
    usable = carried > 0
    if same_grid and rank > 0:
        usable &= leading[rows].abs() > step[rows]
    mean = float(once.mean())
    fitted = _regress(left_out[rows][usable].square(), carried[usable], product[usable], mean)
    m, n = d.shape
    shown = values if scale is None else leading_part(plain, rank, generator)[2]
    return Remainder(
        *fitted,
        hidden_rank=max(fitted[2], 0.0) * m * n / (math.sqrt(m) + math.sqrt(n)) ** 2,
        moved=float((d != 0).double().mean()),
        seen=float(usable.double().mean()),
        noise=math.sqrt(mean),
        tail=_tail(values, (m, n), mean, fitted[0]) if rank > 0 and mean > 0 else math.nan,
        singular_values=tuple(shown.tolist()),
    )


def _tail(values: Float[Tensor, " r"], shape: tuple[int, int], mean: float, roundings: float) -> float:
    m, n = shape
    many = min(max(roundings, 1.0), MOST) if math.isfinite(roundings) else 1.0
    return continued(unspiked(values, shape, many * mean), min(m, n)) / (m * n * mean)


def unspiked(values: Float[Tensor, " r"], shape: tuple[int, int], variance: float) -> Float[Tensor, " r"]:
    """The singular values without the noise that enlarged them; those of the noise itself at its edge.

    A value θ of a matrix with independent noise of variance v is seen at σ² = (θ² + m v)(θ² + n v) / θ²
    (Benaych-Georges and Nadakuditi, 2012). Below σ = √v (√m + √n) nothing of θ can be told.
    """
    m, n = shape
    middle = values.square() - (m + n) * variance
    root = (middle.square() - 4 * m * n * variance**2).clamp_min(0).sqrt()
    least = math.sqrt(m * n) * variance
    return ((middle + root) / 2).clamp_min(least).sqrt()


def continued(values: Float[Tensor, " r"], size: int) -> float:
    """The energy of the values after these if they fell on by the same power law; see `Remainder.tail`."""
    r = len(values)
    exponent = STEEPEST
    if r >= FEW:
        place = torch.arange(r // 4 + 1, r + 1, dtype=torch.float64, device=values.device).log()
        height = values[r // 4 :].clamp_min(torch.finfo(torch.float64).tiny).log()
        place, height = place - place.mean(), height - height.mean()
        exponent = min(max(-float((place * height).sum() / place.square().sum()), FLATTEST), STEEPEST)
    beyond = torch.arange(r + 1, size + 1, dtype=torch.float64, device=values.device) / r
    return float(values[-1].square() * beyond.pow(-2 * exponent).sum())


def spacing(values: Float[Tensor, "*shape"], dtype: torch.dtype) -> Float[Tensor, "*shape"]:
    """The unit in the last place of numbers of this size in a dtype, in float64; the smallest one at zero.

    >>> spacing(torch.tensor([1.0, 1.9, 2.0, 0.0]), torch.bfloat16)[:3]
    tensor([0.0078, 0.0078, 0.0156], dtype=torch.float64)
    """
    facts = torch.finfo(dtype)
    exponent = torch.frexp(values.abs().double())[1] - 1
    least = math.frexp(facts.smallest_normal)[1] - 1
    exponent = torch.where(values == 0, least, exponent).clamp_min(least)
    return torch.ldexp(torch.full_like(values, facts.eps, dtype=torch.float64), exponent)


def grid(values: Float[Tensor, "*shape"], stored: torch.dtype) -> torch.dtype:
    """The coarsest of bfloat16, float16 and the stored dtype whose numbers these values are.

    A checkpoint that was rounded to half precision and widened again is still on the coarse grid.
    """
    for dtype in HALF:
        if stored not in HALF and values.numel() and torch.isfinite(values.to(dtype)).all():
            off = (values.to(dtype).to(values.dtype) - values).abs()
            if bool((off <= 2.0**-21 * values.abs()).double().mean() > 0.999):
                return dtype
    return stored


def leading_part(
    d: Float[Tensor, "m n"], rank: int, generator: torch.Generator
) -> tuple[Float[Tensor, "m r"], Float[Tensor, "n r"], Float[Tensor, " r"], Float[Tensor, "m n"]]:
    """The leading left and right singular vectors, their values, and the matrix's part in their span.

    For m ≤ n. The left ones come from the Gram matrix of the rows, in a large matrix from subspace iteration.
    """
    if rank <= 0:
        return d.new_zeros(len(d), 0), d.new_zeros(d.shape[1], 0), d.new_zeros(0), torch.zeros_like(d)
    if len(d) <= WHOLE or rank > len(d) // 8:
        left = torch.linalg.eigh(d @ d.mT)[1].flip(-1)[:, :rank]
    else:
        start = torch.randn(d.shape[1], rank + 10, generator=generator, device=generator.device)
        block = d @ start.to(d)
        for _ in range(6):
            block = torch.linalg.qr(block)[0]
            block = d @ (d.mT @ block)
        block = torch.linalg.qr(block)[0]
        left = block @ torch.linalg.svd(block.mT @ d, full_matrices=False)[0][:, :rank]
    rows = left.mT @ d
    values = rows.norm(dim=1)
    right = rows.mT / values.clamp_min(torch.finfo(d.dtype).tiny)
    return left, torch.linalg.qr(right)[0] * _signs(right), values, left @ rows


def _signs(frame: Float[Tensor, "n r"]) -> Float[Tensor, " r"]:
    """What QR turns columns that are orthogonal already by: ±1."""
    diagonal = torch.linalg.qr(frame)[1].diagonal()
    return torch.where(diagonal < 0, -1.0, 1.0).to(frame)


def _carried(
    once: Float[Tensor, "m n"],
    left: Float[Tensor, "m r"],
    right: Float[Tensor, "n r"],
    rows: Tensor,
) -> Float[Tensor, "rows n"]:
    """Variances of (I − P) N (I − Q) for independent entries N: squared projectors on either side."""
    if left.shape[1] == 0:
        return once[rows]
    keep = -(left[rows] @ left.mT)
    keep[torch.arange(len(rows), device=rows.device), rows] += 1
    found = keep.square() @ once
    keep = -(right @ right.mT)
    keep.diagonal().add_(1)
    return found @ keep.square()


def _regress(
    squares: Float[Tensor, " k"], carried: Float[Tensor, " k"], product: Float[Tensor, " k"], mean: float
) -> tuple[float, float, float, float]:
    """Weighted least squares with errors that hold for unequal variances (White, 1980)."""
    nothing = (math.nan, math.inf, math.nan, math.inf)
    if len(squares) < FEWEST or mean == 0:
        return nothing
    y = squares / carried
    columns = [torch.ones_like(y), mean / carried]
    if float((product / carried).mean()) > 1e-3:
        columns.append(product / carried)
    found = torch.zeros(len(columns), dtype=y.dtype, device=y.device)
    kept = list(range(len(columns)))
    weight = torch.ones_like(y)
    for _ in range(12):
        design = torch.stack([columns[i] for i in kept], -1)
        scaled = design * weight.unsqueeze(-1)
        inverse = torch.linalg.pinv(scaled.mT @ design)
        found = inverse @ (scaled.mT @ y)
        if len(kept) == 3 and float(found[2]) < 0:
            kept = kept[:2]
            continue
        if float(found[0]) < 0:  # no rounding at all beside what is there
            found[0] = 0.0
        weight = (design @ found).clamp_min(1e-3).square().reciprocal()
    off = (y - design @ found).unsqueeze(-1) * scaled
    errors = (inverse @ (off.mT @ off) @ inverse).diagonal().clamp_min(0).sqrt()
    return float(found[0]), float(errors[0]), float(found[1]), float(errors[1])
