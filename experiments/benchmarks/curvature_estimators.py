"""Curvature from samples: ours beside the plain quadratic fit, CAML and Manifold Diffusion Geometry.

Every estimator sees the same points in one run, and nobody was tuned on these draws. The three references are
written anew from their papers. Diffusion geometry works with arrays of n·D³ numbers, so it gets the points in
their leading principal directions, three more than the shape needs: an advantage, for most noise is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import sparse
from scipy.sparse.linalg import eigsh
from torch import Tensor

from experiments.benchmarks import sampled_shapes as shapes
from experiments.benchmarks.peers import require
from experiments.benchmarks.timing import compare
from manifolds.cloud.neighbours import nearest_neighbours
from manifolds.curvature import intrinsic_dimension, second_fundamental_form

Found = tuple[Float[Tensor, "b"] | None, Float[Tensor, "b"]]
"""|H|, where the method gives it, and the mean sectional curvature."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        ambient: the dimension of the space around every shape.
        noises: standard deviations of the noise in each direction.
        queries: how many points each estimate is judged at.
        seed: of the draws.
        speed_points: how many points the timings use.
        diffusion: whether to run Manifold Diffusion Geometry, which takes most of the time.
        names: which shapes; all of them if empty.
    """

    ambient: int = 128
    noises: tuple[float, ...] = (0.0, 0.01)
    queries: int = 60
    seed: int = 20
    speed_points: int = 5000
    diffusion: bool = True
    names: tuple[str, ...] = ()


CASES: dict[str, tuple[shapes.Maker, int, int]] = {
    "sphere 5": (lambda n, g: shapes.sphere(n, 5, g), 5000, 100),
    "sphere 10": (lambda n, g: shapes.sphere(n, 10, g), 20000, 300),
    "sphere 20": (lambda n, g: shapes.sphere(n, 20, g), 20000, 600),
    "ring torus": (shapes.torus, 5000, 50),
    "ellipsoid 10": (lambda n, g: shapes.ellipsoid(n, 10, g), 20000, 300),
    "Clifford torus 8": (lambda n, g: shapes.clifford_torus(n, 8, g), 20000, 200),
    "paraboloid 5": (lambda n, g: shapes.paraboloid(n, 5, g), 5000, 100),
    "Stiefel 4×2": (lambda n, g: shapes.stiefel(n, 4, 2, g), 20000, 150),
}
"""Each shape with its number of points and of neighbours."""


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """The errors of every estimator on every shape, and the speeds."""
    settings = settings or Settings()
    rows: list[dict[str, Any]] = []
    for name in settings.names or CASES:
        for noise in settings.noises:
            rows += accuracy(name, noise, settings)
    return rows + speeds(settings)


def accuracy(name: str, noise: float, settings: Settings) -> list[dict[str, Any]]:
    """One shape with one noise, all estimators."""
    make, n, neighbors = CASES[name]
    generator = torch.Generator().manual_seed(settings.seed)
    clean = make(n, generator)
    sample = clean.embedded(settings.ambient, noise, generator)
    at = torch.randperm(n, generator=generator)[: settings.queries]
    methods: dict[str, Callable[[], Found]] = {
        "ours": partial(ours, sample, at, neighbors),
        "plain fit": partial(quadratic, sample, at, neighbors, lower_terms=True),
        "CAML": partial(quadratic, sample, at, neighbors, lower_terms=False),
    }
    if settings.diffusion:
        width = min(clean.points.shape[1] + 3, settings.ambient)
        methods["diffusion geometry"] = partial(diffusion, sample, at, width)
    rows = []
    for method, work in methods.items():
        start = time.perf_counter()
        lengths, sectional = work()
        row = {"shape": name, "noise": noise, "method": method, "neighbors": neighbors, "points": n}
        row["seconds"] = round(time.perf_counter() - start, 2)
        rows.append(row | errors(lengths, sectional, sample, at))
    return rows


def errors(
    lengths: Tensor | None, sectional: Tensor, sample: shapes.Sample, at: Tensor
) -> dict[str, float | None]:
    """Median errors, relative unless the truth is zero; the share answered; the correlation."""
    kept = sectional.isfinite()
    truth = sample.sectional[at]
    scale = truth.abs() if bool((truth != 0).any()) else torch.ones_like(truth)
    off = ((sectional - truth) / scale)[kept]
    found: dict[str, float | None] = {
        "answered": float(kept.double().mean()),
        "sectional_error": _median(off.abs()),
        "sectional_bias": _median(off),
        "correlation": None,
        "mean_curvature_error": None,
    }
    if float(truth.std()) > 1e-9 and int(kept.sum()) > 2:
        found["correlation"] = float(torch.corrcoef(torch.stack([sectional, truth])[:, kept])[0, 1])
    if lengths is not None:
        mean = sample.mean_curvature[at]
        found["mean_curvature_error"] = _median(((lengths - mean).abs() / mean)[kept])
    return found


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None


def ours(sample: shapes.Sample, at: Int[Tensor, "b"], neighbors: int) -> Found:
    """The estimator of this package."""
    form = second_fundamental_form(sample.points, at, dim=sample.dim, neighbors=neighbors)
    return torch.linalg.vector_norm(form.mean_curvature, dim=1), form.sectional


def quadratic(sample: shapes.Sample, at: Int[Tensor, "b"], neighbors: int, *, lower_terms: bool) -> Found:
    """Normal coordinates regressed on products of tangential ones, in the tangent space of a local PCA.

    Without lower terms it is the estimate inside CAML (Li, "Curvature-aware manifold learning", 2018), which
    takes the coordinate functions to vanish with their gradients at the point; with an intercept and linear
    terms it is the textbook's local quadratic regression.
    """
    indices = nearest_neighbours(sample.points, at, neighbors=neighbors).indices
    rows = sample.points[indices] - sample.points[at, None]
    axes = torch.linalg.svd(rows - rows.mean(1, keepdim=True), full_matrices=False).Vh
    tangent = axes[:, : sample.dim].mT
    flat = rows @ tangent
    first, second = torch.triu_indices(sample.dim, sample.dim)
    design = flat[..., first] * flat[..., second] * torch.where(first == second, 0.5, 1.0).double()
    if lower_terms:
        design = torch.cat([torch.ones_like(flat[..., :1]), flat, design], -1)
    values = torch.linalg.pinv(design) @ (rows - flat @ tangent.mT)
    form = values[:, -len(first) :]
    trace = form[:, first == second].sum(1)
    times = torch.where(first == second, 1.0, 2.0).double()
    scalar = (trace**2).sum(-1) - ((form**2).sum(-1) * times).sum(-1)
    planes = sample.dim * (sample.dim - 1)
    return torch.linalg.vector_norm(trace, dim=1) / sample.dim, scalar / planes


def diffusion(
    sample: shapes.Sample, at: Int[Tensor, "b"], width: int, *, neighbors: int = 32, functions: int = 50
) -> Found:
    """Manifold Diffusion Geometry (Jones 2024, arXiv 2411.04100), with the parameters of the paper.

    The carré du champ Γ(f, h) = ½ (f Lh + h Lf − L(fh)) of a diffusion-maps Laplacian L gives the tangent
    space, as the leading eigenvectors of Γ of the coordinates; the Hessian of a normal coordinate,
    H(f)(∇a, ∇b) = ½ (Γ(a, Γ(f, b)) + Γ(b, Γ(f, a)) − Γ(f, Γ(a, b))), gives II; Gauss gives the curvature.
    Coordinates, Γ and curvature are smoothed by the first eigenfunctions of L.
    """
    centred = sample.points - sample.points.mean(0)
    axes = torch.linalg.eigh(centred.mT @ centred).eigenvectors.flip(-1)[:, :width]
    laplacian, smooth = _laplacian((centred @ axes).numpy(), neighbors, functions)
    x = smooth((centred @ axes).numpy())
    n, dim = len(x), sample.dim

    def gamma(f: np.ndarray, h: np.ndarray) -> np.ndarray:
        """Γ of every column of f with every column of h."""
        products = (f[:, :, None] * h[:, None]).reshape(n, -1)
        crossed = f[:, :, None] * (laplacian @ h)[:, None] + h[:, None] * (laplacian @ f)[:, :, None]
        return (crossed - (laplacian @ products).reshape(crossed.shape)) / 2

    metric = gamma(x, x)
    values, vectors = np.linalg.eigh(smooth(metric.reshape(n, -1)).reshape(metric.shape))
    vectors = vectors[..., ::-1]
    scale = np.median(values[:, ::-1][:, :dim].mean(1))
    tangent, normal = vectors[..., :dim], vectors[..., dim:]
    # One coordinate at a time: Γ(x_a, Γ(x_b, x_c)) as [n, a, b, c], with the Laplacian rescaled.
    flat = metric.reshape(n, -1)
    iterated = np.stack([gamma(x[:, [a]], flat)[:, 0].reshape(metric.shape) for a in range(width)], 1)
    iterated = iterated / scale**2
    hessian = (iterated.transpose(0, 3, 1, 2) + iterated.transpose(0, 3, 2, 1) - iterated) / 2
    part = np.einsum("pstu,psl->pltu", hessian, normal, optimize=True)
    part = np.einsum("pltu,pti->pliu", part, tangent, optimize=True)
    form = np.einsum("pliu,puj->plij", part, tangent, optimize=True)
    trace = np.einsum("plii->pl", form)
    scalar = (trace**2).sum(1) - (form * form.transpose(0, 1, 3, 2)).sum((1, 2, 3))
    scalar = smooth(scalar[:, None])[:, 0] / (dim * (dim - 1))
    return None, torch.from_numpy(scalar)[at]


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
    width, dim = tuned(squares, 2)
    density = np.asarray(kernel(squares, 2 * width).sum(0))[0] / local**dim
    bandwidth = density**-0.5
    bandwidth /= np.median(bandwidth)
    squares = distances**2 / (bandwidth[indices] * bandwidth[:, None])
    alpha = 0.5 - dim / 4
    width, dim = tuned(squares, 4)
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


def speeds(settings: Settings) -> list[dict[str, Any]]:
    """Curvature in milliseconds a point, and local PCA beside scikit-dimension."""
    generator = torch.Generator().manual_seed(settings.seed)
    n = settings.speed_points
    sample = shapes.sphere(n, 5, generator).embedded(768, 0.01, generator)
    at = torch.randperm(n, generator=generator)[:256]
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        second_fundamental_form(sample.points, at, dim=5, neighbors=100)
        taken.append((time.perf_counter() - start) / len(at) * 1e3)
    rows: list[dict[str, Any]] = [
        {"work": "curvature, d = 5, k = 100, D = 768", "aim_ms": 2.4, "milliseconds_a_point": min(taken)}
    ]
    peer = require("skdim")
    points = sample.points.numpy()
    timing = compare(
        lambda: intrinsic_dimension(sample.points, "local_pca", neighbors=100),
        lambda: peer.id.lPCA().fit_pw(points, n_neighbors=100, n_jobs=1),
        rounds=1,
    )
    work = f"local PCA dimension of all {n} × 768, k = 100"
    return [*rows, {"work": work, "peer": "scikit-dimension lPCA", "aim": 8.0, **timing.row()}]
