"""What noise alone would give beyond the leading components of a difference: the hypotheses of `noise`."""

import math
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from peft_analysis.remainder import spacing
from peft_analysis.rounding import Rounding, balance, largest_singular_value, storage_dtype
from peft_analysis.spectrum import gram

MARGIN = 0.04  # how far above the simulated edge a singular value must be, beside the spread of the draws
CLEAR = 0.1  # and how far to be counted for certain
GAP = 2.0  # a last value so many times above the edge ends a spectrum, rather than fading into the noise
LEFT = 0.125  # of all singular values must be below the edge for the rank to have an upper bound
EXPLAINED = 0.25  # an error of reading, over the edge, that leaves a fit of that rank nothing to explain
DRAWS = 3
MOST_ROUNDINGS = 4  # one after another, that are told from an update of full rank
WHOLE = 0.06  # how far from a whole number of roundings the energy of the noise may be
ALONE = 0.05  # the share of a component in one entry; one that is spread over both sides has far less


@dataclass(frozen=True)
class Expected:
    """What a hypothesis of rank k expects beyond its k components.

    Attributes:
        edge: the largest singular value of the noise.
        hidden: energy of the difference beyond the noise's, over edge².
        hidden_error: its standard error, from the fourth powers of the noise's entries (an upper bound).
        unexplained: the largest singular value of what the fitted update reads wrong.
        margin: how far above the edge a value of noise may lie, relative to it.
        energy: of the noise, squared Frobenius norm.
    """

    edge: float
    hidden: float
    hidden_error: float
    unexplained: float = math.inf
    margin: float = MARGIN
    energy: float = math.nan


@runtime_checkable
class Null(Protocol):
    """What a kind of noise expects of a hypothesis."""

    method: str

    def __call__(self, rank: int) -> Expected:
        """What noise beyond that many components is like."""
        ...

    def first_edge(self) -> float:
        """An edge to start from."""


