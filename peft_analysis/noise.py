"""The edge of rounding noise in a spectrum, and the rank that stands above it."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.rounding import Rounding, largest_singular_value, storage_dtype
from peft_analysis.spectrum import check_matrix, gram, singular_values

MARGIN = 0.04  # how far above the simulated edge a singular value must be
CLEAR = 0.1  # and how far to be counted for certain
GAP = 2.0  # a last value so many times above the edge ends a spectrum, rather than fading into the noise
EXPLAINED = 0.25  # an error of reading, over the edge, that leaves a fit of that rank nothing to explain
DRAWS = 2


@dataclass(frozen=True)
class NoiseEdge:
    """Where the noise of rounding ends in the spectrum of a difference.

    Attributes:
        edge: the largest singular value that noise alone is expected to give, beside the components above it.
            0 where there is no noise.
        interval: the edge is believed between these.
        count: how many singular values of the difference are above the edge.
        method: "exact" (factors), "simulated rounding" (base and dtype known), "random signs" (the difference
            alone), or "float arithmetic" (nothing below the components but errors of the last digit).
        first_noise: the largest singular value of the difference below the edge.
        last_signal: the smallest one above it; NaN if there is none.
        hidden: energy of the difference below the edge beyond what noise explains, in units of edge²; NaN
            where the noise's own energy is not known.
        hidden_error: its standard error.
        unmoved: the share of entries that did not change.
        values: all singular values of the difference (p,).
    """

    edge: float
    interval: tuple[float, float]
    count: int
    method: str
    first_noise: float
    last_signal: float
    hidden: float
    hidden_error: float
    unmoved: float
    values: Tensor

    def to_dict(self) -> dict[str, Any]:
        """All but the singular values, in plain Python."""
        return {name: value for name, value in asdict(self).items() if name != "values"}


@dataclass(frozen=True)
class RankEstimate:
    """The rank of an update, read from a difference that carries rounding noise.

    Attributes:
        rank: the most likely rank: how many singular values are above the noise.
        low: the true rank is at least this.
        high: and at most this; min(m, n) where nothing can be said.
        edge: the noise edge, as a singular value.
        reliable: whether low … high is more than the count and its absence of an upper bound.
        reason: what the answer rests on, or why it is not known.
        method: as in `NoiseEdge`.
    """

    rank: int
    low: int
    high: int
    edge: float
    reliable: bool
    reason: str
    method: str

    def to_dict(self) -> dict[str, Any]:
        """The same in plain Python."""
        return asdict(self)


def noise_edge(
    difference: LowRank | Tensor,
    *,
    base: Tensor | None = None,
    tuned: Tensor | None = None,
    rounded: torch.dtype | None = None,
    base_rounded: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> NoiseEdge:
    """The edge of the rounding noise in the spectrum of a difference, and what is above it.

    With the base, a rank k is tried: the update of rank k is fitted that reads as the difference when base +
    update is rounded; its components with random signs are added to the base and rounded again; and the
    largest singular value beyond the k leading ones of what is then read is the edge that rank k predicts.
    The rank is the smallest k whose next singular value does not exceed that edge. Rows, columns and single
    entries of very different size, updates larger or smaller than the spacing of the dtype, and the
    components that rounding itself makes of a structured update are all in the simulation.

    Without the base nothing can be rounded again. Then the residual beyond k components has its entries'
    signs drawn anew (parallel analysis): noise keeps its spectrum, structure loses it.

    Cost: one eigendecomposition of the smaller Gram matrix; for each rank that is tried (about 2 log₂ of the
    rank) some products of the matrix with k and with 48 vectors. No further decomposition of the matrix.

    Args:
        difference: (m, n): tuned − base.
        base: the base's matrix.
        tuned: the tuned matrix; base + difference if not given.
        rounded: the dtype that the tuned values were stored in; a coarser one that holds them all is found.
        base_rounded: the dtype that the base's values were stored in, likewise.
        generator: for signs and starts; a generator of seed 0 if not given.

    Raises:
        UpdateError: for matrices that are not finite, real, two-dimensional and of one shape.
    """
    shape = _check(difference, base, tuned)
    if isinstance(difference, LowRank):
        return _exact(difference)
    generator = generator if generator is not None else torch.Generator().manual_seed(0)
    if base is None and tuned is not None:
        base = tuned.double() - difference.double()
    model = _model(difference.detach(), base, tuned, rounded, base_rounded) if base is not None else None
    wanted = difference.detach().to(model[1].base.dtype if model is not None else torch.float64)
    parts = _Parts(wanted, generator)
    floor = float(parts.values[0]) * max(shape) * torch.finfo(torch.float32).eps if parts.count else 0.0
    unmoved = float((wanted == 0).double().mean()) if wanted.numel() else 1.0
    if not parts.count or float(parts.values[0]) == 0:
        return NoiseEdge(0.0, (0.0, 0.0), 0, "exact", 0.0, math.nan, 0.0, 0.0, unmoved, parts.values)
    null: _Null = _RoundingNull(parts, *model) if model is not None else _SignNull(parts)
    count = _search(parts, null)
    found = null(count)
    method = null.method
    if base is None and found.edge <= floor:
        method = "float arithmetic"
    return NoiseEdge(
        edge=found.edge,
        interval=(found.edge * (1 - MARGIN), found.edge * (1 + MARGIN)),
        count=count,
        method=method,
        first_noise=float(parts.values[count]) if count < parts.count else 0.0,
        last_signal=float(parts.values[count - 1]) if count else math.nan,
        hidden=found.hidden,
        hidden_error=found.hidden_error,
        unmoved=unmoved,
        values=parts.values,
    )


def true_rank(
    difference: LowRank | Tensor,
    *,
    base: Tensor | None = None,
    tuned: Tensor | None = None,
    rounded: torch.dtype | None = None,
    base_rounded: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> RankEstimate:
    """The rank of the update behind a difference, with an interval; see `noise_edge`.

    A `LowRank` has its numerical rank, exactly. For a dense difference `rank` counts the singular values
    above the noise. A component weaker than the noise cannot be seen; `high` is the rank itself where nothing
    speaks for hidden components: the energy below the edge is what rounding explains, and the last component
    stands clear of the edge. Where the energy says that there is more, `high` is min(m, n).

    Args:
        difference: (m, n): tuned − base.
        base: the base's matrix.
        tuned: the tuned matrix; base + difference if not given.
        rounded: the dtype that the tuned values were stored in.
        base_rounded: the dtype that the base's values were stored in.
        generator: for signs and starts; a generator of seed 0 if not given.

    Example:
        >>> import torch
        >>> from peft_analysis.noise import true_rank
        >>> draw = torch.Generator().manual_seed(0)
        >>> base, B, A = (torch.randn(size, generator=draw) for size in ((200, 160), (200, 3), (3, 160)))
        >>> tuned = (base + 0.01 * B @ A).bfloat16()
        >>> difference = tuned.float() - base
        >>> int(torch.linalg.matrix_rank(difference)), true_rank(difference, base=base, tuned=tuned).rank
        (160, 3)
    """
    edge = noise_edge(
        difference, base=base, tuned=tuned, rounded=rounded, base_rounded=base_rounded, generator=generator
    )
    return judge(edge, min(difference.shape[-2:]))


def judge(edge: NoiseEdge, full: int) -> RankEstimate:
    """The rank and its interval from a noise edge; `full` is min(m, n)."""
    rank = edge.count
    if edge.method == "exact":
        reason = "no entry differs" if rank == 0 else "the update is known in factors"
        return RankEstimate(rank, rank, rank, edge.edge, True, reason, edge.method)
    low = int((edge.values[:rank] > edge.edge * (1 + CLEAR)).sum())
    clear = rank > 0 and edge.last_signal > GAP * edge.edge
    many = f"{edge.unmoved:.0%} of the entries did not move" if edge.unmoved > 0.5 else ""
    if rank == full:
        why, high = "every singular value is above the noise", full
    elif edge.hidden > 2.5 * edge.hidden_error + 0.25:
        why, high = f"below the edge lies {edge.hidden:.1f} edge² more than rounding explains", full
    elif rank == 0:
        why = "no component stands above the rounding noise"
        if math.isnan(edge.hidden):
            why = "the entries look independent: noise or a full-rank update; the base would tell them apart"
        high = full
    elif clear:
        why, high = "the last component is clear of the noise, and rounding explains the rest", rank
    elif math.isnan(edge.hidden):
        why, high = "the spectrum fades into noise of unknown size; give the base for a bound", full
    else:
        why = "the spectrum fades into the rounding noise; weaker components may hide there"
        high = min(full, rank + _faded(edge))
    reason = "; ".join(part for part in (why, many) if part)
    return RankEstimate(rank, low, high, edge.edge, high < full or rank == full, reason, edge.method)


def _faded(edge: NoiseEdge) -> int:
    """How many more components would follow below the edge if the spectrum went on falling as it did."""
    values = edge.values[: edge.count]
    ratio = float(values[-1] / values[0]) ** (1 / (edge.count - 1)) if edge.count > 1 else 0.5
    ratio = min(max(ratio, 0.1), 0.99)
    budget = (max(edge.hidden, 0.0) + 2.5 * edge.hidden_error + 0.25) * edge.edge**2
    found, value = 0, float(values[-1]) * ratio
    while value > 0.03 * edge.edge and budget > 0:
        budget -= value**2
        found, value = found + 1, value * ratio
    return max(found, 1)


@dataclass(frozen=True)
class _Expected:
    """What a hypothesis of rank k expects beyond its k components."""

    edge: float
    hidden: float
    hidden_error: float
    unexplained: float = math.inf


@runtime_checkable
class _Null(Protocol):
    """What a kind of noise expects of a hypothesis."""

    method: str

    def __call__(self, rank: int) -> _Expected: ...

    def first_edge(self) -> float:
        """An edge to start from."""


class _Parts:
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


class _RoundingNull:
    """Expects what rounding makes of a base and an update of rank k; see `noise_edge`."""

    method = "simulated rounding"

    def __init__(self, parts: _Parts, sign: float, rounding: Rounding) -> None:
        self.parts, self.sign, self.rounding = parts, sign, rounding
        self.target = sign * parts.matrix
        self.known: dict[int, _Expected] = {}

    def __call__(self, rank: int) -> _Expected:
        if rank not in self.known:
            self.known[rank] = self._simulate(rank)
        return self.known[rank]

    def _simulate(self, rank: int) -> _Expected:
        left, values, right = self.parts.leading(rank)
        left, values, right = self.rounding.fit(self.target, self.sign * left, values, right)
        unexplained = math.inf
        if self.rounding.aligned and rank:
            rest = self.target - self.rounding.read((left * values) @ right.mT)
            unexplained = self._largest(rest, left[:, :0], right[:, :0])
        edges, energies, spread = [], [], 0.0
        for _ in range(DRAWS):
            signed = values * self.parts.signs(rank)
            read = self.rounding.read((left * signed) @ right.mT)
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
        return _Expected(edge, (left_over - energy) / unit, spread / unit, unexplained)

    def first_edge(self) -> float:
        """That of evenly spread errors; where entries do not move, the noise is less."""
        rest = self.rounding.dithered(self.parts.generator)
        return self._largest(rest, rest[:, :0], rest.mT[:, :0])

    def _largest(self, rest: Tensor, left: Tensor, right: Tensor) -> float:
        return largest_singular_value(rest, left, right, generator=self.parts.generator)


class _SignNull:
    """Expects what the residual beyond k components gives with the signs of its entries drawn anew."""

    method = "random signs"

    def __init__(self, parts: _Parts) -> None:
        self.parts = parts
        self.known: dict[int, _Expected] = {}

    def __call__(self, rank: int) -> _Expected:
        if rank not in self.known:
            self.known[rank] = _Expected(self._edge(rank), math.nan, math.nan)
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


def _search(parts: _Parts, null: _Null) -> int:
    """The smallest rank that is enough: from a guess up by doubled steps, or down, then by halving."""

    def enough(rank: int) -> bool:
        if rank >= parts.count:
            return True
        expected = null(rank)
        if expected.edge == 0:
            return float(parts.values[rank]) == 0
        ratio, reads = float(parts.values[rank]) / expected.edge, expected.unexplained / expected.edge
        return ratio <= 1 + MARGIN or (ratio <= 1 + CLEAR and reads <= 1) or reads <= EXPLAINED

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


def _model(
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


def _rounding(base: Float[Tensor, "m n"], dtype: torch.dtype) -> Rounding:
    work = torch.float32 if torch.finfo(dtype).eps > 1e-5 else torch.float64
    return Rounding(base.to(work), dtype, bool((base.to(dtype).to(base.dtype) == base).all()))


def _exact(difference: LowRank) -> NoiseEdge:
    values = singular_values(difference)
    limit = max(*difference.shape, 1) * torch.finfo(difference.dtype).eps
    count = int((values > limit * values[:1]).sum())
    last = float(values[count - 1]) if count else math.nan
    edge = float(limit * values[0]) if values.numel() else 0.0
    first = float(values[count]) if count < values.numel() else 0.0
    return NoiseEdge(edge, (edge, edge), count, "exact", first, last, 0.0, 0.0, math.nan, values)


def _check(difference: LowRank | Tensor, base: Tensor | None, tuned: Tensor | None) -> tuple[int, int]:
    if difference.ndim != 2:
        raise UpdateError(
            f"noise_edge: shape {tuple(difference.shape)}; give one matrix (m, n); see update.matrix"
        )
    for name, matrix in {"difference": difference, "base": base, "tuned": tuned}.items():
        if matrix is None or isinstance(matrix, LowRank):
            continue
        check_matrix(matrix, f"noise_edge: {name}")
        if matrix.shape != difference.shape:
            raise UpdateError(
                f"noise_edge: {name} is {tuple(matrix.shape)}, the difference {tuple(difference.shape)}"
            )
    return int(difference.shape[0]), int(difference.shape[1])
