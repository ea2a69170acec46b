"""From the names in a checkpoint's files to those in the model that transformers builds of them.

Transformers renames, stacks and splits what it reads: old checkpoints call a norm's weight 'gamma', one that
was saved without its head has no prefix, and the experts of a mixture lie apart in the file and in one tensor
in the model. The rules are its own; here they are followed tensor by tensor, and only when one is read.
"""

import copy
import logging
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from peft_analysis.updates.files import Stored

log = logging.getLogger(__name__)


def as_model_names(tensors: Mapping[str, Stored], model: nn.Module) -> Mapping[str, Stored]:
    """Tensors of files under the names, and in the shapes, that a model of transformers has for them.

    Args:
        tensors: what the files hold.
        model: the model, which may be on the meta device.
    """
    expected = model.state_dict(keep_vars=True)
    if tensors.keys() <= expected.keys():
        return tensors
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
    except ImportError as moved:
        log.warning(
            "this transformers has no rules for names of checkpoints (%s); they stay as they are", moved
        )
        return tensors
    rules = get_model_conversion_mapping(cast(Any, model))
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    found: dict[str, Stored] = {}
    groups: dict[str, list[tuple[str, str]]] = {}
    for key in sorted(tensors, key=_natural):
        name, pattern = rename_source_key(key, renamings, converters, prefix, expected)
        if name not in expected and key in expected:
            name, pattern = key, None
        if pattern is None:
            found[name if name in expected else key] = tensors[key]
        else:
            groups.setdefault(name, []).append((pattern, key))
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    for name, members in groups.items():
        rule = by_pattern[members[0][0]]
        made = _converted(rule, name, members, {key: _empty(tensors[key]) for _, key in members}, model)
        if any(
            target not in expected or value.shape != expected[target].shape for target, value in made.items()
        ):
            found.update({key: tensors[key] for _, key in members})  # made for another model: as it lies
            continue
        for target, value in made.items():
            read = partial(_read_converted, rule, name, members, tensors, model, target)
            found[target] = Stored(value.shape, value.dtype, read)
    return found


def _read_converted(
    rule: Any,
    name: str,
    members: list[tuple[str, str]],
    tensors: Mapping[str, Stored],
    model: nn.Module,
    target: str,
) -> Tensor:
    return _converted(rule, name, members, {key: tensors[key].read() for _, key in members}, model)[target]


def _converted(
    rule: Any, name: str, members: list[tuple[str, str]], values: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """What a rule of transformers makes of some tensors, by the model's names."""
    work = copy.deepcopy(rule)
    for pattern, key in members:
        work.add_tensor(name, key, pattern, partial(values.__getitem__, key))
    made = work.convert(name, model=model, config=getattr(model, "config", None))
    return {target: value[0] if isinstance(value, list) else value for target, value in made.items()}


def _empty(stored: Stored) -> Tensor:
    return torch.empty(stored.shape, dtype=stored.dtype, device="meta")


def _natural(key: str) -> list[tuple[int, int | str]]:
    """Numbers in a name sort as numbers, so that expert 10 comes after expert 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in key.split(".")]
