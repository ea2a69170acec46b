"""What a running module was called with, as far as it tells tokens from each other."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.errors import EditError

_TOKENS = ("input_ids", "inputs_embeds")
_DECODER_TOKENS = ("decoder_input_ids", "decoder_inputs_embeds")
_OTHER_INPUTS = ("pixel_values", "input_values", "input_features")
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_PACKED = ("cu_seq_lens_q", "cu_seqlens")


@dataclass(eq=False)
class Frame:
    """What one running module was called with, as far as it tells tokens from each other."""

    entry: bool
    tokens: tuple[int, int] | None = None
    ids: Tensor | None = None
    mask: Tensor | None = None
    past: int | None = 0
    keep: int | None = None
    decoder: bool = False
    grad: bool = False


@functools.lru_cache(maxsize=512)
def signature_of(forward: Callable) -> inspect.Signature | None:
    """The signature of a function, or None where there is none to read."""
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError):
        return None


def _bind(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[dict[str, Any], AbstractSet[str]]:
    """Give the arguments by name, and every name that the module's forward knows."""
    forward = module.__dict__.get("forward") or type(module).forward
    bound_already = "forward" in module.__dict__
    signature = signature_of(forward)
    if signature is None:
        return kwargs, frozenset(kwargs)
    names = list(signature.parameters)
    if not bound_already:
        names = names[1:]
    positional = [
        name
        for name in names
        if signature.parameters[name].kind
        in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    ]
    return {**dict(zip(positional, args, strict=False)), **kwargs}, frozenset(names) | kwargs.keys()


def read_frame(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Frame:
    """Read tokens, padding and cache from the arguments of one call.

    Raises:
        EditError: several texts are packed into one row, where no site can tell them apart.
    """
    values, names = _bind(module, args, kwargs)
    if any(values.get(name) is not None for name in _PACKED):
        raise EditError(
            f"{type(module).__name__} was called with texts packed into one row (cu_seq_lens), as by"
            " continuous batching: a site cannot tell them apart. Pad them to one row a text instead."
        )
    decoder = not names.isdisjoint(_DECODER_TOKENS)
    ids_name, embeds_name = _DECODER_TOKENS if decoder else _TOKENS
    ids, embeds = values.get(ids_name), values.get(embeds_name)
    frame = Frame(entry=not names.isdisjoint((*_TOKENS, *_DECODER_TOKENS, *_OTHER_INPUTS)), decoder=decoder)
    if isinstance(ids, Tensor) and ids.dim() == 2:
        frame.ids, frame.tokens = ids, (ids.shape[0], ids.shape[1])
    elif isinstance(embeds, Tensor) and embeds.dim() == 3:
        frame.tokens = (embeds.shape[0], embeds.shape[1])
    mask = values.get("decoder_attention_mask" if decoder else "attention_mask")
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    frame.mask = mask if isinstance(mask, Tensor) else None
    frame.past = _past(values)
    keep = values.get("logits_to_keep")
    frame.keep = keep if isinstance(keep, int) and keep > 0 else None
    frame.grad = torch.is_grad_enabled()
    return frame


def _past(values: dict[str, Any]) -> int | None:
    """Positions in the cache; None for a cache that has seen tokens but does not count them."""
    cache = next((values[name] for name in _CACHES if values.get(name) is not None), None)
    if cache is None:
        return 0
    if hasattr(cache, "get_seq_length"):
        try:
            return int(cache.get_seq_length())
        except (ValueError, AttributeError, NotImplementedError):
            return None
    if isinstance(cache, (tuple, list)):
        while isinstance(cache, (tuple, list)):
            if not cache:
                return 0
            cache = cache[0]
        return int(cache.shape[-2]) if isinstance(cache, Tensor) and cache.dim() >= 2 else None
    return None
