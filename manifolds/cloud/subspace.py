"""The affine subspace that all charts share, so that projections are computed in few dimensions."""

import torch
from jaxtyping import Float
from torch import Tensor

ABOVE = 1.5
"""How far the variance in a direction must stand above the most that the errors of the centres can make."""
EXACT = 1e-24
"""The share of the variance below which a direction is rounding."""
ROWS = 2048
"""How many random combinations of the centres stand for them, where they and their width are more."""


def common_subspace(
    centres: Float[Tensor, "m D"], errors: Float[Tensor, "m"], independent: float, least: int
) -> tuple[Float[Tensor, "D"], Float[Tensor, "D r"]]:
    """An origin and an orthonormal basis of the principal directions in which the centres differ for sure.

    The errors of the centres alone, evenly in all D directions, give variances up to e² (1 + √(D/m))²/D with
    m independent centres and e² their mean square (Marchenko and Pastur 1967). What does not rise above that
    is left out, and with it the most of the error.

    Args:
        centres: points on the manifold.
        errors: the mean square error of each, over all directions.
        independent: how many of them are independent: neighbourhoods overlap.
        least: how many directions to keep at least.
    """
    origin = centres.mean(0)
    rows = (centres - origin).double()
    count, ambient = rows.shape
    if min(count, ambient) > ROWS:
        generator = torch.Generator().manual_seed(0)
        mixing = torch.randn(ROWS, count, generator=generator, dtype=torch.float64).to(rows.device)
        rows = mixing @ rows * (count / ROWS) ** 0.5 / count**0.5
    _, sizes, right = torch.linalg.svd(rows, full_matrices=False)
    variances = sizes * sizes / count
    edge = float(errors.double().median()) / ambient * (1 + (ambient / max(independent, 1.0)) ** 0.5) ** 2
    floor = max(EXACT, 4 * torch.finfo(centres.dtype).eps ** 2) * float(variances.sum())
    rank = int((variances > max(ABOVE * edge, floor)).sum())
    return origin, right[: max(rank, min(least, len(right)))].mT.to(centres).contiguous()
