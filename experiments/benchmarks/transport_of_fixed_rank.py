"""Vector transport between matrices of fixed rank, in factors: ours against pymanopt's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import manifolds
from experiments.benchmarks.peers import require
from experiments.benchmarks.timing import compare


@dataclass(frozen=True)
class Settings:
    """The shape and rank of the matrices, the rounds of timing and the seed."""

    rows: int = 4096
    columns: int = 4096
    rank: int = 16
    rounds: int = 11
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Time the transport of one tangent vector, and compare the two results as matrices."""
    pymanopt = require("pymanopt")
    settings = settings or Settings()
    generator = torch.Generator().manual_seed(settings.seed)
    ours = manifolds.FixedRank(settings.rows, settings.columns)
    size = (settings.rows + settings.columns, settings.rank)
    x, y = (ours.random(*size, dtype=torch.float64, generator=generator) for _ in range(2))
    v = ours.random_tangent(x, generator=generator)

    peer = pymanopt.manifolds.FixedRankEmbedded(settings.rows, settings.columns, settings.rank)
    px, py = (svd_of(point, settings.rows) for point in (x, y))
    pv = tangent_of(px, v, x, settings.rows)

    with manifolds.unchecked():
        moved = ours.transp(x, y, v)
        timing = compare(
            lambda: ours.transp(x, y, v), lambda: peer.transport(px, py, pv), rounds=settings.rounds
        )
    outer, middle, inner = peer.embedding(py, peer.transport(px, py, pv))
    theirs = outer @ middle @ inner.T
    left, right = y[: settings.rows], y[settings.rows :]
    mine = moved[: settings.rows] @ right.mT + left @ moved[settings.rows :].mT
    gap = float((mine - torch.from_numpy(np.ascontiguousarray(theirs))).norm() / mine.norm())
    shape = f"{settings.rows}×{settings.columns}, r = {settings.rank}, float64"
    return [
        {
            "work": f"fixed-rank transport {shape}",
            "peer": "pymanopt FixedRankEmbedded",
            "aim": 35.0,
            **timing.row(),
            "relative_difference": gap,
        }
    ]


def svd_of(x: Tensor, rows: int) -> Any:
    """A point as pymanopt keeps it: (U, S, Vᵀ)."""
    pymanopt = require("pymanopt")
    u, s, vh = manifolds.LowRank.from_factors(x[:rows], x[rows:].mT).svd()
    point = pymanopt.manifolds.fixed_rank._FixedRankPoint
    return point(u.numpy().copy(), s.numpy().copy(), vh.numpy().copy())


def tangent_of(point: Any, v: Tensor, x: Tensor, rows: int) -> Any:
    """A tangent vector as pymanopt keeps it: (U_p, M, V_p)."""
    pymanopt = require("pymanopt")
    u, vt = point[0], point[2]
    left, right, v_left, v_right = (part.numpy() for part in (x[:rows], x[rows:], v[:rows], v[rows:]))
    along_right = v_left @ (right.T @ vt.T) + left @ (v_right.T @ vt.T)
    along_left = right @ (v_left.T @ u) + v_right @ (left.T @ u)
    middle = u.T @ along_right
    tangent = pymanopt.manifolds.fixed_rank._FixedRankTangentVector
    return tangent(along_right - u @ middle, middle, along_left - vt.T @ middle.T)
