"""An adapter's settings: rank and scaling of each module, as peft reads them."""

import math
import re
from collections.abc import Mapping
from typing import Any

from peft_analysis.errors import UpdateError


def of_pattern(patterns: Mapping[str, Any] | None, path: str, otherwise: Any) -> Any:
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


def alpha_of(settings: Mapping[str, Any], path: str, key: str = "lora_alpha") -> float:
    """A module's own α.

    Raises:
        UpdateError: where it is 0 or no number.
    """
    alpha = of_pattern(settings.get("alpha_pattern"), path, settings.get(key, 8))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UpdateError(f"{path}: alpha is {alpha!r}; a number is needed")
    if alpha == 0:
        raise UpdateError(
            f"{path}: alpha is 0, with which the adapter changes nothing; mend {key} or alpha_pattern in "
            "adapter_config.json"
        )
    return float(alpha)


def rank_of(settings: Mapping[str, Any], path: str) -> int:
    """A module's own r.

    Raises:
        UpdateError: where it is less than 1.
    """
    rank = of_pattern(settings.get("rank_pattern"), path, settings.get("r", 8))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise UpdateError(f"{path}: the rank is {rank!r}; a rank is 1 or more")
    return rank


def scaling_of(settings: Mapping[str, Any], path: str, rank: int | None, key: str = "lora_alpha") -> float:
    """α / r, or α / √r with rsLoRA (Kalajdzievski 2023), with the module's own α and r.

    Args:
        settings: the adapter's configuration.
        path: of the module.
        rank: of the factors; None where they do not show it.
        key: of α in the settings.

    Raises:
        UpdateError: where α is 0 or no number, or r is not that of the factors.
    """
    said = rank_of(settings, path)
    if rank is not None and said != rank:
        raise UpdateError(
            f"{path}: the factors have rank {rank}, adapter_config.json says {said}; "
            "the two files are not of one adapter"
        )
    return alpha_of(settings, path, key) / (math.sqrt(said) if settings.get("use_rslora") else said)
