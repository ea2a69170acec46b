"""The YAML forms of a slider's spec: ours, and the published trainer's prompts and config files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from geoedit.edits.io import write_whole
from geoedit.errors import EditError
from geoedit.sliders.spec import Prompts, SliderSpec

PROMPT_KEYS = {
    "target": "target",
    "positive": "positive",
    "unconditional": "negative",
    "negative": "negative",
    "neutral": "neutral",
    "action": "action",
    "guidance_scale": "guidance",
    "guidance": "guidance",
    "resolution": "resolution",
    "dynamic_resolution": "dynamic_resolution",
    "batch_size": "batch_size",
}
"""Keys of a set of prompts in the published files, and what they are called here."""
IGNORED_PROMPT_KEYS = ("dynamic_crops", "use_template", "la_strength", "sampling_batch_size", "seed", "rank")
"""Keys of published files that say nothing about what is learned here."""
CONFIG_KEYS = {
    "prompts_file": None,
    "pretrained_model": ("name_or_path", "v2", "v_pred", "clip_skip"),
    "network": ("type", "rank", "alpha", "training_method"),
    "train": (
        "precision",
        "noise_scheduler",
        "iterations",
        "lr",
        "optimizer",
        "optimizer_args",
        "lr_scheduler",
        "max_denoising_steps",
        "batch_size",
    ),
    "save": ("name", "path", "per_steps", "precision"),
    "logging": ("use_wandb", "verbose"),
    "other": ("use_xformers",),
}
"""Sections and keys of the published trainer's config file."""
TARGETS = {
    "full": ("attn", "conv"),
    "noxattn": ("self-attn", "conv"),
    "innoxattn": ("self-attn", "conv"),
    "selfattn": ("self-attn",),
    "xattn": ("cross-attn",),
    "xattn-strict": ("cross-attn",),
}
"""The published training methods as our targets; "lierla" networks leave the convolutions out."""


def read_spec(path: str | PathLike[str]) -> SliderSpec:
    """See `SliderSpec.load`."""
    path = Path(path)
    data, lines = _read(path)
    if isinstance(data, list):
        return _published(path, data, lines, train={})
    if not isinstance(data, dict):
        raise EditError(
            f"{path}: must hold a slider's keys, or a list of prompts; found {type(data).__name__}"
        )
    if "prompts_file" in data:
        return _config(path, data, lines)
    known = [item.name for item in fields(SliderSpec)]
    for key in data:
        if key not in known:
            raise EditError(
                f"{path}, line {lines[key,]}: key {key!r} is unknown; the keys are {', '.join(known)}"
            )
    _check_texts(path, data, lines, ("name", "kind", "target", "positive", "negative", "neutral", "action"))
    for place, item in enumerate(data.get("more") or []):
        _check_prompts(path, item, lines, ("more", place), [entry.name for entry in fields(Prompts)])
    try:
        return SliderSpec.from_dict({key: value for key, value in data.items() if value is not None})
    except EditError as error:
        raise EditError(f"{path}: {_with_line(str(error), lines)}") from error
    except TypeError as error:
        raise EditError(f"{path}: {error}") from error


def write_spec(spec: SliderSpec, path: str | PathLike[str]) -> None:
    """See `SliderSpec.save`."""
    text = yaml.safe_dump(spec.to_dict(), sort_keys=False, allow_unicode=True, width=100)
    try:
        write_whole(Path(path), text.encode())
    except OSError as error:
        raise EditError(
            f"can't write {path}: {error.strerror or error}; give a folder that can be written to"
        ) from error


