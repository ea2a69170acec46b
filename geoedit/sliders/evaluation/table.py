"""From curves to the table: one row a slider and seed, and one over all seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from geoedit.sliders.evaluation import curves as of
from geoedit.sliders.evaluation.claims import Claim
from geoedit.sliders.evaluation.measures import KIND, RESIDUAL

if TYPE_CHECKING:
    import pandas as pd

DISTANCE = "distance"
RESERVED = ("slider", "method", "seed", "prompt", "scale", RESIDUAL, KIND, DISTANCE)
"""Columns of the curves that are no attributes."""
ALL = "all"
"""What stands for the seed in the row over all seeds."""

COLUMNS: Mapping[str, str] = {
    "slider": "the slider's label",
    "method": "“slider”, or “prompting”: the same change asked for in words, at scales −1 and 1",
    "attribute": "what it is judged by; a minus before it if scale should lower it",
    "claim": "how that is known: given, spec, name, or the largest effect",
    "seed": "the noise's seed, or “all”",
    "images": "pairs of prompt and seed, each followed along all scales",
    "found": "share of the images in which the attribute could be measured",
    "low": "the lowest scale that the row looks at",
    "high": "the highest",
    "spearman": "mean rank correlation of the attribute with the scale, image by image",
    "violations": "share of the steps between neighbouring scales that do not rise",
    "foldback": "share of the attribute's way that goes back",
    "range_sd": "mean rise from the lowest scale to the highest, in natural standard deviations",
    "range_error": "standard error of that mean over images",
    "low_sd": "mean change at the lowest scale",
    "high_sd": "mean change at the highest scale",
    "both_ends_right": "whether the mean falls below scale 0 at the lowest and rises above it at the highest",
    "ends_right_share": "share of the images of which that is true",
    "saturation_low": "the scale below 0 where the mean stops rising (a fifth of its slope at 0), else NaN",
    "saturation_high": "the scale above 0 where it does",
    "interference": "mean |change| of another attribute image by image over the range, mean of all others",
    "interference_worst": "the same, of the attribute that suffers most",
    "interference_signed": "|mean change| of another attribute over the range, mean of all others",
    "interference_signed_worst": "the same, of the attribute that suffers most",
    "residual": "distance off the manifold at the two ends, mean",
    "residual_at_0": "the same at scale 0",
    "class_kept": "share of the images whose class is the same at both ends as at scale 0",
    "distance": "perceptual distance from scale 0 once the attribute has moved by one natural sd",
    "safe_low": "predicted end of the safe range below 0",
    "safe_high": "predicted end above 0",
    "observed_low": "observed end of the safe range below 0",
    "observed_high": "observed end above 0",
    "spearman_safe": "mean rank correlation on the predicted safe range",
}
"""The table's columns and what they mean."""


@dataclass(frozen=True)
class Block:
    """The curves of one slider as arrays: images × scales, attributes in natural standard deviations.

    Attributes:
        scales: rising.
        seeds: of each image.
        prompts: of each image.
        values: by attribute.
        extra: residual, kind and distance, where they are known.
    """

    scales: Float[np.ndarray, " scales"]
    seeds: tuple[int, ...]
    prompts: tuple[str, ...]
    values: Mapping[str, Float[np.ndarray, "images scales"]]
    extra: Mapping[str, Float[np.ndarray, "images scales"]]

    def of_seed(self, seed: int) -> Block:
        """The images of one seed."""
        return self._images(np.array([own == seed for own in self.seeds]))

    def within(self, low: float, high: float) -> Block:
        """The scales between two, if at least three are, with 0 among them; else all."""
        inside = (self.scales >= low - 1e-9) & (self.scales <= high + 1e-9)
        if inside.sum() < 3:
            return self
        return Block(
            self.scales[inside],
            self.seeds,
            self.prompts,
            {name: value[:, inside] for name, value in self.values.items()},
            {name: value[:, inside] for name, value in self.extra.items()},
        )

    def _images(self, chosen: np.ndarray) -> Block:
        return Block(
            self.scales,
            tuple(seed for seed, keep in zip(self.seeds, chosen, strict=True) if keep),
            tuple(prompt for prompt, keep in zip(self.prompts, chosen, strict=True) if keep),
            {name: value[chosen] for name, value in self.values.items()},
            {name: value[chosen] for name, value in self.extra.items()},
        )


def blocks(frame: pd.DataFrame, natural_sd: Mapping[str, float]) -> Iterator[tuple[str, str, Block]]:
    """Label, method and arrays of everything in a table of curves, in its order."""
    for (label, method), part in frame.groupby(["slider", "method"], sort=False):
        scales = np.sort(part["scale"].unique())
        images = part[["seed", "prompt"]].drop_duplicates()
        rows = {pair: number for number, pair in enumerate(images.itertuples(index=False, name=None))}
        places = (
            np.array([rows[pair] for pair in zip(part["seed"], part["prompt"], strict=True)]),
            np.searchsorted(scales, part["scale"].to_numpy()),
        )

        values = {name: _array(part[name], places) / sd for name, sd in natural_sd.items()}
        extra = {name: _array(part[name], places) for name in (RESIDUAL, KIND, DISTANCE) if name in part}
        yield (
            str(label),
            str(method),
            Block(scales, tuple(images["seed"]), tuple(images["prompt"]), values, extra),
        )


def _array(column: pd.Series, places: tuple[np.ndarray, np.ndarray]) -> Float[np.ndarray, "images scales"]:
    found = np.full([int(index.max()) + 1 for index in places], np.nan)
    found[places] = column.to_numpy(dtype=float)
    return found


