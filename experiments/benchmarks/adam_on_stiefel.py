"""One step of Adam on batches of tall orthonormal matrices: ours against geoopt's two Stiefel manifolds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import Tensor

import manifolds
from experiments.benchmarks.timing import compare


@dataclass(frozen=True)
class Settings:
    """How many matrices, their shape, the rounds of timing and the seed."""

    batches: tuple[int, ...] = (8, 64)
    rows: int = 1024
    columns: int = 16
    rounds: int = 11
    device: str = "cpu"
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Time the step of each batch size against each peer, and see how orthonormal the points stay."""
    settings = settings or Settings()
    rows: list[dict[str, Any]] = []
    peers = {"geoopt Stiefel()": geoopt.Stiefel(), "geoopt EuclideanStiefel": geoopt.EuclideanStiefel()}
    aims = {"geoopt Stiefel()": {8: 150.0}, "geoopt EuclideanStiefel": {8: 1.6, 64: 2.7}}
    for batch in settings.batches:
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        ours = manifolds.Stiefel(metric="euclidean")
        size = (batch, settings.rows, settings.columns)
        start = ours.random(*size, device=settings.device, generator=generator)
        gradient = torch.randn(size, device=settings.device, generator=generator)
        for name, peer in peers.items():
            if name == "geoopt Stiefel()" and batch != settings.batches[0]:
                continue
            parameter = geoopt.ManifoldParameter(start.clone(), manifold=ours)
            mine = stepper(manifolds.optim.RiemannianAdam([parameter], lr=1e-3), parameter, gradient)
            other = geoopt.ManifoldParameter(start.clone(), manifold=peer)
            theirs = stepper(geoopt.optim.RiemannianAdam([other], lr=1e-3), other, gradient)
            rounds = settings.rounds if "Euclidean" in name else 3
            timing = compare(mine, theirs, rounds=rounds)
            rows.append(
                {
                    "work": f"Adam step, Stiefel {batch}×({settings.rows}×{settings.columns}) float32",
                    "peer": name,
                    "aim": aims[name].get(batch),
                    **timing.row(),
                    "ours_defect": defect(parameter),
                    "peer_defect": defect(other),
                }
            )
    return rows


def stepper(optimizer: Any, parameter: Tensor, gradient: Tensor) -> Callable[[], object]:
    """A function that makes one step with a fixed gradient."""

    def step() -> None:
        parameter.grad = gradient.clone()
        optimizer.step()

    return step


def defect(x: Tensor) -> float:
    """The largest entry of XᵀX − I."""
    x = x.detach().double()
    return float((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)).abs().max())
