"""Two pieces of code timed in turn, so that whatever else the machine does falls on both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Comparison:
    """Times of ours and of a peer, taken in turn.

    Attributes:
        ours_ms: median time of ours, in milliseconds.
        peer_ms: median time of the peer.
        ratio: median over the rounds of peer / ours; above 1, ours is faster.
        low: lower quartile of that ratio.
        high: upper quartile.
        rounds: how many rounds were taken.
    """

    ours_ms: float
    peer_ms: float
    ratio: float
    low: float
    high: float
    rounds: int

    def row(self) -> dict[str, Any]:
        """The figures as they go into a JSON file."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def compare(
    ours: Callable[[], object], peer: Callable[[], object], *, rounds: int = 15, seconds: float = 0.2
) -> Comparison:
    """Time two functions in turn.

    Args:
        ours: our work; called with nothing.
        peer: the peer's.
        rounds: how many pairs of measurements to take, after one of each that does not count.
        seconds: each measurement repeats its function until it has taken about this long.
    """
    counts = [max(1, int(seconds / max(_time(work, 1), 1e-9))) for work in (ours, peer)]
    pairs = [(_time(ours, counts[0]), _time(peer, counts[1])) for _ in range(rounds)]
    ratios = sorted(theirs / mine for mine, theirs in pairs)
    quartiles = statistics.quantiles(ratios, n=4) if rounds > 1 else [ratios[0]] * 3
    return Comparison(
        ours_ms=statistics.median(mine for mine, _ in pairs) * 1e3,
        peer_ms=statistics.median(theirs for _, theirs in pairs) * 1e3,
        ratio=quartiles[1],
        low=quartiles[0],
        high=quartiles[2],
        rounds=rounds,
    )


def measure(work: Callable[[], object], *, rounds: int = 15, seconds: float = 0.1) -> float:
    """The median time of one call, in seconds."""
    count = max(1, int(seconds / max(_time(work, 1), 1e-9)))
    return statistics.median(_time(work, count) for _ in range(rounds))


def _time(work: Callable[[], object], count: int) -> float:
    """Seconds for one call, as the mean of several; waits for the GPU where there is one."""
    _finish()
    start = time.perf_counter()
    for _ in range(count):
        work()
    _finish()
    return (time.perf_counter() - start) / count


def _finish() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
