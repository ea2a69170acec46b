"""Something small that a model accepts, so that its forward pass can be watched."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = (
    5  # a prime that no layer size is likely to equal, so that the token axis can be told from the others
)
Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def given(inputs: Any) -> Inputs:
    """Turn a user's example inputs (tensor, tuple, or mapping of keywords) into call arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, (tuple, list)):
        return tuple(inputs), {}
    return (inputs,), {}


def attempts(model: nn.Module) -> list[tuple[str, Inputs]]:
    """Return inputs worth trying, best first, each with a description in words."""
    base = _innermost(model)
    config = getattr(base, "config", None)
    parameters = inspect.signature(base.forward).parameters
    tries = _from_config(base, config, parameters) if config is not None else []
    return tries + _from_tensors(base, parameters)


def _innermost(model: nn.Module) -> nn.Module:
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else model
    return inner if isinstance(inner, nn.Module) else model


def home(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Return the device that inputs should be on and the model's floating-point type."""
    tensors = [*model.parameters(), *model.buffers()]
    real = next((t.device for t in tensors if t.device.type != "meta"), torch.device("cpu"))
    dtype = next((t.dtype for t in tensors if t.is_floating_point()), torch.float32)
    return real, dtype


def _ids(model: nn.Module, config: Any, seed: int = 0, length: int = TOKENS) -> Tensor:
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size = getattr(text, "vocab_size", None) or max(tables, default=32)
    special = set()
    for source in (config, text):
        for name, value in vars(source).items() if source is not None else ():
            if name.endswith(("token_id", "token_index")) and isinstance(value, int):
                special.add(value)
    allowed = torch.tensor([i for i in range(min(size, 4096)) if i not in special] or [0])
    order = torch.randperm(len(allowed), generator=torch.Generator().manual_seed(seed))
    return allowed[order[torch.arange(length) % len(order)]][None].to(home(model)[0])


def _noise(model: nn.Module, *shape: int) -> Tensor:
    device, dtype = home(model)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _number(config: Any, *names: str, default: int | None = None) -> int | None:
    parts = [config, *(getattr(config, part, None) for part in ("vision_config", "audio_config", "encoder"))]
    for part in parts:
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, int):
                return value
    return default


def _pixels(model: nn.Module, config: Any) -> Tensor:
    size: Any = None
    for part in (config, getattr(config, "vision_config", None), getattr(config, "encoder", None)):
        size = size or getattr(part, "image_size", None) or 0
    size = size or 32
    height, width = (size, size) if isinstance(size, int) else (size[0], size[1])
    return _noise(model, 1, _number(config, "num_channels", "in_channels", default=3) or 3, height, width)


def _image_tokens(model: nn.Module, config: Any) -> Tensor | None:
    """Return as many image tokens as an image has patches, for models that put patches in their place."""
    token, patch = _number(config, "image_token_id", "image_token_index"), _number(config, "patch_size")
    if token is None or not patch:
        return None
    height, width = _pixels(model, config).shape[-2:]
    return torch.full((1, (height // patch) * (width // patch)), token, device=home(model)[0])


def _from_config(
    model: nn.Module, config: Any, parameters: Mapping[str, inspect.Parameter]
) -> list[tuple[str, Inputs]]:
    parts: dict[str, Tensor] = {}
    if "input_ids" in parameters:
        parts["input_ids"] = _ids(model, config)
    if "pixel_values" in parameters:
        parts["pixel_values"] = _pixels(model, config)
    mels, frames = _number(config, "num_mel_bins"), _number(config, "max_source_positions")
    if "input_features" in parameters and mels and frames:
        parts["input_features"] = _noise(model, 1, mels, 2 * frames)
    if "input_values" in parameters:
        parts["input_values"] = _noise(model, 1, 4000)
    extra: dict[str, Any] = (
        {"use_cache": False} if "use_cache" in parameters or "kwargs" in parameters else {}
    )
    bare: dict[str, Any] = {}
    if "decoder_input_ids" in parameters:
        extra["decoder_input_ids"] = bare["decoder_input_ids"] = _ids(model, config, seed=1)
    choices = [list(parts)]
    main = getattr(model, "main_input_name", None)
    if main in parts:
        choices.append([main])
    choices += [[name] for name in parts]
    tries: list[tuple[str, Inputs]] = []
    if {"input_ids", "pixel_values"} <= set(parts) and (image := _image_tokens(model, config)) is not None:
        ids = torch.cat([image, parts["input_ids"]], 1)
        tries.append(("input_ids with image tokens, pixel_values", ((), parts | {"input_ids": ids} | extra)))
    for names in choices:
        for more in (extra, bare):
            chosen: dict[str, Any] = {name: parts[name] for name in names} | more
            if names and not any(set(chosen) == set(kwargs) for _, (_, kwargs) in tries):
                tries.append((", ".join(chosen), ((), chosen)))
    return tries


def _from_tensors(model: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> list[tuple[str, Inputs]]:
    name = next(iter(parameters), "input")
    tries: list[tuple[str, Inputs]] = []
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    if tables:
        largest = max(table.num_embeddings for table in tables)
        order = torch.randperm(largest, generator=torch.Generator().manual_seed(0))
        ids = order[torch.arange(TOKENS) % largest][None].to(home(model)[0])
        tries.append((f"{name}: token ids (1, {TOKENS})", ((ids,), {})))
    norms = [
        int(weight.shape[-1])
        for m in model.modules()
        if isinstance(weight := getattr(m, "weight", None), Tensor) and weight.ndim == 1
    ]
    linears = [int(m.in_features) for m in model.modules() if isinstance(m, nn.Linear)]
    for width in dict.fromkeys([*linears[:1], *norms[:1]]):
        tries.append((f"{name}: states (1, {TOKENS}, {width})", ((_noise(model, 1, TOKENS, width),), {})))
    return tries
