"""Which noise one matrix's difference carries: of one rounding, of several, or of a dead zone."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from peft_analysis.noise import NoiseEdge, noise_edge
from peft_analysis.remainder import MOST, Remainder, continued, leading_part
from peft_analysis.rounding import Rounding, balance

MERGED, ROOM = 1.5, 0.05
"""More roundings than one, and the share of directions that may hide beside them."""
GOES_ON = 0.25
"""An excess that half of all directions leave behind, in roundings, from which on the rank is full."""
HALVED = 0.8
"""Roundings seen after half of the directions are gone, from which on there may have been several: of each
merge's noise about half is gone with them.
"""


def goes_on(half: Remainder) -> bool:
    """Whether half of all directions do not hold the update: far more than rounding is left without them."""
    off_grid = half.excess > GOES_ON * max(half.roundings, 1.0) and half.excess > 6 * half.excess_error
    return half.roundings + half.excess > MOST or off_grid


def edge_and_rest(
    value: Float[Tensor, "m n"],
    base: Float[Tensor, "m n"],
    whole: Remainder,
    rest: Callable[[int], Remainder],
    grids: tuple[torch.dtype, torch.dtype | None],
    generator: torch.Generator,
) -> tuple[NoiseEdge, Remainder]:
    """The noise's edge and the remainder beyond it: of several roundings where they explain it, else of one.

    The edge of several is that of random signs, which know no size of the noise. `whole` is the remainder
    beyond half of the directions, `rest` gives that beyond so many, `grids` are of the tuned and base values.
    """
    half = min(value.shape) // 2
    if whole.roundings + whole.excess > HALVED:
        edge = noise_edge(value, generator=generator)
        left = rest(min(edge.count, half))
        if _several(left, value):
            return edge, left
    edge = noise_edge(value, base=base, rounded=grids[0], base_rounded=grids[1], generator=generator)
    return edge, rest(min(edge.count, half))


def _several(left: Remainder, value: Tensor) -> bool:
    """Whether more than one rounding explains the remainder, but for what a few directions may hold."""
    return MERGED < left.roundings <= MOST and left.hidden_rank < ROOM * min(value.shape)


def simulated(
    left: Remainder,
    edge: NoiseEdge,
    value: Float[Tensor, "m n"],
    base: Float[Tensor, "m n"],
    rounded: torch.dtype,
    generator: torch.Generator,
) -> tuple[Remainder, float]:
    """The remainder with its excess, and the excess of a continued spectrum, from simulated rounding.

    Where many entries do not move, the error of rounding is a function of the update, not noise on a grid,
    and most of a tail is swallowed. So the update that reads as the leading part is fitted (`Rounding.fit`),
    and is read again with a tail of the continued spectrum's energy, in random directions, and without. Also
    returned: edge² in units of the energy of one rounding.
    """
    one, edge = value.numel() * left.noise**2, edge.balanced or edge
    unit, rank = edge.edge**2 / one, edge.count
    found = replace(
        left,
        excess=edge.hidden * unit,
        excess_error=edge.hidden_error * unit,
        hidden_rank=max(edge.hidden, 0.0),
    )
    if not rank:
        return found, unit
    if len(value) > value.shape[1]:
        value, base = value.mT, base.mT
    scale = balance(base.double() + value.double(), rounded)
    d = value.double() if scale is None else value.double() * scale
    rounding = Rounding(base.double(), rounded, aligned=True, scale=scale)
    outer, inner, sizes, _ = leading_part(d, rank, generator)
    outer, sizes, inner = rounding.fit(d, outer, sizes, inner)
    update = (outer * sizes) @ inner.mT
    deviation = math.sqrt(continued(sizes, min(d.shape)) / d.numel())
    noise = torch.randn(d.shape, generator=generator, device=generator.device).to(d)

    def beyond(read: Float[Tensor, "m n"]) -> float:
        leading = leading_part(read, rank, generator)[2].square().sum()
        return float(read.square().sum() - leading)

    tail = beyond(rounding.read(update + deviation * noise)) - beyond(rounding.read(update))
    return replace(found, tail=tail / one), unit
