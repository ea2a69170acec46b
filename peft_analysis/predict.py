"""Will parameter-efficient tuning do well on a matrix? From the base's spectrum alone, with its record.

The coefficients were fitted to what LoRAs on single matrices of two small models learned; the fit lies in
`predict.json` with its record: how it did on an architecture, and on kinds of matrices, that it had not seen.
Published evidence on such predictors is mixed, and the record here says how little to expect. See
`experiments.spectral_entropy_predicts_peft`.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from peft_analysis.errors import UpdateError
from peft_analysis.spectrum import spectrum
from peft_analysis.updates import Weights

COEFFICIENTS = Path(__file__).parent / "predict.json"
FEATURES = ("entropy", "effective_rank", "stable_rank", "condition", "alpha", "threshold")
TOP = 10
"""An intruder must come among so many leading singular vectors (Shuttleworth et al., 2024)."""
SMALLEST = 10
"""A matrix with a side below this has no spectrum to speak of."""


@dataclass(frozen=True)
class Prediction:
    """What a LoRA on this matrix alone is expected to learn.

    Attributes:
        parameter: its name; "" for a matrix that was given by itself.
        gain: the share of the loss on new wordings that a short LoRA run removes, as in the record.
        low: of the 90 % interval, from errors on architectures that were not seen. high: of the interval.
        features: what the spectrum says; see `spectral_features`.
        skill: of the same fit on an unseen architecture: the share of variance that it explains beyond the
            mean. At or below 0 the mean is as good.
        baseline: the skill of the best predictor that knows no spectrum (kind, depth or size of the matrix).
        reliable: whether the fit has skill, beats that baseline, and saw spectra like this one.
        reason: why not, in words; "" if it is.
    """

    parameter: str
    gain: float
    low: float
    high: float
    features: Mapping[str, float]
    skill: float
    baseline: float
    reliable: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with None for what is not known."""
        found = asdict(self)
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in found.items()
        }


def predict(base: Any, *, only: list[str] | None = None) -> dict[str, Prediction]:
    """Predict for every matrix of a base model how well LoRA on it alone would learn.

    Args:
        base: a module, a folder, a file, `Weights`, or one matrix (out, in), whose name is then "".
        only: parameter names; all matrices but embeddings if not given.

    Raises:
        UpdateError: the base has no such matrix; a matrix has values that are not finite, or is zero.
    """
    if isinstance(base, Tensor):
        return {"": predict_matrix(base)}
    weights = base if isinstance(base, Weights) else Weights.of(base)
    names = [
        name
        for name in weights
        if len(weights.shape(name)) >= 2
        and name not in weights.embeddings
        and min(weights.shape(name)[0], math.prod(weights.shape(name)[1:])) >= SMALLEST
    ]
    if only is not None:
        missing = [name for name in only if name not in weights]
        if missing:
            raise UpdateError(f"{weights.source} has no parameter {', '.join(missing[:5])}")
        names = list(only)
    if not names:
        raise UpdateError(f"{weights.source} has no matrix with sides of {SMALLEST} or more")
    return {name: predict_matrix(_as_matrix(weights, name), parameter=name) for name in names}


def _as_matrix(weights: Weights, name: str) -> Tensor:
    value = weights[name].flatten(1)
    return value.mT if weights.layout(name) == "in_out" else value


