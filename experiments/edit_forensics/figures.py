"""The study's picture: recall of subjects and objects, beside how well the edits themselves went."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

SERIES = (
    ("subject_recall", "subject found", "#2e6f95"),
    ("object_recall", "object read", "#d1495b"),
    ("success", "edited model says the object", "#999999"),
)


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Write the picture: a row for each model, a column for each method."""
    table = pd.DataFrame(found["edits"])
    models, methods = list(table["model"].unique()), list(table["method"].unique())
    figure = Figure(figsize=(3.0 * len(methods), 2.4 * len(models)), layout="constrained")
    grid = figure.subplots(len(models), len(methods), squeeze=False, sharey=True)
    for model, line in zip(models, grid, strict=True):
        for method, axes in zip(methods, line, strict=True):
            rows = table.query("model == @model and method == @method")
            counts = sorted(rows["edits"].unique())
            places = np.arange(len(counts))
            for offset, (column, label, colour) in enumerate(SERIES):
                means = [rows.query("edits == @count")[column].mean() for count in counts]
                axes.bar(places + (offset - 1) * 0.27, means, 0.25, color=colour, label=label)
            axes.axhline(0.95, color="black", linewidth=0.6, linestyle=":")
            axes.set_xticks(
                places, [f"{count} edit{'s' if count > 1 else ''}" for count in counts], fontsize=7
            )
            axes.set_title(f"{model}, {method}", fontsize=8)
            axes.set_ylim(0, 1.05)
    grid[0][0].legend(fontsize=6, loc="lower left")
    temporary = path.with_name(f".{path.stem}.part.png")
    figure.savefig(temporary, dpi=90, metadata={"Software": None})
    os.replace(temporary, path)
