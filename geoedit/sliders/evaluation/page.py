"""One self-contained HTML page: strips, curves, matrix; plain SVG and script, no request to anywhere."""

from __future__ import annotations

import html
import math
import re
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from geoedit.sliders.evaluation.table import ALL, COLUMNS
from peft_analysis.report.page import embed

if TYPE_CHECKING:
    import pandas as pd

    from geoedit.sliders.evaluation.result import Evaluation

DIGITS = 6


def page(evaluation: Evaluation) -> str:
    """The page of an evaluation as HTML text.

    Every name from outside reaches the page as JSON data and is set as text, never as markup.
    """
    data = payload(evaluation)
    parts = {
        "TITLE": html.escape(data["title"]),
        "STYLE": _shared("page.css") + _asset("page.css"),
        "DATA": embed(data),
        "SCRIPT": '"use strict";\n(() => {\n'
        + "\n".join([_asset("common.js"), _shared("charts.js"), _asset("page.js")])
        + "})();\n",
    }
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def payload(evaluation: Evaluation) -> dict[str, Any]:
    """Everything that the page's script reads, as JSON values; numbers with six digits."""
    table = evaluation.table
    labels = list(evaluation.claims)
    settings = evaluation.settings
    whole = table[table["seed"] == ALL]
    ours, words = whole[whole["method"] == "slider"], whole[whole["method"] == "prompting"]
    found: dict[str, Any] = _short(
        {
            "title": "What "
            + (f"“{labels[0]}” moves" if len(labels) == 1 else f"{len(labels)} sliders move"),
            "asked": f"{len(evaluation.records):,} images of {settings.get('pipeline', 'a pipeline')}: "
            f"{len(settings.get('prompts', []))} prompts and {len(settings.get('seeds', []))} seeds.",
            "headline": _headline(ours),
            "lines": _lines(ours, words),
            "tiles": _tiles(ours, words),
            "attributes": list(evaluation.natural_sd),
            "seeds": settings.get("seeds", []),
            "sliders": [_slider(evaluation, label) for label in labels],
            "pictures": list(evaluation.pictures),
            "rows": table.to_dict("records"),
            "interference": {
                "absolute": _matrix(evaluation, evaluation.interference),
                "signed": _matrix(evaluation, evaluation.interference_signed),
            },
            "compositions": list(evaluation.compositions),
            "columns": {name: meaning for name, meaning in COLUMNS.items() if name in table},
            "notes": list(evaluation.notes),
            "settings": dict(settings),
        }
    )
    return found


def _slider(evaluation: Evaluation, label: str) -> dict[str, Any]:
    """The curves of one slider, image by image, as changes from scale 0."""
    own, block = evaluation.claims[label], evaluation.block(label)
    zero = int(np.flatnonzero(block.scales == 0)[0])
    change = {name: (value - value[:, [zero]]).tolist() for name, value in block.values.items()}
    return {
        "label": label,
        "attribute": own.attribute,
        "sign": own.sign,
        "scales": block.scales.tolist(),
        "images": [
            {"seed": seed, "prompt": prompt, "change": {name: rows[row] for name, rows in change.items()}}
            for row, (seed, prompt) in enumerate(zip(block.seeds, block.prompts, strict=True))
        ],
        **evaluation.ranges.get(label, {}),
    }


def _matrix(evaluation: Evaluation, frame: pd.DataFrame) -> list[dict[str, Any]]:
    found = []
    for name, values in frame.iterrows():
        label = next(one for one in evaluation.claims if name in (one, f"{one} (prompting)"))
        own = evaluation.claims[label].attribute
        found.append({"name": name, "label": label, "own": own, "values": values.to_dict()})
    return found


def _headline(ours: pd.DataFrame) -> str:
    right = int(ours["both_ends_right"].sum())
    if right == len(ours):
        return "Both ends move the right way" + ("." if len(ours) == 1 else f" in all {len(ours)} sliders.")
    return f"Both ends move the right way in {right} of {len(ours)} sliders."


def _lines(ours: pd.DataFrame, words: pd.DataFrame) -> list[str]:
    lines = []
    lost = ours[ours["found"] < 1]
    if len(lost):
        worst = lost.loc[lost["found"].idxmin()]
        lines.append(
            f"In {1 - worst['found']:.1%} of the images of {worst['slider']} its attribute could not be "
            "measured."
        )
    if len(words):
        both = ours.merge(words, on="slider", suffixes=("", "_words"))
        wider = int((both["range_sd"] >= both["range_sd_words"]).sum())
        lines.append(f"The range is at least that of asking in words in {wider} of {len(both)} sliders.")
    folded = ours[ours["violations"] > 0.1]
    if len(folded):
        lines.append(f"More than a tenth of the steps do not rise: {', '.join(folded['slider'])}.")
    return lines


def _tiles(ours: pd.DataFrame, words: pd.DataFrame) -> list[dict[str, str]]:
    def tile(name: str, text: str, frame: pd.DataFrame = ours) -> dict[str, str]:
        value = float(frame[name].mean())
        return {"value": f"{value:.2f}".replace("-", "−") if math.isfinite(value) else "–", "text": text}

    found = [
        tile("spearman", "mean rank correlation"),
        tile("range_sd", "mean range, natural sd"),
        tile("interference", "mean |interference| over range"),
        tile("interference_signed", "of it with one sign"),
    ]
    if len(words):
        found.append(tile("range_sd", "mean range of asking in words", words))
        found.append(tile("interference", "|interference| of asking in words", words))
    return found


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, np.generic):
        return _short(value.item())
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _asset(name: str) -> str:
    return (files("geoedit.sliders.evaluation") / "assets" / name).read_text(encoding="utf-8")


def _shared(name: str) -> str:
    """Charts and style are those of the other reports."""
    return (files("peft_analysis.report") / "assets" / name).read_text(encoding="utf-8")
