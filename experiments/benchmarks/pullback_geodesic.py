"""A geodesic through a decoder from 2 to 768 dimensions: ours against stochman's.

Run with ``python -m experiments.benchmarks.pullback_geodesic``; stochman is in the extra ``bench``. Both get
the same network, the same ends and one thread; the curves that they return are measured with one fine
discretisation.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from experiments.benchmarks.peers import require
from experiments.benchmarks.timing import compare
from manifolds.pulled_back import Geodesic, Pullback

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Sizes of the decoder, segments of our path, rounds of timing, and pairs of points."""

    hidden: tuple[int, ...] = (64, 256)
    outputs: int = 768
    gain: float = 2.0
    steps: int = 20
    fine: int = 2000
    rounds: int = 5
    pairs: int = 3
    seed: int = 0


def decoder(settings: Settings) -> nn.Sequential:
    """A network with hyperbolic tangents and random weights, `gain` times the usual so that it bends."""
    sizes = [2, *settings.hidden, settings.outputs]
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for number, (before, after) in enumerate(pairwise(sizes)):
            layers += (
                [nn.Linear(before, after), nn.Tanh()]
                if number < len(sizes) - 2
                else [nn.Linear(before, after)]
            )
    net = nn.Sequential(*layers).requires_grad_(False)
    for layer in list(net)[:-1]:
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(settings.gain)
    return net


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Time both on each pair of points, and measure their curves and the straight line.

    Raises:
        ImportError: stochman is not installed.
    """
    settings = settings or Settings()
    curves, manifold = require("stochman.curves"), require("stochman.manifold")
    torch.set_num_threads(1)
    net = decoder(settings)

    class Decoded(manifold.EmbeddedManifold):  # type: ignore[name-defined]
        def embed(self, points: Tensor, jacobian: bool = False) -> Tensor:
            return net(points)

    ours, peer = Pullback(net), Decoded()
    fine = Pullback(decoder(settings).double())
    generator = torch.Generator().manual_seed(settings.seed)
    ends = 1.2 * torch.randn(settings.pairs, 2, 2, generator=generator)
    share = torch.linspace(0, 1, settings.fine + 1, dtype=torch.float64)
    nodes = torch.linspace(0, 1, settings.steps + 1, dtype=torch.float64)
    rows = []
    for number, (x, y) in enumerate(ends):

        def mine(x: Tensor = x, y: Tensor = y) -> Geodesic:
            with torch.no_grad():
                return ours.geodesic(x, y, steps=settings.steps)

        def theirs(x: Tensor = x, y: Tensor = y) -> tuple[Any, Any]:
            return peer.connecting_geodesic(x[None], y[None], curves.CubicSpline(x[None], y[None]))

        timing = compare(mine, theirs, rounds=settings.rounds)
        geodesic, (curve, success) = mine(), theirs()
        path = torch.as_tensor(CubicSpline(nodes.numpy(), geodesic.path.double().numpy())(share.numpy()))
        with torch.no_grad():
            other = curve(share.float()).reshape(-1, 2).double()
        straight = x.double() + share[:, None] * (y - x).double()
        rows.append(
            {
                "work": f"geodesic through a 2→{settings.outputs} decoder, pair {number + 1}",
                "peer": "stochman",
                "aim": 5.0,
                **timing.row(),
                "ours_energy": float(fine.energy(path)),
                "peer_energy": float(fine.energy(other)),
                "straight_energy": float(fine.energy(straight)),
                "ours_converged": bool(geodesic.converged),
                "peer_converged": bool(success),
            }
        )
    return rows


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info(json.dumps(run(), indent=1))
