"""The top directions of a small U-Net's Jacobian at its bottleneck: block Krylov, power iteration.

Run with ``python -m experiments.benchmarks.jacobian_directions``. The peer is the subspace power iteration of
Park et al., "Understanding the latent space of diffusion models through the lens of Riemannian geometry"
(2023), written anew from its description, with the settings of their code: at least 10 iterations, at most
100, and a stop when no entry of the right vectors moved by more than 1e-3. Its Jacobian products are ours, so
that only the iterations differ.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.timing import compare
from manifolds.pulled_back import Pullback, SingularDirections
from manifolds.pulled_back.derivatives import Linearization

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The bottleneck's shape, how many directions, the tolerance of both, and the rounds of timing."""

    channels: int = 16
    side: int = 6
    k: int = 8
    tolerance: float = 1e-3
    least: int = 10
    most: int = 100
    rounds: int = 5
    seed: int = 0


class UpPath(nn.Module):
    """From a bottleneck and two skip connections, which are held, to an image: the second half of a U-Net."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.skips = nn.ParameterList(
            [torch.randn(1, channels, side, side), torch.randn(1, 8, 2 * side, 2 * side)]
        )
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


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
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
    draws = Draws(settings.seed)

    def mine() -> SingularDirections:
        with torch.no_grad():
            return pull.singular_directions(
                x, settings.k, tolerance=settings.tolerance, generator=draws.next("ours")
            )

    def theirs() -> tuple[Tensor, int]:
        return power_iteration(image, x, settings, draws.next("power iteration"))

    timing = compare(mine, theirs, rounds=settings.rounds)
    found, (vectors, iterations) = mine(), theirs()
    row = {
        "work": f"top-{settings.k} Jacobian directions of a U-Net's bottleneck of {x.numel()} numbers",
        "peer": "power iteration (Park et al. 2023)",
        "aim": 3.0,
        **timing.row(),
        "ours_angle": largest_angle(basis, found.vectors.flatten(1).double()),
        "peer_angle": largest_angle(basis, vectors.double()),
        "ours_iterations": found.iterations,
        "peer_iterations": iterations,
        "ours_converged": bool(found.converged),
        "singular_values": [round(float(value), 6) for value in exact.S[: settings.k + 2]],
    }
    return [row]


class Draws:
    """Generators of one seed after another, the same for both."""

    def __init__(self, seed: int) -> None:
        self.seed, self.counts = seed, {"ours": 0, "power iteration": 0}

    def next(self, name: str) -> torch.Generator:
        """The next generator of one of the two."""
        self.counts[name] += 1
        return torch.Generator().manual_seed(self.seed + self.counts[name])


def largest_angle(exact: Tensor, found: Tensor) -> float:
    """The largest principal angle (radians) between the spaces of the rows, by its sine."""
    rows = torch.linalg.qr(found.mT).Q.mT
    return float(torch.asin(torch.linalg.matrix_norm(rows - rows @ exact.mT @ exact, ord=2).clamp(max=1)))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info(json.dumps(run(), indent=1))
