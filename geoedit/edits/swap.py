"""Swap one class mean for another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.activations import Activations, Statistics
from geoedit.edits.activation import ActivationEdit, Selected
from geoedit.errors import EditError
from geoedit.fingerprint import Fingerprint
from geoedit.site import Site

Means = Statistics | Activations | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class SwapMeans(ActivationEdit, kind="swap-means"):
    r"""Take the mean of one class out of the states at a site, and put that of another in.

    \(x \mapsto x + s\,(\mu_\text{target} - \mu_\text{source})\).

    Args:
        site: Where, and at which tokens.
        source: \(\mu_\text{source}\), (width,).
        target: \(\mu_\text{target}\), (width,).

    Raises:
        EditError: the means are no vectors of one width, not floating-point, or hold NaN.

    Source: Marks & Tegmark 2024, The geometry of truth (mass-mean direction).
    """

    source: Tensor
    target: Tensor

    def __post_init__(self) -> None:
        """Refuse means that are not two vectors of one width."""
        super().__post_init__()
        if self.source.dim() != 1 or self.source.shape != self.target.shape:
            raise EditError(
                f"SwapMeans needs two vectors of one width; source has shape {tuple(self.source.shape)},"
                f" target {tuple(self.target.shape)}."
            )

    @classmethod
    def between(cls, means: Means, source: str, target: str, *, site: Site, **others: Any) -> SwapMeans:
        """Make the edit from the means of two values.

        Args:
            means: Statistics by label (`geoedit.statistics`), activations with a value for each prompt
                (`geoedit.collect`), or a mapping from value to mean (width,).
            source: The value to take out.
            target: The value to put in.
            site: Where, and at which tokens; for statistics and activations a site that they hold.
            others: Further fields, such as `scale`.

        Raises:
            EditError: there is no such value or site.
        """
        mark = getattr(means, "fingerprint", None)
        if isinstance(mark, Fingerprint):
            others.setdefault("fingerprint", mark)
        return cls(site, mean_of(means, site, source), mean_of(means, site, target), **others)

    def change(
        self, states: Float[Tensor, "selected width"], at: Selected
    ) -> Float[Tensor, "selected width"]:
        """Add the scaled difference of the means."""
        return states + at.scale * (self.target - self.source)

    def unchanged_because(self) -> str | None:
        """Say that both means are the same, if they are."""
        return "its source and its target are the same" if bool((self.source == self.target).all()) else None


def mean_of(means: Means, site: Site, value: str) -> Tensor:
    """The mean state (width,) of one value.

    Raises:
        EditError: there is no such value or site.
    """
    if isinstance(means, Statistics):
        return means.mean(site, value)
    if isinstance(means, Activations):
        wanted = torch.tensor([label == value for label in means.labels])
        rows = means[site][wanted[means.rows(site).cpu()]]
        if rows.shape[0] == 0:
            known = sorted({str(label) for label in means.labels})
            raise EditError(f"No prompt shows the value {value!r}; there are {known}.")
        return rows.mean(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    if value not in means:
        raise EditError(f"There is no mean for {value!r}; there are {sorted(means)}.")
    return means[value]
