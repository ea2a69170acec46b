"""A geodesic through a decoder from 2 to 768 dimensions: ours against stochman's.

Run with ``python -m experiments.benchmarks.pullback_geodesic``; stochman is in the extra ``bench``. Both get the same
network, the same ends and one thread; the curves that they return are measured with one fine discretisation.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from manifolds.pulled_back import Pullback

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Sizes of the decoder, segments of our path, how often each is run, and on how many pairs of points."""

    hidden: tuple[int, ...] = (64, 256)
    outputs: int = 768
    gain: float = 2.0
    steps: int = 20
    fine: int = 2000
    repeats: int = 5
    pairs: int = 3
    seed: int = 0


def decoder(settings: Settings) -> nn.Sequential:
    """A network with hyperbolic tangents and random weights, larger than usual by `gain` so that its image bends."""
    sizes = [2, *settings.hidden, settings.outputs]
    layers: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        for number, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
            layers += [nn.Linear(before, after), nn.Tanh()] if number < len(sizes) - 2 else [nn.Linear(before, after)]
    net = nn.Sequential(*layers).requires_grad_(False)
    for layer in net[:-1]:
        if isinstance(layer, nn.Linear):
            layer.weight.mul_(settings.gain)
    return net


def run(settings: Settings | None = None) -> dict[str, Any]:
    """Time both on each pair of points, in turn, and measure their curves.

    Raises:
        ImportError: stochman is not installed.
    """
    settings = settings or Settings()
    try:
        from stochman.curves import CubicSpline as PeerSpline
        from stochman.manifold import EmbeddedManifold
    except ImportError as missing:
        raise ImportError("this benchmark compares with stochman: pip install 'geoedit[bench]'") from missing
    torch.set_num_threads(1)
    net = decoder(settings)

    class Decoded(EmbeddedManifold):  # type: ignore[misc]
        def embed(self, points: Tensor, jacobian: bool = False) -> Tensor:
            return net(points)

    ours, peer = Pullback(net), Decoded()
    generator = torch.Generator().manual_seed(settings.seed)
    ends = 1.2 * torch.randn(settings.pairs, 2, 2, generator=generator)
    with torch.no_grad():
        ours.geodesic(ends[0, 0], ends[0, 1], steps=settings.steps)  # imports and caches
    found = []
    for x, y in ends:
        times: dict[str, list[float]] = {"ours": [], "stochman": []}
        for _ in range(settings.repeats):
            start = time.perf_counter()
            with torch.no_grad():
                geodesic = ours.geodesic(x, y, steps=settings.steps)
            times["ours"].append(time.perf_counter() - start)
            start = time.perf_counter()
            curve, success = peer.connecting_geodesic(x[None], y[None], PeerSpline(x[None], y[None]))
            times["stochman"].append(time.perf_counter() - start)
        share = torch.linspace(0, 1, settings.fine + 1, dtype=torch.float64)
        nodes = torch.linspace(0, 1, settings.steps + 1, dtype=torch.float64)
        mine = torch.as_tensor(CubicSpline(nodes.numpy(), geodesic.path.double().numpy())(share.numpy()))
        with torch.no_grad():
            theirs = curve(share.float()).reshape(-1, 2).double()
        fine = Pullback(net.double())
        straight = x.double() + share[:, None] * (y - x).double()
        energies = {
            name: float(fine.energy(path)) for name, path in (("ours", mine), ("stochman", theirs), ("line", straight))
        }
        net.float()
        found.append({
            "seconds": times, "energy": energies, "converged": bool(geodesic.converged),
            "stochman_converged": bool(success), "iterations": int(geodesic.iterations),
            "ratio": ratio(times["stochman"], times["ours"]),
        })  # fmt: skip
        log.info("%s times faster; energies %s", found[-1]["ratio"]["median"], energies)
    return {"settings": asdict(settings), "pairs": found, "torch": torch.__version__.split("+")[0]}


def ratio(peer: list[float], ours: list[float]) -> dict[str, float]:
    """The peer's time by ours, run by run: median, least and largest."""
    each = [a / b for a, b in zip(peer, ours, strict=True)]
    return {"median": round(statistics.median(each), 2), "least": round(min(each), 2), "largest": round(max(each), 2)}


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info(json.dumps(run(), indent=1))
