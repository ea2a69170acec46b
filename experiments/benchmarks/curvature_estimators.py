"""Curvature from samples: ours beside the plain quadratic fit, CAML (CRLM) and Manifold Diffusion Geometry.

Every estimator sees the same points in one run, and nobody was tuned on these draws. The references are in
`curvature_references`, with what was confirmed about them. Diffusion geometry works with arrays of n·D³
numbers, so it gets the points in their leading principal directions, three more than the shape needs: an
advantage, for most noise is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from experiments.benchmarks import sampled_shapes as shapes
from experiments.benchmarks.curvature_references import Found, diffusion, quadratic
from experiments.benchmarks.curvature_table import DIFFUSION
from experiments.benchmarks.peers import require
from experiments.benchmarks.timing import Comparison
from manifolds.curvature import intrinsic_dimension, second_fundamental_form

PLAIN = "plain fit"
CAML = "CAML (CRLM)"


@dataclass(frozen=True)
class Aim:
    """What ours should reach.

    Attributes:
        column: of which error.
        limit: the most it may be (the least, for a correlation), or the method that it must not exceed.
    """

    column: str
    limit: float | str


@dataclass(frozen=True)
class Case:
    """A shape to measure on.

    Attributes:
        make: draws it.
        points: how many points.
        neighbors: how many neighbours the local fits take.
        noises: standard deviations of the noise in each direction.
        aims: what ours should reach, at every noise.
    """

    make: shapes.Maker
    points: int
    neighbors: int
    aims: tuple[Aim, ...] = ()
    noises: tuple[float, ...] = (0.0, 0.01)


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        ambient: the dimension of the space around every shape.
        queries: how many points each estimate is judged at.
        seed: of the draws.
        speed_points: how many points the timings use.
        diffusion: whether to run Manifold Diffusion Geometry, which takes most of the time.
        large: samples of more points than this are shown to it with the largest noise only.
        names: which shapes; all of them if empty.
    """

    ambient: int = 128
    queries: int = 60
    seed: int = 20
    speed_points: int = 5000
    diffusion: bool = True
    large: int = 5000
    names: tuple[str, ...] = ()


FEWEST = 10
"""A correlation of fewer points than this says nothing."""
LENGTH, SECTIONAL = "mean_curvature_error", "sectional_error"
THREE_PERCENT = (Aim(LENGTH, 0.03), Aim("sectional_off", 0.03))
TORUS = (Aim("correlation", 0.99),)
CASES: dict[str, Case] = {
    "sphere 5": Case(lambda n, g: shapes.sphere(n, 5, g), 5000, 100, THREE_PERCENT),
    "sphere 10": Case(lambda n, g: shapes.sphere(n, 10, g), 20000, 300, THREE_PERCENT),
    "sphere 20": Case(lambda n, g: shapes.sphere(n, 20, g), 20000, 600, THREE_PERCENT),
    "ring torus": Case(shapes.torus, 5000, 100, TORUS),
    "ring torus, few neighbours": Case(shapes.torus, 5000, 50, TORUS),
    "ring torus, much noise": Case(shapes.torus, 5000, 100, (), (0.05,)),
    "ellipsoid 10": Case(lambda n, g: shapes.ellipsoid(n, 10, g), 20000, 300, (Aim(LENGTH, 0.1),)),
    "Clifford torus 8": Case(lambda n, g: shapes.clifford_torus(n, 8, g), 20000, 200, (Aim(LENGTH, 0.02),)),
    "paraboloid 5": Case(lambda n, g: shapes.paraboloid(n, 5, g), 5000, 100, (Aim(LENGTH, PLAIN),)),
    "Stiefel 4×2": Case(lambda n, g: shapes.stiefel(n, 4, 2, g), 20000, 150, (Aim("bend_error", PLAIN),)),
    "rank one 3×3": Case(lambda n, g: shapes.rank_one(n, 3, 3, g), 20000, 150, (Aim("bend_error", PLAIN),)),
    "sphere 2, to be refused": Case(
        lambda n, g: shapes.sphere(n, 2, g), 5000, 50, (Aim("answered", 0.0),), (0.03,)
    ),
    "ring torus, to be refused": Case(shapes.torus, 5000, 50, (Aim("answered", 0.0),), (0.03,)),
}


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """The errors of every estimator on every shape, and the speeds."""
    settings = settings or Settings()
    rows: list[dict[str, Any]] = []
    for name in settings.names or CASES:
        for noise in CASES[name].noises:
            rows += accuracy(name, noise, settings)
    return rows + speeds(settings)


