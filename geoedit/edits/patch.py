"""Patch: put given states in."""

from __future__ import annotations

from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from geoedit.edits.activation import ActivationEdit, Selected
from geoedit.errors import EditError


@dataclass(frozen=True, eq=False, repr=False)
class Patch(ActivationEdit, kind="patch"):
    r"""Put given states in place of those at a site.

    \(x \mapsto x + s\,(p - x)\): at scale 1 the given states themselves, below it a mixture. By default
    only the prompt is patched: new tokens have no given states.

    Args:
        site: Where, and at which tokens.
        states: \(p\): one state (width,) for every selected token, or one for each row of the batch (batch,
            width).

    Raises:
        EditError: the states have another shape, are not floating-point, or hold NaN; or, when the model
            runs, there are not as many as rows in the batch.

    Source: Vig et al. 2020; Meng et al. 2022 (causal tracing); Zhang & Nanda 2024 (patching in practice).
    """

    states: Tensor
    phase: str = field(default="prompt", kw_only=True)

    def __post_init__(self) -> None:
        """Refuse states of another shape."""
        super().__post_init__()
        if self.states.dim() not in (1, 2):
            raise EditError(
                f"Patch.states has shape {tuple(self.states.shape)}; give one state (width,) or one a row"
                " (batch, width)."
            )

    def change(
        self, states: Float[Tensor, "selected width"], at: Selected
    ) -> Float[Tensor, "selected width"]:
        """Move each state to the given one of its row."""
        given = at.of_rows(self.states, "Patch.states").expand_as(states)
        if not isinstance(at.scale, Tensor) and at.scale == 1:
            return given
        return states + at.scale * (given - states)
