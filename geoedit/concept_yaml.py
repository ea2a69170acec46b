"""The YAML form of a concept: plain data in and out, with errors that name the file, the key and the mend."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from geoedit.errors import EditError

KEYS = ("name", "kind", "description", "values", "forms", "coordinates", "templates")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice (plain YAML keeps the last one in silence)."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for place, key in enumerate(keys):
        if key in keys[:place]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {key!r} stands there twice", node.value[place][0].start_mark
            )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_concept(path: Path) -> dict[str, Any]:
    """The fields of a concept as checked plain data; `templates` is a list of (text, answers).

    Raises:
        EditError: naming the file, the key and the mend.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EditError(f"{path}: can't be read ({error}); give a YAML file in UTF-8.") from error
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise EditError(f"{path}: is not plain YAML: {error}") from error
    if not isinstance(data, dict):
        raise EditError(f"{path}: must hold the keys {', '.join(KEYS)}; found {type(data).__name__}.")
    for key in data:
        if key not in KEYS:
            raise EditError(f"{path}: key {key!r} is unknown; the keys are {', '.join(KEYS)}.")
    if "name" not in data or "templates" not in data:
        missing = "name" if "name" not in data else "templates"
        raise EditError(f"{path}: key {missing!r} is missing; add it.")
    return _fields(path, data)


def _fields(path: Path, data: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key in ("name", "kind", "description"):
        if key in data:
            fields[key] = _text(path, key, data[key])
    if data.get("forms") is not None:
        forms = data["forms"]
        if not isinstance(forms, dict):
            raise EditError(f"{path}: key 'forms' must map each value to a list of texts.")
        fields["forms"] = {
            _text(path, "forms", value): _texts(path, f"forms[{value!r}]", words)
            for value, words in forms.items()
        }
    if data.get("values") is not None:
        fields["values"] = _texts(path, "values", data["values"])
    elif "forms" in fields:
        fields["values"] = list(fields["forms"])
    else:
        raise EditError(f"{path}: key 'values' is missing; add a list of texts.")
    if data.get("coordinates") is not None:
        fields["coordinates"] = _coordinates(path, data["coordinates"])
    templates = data["templates"]
    if not isinstance(templates, list):
        raise EditError(f"{path}: key 'templates' must be a list; found {type(templates).__name__}.")
    fields["templates"] = [_template(path, f"templates[{i}]", item) for i, item in enumerate(templates)]
    return fields


def _template(path: Path, key: str, item: Any) -> tuple[str, list[str | None] | dict[str, str | None] | None]:
    if isinstance(item, str):
        return item, None
    if not isinstance(item, dict) or "text" not in item or set(item) - {"text", "answers"}:
        raise EditError(f"{path}: key {key!r} must be a text, or a mapping with the keys text and answers.")
    text = _text(path, f"{key}.text", item["text"])
    answers = item.get("answers")
    where = f"{key}.answers"
    if answers is None:
        return text, None
    if isinstance(answers, dict):
        return text, {
            _text(path, where, value): _optional(path, where, word) for value, word in answers.items()
        }
    if isinstance(answers, list):
        return text, [_optional(path, where, word) for word in answers]
    raise EditError(
        f"{path}: key {where!r} must be a list in the order of the values, or map value to answer."
    )


def _text(path: Path, key: str, item: Any) -> str:
    if not isinstance(item, str):
        raise EditError(
            f"{path}: key {key!r} holds {item!r}, which YAML reads as {type(item).__name__}; write it in "
            "quotes."
        )
    return item


def _optional(path: Path, key: str, item: Any) -> str | None:
    return None if item is None else _text(path, key, item)


def _texts(path: Path, key: str, items: Any) -> list[str]:
    if not isinstance(items, list):
        raise EditError(f"{path}: key {key!r} must be a list of texts; found {type(items).__name__}.")
    return [_text(path, f"{key}[{i}]", item) for i, item in enumerate(items)]


def _coordinates(path: Path, items: Any) -> list[list[float]]:
    message = f"{path}: key 'coordinates' must be a list with a list of numbers for each value."
    if not isinstance(items, list):
        raise EditError(message)
    points = []
    for point in items:
        if not isinstance(point, list) or any(
            isinstance(x, bool) or not isinstance(x, int | float) for x in point
        ):
            raise EditError(message)
        points.append([float(x) for x in point])
    return points


def write_concept(
    path: Path, *, templates: Sequence[tuple[str, Sequence[str | None] | None]], **fields: Any
) -> None:
    """Write the fields of a concept as YAML (atomic: a temporary file, then a rename)."""
    data = {key: fields[key] for key in KEYS if fields.get(key)}
    data["templates"] = [
        text if answers is None else {"text": text, "answers": list(answers)} for text, answers in templates
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.write_text(
        yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=110), encoding="utf-8"
    )
    temporary.replace(path)
