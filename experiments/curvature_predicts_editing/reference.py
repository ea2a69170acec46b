"""How far a state is from those that the model itself leaves in one sentence: a measure no edit has seen.

A sentence that no edit was learned from leaves one state for every value of the concept. Between them lies
what the concept's states would be there: on a cycle or line the cubic spline through them, on a grid the
thin-plate spline over the values' coordinates. Both pass through every real state, so that the distance of an
unedited state is zero, and an edit that drops what is peculiar to the sentence is as far off as one that
bends the concept.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.interpolate import CubicSpline, RBFInterpolator
from torch import Tensor

from geoedit.errors import EditError

FINENESS = {1: 32, 2: 8}
"""Samples between two neighbouring values, by the number of coordinates."""


@dataclass(frozen=True)
class SentenceManifold:
    """The curve or sheet through the states of one sentence, as samples close beside each other.

    Attributes:
        samples: points of it.
        halves: at each sample, for each coordinate, half of the way to the next sample.
    """

    samples: Float[Tensor, "m D"]
    halves: Float[Tensor, "m q D"]

    @classmethod
    def through(
        cls, states: Float[Tensor, "c D"], coordinates: Float[np.ndarray, "c q"], *, closed: bool = False
    ) -> SentenceManifold:
        """Interpolate between states.

        Args:
            states: one of each value.
            coordinates: where the values lie: one number (in rising order) or two.
            closed: whether the last value is followed by the first again.

        Raises:
            EditError: too few states, coordinates that do not rise, or more than two of them.
        """
        count, size = coordinates.shape
        least = {1: 3, 2: 4}.get(size)
        if least is None or (closed and size != 1):
            raise EditError(
                f"coordinates of {size} numbers (closed: {closed}); a sentence is a curve or a sheet."
            )
        if count < least or len(states) != count:
            raise EditError(f"{len(states)} states at {count} coordinates; give {least} or more of each.")
        given = states.double().cpu().numpy()
        lattice = _curve(given, coordinates[:, 0], closed) if size == 1 else _sheet(given, coordinates)
        halves = [_half(lattice, axis, closed) for axis in range(size)]
        width = given.shape[1]
        return cls(
            torch.tensor(lattice.reshape(-1, width)),
            torch.tensor(np.stack([half.reshape(-1, width) for half in halves], 1)),
        )

    def distance(self, points: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        """How far points are from it: from the nearest sample, less the part along it within half a step."""
        wide = points.double().cpu()
        nearest = torch.cdist(wide, self.samples, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        away, halves = wide - self.samples[nearest], self.halves[nearest]
        gram = halves @ halves.mT
        floor = 1e-12 * gram.diagonal(dim1=1, dim2=2).sum(1) + torch.finfo(gram.dtype).tiny
        gram = gram + floor[:, None, None] * torch.eye(gram.shape[1], dtype=gram.dtype)
        share = torch.linalg.solve(gram, halves @ away[..., None])[..., 0].clamp(-1, 1)
        return torch.linalg.vector_norm(away - torch.einsum("nq,nqd->nd", share, halves), dim=1)


def left_out_distances(
    states: Float[Tensor, "c D"],
    coordinates: Float[np.ndarray, "c q"],
    *,
    closed: bool = False,
    most: int = 24,
) -> Float[Tensor, " k"]:
    """How far real states are from the manifold through all others: what an unedited state has.

    Values at the edge (the ends of a line, the border of a grid) are kept in, since beyond them nothing is
    interpolated; of more than `most` others, some evenly spread are left out in turn. Empty where too few
    would remain.
    """
    count, size = coordinates.shape
    inner = np.ones(count, dtype=bool)
    if not closed:
        low, high = coordinates.min(0), coordinates.max(0)
        inner = ((coordinates > low) & (coordinates < high)).all(1)
    chosen = np.flatnonzero(inner)
    if count - 1 < {1: 3, 2: 4}[size]:
        return torch.zeros(0, dtype=torch.float64)
    found = []
    for left_out in chosen[:: -(-len(chosen) // most) or 1]:
        rest = np.delete(np.arange(count), left_out)
        # A cycle is cut open nowhere: the gap is where the value was.
        manifold = SentenceManifold.through(states[torch.tensor(rest)], coordinates[rest], closed=closed)
        found.append(manifold.distance(states[left_out : left_out + 1]))
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def _curve(states: Float[np.ndarray, "c D"], places: Float[np.ndarray, " c"], closed: bool) -> np.ndarray:
    if not bool((np.diff(places) > 0).all()):
        raise EditError("the coordinates of a curve must rise from value to value.")
    ring = np.vstack([states, states[:1]]) if closed else states
    # By the lengths of the chords, so that unequal steps make no loops.
    lengths = np.linalg.norm(np.diff(ring, axis=0), axis=1)
    if not bool((lengths > 0).all()):
        raise EditError("two neighbouring values leave the same state, so that no curve leads through them.")
    knots = np.concatenate([[0.0], np.cumsum(lengths)])
    spline = CubicSpline(knots, ring, bc_type="periodic" if closed else "natural")
    steps = np.arange(FINENESS[1]) / FINENESS[1]
    fine = np.concatenate([(knots[:-1, None] + steps * lengths[:, None]).ravel(), knots[-1:]])
    return spline(fine[:-1] if closed else fine)


def _sheet(states: Float[np.ndarray, "c D"], coordinates: Float[np.ndarray, "c 2"]) -> np.ndarray:
    spline = RBFInterpolator(coordinates, states, kernel="thin_plate_spline")
    axes = []
    for values in coordinates.T:
        steps = len(np.unique(values)) - 1
        axes.append(np.linspace(values.min(), values.max(), steps * FINENESS[2] + 1))
    places = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
    return spline(places.reshape(-1, 2)).reshape(*places.shape[:2], -1)


def _half(lattice: np.ndarray, axis: int, closed: bool) -> np.ndarray:
    if closed:
        return (np.roll(lattice, -1, axis) - np.roll(lattice, 1, axis)) / 4
    return np.gradient(lattice, axis=axis) / 2