def predict_matrix(matrix: Tensor, *, parameter: str = "") -> Prediction:
    """Predict for one matrix; see `predict`. Convolutions are read as (out, in · height · width).

    Example:
        >>> import torch
        >>> found = predict_matrix(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
        >>> found.low <= found.gain <= found.high
        True
        >>> sorted(found.features)
        ['alpha', 'condition', 'effective_rank', 'entropy', 'stable_rank', 'threshold']
    """
    named = parameter or "the matrix"
    if matrix.ndim < 2:
        raise UpdateError(f"{named} has shape {tuple(matrix.shape)}; give a matrix (out, in)")
    features = spectral_features(matrix.flatten(1), name=named)
    fit = coefficients()
    missing = [name for name, value in features.items() if not math.isfinite(value)]
    filled = {name: fit["mean"][name] if name in missing else value for name, value in features.items()}
    gain = fit["intercept"] + sum(
        fit["coefficients"][name] * (filled[name] - fit["mean"][name]) / fit["scale"][name]
        for name in FEATURES
    )
    skill = float(fit["record"]["skill"]["architecture"])
    baseline = float(fit["record"]["best_baseline"]["architecture"])
    outside = [
        name
        for name in FEATURES
        if name not in missing and not fit["range"][name][0] <= features[name] <= fit["range"][name][1]
    ]
    why = []
    if skill <= 0:
        why.append(f"on an unseen architecture the fit is no better than the mean (skill {skill:.2f})")
    elif skill <= baseline:
        why.append(
            f"on an unseen architecture {fit['record']['best_baseline']['name']} alone predicts better "
            f"(skill {baseline:.2f} against {skill:.2f})"
        )
    if outside:
        why.append(f"its {', '.join(outside)} lie outside of what the fit has seen")
    if missing:
        why.append(f"its {', '.join(missing)} cannot be told")
    spread = float(fit["error"])
    return Prediction(
        parameter,
        gain,
        gain - spread,
        gain + spread,
        features,
        skill,
        baseline,
        not why,
        "; ".join(why),
    )


def spectral_features(matrix: Float[Tensor, "m n"], *, name: str = "the matrix") -> dict[str, float]:
    """What a base matrix's spectrum says, free of its scale and nearly of its size.

    entropy: of the shares σ² / Σσ², over its largest value (`Spectrum.entropy`). effective_rank: Roy and
    Vetterli's, over min(m, n). stable_rank: over min(m, n). condition: log10 of the largest over the median
    singular value; the smallest is noise in trained weights. alpha: the exponent of the power law of the
    eigenvalues' tail (Martin, Peng and Mahoney, 2021). threshold: `intruder_threshold`, over the root mean
    square of the singular values.

    Raises:
        UpdateError: the matrix is zero, has values that are not finite, or a side below 10.
    """
    if min(matrix.shape) < SMALLEST:
        raise UpdateError(
            f"{name} has shape {tuple(matrix.shape)}; a spectrum needs sides of {SMALLEST} or more"
        )
    found = spectrum(matrix)
    if found.rank == 0:
        raise UpdateError(f"{name} is zero; it has no spectrum to predict from")
    values = found.singular_values.double()
    size = min(matrix.shape)
    middle = float(values.median())
    return {
        "entropy": found.entropy,
        "effective_rank": found.effective_rank / size,
        "stable_rank": found.stable_rank / size,
        "condition": math.log10(found.spectral / middle) if middle > 0 else math.nan,
        "alpha": found.power_law.alpha,
        "threshold": intruder_threshold(values, (int(matrix.shape[0]), int(matrix.shape[1])))
        / (found.frobenius / math.sqrt(size)),
    }


def intruder_threshold(values: Float[Tensor, " p"], shape: tuple[int, int], *, top: int = TOP) -> float:
    """The size of a random rank-one update that comes among the `top` leading singular values.

    For θ u vᵀ in random directions added to a matrix with the other singular values σᵢ, i > top, a singular
    value z above them solves θ⁻² = φ(z) ψ(z), φ(z) = (1/m) Σ z / (z² − σᵢ²) over m values and ψ(z) the same
    over n, values that are not there being zero (Benaych-Georges and Nadakuditi, 2012, theorem 2.9). Here z
    is the `top`-th value of the base, half a mean spacing above it so that the sums exist.

    Beside one direction of size 2 and nothing else, an update must be as large:

    >>> import torch
    >>> round(intruder_threshold(torch.tensor([2.0, *99 * [0.0]]), (100, 100), top=1), 2)
    2.03
    """
    m, n = shape
    top = min(top, len(values) - 1)
    rest = values[top:]
    spacing = float(values[top - 1] - values[-1]) / max(len(values) - top, 1)
    z = float(values[top - 1]) + max(spacing / 2, 1e-9 * float(values[0]))
    inner = float((z / (z**2 - rest.square())).sum())
    missing = [(side - top - len(rest)) / z for side in (m, n)]
    phi, psi = ((inner + more) / side for more, side in zip(missing, (m, n), strict=True))
    return 1 / math.sqrt(phi * psi)


@cache
def coefficients() -> dict[str, Any]:
    """The fit that ships with the package, and its record."""
    return dict(json.loads(COEFFICIENTS.read_text(encoding="utf-8")))
