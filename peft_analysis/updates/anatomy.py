"""What a module's parameters are: which are tied, transposed, embeddings, quantised."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from peft_analysis.updates.entry import Layout


@dataclass(frozen=True)
class Anatomy:
    """Names of a module's parameters and buffers, and what the modules that own them say of them.

    Attributes:
        parameters: by name, each once.
        buffers: those that are floating-point and saved with the model.
        layouts: "in_out" for the weights of GPT-2's Conv1D, "other" for embeddings.
        tied: for each further name of a parameter, its first name.
        embeddings: names of parameters with a row for each token or position.
        skipped: saved buffers that are not floating-point, each with the reason.
    """

    parameters: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    embeddings: frozenset[str] = frozenset()
    skipped: dict[str, str] = field(default_factory=dict)


def anatomy(model: nn.Module) -> Anatomy:
    """Looks at a module's structure; reads no value, so that a model on the meta device will do."""
    found = Anatomy(parameters=dict(model.named_parameters()))
    first = {id(value): name for name, value in found.parameters.items()}
    for name, value in model.named_parameters(remove_duplicate=False):
        if first[id(value)] != name:
            found.tied[name] = first[id(value)]
    saved = set(model.state_dict(keep_vars=True))
    for name, value in model.named_buffers():
        if name not in saved:
            continue
        if value.is_floating_point():
            found.buffers[name] = value
        else:
            found.skipped[name] = f"a buffer of {value.dtype}, which counts or masks and is no weight"
    embeddings = {id(value) for value in _embeddings(model)}
    heads = {id(value) for value in _head(model)}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        name = first.get(id(weight), "")
        if type(module).__name__ == "Conv1D" and not isinstance(module, nn.Conv1d):
            found.layouts[name] = "in_out"
        elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
            found.layouts[name] = "other"
            embeddings.add(id(weight))
    rows = frozenset(name for name, value in found.parameters.items() if id(value) in embeddings | heads)
    return Anatomy(
        found.parameters, found.buffers, found.layouts, found.tied, embeddings=rows, skipped=found.skipped
    )


def _embeddings(model: nn.Module) -> list[Tensor]:
    try:
        return list(model.get_input_embeddings().parameters())  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return []


def _head(model: nn.Module) -> list[Tensor]:
    try:
        return list(model.get_output_embeddings().parameters())  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return []


def quantised_dtype(dtype: torch.dtype) -> bool:
    """Whether numbers of this dtype are codes that need a scale: integers, booleans, eight bits or fewer."""
    return not (dtype.is_floating_point or dtype.is_complex) or dtype.itemsize < 2
