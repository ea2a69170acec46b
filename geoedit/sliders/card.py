"""The model card of a slider: a README.md beside its file, as the Hub and a reader expect it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import yaml
from jaxtyping import Float
from torch import Tensor

from geoedit.edits.io import write_whole
from geoedit.errors import EditError
from geoedit.sliders.slider import Slider
from geoedit.sliders.training.progress import png, tile

STRIP = "strip.png"
_WORDS = ("target", "positive", "negative", "neutral", "preserve")


def write_card(
    slider: Slider,
    path: str | PathLike[str],
    *,
    strip: Float[Tensor, "rows columns 3 height width"] | None = None,
    scales: Sequence[float | int] = (),
    base_model: str | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``README.md`` (and ``strip.png``) beside a slider's file.

    Args:
        slider: what the card is of; its ``details`` tell specification, settings and measurements.
        path: the slider's file, which the card names.
        strip: sample images, a row for each prompt, a column for each scale.
        scales: the scales of the columns, for the caption.
        base_model: what it was trained on: a hub id or a name; ``details["model"]`` where it is None.
        measured: figures to show instead of ``details["measured"]``: names and numbers, or a mapping of such.

    Returns:
        The card's path.

    Raises:
        EditError: the folder cannot be written to, or there are no columns for the scales.
    """
    file = Path(path)
    if strip is not None and scales and strip.shape[1] != len(scales):
        raise EditError(f"a strip of {strip.shape[1]} columns for the scales {list(scales)}: one for each")
    text = card(
        slider,
        file.name,
        strip=STRIP if strip is not None else None,
        scales=scales,
        base_model=base_model,
        measured=measured,
    )
    target = file.parent / "README.md"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if strip is not None:
            write_whole(file.parent / STRIP, png(tile(strip)))
        write_whole(target, text.encode())
    except OSError as error:
        raise EditError(
            f"can't write {target}: {error.strerror or error}; give a folder that can be written to"
        ) from error
    return target


def card(
    slider: Slider,
    file: str,
    *,
    strip: str | None = None,
    scales: Sequence[float | int] = (),
    base_model: str | None = None,
    measured: Mapping[str, Any] | None = None,
) -> str:
    """The card's text: a header in YAML, how to use the file, what it was taught, what was measured.

    >>> import torch
    >>> from manifolds import LowRank
    >>> from geoedit.sliders import ModuleChange
    >>> change = ModuleChange(LowRank.from_factors(torch.ones(4, 1), torch.ones(1, 3)))
    >>> print(card(Slider("age", {"unet": {"mid.to_q": change}}), "age.safetensors").split("---")[1].strip())
    library_name: diffusers
    pipeline_tag: text-to-image
    tags:
    - concept-slider
    - lora
    - geoedit
    """
    details = slider.details
    spec = details.get("spec") if isinstance(details.get("spec"), Mapping) else {}
    model = base_model or details.get("model")
    measured = measured if measured is not None else details.get("measured")
    sections = [
        f"---\n{yaml.safe_dump(_header(slider, model), sort_keys=False, allow_unicode=True)}---",
        f"# {_line(slider.name)}",
        _summary(slider, spec or {}, model),
    ]
    if strip is not None:
        columns = (
            f" Scales from left to right: {', '.join(f'{scale:g}' for scale in scales)}." if scales else ""
        )
        sections.append(f"![What it does]({strip})\n\nOne prompt and seed a row.{columns}")
    sections.append(f"## Use\n\n```python\n{_use(slider, file, model)}\n```")
    if spec:
        first = {name: spec[name] for name in _WORDS if spec.get(name)}
        rest = {
            name: value
            for name, value in spec.items()
            if name not in _WORDS and value not in (None, "", [], {})
        }
        sections.append(f"## What it was taught\n\n{_pairs({**first, **rest})}")
    if measured:
        sections.append(f"## Measured\n\n{_figures(measured)}")
    sections.append(f"## What it changes\n\n{_sizes(slider)}")
    for title, key in (("Base", "base"), ("Settings", "settings"), ("Training", "training")):
        if isinstance(details.get(key), Mapping) and details[key]:
            sections.append(f"## {title}\n\n{_pairs(details[key])}")
    return "\n\n".join(sections) + "\n"


def model_name(pipe: Any) -> str | None:
    """What a pipeline or a model was loaded from: a hub id, or the last part of a folder's path."""
    config = getattr(pipe, "config", None)
    kept = config if isinstance(config, Mapping) else vars(config) if hasattr(config, "__dict__") else {}
    found = kept.get("_name_or_path")
    if not isinstance(found, str) or not found.strip():
        return None
    return Path(found).name if Path(found).is_dir() else found


