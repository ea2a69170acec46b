"""What a module's parameters are: which are tied, stored transposed, or have a row for each token."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peft_analysis.updates.entry import Layout

UNSAVED = "a buffer that the model makes itself and does not save"
TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


@dataclass(frozen=True)
class Anatomy:
    """Names of a module's parameters and buffers, and what the modules that own them say of them.

    Attributes:
        parameters: by name, each once.
        buffers: those that are floating-point and saved with the model.
        layouts: "in_out" for GPT-2's Conv1D and transposed convolutions, "other" for embeddings.
        tied: for each further name of a parameter, its first name.
        embeddings: names of parameters with a row for each token, position or class of tokens.
        tokens: those with a row for each token: the input embedding and the head.
        skipped: buffers that are no weights, each with the reason.
        ignored: regular expressions of names that older checkpoints hold and the model does not read.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    tokens: frozenset[str] = frozenset()
    skipped: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


def anatomy(model: nn.Module) -> Anatomy:
    """Looks at a module's structure; reads no value, so that a model on the meta device will do."""
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    first = {id(value): name for name, value in parameters.items()}
    every = list(model.named_parameters(remove_duplicate=False))
    tied = {name: first[id(value)] for name, value in every if first[id(value)] != name}
    buffers, skipped = _buffers(model)
    tokens = {id(value) for value in _token_rows(model)}
    rows = set(tokens)
    layouts: dict[str, Layout] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or id(weight) not in first:
            continue
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            layouts[first[id(weight)]] = "other"
            rows.add(id(weight))
        elif isinstance(module, TRANSPOSED) or type(module).__name__ == "Conv1D":
            layouts[first[id(weight)]] = "in_out"
    return Anatomy(
        parameters,
        buffers,
        layouts,
        tied,
        embeddings=frozenset(name for name, value in parameters.items() if id(value) in rows),
        tokens=frozenset(name for name, value in parameters.items() if id(value) in tokens),
        skipped=skipped,
        ignored=tuple(map(str, getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())),
    )


def quantised_dtype(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype are codes that need a scale: integers, booleans, eight bits or fewer."""
    return not (dtype.is_floating_point or dtype.is_complex) or dtype.itemsize < 2


def _buffers(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Buffers that a checkpoint stores as numbers, and why the others are no weights."""
    kept, skipped = {}, {}
    saved = model.state_dict(keep_vars=True)
    for name, value in model.named_buffers():
        if name not in saved:
            skipped[name] = UNSAVED
        elif value.is_floating_point():
            kept[name] = value
        else:
            skipped[name] = f"a buffer of {value.dtype}, which counts or masks and is no weight"
    return kept, skipped


def _token_rows(model: nn.Module) -> Iterator[Tensor]:
    """The parameters of the input embedding and of the head, where a model says which these are."""
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, ask)()
        except (AttributeError, NotImplementedError):
            continue
        if isinstance(module, nn.Module):
            yield from module.parameters(recurse=False)
