"""From a margin to odds, where the learned odds cannot speak."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

SLOPE, INTERCEPT = 0.85, 0.9
"""Of the landing margin in nats.

Set once, on edits of the almanac's city-country concept (GPT-2, all sites, scales 0.5 to 2).
"""


def probability(margin: Float[np.ndarray, " n"], column: str) -> Float[np.ndarray, " n"]:
    """Return the predicted probability of success, a fixed logistic of the default predictor's margin.

    `p = 1 / (1 + exp(-(SLOPE m + INTERCEPT)))` for the landing margin m in nats. Other margins carry the
    units of their metric: they are divided by their own mean size first, so that p then says which side and
    how clearly, and is not calibrated. Infinite margins (no rival) give 0 or 1.
    """
    finite = margin[np.isfinite(margin)]
    unit = 1.0 if column == "landing" or not len(finite) else max(float(np.abs(finite).mean()), 1e-300)
    slope, intercept = (SLOPE, INTERCEPT) if column == "landing" else (1.0, 0.0)
    return 0.5 * (
        1 + np.tanh(0.5 * (slope * np.nan_to_num(margin / unit, posinf=1e6, neginf=-1e6) + intercept))
    )