def _header(slider: Slider, model: str | None) -> dict[str, Any]:
    language = _is_language(slider)
    header: dict[str, Any] = {}
    if model:
        header |= {"base_model": str(model), "base_model_relation": "adapter"}
    header |= {
        "library_name": "geoedit" if language else "diffusers",
        "pipeline_tag": "text-generation" if language else "text-to-image",
        "tags": ["concept-slider", "lora", "geoedit"],
    }
    return header


def _is_language(slider: Slider) -> bool:
    return set(slider.changes) == {"model"}


def _summary(slider: Slider, spec: Mapping[str, Any], model: str | None) -> str:
    ends = [f"**{_line(spec[name])}**" for name in ("negative", "positive") if spec.get(name)]
    between = f" between {ends[0]} and {ends[1]}" if len(ends) == 2 else f" towards {ends[0]}" if ends else ""
    who = _line(model) if model else "its base"
    calibration = slider.calibration
    if calibration is None:
        unit = (
            "Scales are factors on the trained change: 1 is as it was trained, −1 its opposite, 0 the base."
        )
    else:
        unit = f"Scale 1 is one {_line(calibration.unit)} of {_line(calibration.attribute)}; 0 is the base."
        unit += f" Measured from {_cell(calibration.low)} to {_cell(calibration.high)}."
    what = "says" if _is_language(slider) else "draws"
    return f"A concept slider: a LoRA that moves what {who} {what}{between}. {unit}"


def _use(slider: Slider, file: str, model: str | None) -> str:
    name = repr(str(model or "path/to/the/base"))
    if _is_language(slider):
        return (
            "import geoedit\n"
            f"from transformers import AutoModelForCausalLM\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({name})\n"
            f"slider = geoedit.sliders.load({file!r})\n"
            "with slider.at(model, 1.0):\n    model.generate(**inputs)"
        )
    load = (
        f"pipe = geoedit.testbeds.load({name})"
        if str(model) in ("shapes-unet", "shapes-flow")
        else f"pipe = DiffusionPipeline.from_pretrained({name})"
    )
    return (
        "import geoedit\n"
        + ("" if "testbeds" in load else "from diffusers import DiffusionPipeline\n")
        + f"\n{load}\nslider = geoedit.sliders.load({file!r})\n"
        "with slider.at(pipe, 1.0):  # any number; several sliders may be on at once\n"
        "    pipe(prompt).images[0]\n\n"
        "# Or with diffusers alone, where the scale is a factor on the change:\n"
        f'pipe.load_lora_weights(".", weight_name={file!r}, adapter_name="slider")\n'
        'pipe.set_adapters("slider", 1.0)'
    )


def _sizes(slider: Slider) -> str:
    rows = []
    for component, modules in slider.changes.items():
        ranks = sorted({change.matrix.rank for change in modules.values()})
        numbers = sum(sum(change.matrix.shape[-2:]) * change.matrix.rank for change in modules.values())
        rank = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "none"
        rows.append([component, len(modules), rank, f"{numbers:,}"])
    return _table(["component", "modules", "rank", "numbers"], rows)


def _figures(measured: Mapping[str, Any]) -> str:
    """A table a row for each entry if they are mappings themselves, else pairs."""
    entries = {name: value for name, value in measured.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in measured.items() if name not in entries}
    columns = list(dict.fromkeys(key for value in entries.values() for key in value))
    parts = []
    if entries:
        rows = [[name, *(value.get(column, "") for column in columns)] for name, value in entries.items()]
        parts.append(_table(["", *columns], rows))
    if plain:
        parts.append(_pairs(plain))
    return "\n\n".join(parts)


def _pairs(values: Mapping[str, Any]) -> str:
    return _table(["", ""], [[name, value] for name, value in values.items()])


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "–"}[value]
    elif isinstance(value, float):
        text = f"{value:.4g}" if math.isfinite(value) else "not known" if math.isnan(value) else str(value)
    elif isinstance(value, (list, tuple)) and not any(
        isinstance(item, (Mapping, list, tuple)) for item in value
    ):
        text = ", ".join(_cell(item) for item in value)
    elif isinstance(value, (Mapping, list, tuple)):
        text = f"`{json.dumps(value, ensure_ascii=False, default=str)}`"
    else:
        text = str(value)
    return _line(text)


def _line(text: object) -> str:
    """Text on one line that ends no cell of a table."""
    return re.sub(r"\s+", " ", str(text)).strip().replace("|", "\\|")
