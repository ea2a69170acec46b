"""Which samples become centres of charts: points far from each other, measured by the local spacing."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SKETCH = 64
"""How many dimensions the choice is made in; a random projection keeps distances to a fifth there."""
LANDMARKS = 1024
"""How many samples the local spacing is measured against."""
TRIED = 16
"""How many samples there are to choose each centre from."""
LEAST_TRIED = 4096
ROWS = 4096


@torch.no_grad()
def cover(points: Float[Tensor, "n D"], count: int, *, neighbors: int, seed: int = 0) -> Int[Tensor, "m"]:
    """Indices of `count` samples such that every sample is near one of them.

    Farthest points (Gonzalez 1985), with distances in units of the local spacing, so that dense and sparse
    parts of the sample get charts alike, and an outlier no more than one. Where the samples are many,
    the centres are taken from `TRIED` times as many samples, drawn at random: every neighbourhood has some
    of those. Time is 64 · TRIED · count² at most.
    """
    total, width = points.shape
    if count >= total:
        return torch.arange(total, device=points.device)
    generator = torch.Generator().manual_seed(seed)
    centre = points[:: max(1, total // 256)].float().median(0).values
    tried = torch.arange(total, device=points.device)
    if total > LEAST_TRIED + TRIED * count:
        drawn = torch.randperm(total, generator=generator)[: LEAST_TRIED + TRIED * count]
        tried = drawn.sort().values.to(points.device)
    mixing = torch.randn(width, SKETCH, generator=generator).to(points.device) / SKETCH**0.5
    parts = (points[some].float() - centre for some in tried.split(ROWS))
    flat = torch.cat([part @ mixing if width > SKETCH else part for part in parts])
    spacing = _spacing(flat, neighbors, total, generator)
    # Products lose the distances within small clusters, so they are taken in double precision.
    flat, spacing = flat.double(), spacing.double()
    chosen = torch.empty(count, dtype=torch.long, device=points.device)
    nearest = torch.full_like(spacing, torch.inf)
    squares = (flat * flat).sum(1)
    latest = (squares.sqrt() / spacing).argmin()
    for step in range(count):
        chosen[step] = latest
        apart = torch.addmv(squares, flat, flat[latest], alpha=-2).add_(squares[latest])
        nearest = torch.minimum(nearest, apart.div_(spacing).div_(spacing[latest]), out=nearest)
        nearest[latest] = -1
        latest = nearest.argmax()
    return tried[chosen].sort().values


def _spacing(flat: Tensor, neighbors: int, total: int, generator: torch.Generator) -> Tensor:
    """The radius of the neighbourhood, in all samples, of each one here, read off a subsample."""
    some = torch.randperm(len(flat), generator=generator)[:LANDMARKS].to(flat.device)
    marks = flat[some]
    rank = max(2, min(len(marks) - 1, round(neighbors * len(marks) / total)))
    # By differences: a product loses the distances within a small cluster.
    exact = "donot_use_mm_for_euclid_dist"
    found = [
        torch.cdist(part, marks, compute_mode=exact).kthvalue(rank + 1, dim=1).values
        for part in flat.split(ROWS)
    ]
    spacing = torch.cat(found)
    return spacing.clamp_min(max(1e-6 * float(spacing.max()), 1e-18))


@torch.no_grad()
def distinct_rows(points: Float[Tensor, "n D"]) -> tuple[Float[Tensor, "k D"], Int[Tensor, "k"]]:
    """The points without repetitions, in their order, and how often each occurs."""
    # Sums of integers do not depend on their order: equal rows, and hardly any others, have equal ones.
    whole = torch.int64 if points.dtype == torch.float64 else torch.int32
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randint(-(2**62), 2**62, (points.shape[1],), generator=generator).to(points.device)
    key = torch.cat([((part + 0.0).view(whole) * mixing).sum(1) for part in points.split(ROWS)])
    if len(key.unique()) == len(points):
        return points, torch.ones(len(points), dtype=torch.long, device=points.device)
    _, group, size = torch.unique(key, return_inverse=True, return_counts=True)
    times = torch.ones_like(group)
    some = (size[group] > 1).nonzero()[:, 0]
    _, place, often = torch.unique(points[some], dim=0, return_inverse=True, return_counts=True)
    first = torch.full_like(often, len(points)).scatter_reduce(0, place, some, "amin")
    times[some] = 0
    times[first] = often
    kept = times > 0
    return points[kept], times[kept]
