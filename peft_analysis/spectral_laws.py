"""Two laws that spectra are compared with: a power law in the tail, Marchenko and Pastur's bulk."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_VALUES = 8
TRACY_WIDOM_99 = 2.0234  # the 99 % quantile of the Tracy–Widom law of real matrices (Bejan 2005, table 2)
_CELLS = 1 << 22  # of the largest table that a fit makes at once


@dataclass(frozen=True)
class PowerLaw:
    """The tail p(λ) ∝ λ^−α of the eigenvalues λ = σ², by the method of Clauset, Shalizi and Newman (2009).

    x_min is the eigenvalue above which the fitted law is nearest to the data in the Kolmogorov–Smirnov
    distance, every eigenvalue but the last being tried; α = 1 + n / Σ log(λ / x_min) over the n values of the
    tail. These are the conventions of WeightWatcher's alpha (Martin, Peng and Mahoney 2021).

    Attributes:
        alpha: the exponent; NaN where it cannot be told.
        alpha_error: its standard error (α − 1) / √n.
        x_min: the smallest eigenvalue of the tail, in units of the matrix squared.
        ks: the Kolmogorov–Smirnov distance of the tail to the law.
        p_value: how often tails that follow the law at that x_min are as far from it. Because x_min was
            chosen to make the distance small, it is an upper bound: a small value speaks against a power
            law, a large one hardly for it.
        tail: how many eigenvalues the tail has.
        reason: why alpha is NaN; "" where it is not.
    """

    alpha: float
    alpha_error: float
    x_min: float
    ks: float
    p_value: float
    tail: int
    reason: str = ""


@dataclass(frozen=True)
class MarchenkoPastur:
    """The bulk that independent entries would have, fitted to the median singular value.

    Formula: singular values of an m × n matrix of independent entries with standard deviation s fill the
    interval s |√m − √n| … s (√m + √n) (Marchenko and Pastur 1967). s is the slope of the middle half of the
    singular values over the same quantiles of that law, so that a few large values do not move the fit; with
    the median alone it is the estimate of Gavish and Donoho (2014).

    Attributes:
        sigma: the standard deviation s of one entry of the bulk.
        edge: the bulk's upper end s (√m + √n), as a singular value.
        threshold: the edge and the 99 % quantile of the Tracy–Widom fluctuation above it.
        spikes: how many singular values are above the threshold.
    """

    sigma: float
    edge: float
    threshold: float
    spikes: int


def fit_power_law(
    values: Float[Tensor, " p"], *, least: float = 0.0, draws: int = 400, seed: int = 0
) -> PowerLaw:
    """Fits the tail of the eigenvalues σ².

    Args:
        values: singular values, in any order.
        least: values at or below it are left out, as rounding.
        draws: how many simulated tails the p-value rests on.
        seed: of these.

    Example:
        >>> import torch
        >>> from peft_analysis.spectral_laws import fit_power_law
        >>> quantiles = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
        >>> round(fit_power_law(quantiles ** (-0.5 / (2.5 - 1))).alpha, 1)  # λ = σ² of a law with α = 2.5
        2.5
    """
    kept = values.detach().double()
    kept = kept[kept > least]
    if kept.numel() < LEAST_VALUES:
        return _no_law(f"{kept.numel()} singular values above rounding; a tail needs {LEAST_VALUES}")
    logs = 2 * kept.log().sort().values
    if logs[-1] - logs[0] < 1e-9:
        return _no_law("the singular values are all the same")
    slopes, distances = _all_starts(logs)
    best = int(distances.argmin())
    slope, distance, tail = float(slopes[best]), float(distances[best]), logs.numel() - best
    return PowerLaw(
        alpha=1 + slope,
        alpha_error=slope / math.sqrt(tail),
        x_min=float(logs[best].exp()),
        ks=distance,
        p_value=chance_of_distance(distance, tail, draws, seed, logs.device),
        tail=tail,
    )


def _no_law(reason: str) -> PowerLaw:
    return PowerLaw(math.nan, math.nan, math.nan, math.nan, math.nan, 0, reason)


def _all_starts(logs: Float[Tensor, " p"]) -> tuple[Float[Tensor, " q"], Float[Tensor, " q"]]:
    """α − 1 and the distance for a tail that starts at each value but the last; logs rise."""
    count = logs.numel()
    sums = logs.flip(0).cumsum(0).flip(0)
    sizes = torch.arange(count, 0, -1, device=logs.device, dtype=logs.dtype)
    excess = (sums - sizes * logs)[:-1]
    slopes = torch.where(excess > 0, sizes[:-1] / torch.where(excess > 0, excess, 1.0), math.inf)
    places = torch.arange(count, device=logs.device, dtype=logs.dtype)
    found = []
    for starts in torch.arange(count - 1, device=logs.device).split(max(1, _CELLS // count)):
        above = (logs - logs[starts, None]).clamp_min(0)
        law = -torch.expm1(-slopes[starts, None] * above)
        data = (places - starts[:, None]) / sizes[starts, None]
        gap = torch.where(places >= starts[:, None], (law - data).abs(), 0.0)
        found.append(gap.amax(-1).nan_to_num(nan=1.0))
    return slopes, torch.cat(found)


def chance_of_distance(distance: float, tail: int, draws: int, seed: int, device: torch.device) -> float:
    """How often an exponential sample is as far from the exponential law that fits it (Lilliefors 1969).

    The logarithm of a power law's tail is exponential, and the distance does not depend on its rate.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    sizes = torch.empty(draws, tail, dtype=torch.float64, device=device).exponential_(generator=generator)
    sizes = (sizes - sizes.amin(-1, keepdim=True)).sort(-1).values
    slopes = tail / sizes.sum(-1, keepdim=True)
    data = torch.arange(tail, device=device, dtype=sizes.dtype) / tail
    far = (-torch.expm1(-slopes * sizes) - data).abs().amax(-1)
    return (1 + int((far >= distance).sum())) / (1 + draws)


