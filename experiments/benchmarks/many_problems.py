"""A thousand small, independent problems: ours in one batch against pymanopt one after the other.

The peer is timed on a few of the problems, and its time for all of them is that mean times their number.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import manifolds
from experiments.benchmarks.peers import require


@dataclass(frozen=True)
class Settings:
    """How many problems, how many the peer solves, the rounds, the gradient norm to reach, and the seed."""

    count: int = 1000
    peer_count: int = 20
    rounds: int = 3
    tolerance: float = 1e-6
    methods: tuple[str, ...] = ("conjugate-gradient", "trust-region")
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class Family:
    """Problems of one kind: our manifold, the cost of some with their data, the start, the peer's problem."""

    name: str
    manifold: Any
    cost: Callable[[Tensor, Tensor], Tensor]
    data: Tensor
    start: Tensor
    peer: Callable[[int], tuple[Any, Any]]


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Solve each family with each method; compare times and the values reached."""
    require("pymanopt")
    settings = settings or Settings()
    rows = []
    for build in (sphere, stiefel, fixed_rank):
        family = build(settings)
        for method in settings.methods:
            rows.append(solve(family, method, settings))
    return rows


def solve(family: Family, method: str, settings: Settings) -> dict[str, Any]:
    """One family by one method."""
    pymanopt = require("pymanopt")
    peers = {
        "conjugate-gradient": pymanopt.optimizers.ConjugateGradient,
        "trust-region": pymanopt.optimizers.TrustRegions,
    }
    ratios, mine, theirs = [], [], []
    values: Tensor = torch.empty(0)
    missed = 0
    gap = 0.0
    for _ in range(settings.rounds):
        begun = time.perf_counter()
        found = manifolds.minimize(
            family.cost,
            family.start,
            family.manifold,
            method=method,
            data=[family.data],
            gradient_tolerance=settings.tolerance,
            max_steps=1000,
        )
        values = found.value.cpu()
        mine.append(time.perf_counter() - begun)
        missed = int((found.gradient_norm > settings.tolerance).sum())
        # the peer's trust region raises on matrices of fixed rank; there its conjugate gradient stands in
        fallback = method == "trust-region" and family.name.startswith("fixed rank")
        kind = pymanopt.optimizers.ConjugateGradient if fallback else peers[method]
        solver = kind(verbosity=0, min_gradient_norm=settings.tolerance, max_iterations=1000)
        problems = [family.peer(number) for number in range(settings.peer_count)]
        begun = time.perf_counter()
        results = [solver.run(problem, initial_point=start) for problem, start in problems]
        theirs.append((time.perf_counter() - begun) * settings.count / settings.peer_count)
        ratios.append(theirs[-1] / mine[-1])
        reached = torch.tensor([float(result.cost) for result in results], dtype=values.dtype)
        gap = float((values[: settings.peer_count] - reached).max())
    ratios.sort()
    middle = len(ratios) // 2
    return {
        "work": f"{settings.count} problems: {family.name}, {method}",
        "peer": "pymanopt in a loop" + (" (its conjugate gradient)" if fallback else ""),
        "aim": 50.0,
        "ours_ms": round(sorted(mine)[middle] * 1e3, 2),
        "peer_ms": round(sorted(theirs)[middle] * 1e3, 2),
        "ratio": round(ratios[middle], 2),
        "low": round(ratios[0], 2),
        "high": round(ratios[-1], 2),
        "rounds": settings.rounds,
        "items_over_the_tolerance": missed,
        "largest_value_above_the_peer": gap,
    }


def symmetric(count: int, size: int, settings: Settings) -> Tensor:
    """Random symmetric matrices, one for each problem."""
    generator = torch.Generator().manual_seed(settings.seed)
    matrix = torch.randn(count, size, size, dtype=torch.float64, generator=generator)
    return ((matrix + matrix.mT) / 2).to(settings.device)


def sphere(settings: Settings) -> Family:
    """The least eigenvalue of a 10×10 matrix."""
    pymanopt = require("pymanopt")
    matrix = symmetric(settings.count, 10, settings)
    manifold = manifolds.Sphere()
    generator = torch.Generator(settings.device).manual_seed(settings.seed + 1)
    start = manifold.random(
        settings.count, 10, dtype=torch.float64, device=settings.device, generator=generator
    )
    peer_manifold = pymanopt.manifolds.Sphere(10)

    def peer(number: int) -> tuple[Any, Any]:
        a = matrix[number].cpu().numpy()
        cost = pymanopt.function.numpy(peer_manifold)(lambda x: x @ a @ x)
        gradient = pymanopt.function.numpy(peer_manifold)(lambda x: 2 * a @ x)
        hessian = pymanopt.function.numpy(peer_manifold)(lambda x, u: 2 * a @ u)
        problem = pymanopt.Problem(
            peer_manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian
        )
        return problem, start[number].cpu().numpy().copy()

    def cost(x: Tensor, matrix: Tensor) -> Tensor:
        return (x * (matrix @ x.unsqueeze(-1)).squeeze(-1)).sum(-1)

    return Family("sphere in 10 dimensions, Rayleigh", manifold, cost, matrix, start, peer)


def stiefel(settings: Settings) -> Family:
    """The Brockett cost of a 10×10 matrix over frames of three vectors."""
    pymanopt = require("pymanopt")
    matrix = symmetric(settings.count, 10, settings)
    weights = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64, device=settings.device)
    manifold = manifolds.Stiefel(metric="euclidean")
    generator = torch.Generator(settings.device).manual_seed(settings.seed + 1)
    start = manifold.random(
        settings.count, 10, 3, dtype=torch.float64, device=settings.device, generator=generator
    )
    peer_manifold = pymanopt.manifolds.Stiefel(10, 3)

    def peer(number: int) -> tuple[Any, Any]:
        a, n = matrix[number].cpu().numpy(), weights.cpu().numpy()
        cost = pymanopt.function.numpy(peer_manifold)(lambda x: np.sum(x * (a @ x) * n))
        gradient = pymanopt.function.numpy(peer_manifold)(lambda x: 2 * a @ x * n)
        hessian = pymanopt.function.numpy(peer_manifold)(lambda x, u: 2 * a @ u * n)
        problem = pymanopt.Problem(
            peer_manifold, cost, euclidean_gradient=gradient, euclidean_hessian=hessian
        )
        return problem, start[number].cpu().numpy().copy()

    def cost(x: Tensor, matrix: Tensor) -> Tensor:
        return (x * (matrix @ x) * weights).sum((-1, -2))

    return Family("Stiefel 10×3, Brockett", manifold, cost, matrix, start, peer)


def fixed_rank(settings: Settings) -> Family:
    """The nearest matrix of rank 2 to a 12×10 matrix."""
    pymanopt = require("pymanopt")
    m, n, r = 12, 10, 2
    generator = torch.Generator().manual_seed(settings.seed)
    target = torch.randn(settings.count, m, n, dtype=torch.float64, generator=generator).to(settings.device)
    manifold = manifolds.FixedRank(m, n)
    generator = torch.Generator(settings.device).manual_seed(settings.seed + 1)
    start = manifold.random(
        settings.count, m + n, r, dtype=torch.float64, device=settings.device, generator=generator
    )
    peer_manifold = pymanopt.manifolds.FixedRankEmbedded(m, n, r)
    point = pymanopt.manifolds.fixed_rank._FixedRankPoint

    def peer(number: int) -> tuple[Any, Any]:
        a = target[number].cpu().numpy()

        def cost(u: Any, s: Any, vt: Any) -> Any:
            return 0.5 * np.sum(((u * s) @ vt - a) ** 2)

        def gradient(u: Any, s: Any, vt: Any) -> Any:
            residual = (u * s) @ vt - a
            along, across = residual @ vt.T, residual.T @ u
            return along * s, np.einsum("ij,ij->j", u, along), (across * s).T

        factors = manifolds.LowRank.from_factors(start[number, :m], start[number, m:].mT).svd()
        u, s, vh = (part.cpu().numpy().copy() for part in factors)
        known = pymanopt.function.numpy(peer_manifold)  # it takes functions of positional arguments alone
        value, slope = known(lambda u, s, vt: cost(u, s, vt)), known(lambda u, s, vt: gradient(u, s, vt))
        return pymanopt.Problem(peer_manifold, value, euclidean_gradient=slope), point(u, s, vh)

    def cost(x: Tensor, target: Tensor) -> Tensor:
        return (x[..., :m, :] @ x[..., m:, :].mT - target).square().sum((-1, -2)) / 2

    return Family("fixed rank 12×10, r = 2, nearest", manifold, cost, target, start, peer)
