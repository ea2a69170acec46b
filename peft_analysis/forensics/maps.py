"""How a key becomes the right vector of an edit: by the inverse of C, by its null space, or as it is.

An edit that stores a value for a key k changes W by λ rᵀ. Least squares under which old keys keep their
values gives r ∝ C⁻¹k (ROME, MEMIT), a projection that leaves old keys alone gives r ∝ P k (AlphaEdit), and a
step of gradient descent r ∝ k. All three are diagonal in the eigenvectors of C.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from peft_analysis.errors import UpdateError

Kind = Literal["inverse", "null space", "identity"]

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)
"""What may have been added to C before it was inverted, in mean eigenvalues."""
NULL_PARTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""The part of the directions of C, from the weakest on, that a null space may take."""


@dataclass(frozen=True)
class RightMap:
    """r ∝ E diag(weights) Eᵀ k, with E the eigenvectors of C.

    Attributes:
        kind: "inverse", "null space" or "identity".
        parameter: the ridge in mean eigenvalues, the null space's part of the directions, or 0.
        weights: (n,), not negative.
    """

    kind: Kind
    parameter: float
    weights: Tensor

    def __str__(self) -> str:
        words = {
            "inverse": f"(C + {self.parameter:g} mean eigenvalues)⁻¹ k",
            "null space": f"P k, P on {int((self.weights > 0).sum())} of {len(self.weights)} directions of C",
            "identity": "k itself",
        }
        return words[self.kind]


@dataclass(frozen=True)
class Basis:
    """Eigenvectors (n, n) and eigenvalues (n,) of C, rising."""

    vectors: Tensor
    values: Tensor


def basis(name: str, covariance: Float[Tensor, "n n"]) -> Basis:
    """The eigenvectors of C, in float64.

    Raises:
        UpdateError: C is not finite, not symmetric, zero, or has a clearly negative eigenvalue.
    """
    wide = covariance.double()
    if not bool(wide.isfinite().all()):
        raise UpdateError(f"the covariance of {name} has values that are not finite")
    size = wide.abs().amax()
    if bool(size == 0):
        raise UpdateError(f"the covariance of {name} is zero; no text has moved this matrix's input")
    if bool((wide - wide.mT).abs().amax() > 1e-3 * size):
        raise UpdateError(f"the covariance of {name} is not symmetric; give C = E[k kᵀ]")
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    if bool(values[0] < -1e-3 * values[-1]):
        raise UpdateError(
            f"the covariance of {name} has an eigenvalue of {float(values[0]):.3g}; E[k kᵀ] has none below 0"
        )
    return Basis(vectors, values.clamp_min(0))


def right_maps(values: Float[Tensor, " n"]) -> list[RightMap]:
    """All maps that are tried, from the eigenvalues of C."""
    mean = values.mean()
    found = [RightMap("inverse", ridge, 1 / (values + ridge * mean)) for ridge in RIDGES]
    counts = dict.fromkeys(round(part * len(values)) for part in NULL_PARTS)
    for count in counts:
        if 0 < count < len(values):
            inside = (torch.arange(len(values), device=values.device) < count).to(values.dtype)
            found.append(RightMap("null space", count / len(values), inside))
    return [*found, RightMap("identity", 0.0, torch.ones_like(values))]
