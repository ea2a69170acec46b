"""Merging of entries: small ones trimmed, random ones dropped, signs elected."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from peft_analysis.errors import UpdateError
from peft_analysis.merging.shares import Share, same_device, wide

Election = Literal["total", "frequency"]
Scope = Literal["update", "parameter"]
DIGIT = 21  # bits of a magnitude looked at in one pass; three passes for the 63 of a float64


class Trim:
    """Keeps the largest entries of one update, and sets the others to zero.

    Args:
        share: the update.
        density: the share of entries that stay, in (0, 1]; those as large as the smallest of them stay too.
        scope: whether entries are ranked over the whole update, or within each parameter.
    """

    def __init__(self, share: Share, density: float, scope: Scope) -> None:
        self.share, self.density, self.scope = share, density, scope

    def of(self, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The difference of one parameter, trimmed."""
        size = wide(value).abs()
        if self.scope == "update":
            least = self._least_of_all
        elif value.numel():
            least = float(size.flatten().topk(self._count(value.numel())).values[-1])
        else:
            least = 0.0
        return torch.where(size >= least, value, torch.zeros_like(value))

    @cached_property
    def _least_of_all(self) -> float:
        """The least magnitude that stays, over all parameters; they are read three times."""
        update = self.share.update
        count = sum(entry.shape.numel() for entry in update.entries.values())
        return kth_largest(lambda: (self.share.dense(name) for name in update), self._count(count))

    def _count(self, entries: int) -> int:
        """How many of so many entries stay: at least one."""
        return max(1, int(self.density * entries))


def kth_largest(read: Callable[[], Iterable[Tensor]], k: int) -> float:
    """The k-th largest magnitude of all entries of all tensors, exactly, one tensor in memory at a time.

    Positive floats are ordered as the integers of the same bits are. Each pass counts the next digits of
    those that agree with the digits found so far.

    Args:
        read: gives the tensors, the same ones in each of up to three passes.
        k: from 1 to the number of entries.
    """
    found, left = 0, k
    for shift in (2 * DIGIT, DIGIT, 0):
        counts: Tensor | None = None
        for value in read():
            bits = value.double().abs().flatten().view(torch.int64)
            bits = bits[(bits >> (shift + DIGIT)) == found] if shift < 2 * DIGIT else bits
            seen = torch.bincount((bits >> shift) & ((1 << DIGIT) - 1), minlength=1 << DIGIT)
            counts = seen if counts is None else counts + seen.to(counts.device)
        if counts is None or int(counts.sum()) < left:
            raise UpdateError(f"there are fewer than {k} entries; a difference changed while it was read")
        from_above = counts.flip(0).cumsum(0)
        place = int((from_above < left).sum())
        left -= int(from_above[place - 1]) if place else 0
        found = (found << DIGIT) | ((1 << DIGIT) - 1 - place)
    return float(torch.tensor(found, dtype=torch.int64).view(torch.float64))


@dataclass(frozen=True)
class Drop:
    """Keeps entries at random and divides them by the chance to stay, so that the mean stays what it was.

    Attributes:
        density: the chance to stay, in (0, 1].
        seeds: by update and parameter; what is read does not depend on the order of reading.
    """

    density: float
    seeds: dict[tuple[int, str], int]

    @classmethod
    def drawn(cls, density: float, generator: torch.Generator | None, shares: Sequence[Share]) -> "Drop":
        """With seeds from a generator; from one with seed 0 if none is given."""
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        keys = [(share.place, name) for share in shares for name in share.update]
        drawn = torch.randint(2**62, (len(keys),), generator=generator, device=generator.device)
        return cls(density, dict(zip(keys, drawn.tolist(), strict=True)))

    def of(self, place: int, name: str, value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The difference of one parameter in one update, thinned."""
        generator = torch.Generator(value.device).manual_seed(self.seeds[place, name])
        stays = torch.rand(value.shape, device=value.device, generator=generator) < self.density
        return torch.where(stays, value / self.density, torch.zeros_like(value))


def elected(parts: Callable[[], Iterable[tuple[Tensor, float]]], election: Election, name: str) -> Tensor:
    """The mean, at each entry, of the weighted values that have the sign which won there; zero at a draw.

    Args:
        parts: gives tensors of one shape with their weights, the same ones in each of two passes.
        election: by the sum of the weighted values, or by how many there are of either sign.
        name: of the parameter, for messages.
    """
    votes: Tensor | None = None
    dtype = torch.float16
    for value, weight in parts():
        dtype = value.dtype if votes is None else torch.promote_types(dtype, value.dtype)
        vote = wide(value) * weight
        vote = vote.sign() if election == "frequency" else vote
        if votes is not None:
            same_device(votes, vote, name)
        votes = vote if votes is None else votes + vote
    if votes is None:
        raise UpdateError(f"{name}: there is nothing to merge")
    won = votes.sign()
    whole, count = torch.zeros_like(votes), torch.zeros_like(votes)
    for value, weight in parts():
        vote = wide(value) * weight
        agrees = (vote.sign() == won) & (vote != 0)
        whole = whole + torch.where(agrees, vote, 0.0)
        count = count + agrees
    return (whole / count.clamp(min=1)).to(dtype)