def fit_bulk(values: Float[Tensor, " p"], shape: tuple[int, int], *, least: float = 0.0) -> MarchenkoPastur:
    """Fits Marchenko and Pastur's bulk to all min(m, n) singular values of a matrix.

    Args:
        values: the singular values, largest first; those not given are zero.
        shape: (m, n).
        least: values at or below it count as zero.
    """
    rows, columns = shape
    full, given = min(rows, columns), values.detach().double()
    if not full:
        return MarchenkoPastur(0.0, 0.0, 0.0, 0)
    middle = slice(full // 4, full - full // 4)
    found = torch.cat([given, given.new_zeros(full - given.numel())])[middle]
    law = quantiles(rows, columns).to(found.device)[middle]
    sigma = float((found * law).sum() / law.square().sum()) if float(found.median()) > least else 0.0
    edge = sigma * (math.sqrt(rows) + math.sqrt(columns))
    threshold = max(sigma * upper_quantile(rows, columns), least)
    return MarchenkoPastur(sigma, edge, threshold, int((given > threshold).sum()))


def upper_quantile(rows: int, columns: int, quantile: float = TRACY_WIDOM_99) -> float:
    """The largest singular value of an m × n standard normal matrix, at a quantile of the Tracy–Widom law.

    Formula: σ² = μ + t τ with μ = (√(m − ½) + √(n − ½))², τ = √μ (1/√(m − ½) + 1/√(n − ½))^(1/3)
    (Johnstone 2001; the halves are Ma's, 2012).
    """
    tall, wide = math.sqrt(rows - 0.5), math.sqrt(columns - 0.5)
    return math.sqrt((tall + wide) ** 2 + quantile * (tall + wide) * (1 / tall + 1 / wide) ** (1 / 3))


@lru_cache(maxsize=64)
def quantiles(rows: int, columns: int) -> Float[Tensor, " p"]:
    """The singular values of an m × n standard normal matrix that Marchenko and Pastur's law expects.

    Formula: in θ, λ / max(m, n) = 1 + β − 2 √β cos θ with β = min / max has a density ∝ sin² θ / λ.
    """
    few, many = min(rows, columns), max(rows, columns)
    aspect = few / many
    edges = torch.linspace(0, math.pi, 20001, dtype=torch.float64)
    angles = (edges[1:] + edges[:-1]) / 2
    eigenvalues = 1 + aspect - 2 * math.sqrt(aspect) * angles.cos()
    mass = (angles.sin().square() / eigenvalues).cumsum(0)
    places = (torch.arange(few, 0, -1, dtype=torch.float64) - 0.5) / few
    found = eigenvalues[torch.searchsorted(mass / mass[-1], places).clamp_max(angles.numel() - 1)]
    return (found * many).sqrt()
