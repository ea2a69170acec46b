"""One call that reads any update."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates.files import SAFE, TORCH, open_file
from peft_analysis.updates.names import Chosen, Selection
from peft_analysis.updates.pairs import read_pair
from peft_analysis.updates.saved import from_file, is_saved_update
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights


def read_update(base: Any, tuned: Any, *, only: Selection = None, without: Selection = None) -> WeightUpdate:
    """Reads what was changed: parameter names, and a `LowRank` or a dense difference for each.

    Nothing but names, shapes and dtypes is read now; values are read one by one when they are asked for.

    Args:
        base: the model that the update starts from: a module, its folder, a file, `Weights`, or None for an
            adapter or an update that is read alone.
        tuned: a live `PeftModel` or an adapter's folder; a module, folder or file of full weights, which are
            compared with the base; a kohya file or a slider; a file that `WeightUpdate.save` wrote; a
            `WeightUpdate`; or a sequence of any of these, each upon the one before it, as a ReLoRA run.
        only: a regular expression that a parameter's name must contain, or the names themselves.
        without: the same for names that are left out.

    Raises:
        UpdateError: what is given cannot be read, or does not match the base by name or shape.
    """
    chosen = Chosen(only, without)
    if isinstance(tuned, WeightUpdate):
        update = _upon(tuned, base)
    elif isinstance(tuned, Sequence) and not isinstance(tuned, str):
        from peft_analysis.updates.sequence import read_sequence

        return read_sequence(base, tuned, only=only, without=without)
    elif _is_adapter(tuned):
        from peft_analysis.updates.adapters import read_adapter

        update = read_adapter(
            base if base is None or isinstance(base, nn.Module) else Weights.of(base), tuned
        )
    else:
        return _from_weights(base, tuned, chosen)
    return update.only(only, without=without) if chosen else update


def _from_weights(base: Any, tuned: Any, chosen: Chosen) -> WeightUpdate:
    if isinstance(tuned, str | os.PathLike):
        path = Path(tuned).expanduser()
        if path.is_file() and path.suffix in (SAFE, *TORCH):
            file = open_file(path)
            if is_saved_update(file):
                found = from_file(file, base=None if base is None else Weights.of(base))
                return found.only(chosen.only, without=chosen.without) if chosen else found
    if base is None:
        raise UpdateError(
            f"{_named(tuned)} holds full weights; what was changed in them is known only beside the base: "
            "read_update(base, tuned)"
        )
    ours, theirs = Weights.of(base), Weights.of(tuned)
    chosen.check(ours)
    return read_pair(ours, theirs, chosen=chosen)


def _upon(update: WeightUpdate, base: Any) -> WeightUpdate:
    if base is None:
        return update
    return WeightUpdate(
        update.entries,
        base=Weights.of(base),
        source=update.source,
        stages=update.stages,
        skipped=update.skipped,
    )


def _is_adapter(tuned: Any) -> bool:
    if isinstance(tuned, nn.Module):
        return hasattr(tuned, "peft_config")
    if isinstance(tuned, str | os.PathLike):
        return (Path(tuned).expanduser() / "adapter_config.json").is_file()
    return False


def _named(tuned: Any) -> str:
    if isinstance(tuned, str | os.PathLike):
        return os.fspath(tuned)
    return "a mapping of tensors" if isinstance(tuned, Mapping) else type(tuned).__name__
