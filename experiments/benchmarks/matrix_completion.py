"""Low-rank matrix completion to full precision: ours against pymanopt's conjugate gradient and trust region.

The cost is half the sum of squared errors at the seen entries. Both sides get their gradient by sparse
products: the peer by formulas written out in numpy and scipy, ours by differentiation of `manifolds.Entries`.
"""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse.linalg
import torch
from torch import Tensor

import manifolds
from experiments.benchmarks.peers import require


@dataclass(frozen=True)
class Problem:
    """One matrix: its shape and rank, the share of entries that is seen, and the rounds of timing."""

    rows: int
    columns: int
    rank: int
    seen: float
    rounds: int


@dataclass(frozen=True)
class Settings:
    """The problems, the gradient norm to reach, relative to the first one, and the seed."""

    problems: tuple[Problem, ...] = (
        Problem(500, 400, 5, 0.2, 5),
        Problem(4096, 4096, 16, 0.03, 1),
    )
    methods: tuple[str, ...] = ("conjugate-gradient", "lbfgs", "trust-region")
    tolerance: float = 1e-10
    peer_seconds: float = 240.0
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Solve each problem with each of our methods and with the peer's, from the same start."""
    require("pymanopt")
    settings = settings or Settings()
    rows: list[dict[str, Any]] = []
    for problem in settings.problems:
        data = Data.draw(problem, settings.seed)
        limit = settings.tolerance * data.first_gradient_norm()
        peers = [solve_peer(data, limit, settings.peer_seconds) for _ in range(problem.rounds)]
        for method in settings.methods:
            pairs = [solve_ours(data, method, limit) for _ in range(problem.rounds)]
            rows.append(compare_runs(problem, method, pairs, peers))
        rows[-1]["peer_trust_region"] = peer_trust_region(data, limit)
    return rows


@dataclass(frozen=True)
class Data:
    """The seen entries of a random matrix of low rank, its truth, and a start."""

    problem: Problem
    entries: manifolds.Entries
    values: Tensor
    start: Tensor
    truth: Tensor

    @classmethod
    def draw(cls, problem: Problem, seed: int) -> Data:
        """A product of Gaussian factors, entries seen at random, and a start from the seen entries' SVD."""
        generator = torch.Generator().manual_seed(seed)
        m, n, r = problem.rows, problem.columns, problem.rank
        left = torch.randn(m, r, dtype=torch.float64, generator=generator)
        right = torch.randn(n, r, dtype=torch.float64, generator=generator)
        seen = torch.rand(m, n, generator=generator) < problem.seen
        places = seen.nonzero()
        entries = manifolds.Entries(places[:, 0], places[:, 1], (m, n))
        values = entries(left, right)
        sparse = scipy.sparse.csr_matrix((values.numpy(), places.numpy().T), (m, n))
        u, s, vt = scipy.sparse.linalg.svds(sparse / problem.seen, k=r, rng=seed)
        half = np.sqrt(s)
        start = torch.from_numpy(np.concatenate([u * half, vt.T * half]))
        return cls(problem, entries, values, start, torch.cat([left, right]))

    @property
    def manifold(self) -> manifolds.FixedRank:
        """The matrices of this rank."""
        return manifolds.FixedRank(self.problem.rows, self.problem.columns)

    def cost(self, x: Tensor) -> Tensor:
        """Half the sum of squared errors at the seen entries."""
        return (self.entries.of(x) - self.values).square().sum(-1) / 2

    def first_gradient_norm(self) -> float:
        """The Riemannian gradient's norm at the start."""
        gradient = torch.func.grad(self.cost)(self.start)
        return float(self.manifold.norm(self.start, self.manifold.egrad2rgrad(self.start, gradient)))

    def error(self, x: Tensor) -> float:
        """Relative error of the whole matrix, by its factors."""
        m = self.problem.rows
        mine = manifolds.LowRank.from_factors(x[:m], x[m:].mT)
        truth = manifolds.LowRank.from_factors(self.truth[:m], self.truth[m:].mT)
        return float((mine - truth).norm() / truth.norm())


@dataclass(frozen=True)
class Run:
    """How one run went."""

    seconds: float
    steps: int
    error: float
    ended: str


