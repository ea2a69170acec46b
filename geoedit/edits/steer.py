"""Steer along a straight line: add a vector."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from geoedit.edits.activation import ActivationEdit, Selected
from geoedit.errors import EditError


@dataclass(frozen=True, eq=False, repr=False)
class LinearSteer(ActivationEdit, kind="linear-steer"):
    r"""Add one vector to the states at a site.

    \(x \mapsto x + s\,v\), with the direction \(v\) (width,) and the scale \(s\). The direction is not
    normalised; it may require a gradient, which then flows to it through the model.

    Args:
        site: Where, and at which tokens.
        direction: \(v\), (width,).

    Raises:
        EditError: the direction is no vector, not floating-point, or holds NaN.

    Source: Turner et al. 2023, Activation addition; Rimsky et al. 2024, Contrastive activation addition.

    >>> import torch
    >>> from geoedit import Site
    >>> LinearSteer(Site(1, token="all"), torch.ones(8), scale=2.0)
    LinearSteer(block 1 residual_out @ all, scale=2)
    """

    direction: Tensor

    def __post_init__(self) -> None:
        """Refuse a direction that is not a vector."""
        super().__post_init__()
        if self.direction.dim() != 1:
            raise EditError(
                f"LinearSteer.direction has shape {tuple(self.direction.shape)}; give one vector (width,)."
            )

    def change(
        self, states: Float[Tensor, "selected width"], at: Selected
    ) -> Float[Tensor, "selected width"]:
        """Add the scaled direction."""
        return states + at.scale * self.direction

    def unchanged_because(self) -> str | None:
        """Say that the direction is zero, if it is."""
        return None if bool(self.direction.any()) else "its direction is zero"
