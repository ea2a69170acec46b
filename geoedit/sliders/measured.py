"""What an evaluation found, carried by the slider itself: its file, its card and its warnings tell it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from geoedit.errors import EditError
from geoedit.sliders.slider import Slider

if TYPE_CHECKING:
    from geoedit.sliders.evaluation.result import Evaluation

FIGURES = (
    "attribute", "low", "high", "spearman", "violations", "foldback", "range_sd", "range_error", "low_sd",
    "high_sd", "both_ends_right", "interference", "interference_signed", "class_kept", "residual", "distance",
    "spearman_safe",
)  # fmt: skip
"""Columns of an evaluation's table that a slider carries; `evaluation.COLUMNS` says what they mean."""


def measured(slider: Slider, evaluation: Evaluation, label: str | None = None) -> Slider:
    """The same slider with what was measured of it in its details.

    ``details["measured"]`` gets the figures over all seeds and, where both of its ends are known, the
    predicted "safe_range" by which `at` warns. What could not be known is left out.

    Args:
        slider: the slider that was evaluated.
        evaluation: as `evaluate` returned it.
        label: the slider's label there; its name if None.

    Raises:
        EditError: the evaluation has no such label.
    """
    label = slider.name if label is None else label
    rows = evaluation.table
    found = rows[(rows["slider"] == label) & (rows["method"] == "slider") & (rows["seed"] == "all")]
    if found.empty:
        known = ", ".join(map(str, dict.fromkeys(rows["slider"])))
        raise EditError(f"the evaluation knows nothing of {label!r}; it has {known}")
    row: Mapping[str, Any] = found.iloc[0].to_dict()
    figures = {name: value for name in FIGURES if (value := _plain(row.get(name))) is not None}
    ends = [_plain(row.get(name)) for name in ("safe_low", "safe_high")]
    if None not in ends:
        figures["safe_range"] = ends
    return replace(slider, details={**slider.details, "measured": figures})


def _plain(value: Any) -> Any:
    """A Python value of a table's cell; None if it is not known."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value