def solve_ours(data: Data, method: str, limit: float) -> Run:
    """One run of `manifolds.minimize`."""
    start = time.perf_counter()
    found = manifolds.minimize(
        data.cost, data.start, data.manifold, method=method, gradient_tolerance=limit, max_steps=2000
    )
    seconds = time.perf_counter() - start
    return Run(seconds, int(found.steps), data.error(found.x), found.describe())


def peer_problem(data: Data) -> tuple[Any, Any]:
    """The same problem and start as pymanopt takes them."""
    pymanopt = require("pymanopt")
    m, n, r = data.problem.rows, data.problem.columns, data.problem.rank
    manifold = pymanopt.manifolds.FixedRankEmbedded(m, n, r)
    rows, columns = data.entries.rows.numpy(), data.entries.columns.numpy()
    values = data.values.numpy()

    def errors(u: Any, s: Any, vt: Any) -> Any:
        return np.einsum("ij,ij->i", (u * s)[rows], vt.T[columns]) - values

    def cost(u: Any, s: Any, vt: Any) -> Any:
        return 0.5 * np.sum(errors(u, s, vt) ** 2)

    def gradient(u: Any, s: Any, vt: Any) -> Any:
        residual = scipy.sparse.csr_matrix((errors(u, s, vt), (rows, columns)), (m, n))
        along, across = residual @ vt.T, residual.T @ u
        return along * s, np.einsum("ij,ij->j", u, along), (across * s).T

    u, s, vh = manifolds.LowRank.from_factors(data.start[:m], data.start[m:].mT).svd()
    point = pymanopt.manifolds.fixed_rank._FixedRankPoint
    start = point(u.numpy().copy(), s.numpy().copy(), vh.numpy().copy())
    known = pymanopt.function.numpy(manifold)  # it takes functions of positional arguments alone
    value, slope = known(lambda u, s, vt: cost(u, s, vt)), known(lambda u, s, vt: gradient(u, s, vt))
    return pymanopt.Problem(manifold, value, euclidean_gradient=slope), start


def solve_peer(data: Data, limit: float, seconds: float) -> Run:
    """One run of pymanopt's conjugate gradient."""
    pymanopt = require("pymanopt")
    problem, start = peer_problem(data)
    solver = pymanopt.optimizers.ConjugateGradient(
        verbosity=0, min_gradient_norm=limit, min_step_size=0.0, max_iterations=2000, max_time=seconds
    )
    begun = time.perf_counter()
    found = solver.run(problem, initial_point=start)
    taken = time.perf_counter() - begun
    u, s, vt = found.point
    half = np.sqrt(s)
    x = torch.from_numpy(np.concatenate([u * half, vt.T * half]))
    return Run(taken, found.iterations, data.error(x), found.stopping_criterion)


def peer_trust_region(data: Data, limit: float) -> str:
    """What pymanopt's trust region says to this problem."""
    pymanopt = require("pymanopt")
    problem, start = peer_problem(data)
    solver = pymanopt.optimizers.TrustRegions(verbosity=0, min_gradient_norm=limit, max_time=30)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return str(solver.run(problem, initial_point=start).stopping_criterion)
    except Exception as refused:
        return f"raises {type(refused).__name__}"


def compare_runs(problem: Problem, method: str, ours: list[Run], peers: list[Run]) -> dict[str, Any]:
    """One row of the table: medians, and the ratio's spread over the rounds."""
    ratios = sorted(theirs.seconds / mine.seconds for mine, theirs in zip(ours, peers, strict=True))
    shape = f"{problem.rows}×{problem.columns}, r = {problem.rank}, {problem.seen:.0%} seen"
    mine, theirs = sorted(ours, key=lambda run: run.seconds), sorted(peers, key=lambda run: run.seconds)
    middle = len(ratios) // 2
    return {
        "work": f"matrix completion {shape}, {method}",
        "peer": "pymanopt conjugate gradient",
        "aim": 3.0,
        "ours_ms": round(mine[middle].seconds * 1e3, 2),
        "peer_ms": round(theirs[middle].seconds * 1e3, 2),
        "ratio": round(ratios[middle], 3),
        "low": round(ratios[0], 3),
        "high": round(ratios[-1], 3),
        "rounds": len(ratios),
        "ours_steps": mine[middle].steps,
        "peer_steps": theirs[middle].steps,
        "ours_error": mine[middle].error,
        "peer_error": theirs[middle].error,
        "ours_ended": mine[middle].ended,
        "peer_ended": theirs[middle].ended,
    }
