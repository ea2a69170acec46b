"""Numbers as they travel to the page: short, and None where there is none."""

from __future__ import annotations

from typing import Any

import numpy as np


def number(value: Any) -> float | None:
    """Round to five significant digits; None for what is missing, NaN or infinite."""
    if value is None:
        return None
    found = float(value)
    return float(f"{found:.5g}") if np.isfinite(found) else None


def tidy(value: Any) -> Any:
    """Do so to every float in a JSON value."""
    if isinstance(value, dict):
        return {str(key): tidy(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(entry) for entry in value]
    return number(value) if isinstance(value, (float, np.floating)) else value
