"""The span of a neighbourhood: coordinates in at most 64 dimensions, and the noise read from the spectrum.

A neighbourhood of k points in D dimensions has k numbers that matter in each direction. Everything is
computed in the leading dimensions of its span, never in the ambient space: from the Gram matrix of the
points where k is smaller, from their covariance where D is. Eigenvectors in single precision choose the
subspace, for it need not be exact; coordinates in it are then exact in double precision.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MOST = 64
"""How many dimensions of a span are kept, or twice the manifold's where that is more."""
FLOOR = 3e-6
"""Eigenvalues below this share of the largest are rounding of single precision."""

SAME = 1e-13
"""Two rows whose squared distance is below this share of their squared length are one point."""


@dataclass(frozen=True)
class Span:
    """Neighbourhoods in coordinates of their spans; row 0 is the base point, at the origin.

    Attributes:
        coordinates: orthonormal coordinates of neighbour − base.
        squares: the squared length of neighbour − base, in all dimensions.
        distinct: whether a row is no duplicate of the row before.
        offset: the squared distance of the neighbours' mean from the base.
        spread: the mean squared distance of the neighbours from their mean.
        outside: mean squared distance of the centred rows from the kept subspace.
        noise: total variance of one point that spreads evenly over all directions but `dim`; the median of
            the spectrum gives it, so that structure in few directions does not count.
        full: whether every coordinate has an extent, so that all of them lift to unit vectors.
        leading: the directions of largest variance, `dim` of them, to single precision.
    """

    coordinates: Float[Tensor, "b m r"]
    squares: Float[Tensor, "b m"]
    distinct: Bool[Tensor, "b m"]
    offset: Float[Tensor, "b"]
    spread: Float[Tensor, "b"]
    outside: Float[Tensor, "b"]
    noise: Float[Tensor, "b"]
    full: bool
    leading: Float[Tensor, "b r d"]
    _rows: Float[Tensor, "b c D"]
    _mixing: Float[Tensor, "b e r"]
    _by_rows: bool

    def lift(self, vectors: Float[Tensor, "b r a"]) -> Float[Tensor, "b D a"]:
        """Vectors of the span in ambient coordinates."""
        mixed = self._mixing @ vectors
        # In this order the long rows are read as they lie in memory.
        return (mixed.mT @ self._rows).mT if self._by_rows else mixed


def span(between: Float[Tensor, "b c D"], order: Int[Tensor, "b k"], dim: int) -> Span:
    """The span of each neighbourhood.

    Args:
        between: candidate − base, in double precision.
        order: which of the candidates are the neighbours.
        dim: the manifold's dimension.
    """
    count, ambient = order.shape[1] + 1, between.shape[-1]
    by_rows = count < ambient
    if by_rows:
        chosen = order[:, :, None].expand(-1, -1, between.shape[1])
        gram = (between @ between.mT).gather(1, chosen).gather(2, order[:, None].expand(-1, count - 1, -1))
        gram = torch.nn.functional.pad(gram, (1, 0, 1, 0))
        squares = gram.diagonal(dim1=1, dim2=2).clone()
        apart = squares[:, 1:] + squares[:, :-1] - 2 * gram.diagonal(1, 1, 2)
        means = gram.mean(1)
        offset = means.mean(1) * (count / (count - 1)) ** 2
        gram = gram - means[:, None] - means[..., None] + means.mean(1)[:, None, None]
        centred = squares.new_empty(len(squares), 0, ambient)
    else:
        rows = between.gather(1, order[..., None].expand(-1, -1, ambient))
        rows = torch.nn.functional.pad(rows, (0, 0, 1, 0))
        squares = torch.linalg.vector_norm(rows, dim=-1) ** 2
        apart = torch.linalg.vector_norm(rows[:, 1:] - rows[:, :-1], dim=-1) ** 2
        centred = rows - rows.mean(1, keepdim=True)
        offset = torch.linalg.vector_norm(rows[:, 1:].mean(1), dim=-1) ** 2
        gram = centred.mT @ centred
    distinct = torch.nn.functional.pad(apart > SAME * squares[:, 1:].clamp_min(1e-300), (1, 0), value=True)
    rank = min(count - 1, ambient, max(MOST, 2 * dim))
    total = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    scale = total.clamp_min(torch.finfo(total.dtype).tiny)[:, None]
    values, vectors = torch.linalg.eigh((gram / scale[..., None]).float())
    values, vectors = values.flip(-1).double(), vectors.flip(-1)[..., :rank].double()
    values = torch.where(values > FLOOR * values[:, :1], values, 0.0) * scale
    if by_rows:
        image = gram @ vectors
        inner = vectors.mT @ image
        factor = torch.linalg.cholesky(inner + _jitter(inner))
        both = torch.linalg.solve_triangular(
            factor.mT, torch.cat([vectors, image], 1), upper=True, left=False
        )
        mixing, coordinates = both.split(count, 1)
        # The mean of the rows is taken off the mixing instead; the base, a row of zeros, lifts to nothing.
        mixing = (mixing - mixing.mean(1, keepdim=True))[:, 1:]
        wide = mixing.new_zeros(len(mixing), between.shape[1], rank)
        mixing = wide.scatter(1, order[..., None].expand(-1, -1, rank), mixing)
    else:
        mixing = torch.linalg.qr(vectors).Q
        coordinates = centred @ mixing
    return Span(
        coordinates=coordinates - coordinates[:, :1],
        squares=squares,
        distinct=distinct,
        offset=offset,
        spread=squares[:, 1:].mean(1) - offset,
        outside=(total - torch.linalg.vector_norm(coordinates, dim=(1, 2)) ** 2).clamp_min(0) / (count - 1),
        noise=_noise(values, count, ambient, dim),
        full=bool((values[:, rank - 1] > 0).all()),
        leading=torch.eye(rank, dim, dtype=gram.dtype, device=gram.device).expand(len(gram), rank, dim),
        _rows=between,
        _mixing=mixing,
        _by_rows=by_rows,
    )


def _jitter(matrix: Tensor) -> Tensor:
    """A diagonal at rounding size, so that directions without extent factor too."""
    trace = matrix.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None]
    size = trace * torch.finfo(matrix.dtype).eps * 8 + torch.finfo(matrix.dtype).tiny
    return torch.diag_embed(size.expand(-1, matrix.shape[-1]))


def _noise(values: Tensor, count: int, ambient: int, dim: int) -> Tensor:
    """Variance of white noise over all directions but `dim`, from the median of the spectrum behind those."""
    bulk = values[:, dim : min(count - 1, ambient)]
    few, many = sorted((count - 1 - dim, ambient - dim))
    if few < 1:
        return torch.zeros_like(values[:, 0])
    return bulk.median(-1).values / (many * _median_of_marchenko_pastur(few / many)) * (ambient - dim)


@lru_cache(maxsize=256)
def _median_of_marchenko_pastur(ratio: float) -> float:
    """The median eigenvalue of a sample covariance of unit white noise (Marchenko and Pastur 1967).

    Gavish and Donoho, "The optimal hard threshold for singular values is 4/√3" (2014), read the noise so.
    """
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2
    edges = np.linspace(low, high, 20001)
    middle = (edges[1:] + edges[:-1]) / 2
    mass = np.cumsum(np.sqrt((high - middle) * (middle - low)) / middle)
    return float(middle[np.searchsorted(mass, mass[-1] / 2)])
