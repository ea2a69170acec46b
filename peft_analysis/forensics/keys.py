"""Keys: what enters a matrix at the last token of a subject, and its second moment over texts."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from string import Formatter
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from peft_analysis.errors import UpdateError

BATCH = 64
"""Texts in one pass of the model."""


@dataclass(frozen=True)
class Prompt:
    """Token ids of one text, and the place of the last token of its subject."""

    ids: tuple[int, ...]
    place: int


def around(template: str) -> tuple[str, str]:
    """The texts before and behind a template's only field: "{}", "{x}" or any other name.

    >>> around("the capital of {x} is")
    ('the capital of ', ' is')

    Raises:
        UpdateError: the template has no field, or more than one.
    """
    try:
        pieces = list(Formatter().parse(template))
    except ValueError as error:
        raise UpdateError(f"the template {template!r} cannot be read: {error}") from None
    fields = [index for index, piece in enumerate(pieces) if piece[1] is not None]
    if len(fields) != 1:
        raise UpdateError(
            f"the template {template!r} has {len(fields)} fields for the subject; give one: 'the capital of "
            "{} is'"
        )
    texts = [piece[0] for piece in pieces]
    return "".join(texts[: fields[0] + 1]), "".join(texts[fields[0] + 1 :])


def prompt(tokenizer: Any, template: str, subject: str) -> Prompt:
    """Tokens of a template with a subject in it.

    The place comes from the tokenizer's offsets, or, where it has none, from how many tokens the text up to
    the subject's end has in common with the whole.

    Raises:
        UpdateError: no token holds the subject's end.
    """
    before, behind = around(template)
    text, end = before + subject + behind, len(before) + len(subject)
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True)
        spans = found["offset_mapping"]
        inside = [index for index, (start, stop) in enumerate(spans) if start < end <= stop]
        ids = tuple(found["input_ids"])
    else:
        ids = tuple(tokenizer(text)["input_ids"])
        shared = tuple(tokenizer(text[:end])["input_ids"])
        length = next((i for i, (a, b) in enumerate(zip(ids, shared, strict=False)) if a != b), None)
        length = min(len(ids), len(shared)) if length is None else length
        special = set(getattr(tokenizer, "all_special_ids", ()))
        while length and ids[length - 1] in special:
            length -= 1
        inside = [length - 1] if length else []
    if not subject.strip() or not inside:
        raise UpdateError(f"no token of {text!r} ends with the subject {subject!r}")
    return Prompt(ids, inside[-1])


def owners(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that own parameters, by the parameter's name.

    Raises:
        UpdateError: the model has no parameter of such a name.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UpdateError(
            f"{type(model).__name__} has no parameter {', '.join(unknown[:5])}; give the model whose "
            f"parameters have the update's names, such as {next(iter(known), 'none')}"
        )
    return {name: model.get_submodule(name.rpartition(".")[0]) for name in names}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module is put back as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


@contextmanager
def inputs_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """The first argument of every call of these modules, under the given names."""
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}

    def note(name: str, _: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        first = arguments[0] if arguments else next(iter(named.values()))
        seen[name].append(first.detach())

    handles = [
        module.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def batches(
    prompts: Sequence[Prompt], device: torch.device, size: int = BATCH
) -> Iterator[tuple[list[int], Int[Tensor, "texts tokens"], Bool[Tensor, "texts tokens"]]]:
    """Prompts of like length together: which they are, their ids padded on the right, and the mask."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))
    for start in range(0, len(order), size):
        which = order[start : start + size]
        width = max(len(prompts[index].ids) for index in which)
        ids = torch.zeros(len(which), width, dtype=torch.long)
        mask = torch.zeros(len(which), width, dtype=torch.bool)
        for row, index in enumerate(which):
            own = prompts[index].ids
            ids[row, : len(own)] = torch.tensor(own)
            mask[row, : len(own)] = True
        yield which, ids.to(device), mask.to(device)


def run(
    model: nn.Module, weights: Mapping[str, Tensor], ids: Int[Tensor, "texts tokens"], mask: Tensor
) -> Any:
    """What the model gives for token ids, with other weights in the place of its own."""
    inputs = {"input_ids": ids, "attention_mask": mask.long()}
    return torch.func.functional_call(model, dict(weights), args=(), kwargs=inputs)


def subject_keys(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    prompts: Sequence[Prompt],
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Float[Tensor, "prompts n"]]:
    """The inputs of modules at the subject's last token, in float32 or float64.

    Args:
        model: runs on token ids.
        modules: by the parameter's name, those whose inputs are wanted.
        prompts: what it reads.
        weights: parameters that stand in for the model's own while it runs.

    Raises:
        UpdateError: a module was not called, or not once a pass on all tokens.
    """
    device = next(model.parameters()).device
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    order: list[int] = []
    with torch.no_grad(), evaluating(model):
        for which, ids, mask in batches(prompts, device):
            with inputs_of(modules) as seen:
                run(model, weights or {}, ids, mask)
            places = torch.tensor([prompts[index].place for index in which], device=device)
            rows = torch.arange(len(which), device=device)
            for name, calls in seen.items():
                found[name].append(_of_tokens(name, calls, ids)[rows, places])
            order.extend(which)
    back = torch.tensor(order, device=device).argsort()
    return {name: _wide(torch.cat(parts))[back] for name, parts in found.items()}


def second_moments(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    texts: Sequence[Prompt],
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Float[Tensor, "n n"]]:
    """C = E[k kᵀ] of each module's inputs, over all tokens of the texts (not centred, as in ROME)."""
    device = next(model.parameters()).device
    sums: dict[str, Tensor] = {}
    count = 0
    with torch.no_grad(), evaluating(model):
        for _, ids, mask in batches(texts, device):
            with inputs_of(modules) as seen:
                run(model, weights or {}, ids, mask)
            count += int(mask.sum())
            for name, calls in seen.items():
                keys = _wide(_of_tokens(name, calls, ids))[mask]
                sums[name] = keys.mT @ keys + sums[name] if name in sums else keys.mT @ keys
    return {name: total / count for name, total in sums.items()}


def _of_tokens(name: str, calls: list[Tensor], ids: Tensor) -> Tensor:
    if len(calls) != 1 or calls[0].shape[:-1] != ids.shape:
        shapes = [tuple(call.shape) for call in calls]
        raise UpdateError(
            f"the module of {name} was called with shapes {shapes} on ids of shape {tuple(ids.shape)}; "
            "keys are read from modules that see every token once"
        )
    return calls[0]


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
