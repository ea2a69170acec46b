"""The page of the study: the aims, whether they are met, and every row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from experiments.concept_sliders.specs import held_out

COLUMNS = {
    "spearman": "ρ",
    "spearman_safe": "ρ, safe range",
    "ends_right_share": "ends right",
    "range_sd": "range (sd)",
    "interference": "interference",
    "interference_worst": "worst",
    "interference_signed": "signed",
    "interference_signed_worst": "signed, worst",
    "distance": "distance at 1 sd",
    "residual": "residual",
    "residual_at_0": "residual at 0",
    "training_seconds": "CPU s",
}


def verdicts(frame: pd.DataFrame) -> list[tuple[str, str, str, bool]]:
    """Aim, measured over our sliders, how many meet it, and whether all do."""
    ours = frame[frame["trainer"] == "ours"]
    worded = frame[frame["trainer"] == "prompting"].set_index(["family", "slider"])["range_sd"]
    reach = pd.Series(
        [row["range_sd"] / worded.get((row["family"], row["slider"]), math.nan) for _, row in ours.iterrows()]
    )
    ratios = [
        row[f"safe_{end}"] / row[f"observed_{end}"]
        for _, row in ours.iterrows()
        for end in ("low", "high")
        if _known(row.get(f"safe_{end}")) and _known(row.get(f"observed_{end}")) and row[f"observed_{end}"]
    ]
    tests: list[tuple[str, Sequence[float], Callable[[float], bool]]] = [
        ("Spearman ≥ 0.98 on [−1, 1]", list(ours["spearman"]), lambda value: value >= 0.98),
        ("Spearman ≥ 0.95 on the predicted safe range", _column(ours, "spearman_safe"), lambda v: v >= 0.95),
        (
            "both ends move the right way (mean)",
            list(ours["both_ends_right"].astype(float)),
            lambda v: v == 1,
        ),
        ("range at least that of prompting", list(reach), lambda value: value >= 1),
        ("absolute interference ≤ 0.25 of the range", list(ours["interference"]), lambda v: v <= 0.25),
        ("signed interference ≤ 0.25", list(ours["interference_signed"]), lambda value: value <= 0.25),
        ("predicted end of the safe range within 20 % of the observed", ratios, lambda v: 0.8 <= v <= 1.2),
    ]
    found = []
    for aim, values, met in tests:
        known = [value for value in values if _known(value)]
        good = sum(map(met, known))
        middle = f"{pd.Series(known).median():.2f}" if known else "unknown"
        spread = f" ({min(known):.2f} to {max(known):.2f})" if known else ""
        found.append((aim, middle + spread, f"{good} of {len(values)}", good == len(values) > 0))
    return found


def write(rows: Sequence[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The page as markdown."""
    frame = pd.DataFrame.from_records(list(rows))
    lines = [
        "# Do the sliders do what they should?",
        "",
        "Text sliders of the drawn shapes, trained on contexts of words and scored on held-out prompts:",
        f"{', '.join(f'“{prompt}”' for prompt in held_out('size')[: settings['prompts']])} (without",
        "the words of the slider's own attribute; for brightness the third is then a training prompt);",
        f"{settings['noises']} noises each,",
        f"{settings['sampling_steps']} sampling steps, guidance {settings['guidance']}.",
        "Every attribute is read off the image by render and compare; sd means one natural standard",
        "deviation of the attribute. Made by `python -m experiments.concept_sliders`.",
        f"Seeds of training: {settings['seeds']} for the U-Net, {settings['flow_seeds']} for flow matching.",
        "",
        "## The aims",
        "",
        "| aim | median (range) over sliders | met by | |",
        "|---|---|---|---|",
        *(f"| {aim} | {value} | {count} | {'met' if good else '**missed**'} |"
          for aim, value, count, good in verdicts(frame)),
        "",
        "Interference is the mean absolute change of another attribute between scales −1 and 1, image by",
        "image, over the slider's range, mean of the six others; “worst” is the most disturbed one. Signed",
        "interference takes the mean before the absolute value: what is left is a drift in one direction.",
        "Asking in words is a row of each table, and the published trainer (its loss, its step, one set of",
        "prompts) another.",
        "",
    ]  # fmt: skip
    for family in dict.fromkeys(frame["family"]):
        lines += [f"## shapes-{family}", ""]
        lines += ["| slider | by | seed | " + " | ".join(COLUMNS.values()) + " |"]
        lines += ["|" + "---|" * (3 + len(COLUMNS))]
        for _, row in frame[frame["family"] == family].iterrows():
            cells = [_number(row.get(name)) for name in COLUMNS]
            if row["trainer"] == "prompting":
                cells[-1] = "–"
            lines.append(
                f"| {row['slider']} | {row['trainer']} | {row['training_seed']} | " + " | ".join(cells) + " |"
            )
        lines.append("")
    safe = frame[(frame["trainer"] == "ours")]
    if "safe_low" in safe:
        lines += ["## Safe ranges, predicted without drawing and observed", ""]
        lines += ["| family | slider | seed | predicted | observed |", "|---|---|---|---|---|"]
        for _, row in safe.iterrows():
            ends = [
                _number(row.get(f"{kind}_{end}")) for kind in ("safe", "observed") for end in ("low", "high")
            ]
            lines.append(
                f"| {row['family']} | {row['slider']} | {row['training_seed']} | {ends[0]} … {ends[1]} | "
                f"{ends[2]} … {ends[3]} |"
            )
        lines.append("")
    return "\n".join(lines)


def _column(frame: pd.DataFrame, name: str) -> list[float]:
    return list(frame[name]) if name in frame else []


def _known(value: Any) -> bool:
    return value is not None and isinstance(value, (int, float)) and math.isfinite(value)


def _number(value: Any) -> str:
    return f"{value:.2f}" if _known(value) else "–"
