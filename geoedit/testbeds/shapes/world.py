"""A world of drawn shapes: what can vary, how much it varies by nature, and the words that say so."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

CLASSES = ("ellipse", "bar", "diamond")
"""The shapes, in the order of their class numbers; all are their own image under a half turn."""


@dataclass(frozen=True)
class Attribute:
    """One thing that varies, drawn uniformly between two ends.

    Attributes:
        name: Its name.
        low: The least natural value.
        high: The largest natural value.
        unit: What a value counts.
        words: Words and the natural values that they stand for, as shares of the range from 0 to 1.
    """

    name: str
    low: float
    high: float
    unit: str
    words: Mapping[str, tuple[float, float]]

    @property
    def natural_sd(self) -> float:
        """The standard deviation over the world: (high − low) / √12."""
        return (self.high - self.low) / math.sqrt(12)

    def said_of(self, share: float) -> list[str]:
        """The words that fit a value, given as its share of the range."""
        return [word for word, (low, high) in self.words.items() if low <= share <= high]


ATTRIBUTES: Mapping[str, Attribute] = {
    attribute.name: attribute
    for attribute in (
        Attribute(
            "size",
            0.35,
            0.7,
            "half of the length, in half image widths",
            {"very small": (0.0, 0.2), "small": (0.0, 0.4), "large": (0.6, 1.0), "very large": (0.8, 1.0)},
        ),
        Attribute(
            "thickness",
            0.1,
            0.25,
            "half of the width across, in half image widths",
            {"very thin": (0.0, 0.2), "thin": (0.0, 0.4), "thick": (0.6, 1.0), "very thick": (0.8, 1.0)},
        ),
        Attribute(
            "brightness",
            0.35,
            1.0,
            "the largest of red, green and blue, from 0 to 1",
            {"dark": (0.0, 0.4), "bright": (0.6, 1.0)},
        ),
        Attribute(
            "hue",
            0.0,
            240.0,
            "degrees on the colour circle, red at 0, green at 120, blue at 240",
            {
                "red": (0.0, 0.09),
                "orange": (0.09, 0.19),
                "yellow": (0.19, 0.32),
                "green": (0.35, 0.62),
                "cyan": (0.65, 0.85),
                "blue": (0.87, 1.0),
                "warm": (0.0, 0.25),
                "cool": (0.7, 1.0),
            },
        ),
        Attribute(
            "rotation",
            -60.0,
            60.0,
            "degrees from level, rising to the right",
            {"falling": (0.0, 0.38), "level": (0.38, 0.62), "rising": (0.62, 1.0)},
        ),
        Attribute(
            "x",
            -0.25,
            0.25,
            "the middle's place from left to right, in half image widths",
            {"on the left": (0.0, 0.35), "on the right": (0.65, 1.0)},
        ),
        Attribute(
            "y",
            -0.25,
            0.25,
            "the middle's place from bottom to top, in half image widths",
            {"at the bottom": (0.0, 0.35), "at the top": (0.65, 1.0)},
        ),
    )
}
"""All continuous attributes, in the order of a parameter row."""

BEFORE = ("size", "thickness", "brightness", "hue")
"""The attributes that are said before the noun; the others are said after it."""


def sample(
    count: int, *, generator: torch.Generator, device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "count 7"], Int[Tensor, " count"]]:
    """Draw shapes of the world: each attribute uniform and independent, each class equally often.

    Returns:
        Parameters (count, 7) in the order of ``ATTRIBUTES``, and class numbers (count,).
    """
    shares = torch.rand(count, len(ATTRIBUTES), generator=generator)
    kinds = torch.randint(len(CLASSES), (count,), generator=generator)
    return values(shares).to(device), kinds.to(device)


def values(shares: Float[Tensor, "*batch 7"]) -> Float[Tensor, "*batch 7"]:
    """Values from shares of the natural ranges."""
    low, high = ranges(shares)
    return low + shares * (high - low)


def shares(parameters: Float[Tensor, "*batch 7"]) -> Float[Tensor, "*batch 7"]:
    """Shares of the natural ranges (0 the least, 1 the most) from values."""
    low, high = ranges(parameters)
    return (parameters - low) / (high - low)


def ranges(like: Tensor) -> tuple[Float[Tensor, " 7"], Float[Tensor, " 7"]]:
    """The least and the largest natural values, on the device and in the type of a tensor."""
    low = like.new_tensor([attribute.low for attribute in ATTRIBUTES.values()])
    return low, like.new_tensor([attribute.high for attribute in ATTRIBUTES.values()])


def caption(of_shares: Sequence[float], kind: int, *, said: float = 0.5, generator: torch.Generator) -> str:
    """Say what a shape is, each attribute with a probability, by a word drawn from those that fit.

    >>> caption([0.1, 0.9, 0.5, 0.5, 0.5, 0.1, 0.5], 1, said=1.0, generator=torch.Generator().manual_seed(1))
    'a very small thick green bar level on the left'
    """
    draws = iter(torch.rand(2 * len(ATTRIBUTES) + 1, generator=generator).tolist())
    noun = CLASSES[kind] if next(draws) < 0.9 else "shape"
    before: list[str] = []
    after: list[str] = []
    for attribute, share in zip(ATTRIBUTES.values(), of_shares, strict=True):
        speak, choose = next(draws), next(draws)
        fitting = attribute.said_of(share)
        if fitting and speak < said:
            word = fitting[int(choose * len(fitting))]
            (before if attribute.name in BEFORE else after).append(word)
    text = " ".join([*before, noun, *after])
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = {"a", "an", "shape", *CLASSES, *DIGIT_WORDS, "the", "digit"}
    for attribute in ATTRIBUTES.values():
        words.update(word for phrase in attribute.words for word in phrase.split())
    return sorted(words)


DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
