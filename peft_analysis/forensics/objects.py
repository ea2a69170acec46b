"""Candidates for the objects of edits, and vectors read through the unembedding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.forensics.keys import Prompt, around, evaluating, run


@dataclass(frozen=True)
class Candidates:
    """Objects to choose from, and the first token of each."""

    names: tuple[str, ...]
    tokens: Tensor


def candidates(
    tokenizer: Any, objects: Sequence[str] | None, vocabulary: int, template: str = "{}"
) -> Candidates:
    """The objects' first tokens, as they follow on a prompt; without objects every token of the vocabulary.

    Objects whose first token is the same are one candidate, named by all of them.
    """
    if objects is None:
        words = [str(tokenizer.decode([index])).strip() for index in range(vocabulary)]
        return Candidates(tuple(words), torch.arange(vocabulary))
    before = "".join(around(template)).strip() or "is"
    start = tuple(tokenizer(before)["input_ids"])
    by_token: dict[int, list[str]] = {}
    for name in objects:
        whole = tuple(tokenizer(f"{before} {name}")["input_ids"])
        same = next((i for i, (a, b) in enumerate(zip(whole, start, strict=False)) if a != b), len(start))
        if same >= len(whole):
            raise UpdateError(f"the object {name!r} has no token; give words that the tokenizer knows")
        by_token.setdefault(whole[same], []).append(name)
    return Candidates(
        tuple(" | ".join(dict.fromkeys(names)) for names in by_token.values()), torch.tensor(list(by_token))
    )


def lens(
    model: nn.Module, prompt: Prompt, vectors: Float[Tensor, "many d"]
) -> Float[Tensor, "many vocabulary"] | None:
    """Vectors of the residual stream through the final norm and the unembedding.

    The final norm is the module whose output enters the unembedding; None if the model has no unembedding.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    if head is None:
        return None
    called: list[tuple[nn.Module, Tensor]] = []
    entered: list[Tensor] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            called.append((module, output))

    leaves = [module for module in model.modules() if not any(module.children()) and module is not head]
    handles = [module.register_forward_hook(note) for module in leaves]
    handles.append(head.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])))
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), evaluating(model):
            ids = torch.tensor([prompt.ids], device=device)
            run(model, {}, ids, torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    norm = next((module for module, output in called if entered and _same(output, entered[0])), None)
    weight: Tensor = head.weight
    with torch.no_grad():
        inputs = vectors.to(weight)
        if norm is not None and inputs.shape[-1] == weight.shape[-1]:
            inputs = norm(inputs)
        return head(inputs).float() if inputs.shape[-1] == weight.shape[-1] else None


def _same(output: Tensor, entered: Tensor) -> bool:
    return output.shape == entered.shape and bool(torch.equal(output, entered))
