"""Which layers of a model get adapters, found by structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from geoedit.errors import EditError

NAMES = ("attn", "cross-attn", "self-attn", "no-cross-attn", "conv", "linear", "full")
_WORDS_OWN = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_QUERIES = (
    "to_q",
    "q_proj",
    "query",
    "q_lin",
    "c_attn",
    "query_key_value",
    "qkv",
    "qkv_proj",
    "Wqkv",
    "W_pack",
)


def target_paths(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The paths of the layers that are meant, in the order of the model's modules.

    - ``"attn"``: every linear map of every attention;
    - ``"cross-attn"``: those of attentions that read words; where words and pixels attend jointly, the maps
      that the words have for themselves;
    - ``"self-attn"``: the other maps of attentions;
    - ``"conv"``: convolutions; ``"linear"``: linear maps;
    - ``"full"``: all linear maps and convolutions, but for the head that turns a language model's states into
      odds of tokens, which it often shares with its embedding;
    - ``"no-cross-attn"``: all but ``"cross-attn"``.

    Convolutions in groups are left out: peft cannot merge adapters on them.

    Args:
        model: a denoiser, a text encoder or a language model.
        targets: a name or several, which are joined; a layer's own path counts as a name.

    Raises:
        EditError: an unknown name, or one that fits no layer (cross-attention in a model without it).
    """
    layers = {path: module for path, module in model.named_modules() if path and _adaptable(module)}
    attention = dict(_attention_layers(model))
    groups = {
        "attn": set(attention),
        "cross-attn": {path for path, words in attention.items() if words},
        "self-attn": {path for path, words in attention.items() if not words},
        "conv": {path for path, module in layers.items() if isinstance(module, nn.modules.conv._ConvNd)},
        "full": {path for path, module in layers.items() if module is not _head(model)},
    }
    groups["linear"] = groups["full"] - groups["conv"]
    groups["no-cross-attn"] = groups["full"] - groups["cross-attn"]
    wanted: set[str] = set()
    for name in [targets] if isinstance(targets, str) else targets:
        found = groups.get(name, {name} if name in layers else None)
        if found is None:
            raise EditError(
                f"targets: {name!r} is no layer of this {type(model).__name__}, nor one of {', '.join(NAMES)}"
            )
        if not found:
            raise EditError(f"targets: this {type(model).__name__} has no layers that are {name!r}")
        wanted |= found & layers.keys()
    return [path for path in layers if path in wanted]


def _head(model: nn.Module) -> nn.Module | None:
    """The output layer of a language model."""
    ask = getattr(model, "get_output_embeddings", None)
    return ask() if callable(ask) else None


def _adaptable(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.conv._ConvNd):
        return module.groups == 1 and not module.transposed
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _attention_layers(model: nn.Module) -> Iterator[tuple[str, bool]]:
    """Paths of the linear maps inside attentions, and whether they read words."""
    for path, module in model.named_modules():
        children = dict(module.named_children())
        if not any(name in children for name in _QUERIES):
            continue
        crossed = bool(getattr(module, "is_cross_attention", False))
        for inner, layer in module.named_modules():
            if inner and _adaptable(layer):
                yield f"{path}.{inner}" if path else inner, crossed or inner.split(".")[0] in _WORDS_OWN
