"""Adapters of peft as weight updates: one family a file."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from peft_analysis.updates.adapters.folder import is_adapter
from peft_analysis.updates.adapters.live import is_live
from peft_analysis.updates.adapters.reading import from_folder, from_model
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights

__all__ = ["is_adapter", "is_live", "read_adapter"]


def read_adapter(
    base: "nn.Module | Weights | str | os.PathLike[str] | None",
    source: "nn.Module | str | os.PathLike[str]",
    *,
    adapter: str | Sequence[str] | None = None,
) -> WeightUpdate:
    """An adapter of peft as a weight update: what `merge_and_unload` would add to each parameter.

    LoRA, VeRA, AdaLoRA, and LoHa and LoKr of small rank stay in factors. What scales or rotates the base's
    own values (DoRA, OFT, BOFT, (IA)³ …) is dense and needs the base. Values are read one parameter at a
    time.

    Args:
        base: the weights that it was trained on: a module, a folder, or weights that are open. None for an
            adapter alone: what needs the base is then listed with `details["needs_base"]` and raises when it
            is read. With a live model, None stands for the base inside it, as it is now.
        source: an adapter folder, or a live model with adapters in it.
        adapter: of a live model, the adapters to read by name; those merged or switched on if not given.

    Raises:
        UpdateError: for another base, values that are not finite, rank or alpha 0, a file that is cut short,
            a quantised base, an adapter of which nothing can be read without the base, or a kind that is no
            change of weights. The message lists the names.
    """
    if isinstance(base, str | os.PathLike):
        base = Weights.of(base)
    chosen = [adapter] if isinstance(adapter, str) else adapter
    if isinstance(source, nn.Module):
        return from_model(base, source, chosen)
    return from_folder(base, Path(source).expanduser())
