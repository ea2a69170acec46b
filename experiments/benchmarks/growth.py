"""How the time of our operations grows with batch, rows and rank, and how near the machine's limit they are.

The exponent is the slope of log time against log size. On a GPU, and on a CPU where the sizes are large, the
share of memory bandwidth says how near an operation is to reading each tensor once and writing its result
once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import manifolds
from experiments.benchmarks.timing import measure

GROWS = ("batch", "rows", "rank")


@dataclass(frozen=True)
class Settings:
    """The sizes that are varied, one at a time, around a middle; the device and the seed."""

    batch: tuple[int, ...] = (1, 4, 16, 64)
    rows: tuple[int, ...] = (256, 1024, 4096)
    rank: tuple[int, ...] = (4, 8, 16, 32)
    middle: tuple[int, int, int] = (8, 1024, 16)
    rounds: int = 5
    device: str = "cpu"
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Fit an exponent for each operation and size; report the share of bandwidth at the largest size."""
    settings = settings or Settings()
    speed = bandwidth(settings)
    rows = []
    for name, prepare in OPERATIONS.items():
        row: dict[str, Any] = {"operation": name}
        for axis, grown in enumerate(GROWS):
            sizes = getattr(settings, grown)
            times = []
            for size in sizes:
                shape = list(settings.middle)
                shape[axis] = size
                work, _ = prepare((shape[0], shape[1], shape[2]), settings)
                with manifolds.unchecked(), torch.no_grad():
                    times.append(measure(work, rounds=settings.rounds))
            slope, _ = np.polyfit(np.log(sizes), np.log(times), 1)
            row[f"exponent_{grown}"] = round(float(slope), 2)
            row[f"ms_{grown}"] = [round(seconds * 1e3, 4) for seconds in times]
        largest = (settings.batch[-1], settings.rows[-1], settings.middle[2])
        work, moved = prepare(largest, settings)
        with manifolds.unchecked(), torch.no_grad():
            seconds = measure(work, rounds=settings.rounds)
        row["largest"] = f"{largest[0]}×({largest[1]}×{largest[2]})"
        row["gigabytes_per_second"] = round(moved / seconds / 1e9, 2)
        row["share_of_bandwidth"] = round(moved / seconds / speed, 3)
        rows.append(row)
    return [{"operation": "copy (the limit)", "gigabytes_per_second": round(speed / 1e9, 2)}, *rows]


def bandwidth(settings: Settings) -> float:
    """Bytes read and written per second by a copy of a large tensor."""
    source = torch.randn(1 << 25, device=settings.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), rounds=settings.rounds)


def _stiefel(
    shape: tuple[int, int, int], settings: Settings
) -> tuple[manifolds.Stiefel, Tensor, Tensor, Tensor]:
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    manifold = manifolds.Stiefel(metric="euclidean")
    batch, rows, rank = shape
    x = manifold.random(batch, rows, rank, device=settings.device, generator=generator).as_subclass(Tensor)
    u, v = (manifold.random_tangent(x, generator=generator) * 0.01 for _ in range(2))
    return manifold, x, u, v


def _fixed_rank(
    shape: tuple[int, int, int], settings: Settings
) -> tuple[manifolds.FixedRank, Tensor, Tensor, Tensor]:
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    batch, rows, rank = shape
    manifold = manifolds.FixedRank(rows // 2, rows // 2)
    x = manifold.random(batch, rows, rank, device=settings.device, generator=generator).as_subclass(Tensor)
    u, v = (manifold.random_tangent(x, generator=generator) * 0.01 for _ in range(2))
    return manifold, x, u, v


Prepared = tuple[Callable[[], object], int]


def _projection(shape: tuple[int, int, int], settings: Settings) -> Prepared:
    manifold, x, u, _ = _stiefel(shape, settings)
    return (lambda: manifold.proju(x, u)), 3 * x.nbytes


def _retraction(shape: tuple[int, int, int], settings: Settings) -> Prepared:
    manifold, x, u, _ = _stiefel(shape, settings)
    return (lambda: manifold.retr(x, u)), 3 * x.nbytes


def _fixed_rank_retraction(shape: tuple[int, int, int], settings: Settings) -> Prepared:
    manifold, x, u, _ = _fixed_rank(shape, settings)
    return (lambda: manifold.retr(x, u)), 3 * x.nbytes


def _fixed_rank_transport(shape: tuple[int, int, int], settings: Settings) -> Prepared:
    manifold, x, u, v = _fixed_rank(shape, settings)
    y = manifold.retr(x, u)
    return (lambda: manifold.transp(x, y, v)), 4 * x.nbytes


OPERATIONS: dict[str, Callable[[tuple[int, int, int], Settings], Prepared]] = {
    "Stiefel projection": _projection,
    "Stiefel retraction": _retraction,
    "fixed-rank retraction": _fixed_rank_retraction,
    "fixed-rank transport": _fixed_rank_transport,
}
