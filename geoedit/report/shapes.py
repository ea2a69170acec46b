"""What a concept's states look like at a site, and where edits lead, as the page draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from geoedit.diagnosis.result import SiteSummary
from geoedit.diagnosis.safe_scale import safe_interval
from geoedit.report.numbers import number, tidy


def shape(site: SiteSummary) -> dict[str, Any]:
    """The names of a site, its class means on three axes, and the geometry of its manifold."""
    return {
        "label": site.label,
        "place": site.place,
        "token": site.token,
        "depth": site.depth,
        "coordinates": tidy(site.coordinates),
        "explained": tidy(site.explained),
        "separation": number(site.separation),
        "geometry": tidy(site.geometry),
    }


def swept(sweep: Mapping[str, Any]) -> dict[str, Any]:
    """One edit over many scales: the two ends of its straight path, and what is known at each scale."""
    position = sweep["position"]
    return tidy(
        {
            **{
                name: sweep[name] for name in ("site", "edit", "source", "text", "wanted", "scales", "reason")
            },
            "target_value": sweep["target"],
            "target": sweep["target_position"],
            "probability": sweep["probability"],
            "off": sweep["off"],
            "path": [position[0], position[-1]],
            "foot": sweep["foot"],
            "recorded": sweep["recorded"],
            "geodesic": sweep["geodesic"],
            "safe": _safe(sweep["scales"], sweep["probability"]),
        }
    )


def _safe(scales: Sequence[float], probability: Sequence[float | None]) -> list[float] | None:
    """The scales at which this edit is expected to succeed, as the diagnosis tells them; None: none."""
    known = [(scale, p) for scale, p in zip(scales, probability, strict=True) if scale > 0 and p is not None]
    if not known:
        return None
    columns = np.array(known, dtype=float).T
    low, high = safe_interval(columns[0], columns[1][None])
    return [float(low[0]), float(high[0])] if high[0] > 0 else None
