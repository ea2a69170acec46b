"""Orthogonalised steps: the direction of steepest descent when the length of a step is its spectral norm.

Where the gradient is G, the best step A of spectral norm one solves

    minimise ⟨G, A⟩ over A in the tangent space with ‖A‖₂ ≤ 1.

On a flat space the answer is −U Vᵀ with G = U Σ Vᵀ. Each function here solves one such problem, for batches.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manifolds.low_rank import LowRank
from manifolds.matrix_functions import skew, sym

JORDAN = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's coefficients: steepest at zero; singular values end between 0.7 and 1.2 after five
rounds."""


@dataclass(frozen=True)
class StiefelDirection:
    """The solution of the problem on a Stiefel manifold.

    Attributes:
        vector: A, tangent, of spectral norm at most one, with ⟨G, A⟩ ≥ 0 as large as it can be.
        converged: for each item, whether the residual is below the tolerance.
        iterations: how many rounds were made.
        residual: for each item, ‖sym(WᵀA)‖_F / √n before the last projection onto the tangent space.
    """

    vector: Float[Tensor, "*batch m n"]
    converged: Bool[Tensor, "*batch"]
    iterations: int
    residual: Float[Tensor, "*batch"]


def newton_schulz(
    matrix: Float[Tensor, "*batch m n"],
    steps: int = 5,
    coefficients: tuple[float, float, float] = JORDAN,
    eps: float = 1e-7,
) -> Float[Tensor, "*batch m n"]:
    """The orthogonal factor U Vᵀ of a matrix, roughly, by products only.

    Formula: X ← a X + b X XᵀX + c X (XᵀX)², begun with X = G / ‖G‖_F. With Jordan's coefficients the
    singular values do not converge to one but stay around it, which is all that a step needs.

    Args:
        matrix: G.
        steps: rounds.
        coefficients: a, b, c.
        eps: the least norm to divide by.

    Source: Jordan et al., "Muon: an optimizer for hidden layers" (2024).
    """
    a, b, c = coefficients
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def stiefel_direction(
    w: Float[Tensor, "*batch m n"],
    g: Float[Tensor, "*batch m n"],
    *,
    tolerance: float | None = None,
    max_iterations: int = 100,
) -> StiefelDirection:
    """The tangent A at W (WᵀW = I) with ‖A‖₂ ≤ 1 that maximises ⟨G, A⟩: "manifold Muon".

    With K = skew(WᵀG), N = (I − WWᵀ)G and a symmetric multiplier Λ for the condition sym(WᵀA) = 0, the dual
    problem is to minimise the nuclear norm ‖W(K + Λ) + N‖_*, and A is the orthogonal factor at the minimum.
    We minimise the quadratic that touches the nuclear norm from above, again and again: with P = (XᵀX)^½ at
    the present X = W(K + Λ) + N, the next Λ solves

        P Λ + Λ P = K P − P K.

    The dual falls at every round and there is no step size. An item that has converged rests, so that a
    batch gives what its items give. XᵀX = (K + Λ)ᵀ(K + Λ) + NᵀN is n×n, so that only the first
    and the last products are as tall as W. Where W is square, Λ = 0 at once and A is the orthogonal factor
    of the skew K, times W; so it is where K = 0, as on the Grassmann manifold.

    P is taken with singular values no smaller than √ε of the largest: directions in which the gradient
    vanishes get shorter steps, not random ones.

    Args:
        w: points.
        g: Euclidean gradients, or tangent vectors of the Euclidean metric that stand for them.
        tolerance: largest residual; ε^½ of the dtype if not given.
        max_iterations: rounds at most. What has not converged by then is still tangent, of norm at most one.

    Source: Bernstein, "Modular Manifolds" (Thinking Machines, 2025), for the problem and its dual; the rounds
    are iteratively reweighted least squares on that dual (Su, "Muon on the Stiefel manifold", 2025, has
    the fixed point).
    """
    finfo = torch.finfo(g.dtype)
    limit = finfo.eps**0.5 if tolerance is None else tolerance
    size = g.detach().abs().amax((-2, -1), keepdim=True)
    g = g / torch.where(size > 0, size, 1.0)
    inside = w.mT @ g
    k = skew(inside)
    square = w.shape[-2] == w.shape[-1]
    normal = torch.zeros_like(g) if square else g - w @ inside
    gram = normal.mT @ normal
    multiplier = torch.zeros_like(k)
    iterations = 0
    while True:
        core = k + multiplier
        squares, basis = torch.linalg.eigh(core.mT @ core + gram)
        floor = finfo.eps * squares[..., -1:].clamp_min(finfo.tiny)
        values = (squares.clamp_min(0) + floor).sqrt()
        top = (core @ basis) / values.unsqueeze(-2) @ basis.mT
        residual = torch.linalg.matrix_norm(sym(top)) / k.shape[-1] ** 0.5
        converged = residual <= limit
        if iterations == max_iterations or bool(converged.all()):
            break
        iterations += 1
        turned = basis.mT @ k @ basis
        turned = (
            turned
            * (values.unsqueeze(-2) - values.unsqueeze(-1))
            / (values.unsqueeze(-2) + values.unsqueeze(-1))
        )
        found = basis @ turned @ basis.mT
        multiplier = torch.where(converged[..., None, None], multiplier, found)
    inverse = (basis / values.unsqueeze(-2)) @ basis.mT
    vector = w @ skew(top) + normal @ inverse
    length = torch.linalg.eigvalsh(vector.mT @ vector)[..., -1].clamp_min(1).sqrt()
    vector = vector / length[..., None, None]
    return StiefelDirection(vector, converged, iterations, residual)


def orthogonal_factor(matrix: LowRank) -> LowRank:
    """The orthogonal factor U Vᵀ of a matrix U Σ Vᵀ in factors, without forming it.

    Directions with singular value zero are left out.

    Source: Bogachev et al., "LoRA meets Riemannion: Muon optimizer for parametrization-independent low-rank
    adapters" (2025).
    """
    u, values, vt = matrix.svd()
    cut = values[..., :1] * torch.finfo(values.dtype).eps * max(matrix.shape[-2:])
    return LowRank(u * (values > cut).to(values.dtype).unsqueeze(-2), vt)
