"""The top directions of the Jacobian of a small U-Net at its bottleneck: block Krylov against power iteration.

Run with ``python -m experiments.benchmarks.jacobian_directions``. The peer is the subspace power iteration of Park et
al., "Understanding the latent space of diffusion models through the lens of Riemannian geometry" (2023), written anew
from its description, with the settings of their code: at least 10 iterations, at most 100, and a stop when no entry
of the right vectors moved by more than 1e-3. Its Jacobian products are ours, so that only the iterations differ.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from manifolds.pulled_back import Pullback
from manifolds.pulled_back.derivatives import Linearization

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The bottleneck's shape, how many directions, the tolerance of both, and how often each is run."""

    channels: int = 16
    side: int = 6
    k: int = 8
    tolerance: float = 1e-3
    least: int = 10
    most: int = 100
    repeats: int = 5
    seed: int = 0


class UpPath(nn.Module):
    """From a bottleneck and two skip connections, which are held, to an image: the second half of a U-Net."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.skips = nn.ParameterList([torch.randn(1, channels, side, side), torch.randn(1, 8, 2 * side, 2 * side)])
        self.middle = nn.Conv2d(channels, channels, 3, padding=1)
        self.first = nn.Conv2d(2 * channels, 8, 3, padding=1)
        self.second = nn.Conv2d(16, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        self.norms = nn.ModuleList([nn.GroupNorm(4, channels), nn.GroupNorm(4, 8)])

    def forward(self, h: Tensor) -> Tensor:
        """The image (items, 3, 2·side, 2·side)."""
        near, far = (skip.expand(h.shape[0], *skip.shape[1:]) for skip in self.skips)
        h = h + self.middle(torch.tanh(self.norms[0](h)))
        h = self.norms[1](self.first(torch.cat([h, near], 1)))
        h = nn.functional.interpolate(torch.tanh(h), scale_factor=2.0, mode="nearest")
        return self.last(torch.tanh(self.second(torch.cat([h, far], 1))))


def power_iteration(f: Any, x: Tensor, settings: Settings, generator: torch.Generator) -> tuple[Tensor, int]:
    """Right singular vectors (k, size) and the iterations taken."""
    size = x.numel()
    at = Linearization(f, x[None])
    vectors = torch.linalg.qr(torch.randn(size, settings.k, generator=generator, dtype=x.dtype)).Q.mT
    for iteration in range(settings.most):
        pushed = at.push(vectors.reshape(1, settings.k, *x.shape))
        pulled = at.pull(pushed).reshape(settings.k, size)
        before, vectors = vectors, torch.linalg.svd(pulled, full_matrices=False).Vh
        if iteration > settings.least and torch.allclose(before, vectors, atol=settings.tolerance):
            break
    return vectors, iteration + 1


def run(settings: Settings | None = None) -> dict[str, Any]:
    """Time both, and compare their spaces with the exact one."""
    settings = settings or Settings()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = UpPath(settings.channels, settings.side).requires_grad_(False)
        x = torch.randn(settings.channels, settings.side, settings.side)

    def image(h: Tensor) -> Tensor:
        return net(h).flatten(1)

    pull = Pullback(net, ndim=3)
    exact = torch.linalg.svd(torch.func.jacrev(lambda h: image(h[None])[0])(x).flatten(1).double())
    basis = exact.Vh[: settings.k]
    times: dict[str, list[float]] = {"ours": [], "power iteration": []}
    angles: dict[str, list[float]] = {"ours": [], "power iteration": []}
    steps: dict[str, int] = {}
    pull.singular_directions(x, settings.k, max_iterations=1)
    for repeat in range(settings.repeats):
        start = time.perf_counter()
        with torch.no_grad():
            found = pull.singular_directions(
                x, settings.k, tolerance=settings.tolerance, generator=torch.Generator().manual_seed(repeat)
            )
        times["ours"].append(time.perf_counter() - start)
        start = time.perf_counter()
        vectors, steps["power iteration"] = power_iteration(
            image, x, settings, torch.Generator().manual_seed(repeat)
        )
        times["power iteration"].append(time.perf_counter() - start)
        steps["ours"] = found.iterations
        for name, each in (("ours", found.vectors.flatten(1)), ("power iteration", vectors)):
            angles[name].append(largest_angle(basis, each.double()))
    each = [a / b for a, b in zip(times["power iteration"], times["ours"], strict=True)]
    ratio = {"median": statistics.median(each), "least": min(each), "largest": max(each)}
    log.info("%.1f times faster; angles %s", ratio["median"], angles)
    return {
        "settings": asdict(settings), "seconds": times, "angle_to_exact": angles, "iterations": steps,
        "ratio": ratio, "singular_values": exact.S[: settings.k + 2].tolist(), "converged": bool(found.converged),
        "torch": torch.__version__.split("+")[0],
    }  # fmt: skip


def largest_angle(exact: Tensor, found: Tensor) -> float:
    """The largest principal angle (radians) between the spaces of the rows, by its sine."""
    rows = torch.linalg.qr(found.mT).Q.mT
    return float(torch.asin(torch.linalg.matrix_norm(rows - rows @ exact.mT @ exact, ord=2).clamp(max=1)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info(json.dumps(run(), indent=1))