class Parts:
    """The singular value decomposition of a difference, from its smaller Gram matrix in float64."""

    def __init__(self, matrix: Float[Tensor, "m n"], generator: torch.Generator) -> None:
        self.matrix, self.generator = matrix, generator
        self.count = min(matrix.shape)
        self.wide = matrix.shape[0] < matrix.shape[1]
        tall = matrix.mT if self.wide else matrix
        scale = tall.abs().amax() if tall.numel() else tall.new_ones(())
        scale = torch.where(scale > 0, scale, 1.0).double().reshape(1, 1)
        if not self.count:
            self.values, self.frame = matrix.new_zeros(0), matrix.new_zeros(0, 0)
            return
        squares, frame = torch.linalg.eigh(gram(tall, scale))
        self.values = (squares.flip(0).clamp_min(0).sqrt() * scale[0]).to(matrix.dtype)
        self.frame = frame.flip(1).to(matrix.dtype)

    def leading(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """U, σ, V of the leading components, with orthonormal columns."""
        near = self.frame[:, :rank]
        tall = self.matrix.mT if self.wide else self.matrix
        far = torch.linalg.qr(tall @ near)
        far = far[0] * torch.where(far[1].diagonal() < 0, -1.0, 1.0)
        left, right = (near, far) if self.wide else (far, near)
        return left, self.values[:rank], right

    def signs(self, *shape: int) -> Tensor:
        """Random signs."""
        drawn = torch.randint(0, 2, shape, generator=self.generator, device=self.generator.device) * 2 - 1
        return drawn.to(self.matrix)


class RoundingNull:
    """Expects what rounding makes of a base and an update of rank k; see `noise_edge`.

    With `own` the update was rounded before it was added. A product of k terms that is scaled has about
    k / 2 + 3 roundings of the size of its entries; one in half precision is made in float32 and rounded
    once. These errors follow the rows and columns of the update and show where it is large beside the base.
    """

    method = "simulated rounding"

    def __init__(self, parts: Parts, sign: float, rounding: Rounding, *, own: bool = False) -> None:
        self.parts, self.sign, self.rounding, self.own = parts, sign, rounding, own
        self.target = sign * parts.matrix
        self.known: dict[int, Expected] = {}

    def __call__(self, rank: int) -> Expected:
        """What noise beyond that many components is like; computed once."""
        if rank not in self.known:
            self.known[rank] = self._simulate(rank)
        return self.known[rank]

    def _simulate(self, rank: int) -> Expected:
        left, values, right = self.parts.leading(rank)
        left, values, right = self.rounding.fit(self.target, self.sign * left, values, right)
        unexplained = math.inf
        if self.rounding.aligned and rank:
            rest = self.target - self.rounding.read((left * values) @ right.mT)
            unexplained = self._largest(rest, left[:, :0], right[:, :0])
        edges, energies, spread = [], [], 0.0
        for _ in range(DRAWS):
            signed = values * self.parts.signs(rank)
            update = (left * signed) @ right.mT
            read = self.rounding.read(update) + self._arithmetic(update, rank)
            inner = right
            for _ in range(2 if rank else 0):
                outer = torch.linalg.qr(read @ inner)[0]
                inner = torch.linalg.qr(read.mT @ outer)[0]
            outer = torch.linalg.qr(read @ inner)[0]
            rest = read - outer @ (outer.mT @ read)
            rest = rest - (rest @ inner) @ inner.mT
            edges.append(self._largest(rest, outer, inner))
            squares = rest.square()
            energies.append(float(squares.sum(dtype=torch.float64)))
            spread = float(squares.square().sum(dtype=torch.float64)) ** 0.5
        edge, energy = max(edges), sum(energies) / DRAWS
        left_over = float(self.parts.values[rank:].double().square().sum())
        unit = edge**2 if edge > 0 else math.inf
        margin = MARGIN + (edge - min(edges)) / edge if edge else MARGIN
        hidden = (left_over - energy) / unit
        return Expected(edge, hidden, spread / unit, unexplained, margin, energy)

    def _arithmetic(self, update: Tensor, rank: int) -> Tensor | float:
        """The errors of the update's own arithmetic, where `own` says that it was rounded too."""
        if not self.own:
            return 0.0
        epsilon = torch.finfo(self.rounding.dtype).eps
        roundings = 1.0 if epsilon > 1e-5 else rank / 2 + 3
        return update * self.parts.signs(*update.shape) * (epsilon * math.sqrt(roundings / 12))

    def first_edge(self) -> float:
        """That of evenly spread errors; where entries do not move, the noise is less."""
        rest = self.rounding.dithered(self.parts.generator)
        return self._largest(rest, rest[:, :0], rest.mT[:, :0])

    def of_one_weight(self, rank: int) -> bool:
        """Whether the next component is mostly one entry, and rounding that one weight is enough for it.

        In a base of heavy tails the spacing of the largest weight can exceed the edge of all other noise. Its
        error is one draw, which the largest of a few simulated ones need not reach.
        """
        if rank >= self.parts.count:
            return False
        left, values, right = self.parts.leading(rank + 1)
        outer, inner = left[:, rank], right[:, rank]
        i, j = int(outer.abs().argmax()), int(inner.abs().argmax())
        share = float(outer[i] * inner[j]) ** 2
        scale = 1.0 if self.rounding.scale is None else float(self.rounding.scale[i, j])
        size = self.rounding.base[i, j].abs() + self.target[i, j].abs() / scale
        error = float(spacing(size, self.rounding.dtype)) / 2 * scale
        return share > ALONE and float(values[rank]) * share**0.5 <= error

    def _largest(self, rest: Tensor, left: Tensor, right: Tensor) -> float:
        return largest_singular_value(rest, left, right, generator=self.parts.generator)


class SignNull:
    """Expects what the residual beyond k components gives with the signs of its entries drawn anew."""

    method = "random signs"

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.known: dict[int, Expected] = {}

    def __call__(self, rank: int) -> Expected:
        """What noise beyond that many components is like; computed once."""
        if rank not in self.known:
            self.known[rank] = Expected(self._edge(rank), math.nan, math.nan)
        return self.known[rank]

    def first_edge(self) -> float:
        """That of the whole difference, which is too high."""
        return self(0).edge

    def _edge(self, rank: int) -> float:
        left, values, right = self.parts.leading(rank)
        rest = self.parts.matrix - (left * values) @ right.mT
        rows, columns = rest.shape
        if rank >= min(rows, columns):
            return 0.0
        none = rest.new_zeros(rows, 0), rest.new_zeros(columns, 0)
        edges = []
        for _ in range(DRAWS):
            drawn = rest * self.parts.signs(*rest.shape)
            edges.append(largest_singular_value(drawn, *none, generator=self.parts.generator))
        kept_rows, kept_columns = 1 - rank / rows, 1 - rank / columns
        corner = math.sqrt(rows - rank) + math.sqrt(columns - rank)
        corner = corner / (math.sqrt(rows) + math.sqrt(columns)) / math.sqrt(kept_rows * kept_columns)
        return max(edges) * corner


def explained(parts: Parts, null: Null, count: int) -> bool:
    """Whether noise alone lies beyond so many components, and they are not most of all."""
    found = null(count)
    return count <= parts.count // 2 and found.hidden <= 2.5 * found.hidden_error + 0.25


def with_own_rounding(null: RoundingNull, count: int) -> tuple[RoundingNull, int]:
    """The hypothesis that the update was rounded itself, with its rank, where that explains what is left.

    Else the hypothesis as it was given, with its rank.
    """
    if explained(null.parts, null, count):
        return null, count
    own = RoundingNull(null.parts, null.sign, null.rounding, own=True)
    fewer = search(null.parts, own)
    return (own, fewer) if explained(null.parts, own, fewer) else (null, count)


def several_roundings(parts: Parts, null: RoundingNull, count: int) -> tuple[int, Expected, int] | None:
    """The rank, the noise and the number of roundings where one rounding does not explain the noise.

    Merges one upon another round as often. The edge then comes from random signs, which know no size of the
    noise, and the number of roundings from its energy. None where one rounding is enough, or the spectrum
    fades into the noise, or the number is not whole: an update of full rank.

    Args:
        parts: of the difference.
        null: the noise of one rounding.
        count: the rank that it gives.
    """
    if explained(parts, null, count):
        return None
    signs = SignNull(parts)
    count = search(parts, signs)
    edge, one = signs(count).edge, null(count)
    if not count or count > parts.count // 2 or float(parts.values[count - 1]) < GAP * edge or not one.energy:
        return None
    energy = float(parts.values[count:].double().square().sum())
    roundings = round(energy / one.energy)
    if not 1 < roundings <= MOST_ROUNDINGS or abs(energy / one.energy - roundings) > WHOLE * roundings:
        return None
    return count, repeated(parts, null, count, roundings), roundings


def repeated(parts: Parts, null: RoundingNull, count: int, roundings: int) -> Expected:
    """What that many roundings, one upon another, leave beyond a rank; the edge is that of random signs."""
    edge, one = SignNull(parts)(count).edge, null(count)
    energy = float(parts.values[count:].double().square().sum())
    error = one.hidden_error * (one.edge / edge) ** 2 * roundings
    return Expected(edge, (energy - roundings * one.energy) / edge**2, error)


def search(parts: Parts, null: Null) -> int:
    """The smallest rank that is enough: from a guess up by doubled steps, or down, then by halving."""

    def enough(rank: int) -> bool:
        if rank >= parts.count:
            return True
        expected = null(rank)
        if expected.edge == 0:
            return float(parts.values[rank]) == 0
        ratio, reads = float(parts.values[rank]) / expected.edge, expected.unexplained / expected.edge
        if ratio <= 1 + expected.margin or (ratio <= 1 + CLEAR and reads <= 1) or reads <= EXPLAINED:
            return True
        return isinstance(null, RoundingNull) and null.of_one_weight(rank) and enough(rank + 1)

    guess = int((parts.values > null.first_edge() * (1 + MARGIN)).sum())
    step, short, fine = 1, -1, parts.count
    if enough(guess):
        fine = guess
        while fine > 0 and short < 0:
            lower = max(fine - step, 0)
            short, fine = (short, lower) if enough(lower) else (lower, fine)
            step *= 2
    else:
        short = guess
        while short + step < parts.count and not enough(short + step):
            short, step = short + step, 2 * step
        fine = min(short + step, parts.count)
    while fine - short > 1:
        middle = (short + fine) // 2
        short, fine = (short, middle) if enough(middle) else (middle, fine)
    return fine


def what_was_rounded(
    difference: Tensor,
    base: Tensor,
    tuned: Tensor | None,
    rounded: torch.dtype | None,
    base_rounded: torch.dtype | None,
) -> tuple[float, Rounding]:
    """What was rounded, and the sign of the update: the tuned values, or the base's if they are the coarser.

    A base that was rounded is the tuned values less the update, rounded.
    """
    exact = base.detach().double()
    after = tuned.detach().double() if tuned is not None else exact + difference.double()
    slack = 0.0 if tuned is not None else torch.finfo(torch.float32).eps * (exact.abs() + difference.abs())
    rounded = storage_dtype(after, rounded, slack=slack)
    base_rounded = storage_dtype(exact, base_rounded)
    if torch.finfo(base_rounded).eps > torch.finfo(rounded).eps:
        return -1.0, _rounding(after, base_rounded)
    return 1.0, _rounding(exact, rounded)


def balanced(
    matrix: Float[Tensor, "m n"], sign: float, rounding: Rounding
) -> tuple[Float[Tensor, "m n"], Rounding] | None:
    """The difference and its rounding with even noise in rows and columns; None if it is even already.

    Args:
        matrix: the difference.
        sign: of the update; the stored values are those that were rounded plus sign times the difference.
        rounding: of the plain difference.
    """
    scale = balance(rounding.base + sign * matrix, rounding.dtype)
    return None if scale is None else (matrix * scale, replace(rounding, scale=scale))


def _rounding(base: Float[Tensor, "m n"], dtype: torch.dtype) -> Rounding:
    work = torch.float32 if torch.finfo(dtype).eps > 1e-5 else torch.float64
    return Rounding(base.to(work), dtype, bool((base.to(dtype).to(base.dtype) == base).all()))
