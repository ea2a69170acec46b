"""`merge`: which way of merging, with which options, for which parameters."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.merging.karcher import karcher_mean
from peft_analysis.merging.nearest import nearest
from peft_analysis.merging.shares import Share, alike, check_bases, dense_parts, names_of, shares_of, total
from peft_analysis.merging.sparse import Drop, Election, Scope, Trim, elected
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.names import listed
from peft_analysis.updates.weight_update import WeightUpdate

Method = Literal["exact", "svd", "ties", "dare", "dare_ties", "karcher"]
DENSITY = {"ties": 0.2, "dare": 0.1, "dare_ties": 0.1}  # of the papers: the top fifth; nine of ten dropped
Read = Callable[[], "LowRank | Tensor"]


def merge(
    updates: Sequence[WeightUpdate],
    weights: Sequence[float | int] | Tensor | None = None,
    *,
    method: Method = "exact",
    rank: int | None = None,
    density: float | None = None,
    election: Election = "total",
    scope: Scope = "update",
    generator: torch.Generator | None = None,
) -> WeightUpdate:
    """One update out of several of one base.

    Nothing is computed before a parameter is read, and memory is that of a few matrices of one parameter.
    What only some updates have is merged from those.

    - `"exact"`: Σ wᵢ ΔWᵢ. Low ranks stay low ranks with their factors side by side.
    - `"svd"`: the matrix of a rank nearest to that sum, from the QR factors of its factors; only a sum with a
      dense difference in it is decomposed as a dense matrix.
    - `"ties"` (Yadav et al.): each update keeps its largest entries, a sign is elected for every entry, and
      the weighted values of that sign are averaged. The weights come before the election, so that a
      negative one votes for the other sign (peft multiplies after it).
    - `"dare"` (Yu et al.): Σ wᵢ Dᵢ, where Dᵢ has each entry of ΔWᵢ with the chance `density`, divided by
      that, else zero. `"dare_ties"` elects a sign and averages instead of summing.
    - `"karcher"`: the mean along the manifold of matrices of one rank; see `karcher_mean`. It is a mean, not
      a sum: only the ratios of the weights count. Vectors are averaged.

    Args:
        updates: of one base. Convolutions and embeddings count as matrices, as they are stored.
        weights: one number for each update, of any sign; ones if not given.
        method: one of those above.
        rank: "svd": of every matrix; if not given, the largest stored rank among a parameter's low ranks, and
            a sum that is dense stays whole. "karcher": to which every part is cut first. "ties" and "dare":
            to which their dense matrices are cut in the end, if it is given.
        density: "ties" and "dare": the share of entries that stay, in (0, 1]; 0.2 and 0.1 if not given.
        election: by the sum of the weighted values, or by how many there are of either sign.
        scope: whether "ties" ranks entries over a whole update, as its paper does, or within each parameter,
            as peft does. The first reads an update three times more.
        generator: for "dare"; one of seed 0 if not given. Drawn from now, once for each parameter of each
            update, so that the values do not depend on the order in which they are read.

    Raises:
        UpdateError: no update; weights that do not fit; bases that differ; shapes that differ (they are
            listed); an option that the method has not. When a parameter is read: NaN, devices that differ, a
            mean that is not there.

    Source: Yadav et al., "TIES-Merging: resolving interference when merging models" (2023); Yu et al.,
    "Language models are super Mario" (2024).

    Example:
        >>> import torch
        >>> from manifolds import LowRank
        >>> rows = torch.tensor([[1.0, 2.0]])
        >>> a, b = (
        ...     WeightUpdate.from_tensors({"w": LowRank(torch.eye(3)[:, [i]], rows)}) for i in (0, 1)
        ... )
        >>> merged = merge([a, b], weights=[1.0, -0.5])
        >>> merged["w"]
        LowRank(shape=(3, 2), rank=2, dtype=torch.float32, device=cpu)
        >>> merged["w"].dense()
        tensor([[ 1.0000,  2.0000],
                [-0.5000, -1.0000],
                [ 0.0000,  0.0000]])
    """
    shares = shares_of(updates, weights)
    _check_options(method, rank, density, generator)
    check_bases(updates)
    names = names_of(shares)
    options: dict[str, Any] = {"method": method}
    if method in DENSITY:
        density = DENSITY[method] if density is None else density
        options["density"] = density
    if rank is not None:
        options["rank"] = rank
    if method == "karcher":
        _check_mean(shares, names)
    read = _reader(method, rank, density, election, scope, generator, shares)
    entries = {}
    for name in names:
        present = [share for share in shares if name in share]
        used = [share for share in present if share.weight != 0]
        entries[name] = _entry(name, present, options, partial(read, name, used) if used else None)
    base = next((update.base for update in updates if update.base is not None), None)
    return WeightUpdate(entries, base=base, source=f"a merge ({method}) of {len(updates)} updates")


def _reader(
    method: Method,
    rank: int | None,
    density: float | None,
    election: Election,
    scope: Scope,
    generator: torch.Generator | None,
    shares: Sequence[Share],
) -> "Callable[[str, Sequence[Share]], LowRank | Tensor]":
    """What gives one parameter from the shares that have it."""
    if method == "exact":
        return _sum
    if method == "svd":
        return partial(_nearest, rank)
    if method == "karcher":
        return partial(_mean, rank)
    if method == "ties":
        trims = [Trim(share, density or 1.0, scope) for share in shares]
        return partial(_sparse, lambda name, share, value: trims[share.place].of(value), election, rank)
    drop = Drop.drawn(density or 1.0, generator, shares)
    return partial(
        _sparse,
        lambda name, share, value: drop.of(share.place, name, value),
        election if method == "dare_ties" else None,
        rank,
    )


def _sum(name: str, shares: Sequence[Share]) -> LowRank | Tensor:
    """Σ wᵢ ΔWᵢ: a low rank if all are, else dense."""
    low: list[LowRank] = []
    dense: list[Share] = []
    for share in shares:
        value = share.read(name)
        if isinstance(value, LowRank):
            low.append(value * share.weight)
        else:
            dense.append(share)
        del value
    if not dense:
        return LowRank.concatenate(alike(low, name))
    return total(((value, weight) for _, value, weight in dense_parts(shares, name)), name)


def _nearest(rank: int | None, name: str, shares: Sequence[Share]) -> LowRank | Tensor:
    values = [share.update[name] for share in shares]
    low = [value for value in values if isinstance(value, LowRank)]
    if len(low) < len(values):
        del values
        whole = _sum(name, shares)
        return whole if rank is None or whole.ndim < 2 or isinstance(whole, LowRank) else _cut(whole, rank)
    parts = [value * share.weight for value, share in zip(low, shares, strict=True)]
    found = nearest(
        LowRank.concatenate(alike(parts, name)), max(part.rank for part in low) if rank is None else rank
    )
    if found is None:
        for share in shares:  # names the update that is not finite
            share.read(name)
        raise UpdateError(f"{name}: the weighted factors overflow {low[0].dtype}; give smaller weights")
    return found


def _sparse(
    thin: Callable[[str, Share, Tensor], Tensor],
    election: Election | None,
    rank: int | None,
    name: str,
    shares: Sequence[Share],
) -> LowRank | Tensor:
    def parts() -> Iterator[tuple[Tensor, float]]:
        return ((thin(name, share, value), weight) for share, value, weight in dense_parts(shares, name))

    found = total(parts(), name) if election is None else elected(parts, election, name)
    return found if rank is None or found.ndim < 2 else _cut(found, rank)


def _mean(rank: int | None, name: str, shares: Sequence[Share]) -> LowRank | Tensor:
    whole = math.fsum(share.weight for share in shares)
    points, dense = [], []
    for share in shares:
        value = share.read(name)
        if isinstance(value, Tensor) and value.ndim >= 2 and rank is not None:
            value = _cut(value, rank)
        if isinstance(value, LowRank):
            points.append(value)
        else:
            dense.append((share, value))
    if dense and dense[0][1].ndim < 2:
        return total(((value, share.weight / whole) for share, value in dense), name)
    if dense:
        raise UpdateError(
            f"{name} is dense in {listed([str(share) for share, _ in dense])}; a Karcher mean is one of "
            "matrices of one rank: give rank="
        )
    try:
        found = karcher_mean(alike(points, name), [share.weight for share in shares], rank=rank)
    except UpdateError as wrong:
        raise UpdateError(f"{name}: {wrong}") from None
    if not found.converged:
        raise UpdateError(f"{name}: no Karcher mean was found: {found.reason}")
    return found.mean


# Help


def _cut(value: Tensor, rank: int) -> LowRank:
    return LowRank.from_dense(value.flatten(1), rank=rank)


def _zeros(share: Share, name: str) -> LowRank | Tensor:
    value = share.update[name]
    if isinstance(value, LowRank):
        return LowRank.zeros(*value.shape, dtype=value.dtype, device=value.device)
    return torch.zeros_like(value)


def _entry(name: str, present: Sequence[Share], options: dict[str, Any], read: Read | None) -> Entry:
    first = next((share for share in present if share.update.base is not None), present[0])
    entries = [share.update.entries[name] for share in present]
    whole = "rank" not in options and options["method"] != "karcher"
    return Entry(
        first.update.entries[name].shape,
        partial(_zeros, first, name) if read is None else read,
        kind="merge",
        layout=first.update.entries[name].layout,
        rounded=_coarsest([entry.rounded for entry in entries]) if whole else None,
        base_rounded=_coarsest([entry.base_rounded for entry in entries]) if whole else None,
        details={**options, "weights": [share.weight for share in present]},
    )


def _coarsest(dtypes: Sequence[torch.dtype | None]) -> torch.dtype | None:
    known = [dtype for dtype in dtypes if dtype is not None]
    return max(known, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _check_options(
    method: str, rank: int | None, density: float | None, generator: torch.Generator | None
) -> None:
    if method not in get_args(Method):
        raise UpdateError(f"no method of merging is called {method!r}; there are {listed(get_args(Method))}")
    if rank is not None and method == "exact":
        raise UpdateError('rank belongs to the other methods: an exact sum has the rank it has; use "svd"')
    if rank is not None and rank < 1:
        raise UpdateError(f"rank is {rank}; a merge needs a rank of 1 or more")
    if density is not None and method not in DENSITY:
        raise UpdateError(f'density belongs to "ties" and "dare", not to {method!r}')
    if density is not None and not 0 < density <= 1:
        raise UpdateError(f"density is {density}; it is the share of entries that stay, above 0, at most 1")
    if generator is not None and method not in ("dare", "dare_ties"):
        raise UpdateError(f'generator belongs to "dare" and "dare_ties": {method!r} draws nothing')


def _check_mean(shares: Sequence[Share], names: Sequence[str]) -> None:
    numbers = [share.weight for share in shares]
    if min(numbers) <= 0:
        raise UpdateError(
            f"the weights are {numbers}; a Karcher mean has positive ones. For a difference of updates use "
            'method="svd"'
        )
    partly = [name for name in names if not all(name in share for share in shares)]
    if partly:
        raise UpdateError(
            f"only some of the updates have {listed(partly)}; nothing on the manifold stands for no change. "
            'Use method="svd", or only what all of them have'
        )
