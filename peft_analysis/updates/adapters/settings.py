"""An adapter's settings: rank and scaling of each module, as peft reads them."""

import math
import re
from collections.abc import Mapping
from typing import Any

from peft_analysis.errors import UpdateError


def of_pattern(patterns: Mapping[str, Any], path: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of a module's path, from a dot on.

    Raises:
        UpdateError: for a pattern that is no regular expression.
    """
    for pattern, value in (patterns or {}).items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as wrong:
            raise UpdateError(
                f"the pattern {pattern!r} in adapter_config.json is no regular expression: {wrong}"
            ) from None
        if found:
            return value
    return otherwise


def scaling_of(settings: Mapping[str, Any], path: str, rank: int) -> float:
    """α / r, or α / √r with rsLoRA (Kalajdzievski 2023), with the module's own α and r.

    Raises:
        UpdateError: where α is 0 or no number, or r is not that of the factors.
    """
    alpha = of_pattern(settings.get("alpha_pattern") or {}, path, settings.get("lora_alpha", 8))
    said = of_pattern(settings.get("rank_pattern") or {}, path, settings.get("r", 8))
    if said != rank:
        raise UpdateError(
            f"{path}: the factors have rank {rank}, adapter_config.json says {said}; "
            "the two files are not of one adapter"
        )
    if not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UpdateError(f"{path}: alpha is {alpha!r}; a number is needed")
    if alpha == 0:
        raise UpdateError(
            f"{path}: alpha is 0, with which the adapter changes nothing; mend lora_alpha or alpha_pattern in "
            "adapter_config.json"
        )
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
