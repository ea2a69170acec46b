"""Spectra of updates: from factors against an SVD of the product, and of dense matrices against peers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.benchmarks.peers import require
from experiments.benchmarks.timing import compare
from manifolds import LowRank
from peft_analysis.spectrum import measures, singular_values, spectrum


@dataclass(frozen=True)
class Settings:
    """The size of the matrices, the rank of the adapter, the rounds of timing and the seed."""

    size: int = 4096
    rank: int = 16
    rounds: int = 1
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Time the spectrum of an adapter and the effective rank of a dense matrix, and compare the figures."""
    settings = settings or Settings()
    generator = torch.Generator().manual_seed(settings.seed)
    left = torch.randn(settings.size, settings.rank, generator=generator)
    right = torch.randn(settings.rank, settings.size, generator=generator)
    dense = torch.randn(settings.size, settings.size, generator=generator)
    return [of_factors(settings, LowRank.from_factors(left, right)), *of_dense(settings, dense)]


def of_factors(settings: Settings, update: LowRank) -> dict[str, Any]:
    """The whole spectrum of an adapter against the singular values of its product, multiplied out."""
    product = update.dense()
    timing = compare(
        lambda: spectrum(update),
        lambda: torch.linalg.svd(product, full_matrices=False),
        rounds=settings.rounds,
    )
    ours, theirs = spectrum(update).singular_values, torch.linalg.svdvals(product)[: settings.rank]
    return {
        "work": f"spectrum of an adapter {settings.size}², r = {settings.rank}, float32",
        "peer": "torch.linalg.svd of the product",
        "aim": 1000.0,
        **timing.row(),
        "relative_difference": float((ours - theirs).norm() / theirs.norm()),
    }


def of_dense(settings: Settings, matrix: Tensor) -> list[dict[str, Any]]:
    """The effective rank of a dense matrix against WeightWatcher's route and torch's."""
    weightwatcher = require("weightwatcher.RMT_Util")
    array = matrix.numpy()
    peers: list[tuple[str, float | None, Callable[[], Any]]] = [
        ("WeightWatcher (scipy.linalg.svd)", 4.0, partial(weightwatcher.svd_vals, array)),
        ("torch.linalg.svdvals", None, lambda: torch.linalg.svdvals(matrix).numpy()),
    ]
    ours = measures(singular_values(matrix))["effective_rank"]
    rows = []
    for name, aim, values in peers:
        timing = compare(
            lambda: measures(singular_values(matrix)),
            partial(_then_rank, values),
            rounds=settings.rounds,
        )
        rows.append(
            {
                "work": f"effective rank of a dense {settings.size}², float32",
                "peer": name,
                "aim": aim,
                **timing.row(),
                "relative_difference": abs(ours - effective_rank(values())) / ours,
            }
        )
    return rows


def _then_rank(values: Callable[[], Any]) -> float:
    return effective_rank(values())


def effective_rank(values: npt.NDArray[np.floating[Any]]) -> float:
    """The exponential of the entropy of σ / Σσ, in numpy."""
    shares = values.astype(np.float64) / values.astype(np.float64).sum()
    return math.exp(-float((shares * np.log(shares)).sum()))
