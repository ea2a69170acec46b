"""How many heads share the input of an attention's output projection."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

NAMES = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "nhead",
    "num_query_heads",
    "attention_heads",
    "heads",
)
COUNT = "num_attention_heads"


def _sources(model: nn.Module, block: nn.Module, path: str) -> Iterator[Any]:
    """Yield what may know the number of heads: modules, near to far, and configurations."""
    around = path.split(".")[:-1]
    near = [block.get_submodule(".".join(around[:depth])) for depth in range(len(around), -1, -1)]
    groups = [list(module.modules()) for module in near]
    for group in groups:
        yield from group
        yield from (module.config for module in group if hasattr(module, "config"))
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "get_text_config"):
        yield config.get_text_config()
    if config is not None:
        yield config


def count_heads(model: nn.Module, block: nn.Module, path: str, width: int) -> int | None:
    """Return the number of (query) heads, as the attention module or a configuration near it says, or None.

    A number that does not divide `width`, the size of the heads together, is not believed.
    """
    for source in _sources(model, block, path):
        for name in NAMES:
            value = getattr(source, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0 and width % value == 0:
                return value
    return None
