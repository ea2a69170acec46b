"""One call that reads any update."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from peft_analysis.errors import UpdateError
from peft_analysis.updates import kohya
from peft_analysis.updates.adapters import is_adapter, is_live, read_adapter
from peft_analysis.updates.files import SAFE, TORCH, TensorFile, open_file
from peft_analysis.updates.names import Chosen, Selection
from peft_analysis.updates.pairs import read_pair, weights_of_pair
from peft_analysis.updates.saved import from_file, is_saved_update
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights

DIFFUSERS = "pytorch_lora_weights.safetensors"  # the file that diffusers writes into a folder


def read_update(base: Any, tuned: Any, *, only: Selection = None, without: Selection = None) -> WeightUpdate:
    """Reads what was changed: parameter names, and a `LowRank` or a dense difference for each.

    Nothing but names, shapes and dtypes is read of full weights now; values are read one by one when they
    are asked for.

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

    Example:
        >>> import torch
        >>> base, tuned = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
        >>> update = read_update(base, tuned)
        >>> torch.equal(update["weight"], tuned.weight - base.weight)
        True
        >>> list(read_update(base, tuned, only="bias"))
        ['bias']
    """
    chosen = Chosen(only, without)
    if tuned is None:
        raise UpdateError("tuned is None; give what was tuned: an adapter, a checkpoint, a file or an update")
    if isinstance(tuned, Sequence) and not isinstance(tuned, str):
        from peft_analysis.updates.sequence import read_sequence

        return read_sequence(base, tuned, chosen=chosen)
    if is_full(tuned):
        if base is None:
            raise UpdateError(
                f"{_named(tuned)} holds full weights; what was changed in them is known only beside the "
                "base: read_update(base, tuned)"
            )
        ours, theirs = weights_of_pair(base, tuned)
        chosen.check(ours)
        return read_pair(ours, theirs, chosen=chosen)
    update = _read_whole(base, tuned)
    return update.only(only, without=without) if chosen else update


def is_full(tuned: Any) -> bool:
    """Whether something holds a model's full weights, and not an update.

    Raises:
        UpdateError: a file that cannot be read.
    """
    if isinstance(tuned, WeightUpdate) or _peft_adapter(tuned) is not None:
        return False
    file = _file(tuned)
    return file is None or not (is_saved_update(file) or kohya.is_adapter_file(file))


def _read_whole(base: Any, tuned: Any) -> WeightUpdate:
    """What says itself what it changes."""
    known = base if base is None or isinstance(base, nn.Module) else Weights.of(base)
    if isinstance(tuned, WeightUpdate):
        return _upon(tuned, known)
    adapter = _peft_adapter(tuned)
    if adapter is not None:
        return read_adapter(known, adapter)
    file = _file(tuned)
    if file is None:
        raise UpdateError(f"no update can be read from {_named(tuned)}")
    return _upon(from_file(file), known) if is_saved_update(file) else kohya.read_adapter_file(known, file)


def _upon(update: WeightUpdate, base: nn.Module | Weights | None) -> WeightUpdate:
    """The same update with a base, whose parameters it must fit."""
    if base is None:
        return update
    weights = Weights.of(base)
    wrong = [
        f"{name} {tuple(entry.shape)}"
        for name, entry in update.entries.items()
        if name not in weights or weights.shape(name) != entry.shape
    ]
    if wrong:
        raise UpdateError(
            f"{update.source} does not fit {weights.source}: it has no {', '.join(wrong[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. Give the base that it was read with"
        )
    return WeightUpdate(
        update.entries, base=weights, source=update.source, stages=update.stages, skipped=update.skipped
    )


def _file(tuned: Any) -> TensorFile | None:
    if isinstance(tuned, str | os.PathLike):
        path = Path(tuned).expanduser()
        path = path / DIFFUSERS if (path / DIFFUSERS).is_file() else path
        if path.is_file() and path.suffix in (SAFE, *TORCH):
            return open_file(path)
    return None


def _peft_adapter(tuned: Any) -> nn.Module | Path | None:
    """The module or the folder, if it holds an adapter of peft."""
    if isinstance(tuned, nn.Module):  # a module with adapters in it was made by peft, which is slow to import
        live = hasattr(tuned, "peft_config") or ("peft" in sys.modules and is_live(tuned))
        return tuned if live else None
    if isinstance(tuned, str | os.PathLike):
        path = Path(tuned).expanduser()
        if is_adapter(path):
            return path
        if path.is_file() and path.stem == "adapter_model" and is_adapter(path.parent):
            return path.parent
    return None


def _named(tuned: Any) -> str:
    if isinstance(tuned, str | os.PathLike):
        return os.fspath(tuned)
    return "a mapping of tensors" if isinstance(tuned, Mapping) else f"a {type(tuned).__name__}"