def accuracy(name: str, noise: float, settings: Settings) -> list[dict[str, Any]]:
    """One shape with one noise, all estimators; ours comes first and says whether the aims are met."""
    case = CASES[name]
    generator = torch.Generator().manual_seed(settings.seed)
    clean = case.make(case.points, generator)
    sample = clean.embedded(settings.ambient, noise, generator)
    at = torch.randperm(case.points, generator=generator)[: settings.queries]
    methods: dict[str, Callable[[], Found]] = {
        "ours": partial(ours, sample, at, case.neighbors),
        PLAIN: partial(quadratic, sample, at, case.neighbors, intercept=True),
        CAML: partial(quadratic, sample, at, case.neighbors, intercept=False),
    }
    if settings.diffusion and (case.points <= settings.large or noise == max(case.noises)):
        width = min(clean.points.shape[1] + 3, settings.ambient)
        methods[DIFFUSION] = partial(diffusion, sample, at, width)
    rows = []
    for method, work in methods.items():
        start = time.perf_counter()
        found = work()
        seconds = round(time.perf_counter() - start, 2)
        about = {"shape": name, "noise": noise, "method": method, "neighbors": case.neighbors}
        rows.append(about | {"points": case.points, "seconds": seconds} | errors(found, sample, at))
    rows[0]["aims"] = [judged(aim, rows) for aim in case.aims]
    return rows


def errors(found: Found, sample: shapes.Sample, at: Tensor) -> dict[str, float | None]:
    """Median errors, relative unless the truth is zero; the share answered; the correlation.

    `sectional_off` is the error of the median over the points, `sectional_error` the median of the errors.
    """
    kept = found.sectional.isfinite()
    truth = sample.sectional[at]
    scale = truth.abs() if bool((truth != 0).all()) else torch.ones_like(truth)
    off = ((found.sectional - truth) / scale)[kept]
    values: dict[str, float | None] = {
        "answered": float(kept.double().mean()),
        SECTIONAL: _median(off.abs()),
        "sectional_off": None if not len(off) else abs(float(off.median())),
        "correlation": None,
        LENGTH: None,
        "bend_error": None,
    }
    if float(truth.std()) > 1e-9 and int(kept.sum()) >= FEWEST:
        values["correlation"] = float(torch.corrcoef(torch.stack([found.sectional, truth])[:, kept])[0, 1])
    mean = sample.mean_curvature[at]
    if found.lengths is not None and bool((mean > 0).all()):
        values[LENGTH] = _median(((found.lengths - mean).abs() / mean)[kept])
    if found.bend is not None and sample.bend is not None:
        wanted = sample.bend[at]
        wrong = torch.linalg.vector_norm(found.bend - wanted, dim=1)
        values["bend_error"] = _median((wrong / torch.linalg.vector_norm(wanted, dim=1))[kept])
    return values


def judged(aim: Aim, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Whether the first of the rows reaches the aim; where a row is compared, it may not be exceeded."""
    value = rows[0][aim.column]
    peers = {row["method"]: row[aim.column] for row in rows}
    limit = peers[aim.limit] if isinstance(aim.limit, str) else aim.limit
    met = value is not None and (value >= limit if aim.column == "correlation" else value <= limit)
    return {"column": aim.column, "limit": aim.limit, "met": met}


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None


def ours(sample: shapes.Sample, at: Int[Tensor, "b"], neighbors: int) -> Found:
    """The estimator of this package."""
    form = second_fundamental_form(sample.points, at, dim=sample.dim, neighbors=neighbors)
    bend = None if sample.direction is None else form(sample.direction[at], sample.direction[at])
    return Found(form.sectional, torch.linalg.vector_norm(form.mean_curvature, dim=1), bend)


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
    work = f"local PCA dimension of all {n} × 768, k = 100"
    return [*rows, {"work": work, "peer": "scikit-dimension lPCA", "aim": 8.0, **local_pca(sample).row()}]


def local_pca(sample: shapes.Sample) -> Comparison:
    """The dimension at every point, ours before and after the peer, which takes most of a minute."""
    peer = require("skdim")
    points = sample.points.numpy()

    def seconds(work: Callable[[], object]) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    def mine() -> object:
        return intrinsic_dimension(sample.points, "local_pca", neighbors=100)

    taken = [seconds(mine)]
    theirs = seconds(lambda: peer.id.lPCA().fit_pw(points, n_neighbors=100, n_jobs=1))
    taken = sorted([*taken, seconds(mine)])
    best, worst = theirs / taken[0], theirs / taken[1]
    middle = sum(taken) / 2
    return Comparison(1e3 * middle, 1e3 * theirs, theirs / middle, worst, best, 2)
