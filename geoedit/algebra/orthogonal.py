"""Changes turned into spaces of their own, so that none writes or reads where another does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from manifolds import LowRank
from manifolds.matrix_functions import polar

SHARED = 1e-5
"""Frames whose least singular value is below this share a direction, as far as float32 factors can tell."""


def orthogonalised(parts: Sequence[LowRank], where: str = "the module") -> list[LowRank]:
    r"""The parts with their singular values, in column and row spaces orthogonal to those of all others.

    With the thin decompositions \(U_i \Sigma_i V_i^\top\) and the frames \(U = [U_1 \dots U_k]\) and
    \(V = [V_1 \dots V_k]\), part i becomes \(\tilde U_i \Sigma_i \tilde V_i^\top\), where \(\tilde U\) is
    the orthonormal frame nearest to \(U\), its polar factor, and \(\tilde V\) that of \(V\). No part comes
    first: their order does not matter. A single part, or parts that are orthogonal already, stay as they are.
    A side too narrow for the ranks of all parts (a last convolution to a few channels) stays as it is; the
    other one is enough for inner products of zero.

    Args:
        parts: matrices (m, n) of one shape.
        where: what to call the place in a message.

    Raises:
        EditError: neither side is wide enough for the ranks of all parts, or parts share a direction.

    Source: Gargiulo et al., "Task singular vectors: reducing task interference in model merging" (2025),
    section 4, here without cutting the ranks.

    >>> import torch
    >>> a = LowRank(torch.tensor([[1.0], [0.0]]), torch.tensor([[2.0, 0.0]]))
    >>> b = LowRank(torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, 1.0]]))
    >>> one, other = orthogonalised([a, b])
    >>> bool((a.T @ b).norm() > 1), bool((one.T @ other).norm() < 1e-6), round(one.norm().item(), 4)
    (True, True, 2.0)
    """
    dtype = parts[0].dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.dtype)
    wide = torch.float64  # adapters that were trained from one seed begin in one row space
    lefts, values, rights = [], [], []
    for part in parts:
        rank = int(part.numerical_rank())
        left, size, right = part.to(wide).svd()
        lefts.append(left[:, :rank])
        values.append(size[:rank])
        rights.append(right[:rank].mT)
    ranks = [len(size) for size in values]
    if sum(ranks) > max(parts[0].shape):
        raise EditError(
            f"{where}: ranks {ranks} do not fit beside each other into a matrix of "
            f"{' × '.join(map(str, parts[0].shape))}; cut each part: rank={max(parts[0].shape) // len(parts)}"
        )
    left, right = (_apart(frames, where) for frames in (lefts, rights))
    return [
        LowRank.from_svd(one, size, other.mT).to(dtype)
        for one, size, other in zip(left.split(ranks, -1), values, right.split(ranks, -1), strict=True)
    ]


def _apart(frames: Sequence[Float[Tensor, "m _"]], where: str) -> Float[Tensor, "m k"]:
    """The orthonormal frame nearest to all frames side by side; those that do not fit stay as they are."""
    together = torch.cat(list(frames), -1)
    if not together.shape[-1] or len(frames) == 1 or together.shape[-1] > together.shape[-2]:
        return together
    least = torch.linalg.svdvals(together)[-1]
    if not bool(least > SHARED):
        raise EditError(
            f"{where}: the parts share a direction (the least singular value of their frames is "
            f"{float(least):.1g}), which cannot be given to both; leave one out, cut them to a lower rank, "
            "or train them from different seeds, so that they do not begin with the same right factors"
        )
    return polar(together)
