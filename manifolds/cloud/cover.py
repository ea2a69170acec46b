"""Which samples become centres of charts: points far from each other, measured by the local spacing."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

SKETCH = 64
"""How many dimensions the choice is made in; a random projection keeps distances to a fifth there."""
LANDMARKS = 1024
"""How many samples the local spacing is measured against."""
ROWS = 4096


@torch.no_grad()
def cover(points: Float[Tensor, "n D"], count: int, *, neighbors: int, seed: int = 0) -> Int[Tensor, "m"]:
    """Indices of `count` samples such that every sample is near one of them.

    Farthest points (Gonzalez 1985), with distances in units of the local spacing, so that dense and sparse
    parts of the sample get charts alike, and an outlier no more than one. Time is n · count · 64.
    """
    total, width = points.shape
    if count >= total:
        return torch.arange(total, device=points.device)
    generator = torch.Generator().manual_seed(seed)
    flat = points.float() - points[:: max(1, total // 256)].float().median(0).values
    if width > SKETCH:
        mixing = torch.randn(width, SKETCH, generator=generator).to(points.device) / SKETCH**0.5
        flat = flat @ mixing
    spacing = _spacing(flat, neighbors, generator)
    chosen = torch.empty(count, dtype=torch.long, device=points.device)
    nearest = torch.full((total,), torch.inf, device=points.device)
    squares = (flat * flat).sum(1)
    latest = (squares.sqrt() / spacing).argmin()
    for step in range(count):
        chosen[step] = latest
        apart = (flat - flat[latest]).square().sum(1) / (spacing * spacing[latest])
        nearest = torch.minimum(nearest, apart)
        latest = nearest.argmax()
    return chosen.sort().values


def _spacing(flat: Tensor, neighbors: int, generator: torch.Generator) -> Tensor:
    """The radius of the neighbourhood of each sample, read off a subsample."""
    total = len(flat)
    some = torch.randperm(total, generator=generator)[:LANDMARKS].to(flat.device)
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
    # Equal rows have equal products with a vector; only rows with equal products need be compared.
    mixing = torch.randn(points.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    key = torch.cat([part.double() @ mixing.to(points.device) for part in points.split(ROWS)])
    if len(key.unique()) == len(points):
        return points, torch.ones(len(points), dtype=torch.long, device=points.device)
    _, place, times = torch.unique(points, dim=0, return_inverse=True, return_counts=True)
    first = torch.full_like(times, len(points)).scatter_reduce(
        0, place, torch.arange(len(points), device=points.device), "amin"
    )
    order = first.argsort()
    return points[first[order]], times[order]
