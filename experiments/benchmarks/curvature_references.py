"""Published estimators of curvature, written anew from their papers, for the comparison with ours.

What was confirmed, on draws of a sphere and of a ring torus with and without noise:

- `quadratic` without an intercept agrees to rounding with the estimate in the code of CRLM (Kaufman and
  Azencot, "Data representations' study of latent image manifolds", ICML 2023), which is CAML (Li,
  "Curvature-aware manifold learning", 2018) up to its matrices of second derivatives. With an intercept, over
  a centred local PCA, it is the textbook's local quadratic regression; on the unit S²⁰ with 20,000 points and
  no noise it gives a mean sectional curvature near 4 instead of 1.
- `diffusion` agrees with the code of its author to 1e-13, with and without noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse.linalg import eigsh
from torch import Tensor

from experiments.benchmarks.sampled_shapes import Sample
from manifolds.cloud.neighbours import nearest_neighbours
from manifolds.errors import ManifoldError

BLOCK = 500
"""How many points are turned into their own frames at a time."""


@dataclass(frozen=True)
class Found:
    """What an estimator says at some points; None where it does not give that quantity.

    Attributes:
        sectional: the mean sectional curvature; NaN where it refuses.
        lengths: |H|, the length of the mean curvature vector (1/d) Σ II(eᵢ, eᵢ).
        bend: II(v, v) for the directions that the sample names.
    """

    sectional: Float[Tensor, "b"]
    lengths: Float[Tensor, "b"] | None = None
    bend: Float[Tensor, "b D"] | None = None


def quadratic(sample: Sample, at: Int[Tensor, "b"], neighbors: int, *, intercept: bool) -> Found:
    """Normal coordinates regressed on tangential ones and their products.

    Args:
        sample: the points.
        at: which of them.
        neighbors: how many neighbours.
        intercept: whether to fit an intercept, in the tangent space of a PCA about the neighbours' mean (the
            plain fit); or none, in the leading directions from the point itself (CAML, CRLM).
    """
    indices = nearest_neighbours(sample.points, at, neighbors=neighbors).indices
    rows = sample.points[indices] - sample.points[at, None]
    axes = torch.linalg.svd(rows - rows.mean(1, keepdim=True) if intercept else rows, full_matrices=False).Vh
    tangent = axes[:, : sample.dim].mT
    flat = rows @ tangent
    first, second = torch.triu_indices(sample.dim, sample.dim)
    design = flat[..., first] * flat[..., second] * torch.where(first == second, 0.5, 1.0).double()
    design = torch.cat([flat, design], -1)
    if intercept:
        design = torch.cat([torch.ones_like(flat[..., :1]), design], -1)
    form = (torch.linalg.pinv(design) @ (rows - flat @ tangent.mT))[:, -len(first) :]
    trace = form[:, first == second].sum(1)
    times = torch.where(first == second, 1.0, 2.0).double()
    scalar = (trace**2).sum(-1) - ((form**2).sum(-1) * times).sum(-1)
    bend = None
    if sample.direction is not None:
        inside = (sample.direction[at][:, None] @ tangent)[:, 0]
        bend = torch.einsum("bp,bpD->bD", inside[:, first] * inside[:, second] * times, form)
    planes = sample.dim * (sample.dim - 1)
    return Found(scalar / planes, torch.linalg.vector_norm(trace, dim=1) / sample.dim, bend)


def diffusion(
    sample: Sample, at: Int[Tensor, "b"], width: int, *, neighbors: int = 32, functions: int = 50
) -> Found:
    """Manifold Diffusion Geometry (Jones 2024, arXiv 2411.04100), with the parameters of its code.

    The carré du champ Γ(f, h) = ½ (f Lh + h Lf − L(fh)) of a diffusion-maps Laplacian L gives the tangent
    space, as the leading eigenvectors of Γ of the coordinates; the Hessian of a normal coordinate,
    H(f)(∇a, ∇b) = ½ (Γ(a, Γ(f, b)) + Γ(b, Γ(f, a)) − Γ(f, Γ(a, b))), gives II; Gauss gives the curvature.
    Coordinates, Γ and curvature are smoothed by the first eigenfunctions of L.

    Args:
        sample: the points; all of them are used, whichever are asked for.
        at: which of them.
        width: how many principal directions the points keep: arrays have points × width³ numbers.
        neighbors: how many neighbours the Laplacian joins, each point among its own.
        functions: how many eigenfunctions smooth.
    """
    if len(sample.points) <= max(neighbors, functions):
        raise ManifoldError(
            f"diffusion: {len(sample.points)} points are too few; {neighbors} neighbours and {functions} "
            f"eigenfunctions need {max(neighbors, functions) + 1}"
        )
    centred = sample.points - sample.points.mean(0)
    axes = torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(-1)[:, :width]
    x = (centred @ axes).numpy()
    laplacian, smooth = _laplacian(x, neighbors, functions)
    x = smooth(x)
    n, width = x.shape
    dim = sample.dim
    lx = laplacian @ x
    # Γ is symmetric: only the coordinates s ≤ t are multiplied out.
    first, second = np.triu_indices(width)
    metric = x[:, first] * lx[:, second] + x[:, second] * lx[:, first]
    metric = (metric - laplacian @ (x[:, first] * x[:, second])) / 2
    whole = np.zeros((width, width), int)
    whole[first, second] = whole[second, first] = np.arange(len(first))
    values, vectors = np.linalg.eigh(smooth(metric)[:, whole])
    vectors = vectors[..., ::-1]
    scale = np.median(values[:, ::-1][:, :dim].mean(1))
    tangent, normal = vectors[..., :dim], vectors[..., dim:]
    # One coordinate at a time: Γ(x_a, Γ(x_s, x_t)) as [n, a, (s, t)], with the Laplacian rescaled.
    iterated, changed = np.empty((n, width, len(first))), laplacian @ metric
    for a in range(width):
        crossed = x[:, [a]] * changed + lx[:, [a]] * metric - laplacian @ (x[:, [a]] * metric)
        iterated[:, a] = crossed / (2 * scale**2)
    blocks = range(0, n, BLOCK)
    form = np.concatenate(
        [
            _second_form(iterated[i : i + BLOCK], tangent[i : i + BLOCK], normal[i : i + BLOCK], whole)
            for i in blocks
        ]
    )
    trace = np.einsum("plii->pl", form)
    scalar = (trace**2).sum(1) - (form * form.transpose(0, 1, 3, 2)).sum((1, 2, 3))
    scalar = smooth(scalar[:, None])[:, 0] / (dim * (dim - 1))
    return Found(torch.from_numpy(scalar)[at])


def _second_form(
    iterated: np.ndarray, tangent: np.ndarray, normal: np.ndarray, whole: np.ndarray
) -> np.ndarray:
    """½ (Γ(u, Γ(f, v)) + Γ(v, Γ(f, u)) − Γ(f, Γ(u, v))) for tangent u, v and normal f, as [n, f, u, v]."""
    first = (tangent.transpose(0, 2, 1) @ iterated)[..., whole]
    along = (normal.transpose(0, 2, 1)[:, None] @ first @ tangent[:, None]).transpose(0, 2, 1, 3)
    first = (normal.transpose(0, 2, 1) @ iterated)[..., whole]
    across = tangent.transpose(0, 2, 1)[:, None] @ first @ tangent[:, None]
    return (along + along.transpose(0, 1, 3, 2) - across) / 2


def _laplacian(
    x: np.ndarray, neighbors: int, functions: int
) -> tuple[sparse.csr_matrix, Callable[[np.ndarray], np.ndarray]]:
    """A diffusion-maps Laplacian with a variable bandwidth (Berry and Harlim 2016), and its smoothing.

    The bandwidth of the kernel is chosen where the kernel sum grows fastest with it; that growth is the
    dimension.
    """
    n = len(x)
    found = nearest_neighbours(torch.from_numpy(x), neighbors=neighbors - 1)
    indices = np.concatenate([np.arange(n)[:, None], found.indices.numpy()], 1)
    distances = np.concatenate([np.zeros((n, 1)), found.distances.numpy()], 1)
    steps = 2.0 ** np.arange(-30, 10, 0.25)

    def tuned(squares: np.ndarray, factor: float) -> tuple[float, float]:
        sums = np.array([np.exp(-squares / (factor * step)).mean() for step in steps])
        growth = np.diff(np.log(sums.clip(1e-300))) / np.diff(np.log(steps))
        best = int(growth.argmax())
        return float(steps[best]), 2 * float(growth[best])

    def kernel(squares: np.ndarray, width: float) -> sparse.csr_matrix:
        rows = np.repeat(np.arange(n), neighbors)
        one = sparse.csr_matrix((np.exp(-squares / width).ravel(), (rows, indices.ravel())), shape=(n, n))
        return (one + one.T) / 2

    local = np.sqrt((distances[:, 1:8] ** 2).mean(1))
    squares = distances**2 / (local[indices] * local[:, None])
    width, dim = tuned(squares, 2.0)
    density = np.asarray(kernel(squares, 2 * width).sum(0))[0] / local**dim
    bandwidth = density**-0.5
    bandwidth /= np.median(bandwidth)
    squares = distances**2 / (bandwidth[indices] * bandwidth[:, None])
    alpha = 0.5 - dim / 4
    width, dim = tuned(squares, 4.0)
    whole = kernel(squares, 4 * width)
    weights = sparse.diags((np.asarray(whole.sum(0))[0] / bandwidth**dim) ** -alpha)
    whole = weights @ whole @ weights
    sums = np.asarray(whole.sum(0))[0]
    laplacian = sparse.diags(bandwidth**-2.0) @ (sparse.eye(n) - sparse.diags(1 / sums) @ whole) / width
    measure = sums * bandwidth**2
    root = sparse.diags(measure**-0.5)
    symmetric = (root @ whole @ root - sparse.diags(bandwidth**-2.0)) / width
    basis = root @ eigsh(symmetric, functions, which="LA", v0=np.ones(n))[1]
    return laplacian.tocsr(), lambda f: basis @ ((basis * measure[:, None]).T @ f)