def largest_effect(block: Block) -> Claim:
    """The attribute that moves most between the ends of a block, in its own direction."""
    moved = {name: of.mean_curve(value) for name, value in block.values.items()}
    effects = {name: float(curve[-1] - curve[0]) for name, curve in moved.items()}
    known = {name: effect for name, effect in effects.items() if math.isfinite(effect)}
    if not known:
        return Claim(next(iter(block.values)), 1, "largest effect")
    name = max(known, key=lambda key: abs(known[key]))
    return Claim(name, 1 if known[name] >= 0 else -1, "largest effect")


def rows_of(
    label: str, method: str, block: Block, own: Claim, within: tuple[float, float]
) -> list[dict[str, Any]]:
    """The rows of one slider: each seed, then all.

    Args:
        label: the slider's label.
        method: "slider" or "prompting".
        block: all its curves.
        own: what it is judged by.
        within: the scales that all but the saturation looks at.
    """
    seeds: list[int | str] = [*dict.fromkeys(block.seeds), ALL]
    head = {
        "slider": label,
        "method": method,
        "attribute": own.attribute if own.sign > 0 else f"-{own.attribute}",
        "claim": own.source,
    }
    parts = [block if seed == ALL else block.of_seed(int(seed)) for seed in seeds]
    return [
        {**head, "seed": seed, **row_of(part.within(*within), own), **_saturation(part, own)}
        for seed, part in zip(seeds, parts, strict=True)
    ]


def _saturation(block: Block, own: Claim) -> dict[str, float]:
    curve = of.mean_curve(own.sign * block.values[own.attribute])
    low, high = of.saturation(block.scales, curve)
    return {"saturation_low": low, "saturation_high": high}


def row_of(block: Block, own: Claim) -> dict[str, Any]:
    """What the images of a block tell together."""
    scales, moved = block.scales, own.sign * block.values[own.attribute]
    zero = int(np.flatnonzero(scales == 0)[0])
    change = of.mean_curve(moved - moved[:, [zero]])
    mean = of.mean_curve(moved)
    reach = moved[:, -1] - moved[:, 0]
    others = interference(block, own)
    signed, absolute = ([value for name, value in part.items() if name != own.attribute] for part in others)
    return {
        "images": len(moved),
        "found": float(np.mean(~np.isnan(moved))),
        "low": float(scales[0]),
        "high": float(scales[-1]),
        "spearman": _mean(of.spearman(scales, moved)),
        "violations": _mean(of.violations(moved)),
        "foldback": _mean(of.foldback(moved)),
        "range_sd": float(change[-1] - change[0]),
        "range_error": of.standard_error(reach),
        "low_sd": float(change[0]),
        "high_sd": float(change[-1]),
        "both_ends_right": bool(of.ends_right(scales, mean[None])[0]),
        "ends_right_share": _mean(of.ends_right(scales, moved).astype(float)),
        "interference": _mean(np.array(absolute)),
        "interference_worst": max(absolute, default=math.nan),
        "interference_signed": _mean(np.abs(signed)),
        "interference_signed_worst": max(map(abs, signed), default=math.nan),
        **_identity(block, moved, zero),
    }


def interference(block: Block, own: Claim) -> tuple[dict[str, float], dict[str, float]]:
    """Change of every attribute from the lowest scale to the highest over the range: signed, and absolute.

    Signed is the mean over images, which keeps a drift in one direction; absolute is the mean of sizes, which
    keeps what changes here and there without direction (identity). Both in natural standard deviations of the
    attribute over natural standard deviations of the slider's own range.
    """
    moved = own.sign * block.values[own.attribute]
    size = abs(_mean(moved[:, -1] - moved[:, 0]))
    signed, absolute = {}, {}
    for name, values in block.values.items():
        change = values[:, -1] - values[:, 0]
        signed[name] = _mean(change) / size if size > 0 else math.nan
        absolute[name] = _mean(np.abs(change)) / size if size > 0 else math.nan
    return signed, absolute


def _identity(block: Block, moved: np.ndarray, zero: int) -> dict[str, float]:
    ends = sorted({0, len(block.scales) - 1} - {zero})
    found = {}
    if RESIDUAL in block.extra:
        residual = block.extra[RESIDUAL]
        found["residual"] = _mean(residual[:, ends])
        found["residual_at_0"] = _mean(residual[:, zero])
    if KIND in block.extra:
        kinds = block.extra[KIND]
        found["class_kept"] = float(np.mean(kinds[:, ends] == kinds[:, [zero]]))
    if DISTANCE in block.extra:
        found[DISTANCE] = _mean(
            np.array([_at_one(effect, far, zero) for effect, far in zip(
                moved - moved[:, [zero]], block.extra[DISTANCE], strict=True)])
        )  # fmt: skip
    return found


def _at_one(effect: np.ndarray, far: np.ndarray, zero: int) -> float:
    """The distance where an image has moved by one unit, mean of the sides on which it does."""
    sides = [
        of.at_effect(effect[zero:], far[zero:], 1.0),
        of.at_effect(-effect[zero::-1], far[zero::-1], 1.0),
    ]
    return _mean(np.array(sides))


def _mean(values: np.ndarray | Sequence[float]) -> float:
    """The mean of what is known; NaN if nothing is."""
    array = np.asarray(values, dtype=float)
    known = array[~np.isnan(array)]
    return float(known.mean()) if known.size else math.nan
