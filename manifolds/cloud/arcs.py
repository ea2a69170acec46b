"""The length of a curve up to any place, and the place at any length: geodesics in closed form."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

Speed = Callable[[Tensor], Tensor]
ORDER = 5
"""Nodes of Gauss's rule for the length between two places of the table."""
STEPS = 8
"""Newton steps from a length to its place."""


@dataclass(frozen=True)
class Arcs:
    """Lengths along a curve.

    Attributes:
        places: coordinates from one end to the other.
        far: the length up to each.
        speed: the length per coordinate at coordinates (b, 1), as (b,).
    """

    places: Float[Tensor, "g"]
    far: Float[Tensor, "g"]
    speed: Speed

    @property
    def length(self) -> Tensor:
        """The length of the whole curve."""
        return self.far[-1]

    def to_place(self, t: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """The length from the start to coordinates."""
        inner = self.places[1:-1].contiguous()
        index = torch.searchsorted(inner, t.detach().contiguous(), right=True)
        return self.far[index] + _length(self.speed, self.places[index], t)

    def place_at(self, length: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
        """The coordinates at lengths from the start, 0 to `length`; differentiable as often as `to_place`."""
        with torch.no_grad():
            goal = length.detach().clamp(self.far[:1], self.far[-1:])
            index = torch.searchsorted(self.far[1:-1].contiguous(), goal.contiguous(), right=True)
            low, high = self.places[index], self.places[index + 1]
            step = self.far[index + 1] - self.far[index]
            t = low + (high - low) * (goal - self.far[index]) / torch.where(step > 0, step, 1.0)
            for _ in range(STEPS):
                t = self._newton(t, goal)
                t = torch.minimum(torch.maximum(t, low), high)
        for _ in range(2):
            t = self._newton(t, length)
        return t.clamp(self.places[0], self.places[-1])

    def _newton(self, t: Tensor, goal: Tensor) -> Tensor:
        pace = self.speed(t[:, None])
        return t - torch.where(pace > 0, (self.to_place(t) - goal) / torch.where(pace > 0, pace, 1.0), 0.0)


def measure(places: Float[Tensor, "g"], speed: Speed) -> Arcs:
    """The lengths of a curve between these places."""
    off = torch.autocast(places.device.type, enabled=False)
    with torch.inference_mode(False), torch.no_grad(), off:  # they are kept, and used for gradients later
        parts = _length(speed, places[:-1], places[1:])
        return Arcs(places, torch.cat([parts.new_zeros(1), parts.cumsum(0)]), speed)


def _length(speed: Speed, start: Tensor, end: Tensor) -> Tensor:
    """∫ of the speed between coordinates, by Gauss's rule."""
    nodes, weights = np.polynomial.legendre.leggauss(ORDER)
    share, weight = (start.new_tensor(each) for each in ((nodes + 1) / 2, weights / 2))
    width = end - start
    at = (start[:, None] + share * width[:, None]).reshape(-1, 1)
    return (speed(at).reshape(-1, ORDER) * weight).sum(-1) * width