def plain(value: Any, what: str) -> Any:
    """A value as JSON would hold it.

    Raises:
        EditError: it is none.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {key: item for key, item in asdict(value).items() if item is not None}
    if isinstance(value, Mapping):
        return {key: plain(item, what) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, what) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, PathLike):
        return str(value)
    raise EditError(
        f"{what} holds a {type(value).__name__}, which a file cannot; give the path of a file or folder"
    )


def _published(
    path: Path,
    items: list[Any],
    lines: Mapping[tuple[Any, ...], int],
    *,
    train: Mapping[str, Any],
    name: str = "",
) -> SliderSpec:
    """A list of prompt sets, completed by the published rules.

    They are: positive = target, unconditional = "", neutral = unconditional, action = erase, guidance 1,
    resolution 512.
    """
    if not items:
        raise EditError(f"{path}: the list of prompts is empty")
    sets = []
    for place, item in enumerate(items):
        _check_prompts(path, item, lines, (place,), [*PROMPT_KEYS, *IGNORED_PROMPT_KEYS])
        kept = {key: value for key, value in item.items() if key in PROMPT_KEYS and value is not None}
        given = {PROMPT_KEYS[key]: value for key, value in kept.items()}
        if "target" not in given:
            raise EditError(f"{path}, line {lines.get((place,), 1)}: key 'target' is missing")
        given.setdefault("positive", given["target"])
        given.setdefault("negative", "")
        given.setdefault("neutral", given["negative"])
        defaults = {"action": "erase", "guidance": 1.0, "resolution": 512}
        sets.append(Prompts(**{**defaults, **given}))
    first, *more = sets
    values = {
        key: value for key, value in asdict(first).items() if key not in ("dynamic_resolution", "batch_size")
    }
    try:
        return SliderSpec(
            **values,
            name=name or _stem(path),
            more=more,
            train=dict(train) | ({"batch_size": first.batch_size} if first.batch_size != 1 else {}),
            published=True,
        )
    except EditError as error:
        raise EditError(f"{path}: {error}") from error


def _config(path: Path, data: dict[str, Any], lines: Mapping[tuple[Any, ...], int]) -> SliderSpec:
    """The published trainer's config: its prompts, and its settings under our names."""
    for section, content in data.items():
        if section not in CONFIG_KEYS:
            known = ", ".join(CONFIG_KEYS)
            raise EditError(
                f"{path}, line {lines[section,]}: key {section!r} is unknown; the keys are {known}"
            )
        for key in content if isinstance(content, dict) else ():
            if key not in (CONFIG_KEYS[section] or ()):
                raise EditError(
                    f"{path}, line {lines[section, key]}: key {key!r} of {section!r} is unknown; there are "
                    f"{', '.join(CONFIG_KEYS[section] or ())}"
                )
    prompts = _beside(path, str(data["prompts_file"]))
    items, item_lines = _read(prompts)
    if not isinstance(items, list):
        raise EditError(f"{prompts}: must hold a list of prompts; found {type(items).__name__}")
    network, train = data.get("network") or {}, data.get("train") or {}
    method, optimizer = network.get("training_method", "full"), str(train.get("optimizer", "adamw")).lower()
    if method not in TARGETS:
        raise EditError(
            f"{path}: training_method is {method!r}; those that can be read are {', '.join(TARGETS)}"
        )
    targets = [name for name in TARGETS[method] if name != "conv" or network.get("type") == "c3lier"]
    precision = dict.fromkeys(("bfloat16", "bf16", "float16", "fp16"), "bfloat16")
    settings = {
        "rank": network.get("rank", 4),
        "alpha": network.get("alpha", 1.0),
        "targets": targets,
        "steps": train.get("iterations", 500),
        "learning_rate": train.get("lr", 1e-4),
        "decay": "cosine" if train.get("lr_scheduler") == "cosine" else "constant",
        "trajectory_steps": train.get("max_denoising_steps", 50),
        "autocast": precision.get(str(train.get("precision"))),
    }
    if not optimizer.startswith("adam"):
        raise EditError(f"{path}: optimizer is {optimizer!r}; AdamW is what there is here, write it instead")
    return _published(
        prompts, items, item_lines, train=settings, name=str((data.get("save") or {}).get("name", ""))
    )


def _beside(config: Path, named: str) -> Path:
    """The prompts file that a config names: from here, or from the config's folder or one above it."""
    tried = [Path(named), *(folder / named for folder in config.resolve().parents)]
    tried.append(config.resolve().parent / Path(named).name)
    for candidate in tried:
        if candidate.is_file():
            return candidate
    raise EditError(
        f"{config}: prompts_file {named!r} is found neither here nor in a folder above the config"
    )


def _check_prompts(
    path: Path, item: Any, lines: Mapping[tuple[Any, ...], int], place: tuple[Any, ...], known: Sequence[str]
) -> None:
    if not isinstance(item, dict):
        raise EditError(f"{path}, line {lines.get(place, 1)}: {item!r} is no set of prompts")
    for key in item:
        line = lines.get((*place, key), 1)
        if key not in known:
            raise EditError(f"{path}, line {line}: key {key!r} is unknown; the keys are {', '.join(known)}")
    _check_texts(path, item, lines, ("target", "positive", "unconditional", "negative", "neutral"), place)


def _check_texts(
    path: Path,
    item: Mapping[str, Any],
    lines: Mapping[tuple[Any, ...], int],
    keys: Sequence[str],
    place: tuple[Any, ...] = (),
) -> None:
    for key in keys:
        if not isinstance(item.get(key), (str, NoneType)):
            line = lines.get((*place, key), 1)
            raise EditError(
                f"{path}, line {line}: {key!r} is {item[key]!r}; it is a text, write it in quotes"
            )


def _read(path: Path) -> tuple[Any, dict[tuple[Any, ...], int]]:
    """Plain data of a YAML file, and the line of every key by its path."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EditError(f"{path}: can't be read ({error}); give a YAML file in UTF-8") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[tuple[Any, ...], int] = {}
        if node is not None:
            _walk(path, node, (), lines)
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        raise EditError(f"{path}: is not plain YAML: {error}") from error


def _walk(path: Path, node: yaml.Node, place: tuple[Any, ...], lines: dict[tuple[Any, ...], int]) -> None:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, key.value)
            if here in lines:
                raise EditError(
                    f"{path}, line {key.start_mark.line + 1}: key {key.value!r} stands there twice, first in "
                    f"line {lines[here]}"
                )
            lines[here] = key.start_mark.line + 1
            _walk(path, value, here, lines)
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _walk(path, value, (*place, number), lines)


def _with_line(message: str, lines: Mapping[tuple[Any, ...], int]) -> str:
    """The message with the line of the first key that it quotes."""
    for place, line in lines.items():
        if len(place) == 1 and f"{place[0]!r}" in message:
            return f"line {line}: {message}"
    return message


def _stem(path: Path) -> str:
    return path.stem.removeprefix("prompts-") or "slider"
