"""What each update has in a merge: its weight, and its differences, checked as they are read."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.names import listed
from peft_analysis.updates.weight_update import WeightUpdate

HALF = (torch.float16, torch.bfloat16)
SAME_BASE = 1e-2  # how far a base may be from another copy of it: more than bfloat16 rounds


@dataclass(frozen=True)
class Share:
    """One update's part in a merge: its weight, and its place among the updates."""

    update: WeightUpdate
    weight: float
    place: int

    def __contains__(self, name: str) -> bool:
        return name in self.update

    def read(self, name: str) -> LowRank | Tensor:
        """The difference of one parameter as it is stored.

        Raises:
            UpdateError: if it holds NaN or infinite values.
        """
        value = self.update[name]
        factors = (value.left, value.right) if isinstance(value, LowRank) else (value,)
        if not all(bool(factor.isfinite().all()) for factor in factors):
            raise UpdateError(
                f"{name} holds NaN or infinite values in {self}; mend them, or merge without this parameter"
            )
        return value

    def dense(self, name: str) -> Tensor:
        """The difference as a dense tensor of the parameter's shape."""
        value = self.read(name)
        return value.dense().reshape(self.update.entries[name].shape) if isinstance(value, LowRank) else value

    def __str__(self) -> str:
        return f"update {self.place} ({self.update.source})"


def shares_of(updates: Sequence[WeightUpdate], weights: Sequence[float | int] | Tensor | None) -> list[Share]:
    """Updates with their weights, ones if there are none.

    Raises:
        UpdateError: no update, something that is none, weights of another number or not finite, or shapes of
            one parameter that differ; all such parameters are listed.
    """
    if not updates:
        raise UpdateError("there is nothing to merge; give at least one update")
    for place, update in enumerate(updates):
        if not isinstance(update, WeightUpdate):
            raise UpdateError(f"update {place} is a {type(update).__name__}; read it first: read_update(…)")
    given = weights.tolist() if isinstance(weights, Tensor) else weights
    numbers = [1.0] * len(updates) if given is None else [float(number) for number in given]
    if len(numbers) != len(updates):
        raise UpdateError(f"{len(numbers)} weights for {len(updates)} updates; give one for each")
    if not all(math.isfinite(number) for number in numbers):
        raise UpdateError(f"the weights are {numbers}; they have to be finite")
    shares = [Share(*both, place) for place, both in enumerate(zip(updates, numbers, strict=True))]
    differ = []
    for name in names_of(shares):
        shapes = {tuple(share.update.entries[name].shape): share for share in shares if name in share}
        if len(shapes) > 1:
            differ.append(f"{name}: " + ", ".join(f"{shape} in {share}" for shape, share in shapes.items()))
    if differ:
        raise UpdateError(
            f"updates of other shapes cannot be merged; are they of one base? {listed(differ, '; ')}"
        )
    return shares


def check_bases(updates: Sequence[WeightUpdate]) -> None:
    """Refuses updates of different bases, told by the first matrix that both bases have.

    A base in half precision and the same in float32 pass.
    """
    known = [update for update in updates if update.base is not None]
    for update in known[1:]:
        one, other = known[0].base, update.base
        if one is None or other is None or one is other:
            continue
        name = next((name for name in one if len(one.shape(name)) >= 2 and name in other), None)
        if name is None or one.shape(name) != other.shape(name):
            continue
        first, second = one[name], other[name]
        apart = torch.linalg.vector_norm(second.to(first.device).double() - first.double())
        if not float(apart) <= SAME_BASE * float(torch.linalg.vector_norm(first.double())):
            raise UpdateError(
                f"{known[0].source} and {update.source} have different bases: {name} differs. Read both with "
                "one base: read_update(base, tuned)"
            )


def names_of(shares: Iterable[Share]) -> list[str]:
    """Every parameter that one of the updates has, in the order in which they come."""
    return list(dict.fromkeys(name for share in shares for name in share.update))


def alike(values: Sequence[LowRank], name: str) -> list[LowRank]:
    """Low ranks in the dtype that holds all of theirs.

    Raises:
        UpdateError: if they lie on different devices.
    """
    dtype = values[0].dtype
    for value in values:
        same_device(values[0], value, name)
        dtype = torch.promote_types(dtype, value.dtype)
    return [value.to(dtype) for value in values]


def total(parts: Iterable[tuple[Tensor, float]], name: str) -> Tensor:
    """Σ w x of dense tensors, one at a time; half precision is summed in float32 and given back as such."""
    whole, dtype = None, None
    for part, weight in parts:
        dtype = part.dtype if dtype is None else torch.promote_types(dtype, part.dtype)
        if whole is None:
            whole = wide(part) * weight
        else:
            same_device(whole, part, name)
            whole = whole + wide(part) * weight
    if whole is None:
        raise UpdateError(f"{name}: there is nothing to sum")
    return whole.to(dtype)


def wide(value: Tensor) -> Tensor:
    """Half precision in float32; anything else as it is."""
    return value.float() if value.dtype in HALF else value


def same_device(one: LowRank | Tensor, other: LowRank | Tensor, name: str) -> None:
    """Refuses values on different devices."""
    if one.device != other.device:
        raise UpdateError(
            f"{name} is on {one.device} in one update and on {other.device} in another; "
            "read both to the same device"
        )


def dense_parts(shares: Iterable[Share], name: str) -> Iterator[tuple[Share, Tensor, float]]:
    """The dense differences of one parameter with their weights, one at a time."""
    for share in shares:
        yield share, share.dense(name), share.weight
