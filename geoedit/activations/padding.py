"""Padding on the left, made right for the model or refused."""

from __future__ import annotations

import weakref
from dataclasses import replace

import torch
from torch import Tensor, nn

from geoedit.activations.calls import accepted_arguments, call_arguments
from geoedit.activations.inputs import Batch, Texts
from geoedit.errors import EditError

_numbering: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def fit_padding(model: nn.Module, source: Texts) -> Texts | None:
    """Make left padding right for this model, or say that it can't be.

    Under left padding a model with learned or absolute positions needs position_ids that start at each text's
    own first token; others number their tokens themselves, and a few (RoBERTa) count from elsewhere. Which it
    is, is asked of the model: one short text alone and the same text padded must give the same output.

    Returns:
        The source with `positions` set as this model needs; None if no way to pad on the left agrees with the
        text alone, so that only texts of the same length may share a batch.
    """
    if source.side == "right":
        return source
    if model not in _numbering:
        _numbering[model] = _ask_numbering(model, source)
    found = _numbering[model]
    return None if found == "none" else replace(source, positions=found == "explicit")


def _ask_numbering(model: nn.Module, source: Texts) -> str:
    shortest = min(range(len(source)), key=lambda i: len(source.ids[i]))
    other = max(range(len(source)), key=lambda i: len(source.ids[i]))
    length = len(source.ids[shortest])
    alone = _whole_output(model, source.batch([shortest]))[:, -length:]
    ways = ["own"]
    if "position_ids" in accepted_arguments(model):
        ways.insert(0, "explicit")
    for way in ways:
        padded = replace(source, positions=way == "explicit").batch([shortest, other])
        output = _whole_output(model, padded)[:1, -length:]
        tolerance = 1e-4 if output.dtype in (torch.float32, torch.float64) else 5e-2
        distance = (output.double() - alone.double()).norm() / alone.double().norm().clamp_min(1e-30)
        if output.shape == alone.shape and float(distance) < tolerance:
            return way
    return "none"


def _whole_output(model: nn.Module, batch: Batch) -> Tensor:
    output = model(**call_arguments(model, batch.inputs, ready=False))
    for name in ("encoder_last_hidden_state", "logits", "last_hidden_state"):
        found = output.get(name) if hasattr(output, "get") else None
        if isinstance(found, Tensor) and found.dim() == 3:
            return found
    first = output if isinstance(output, Tensor) else output[0]
    if not isinstance(first, Tensor) or first.dim() != 3:
        raise EditError(
            f"{type(model).__name__} gives no output with one row a token, so left padding can't be checked; "
            "set tokenizer.padding_side = 'right'."
        )
    return first
