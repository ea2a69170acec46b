"""What the study's sliders are asked to be, and the prompts that they are scored on."""

from __future__ import annotations

from geoedit.sliders import SliderSpec
from geoedit.testbeds.shapes.card import phrase

ENDS = {
    "size": ("very small", "very large"),
    "thickness": ("very thin", "very thick"),
    "brightness": ("dark", "bright"),
    "rotation": ("falling", "rising"),
    "hue": ("warm", "cool"),
}
"""The words for the lower and the upper end of each attribute."""

CONTEXT = {
    "size": ("", "small", "large"),
    "thickness": ("", "thin", "thick"),
    "hue": ("", "red", "yellow", "green", "cyan", "blue"),
    "shape": ("ellipse", "bar", "diamond"),
    "rotation": ("", "falling", "level", "rising"),
}
"""Words that must stay as they are; the empty word leaves the attribute unsaid."""

ORDER = ("size", "thickness", "brightness", "hue", "shape", "rotation")

HELD_OUT = (
    ("bar", {"hue": "orange", "x": "on the left"}),
    ("ellipse", {"brightness": "bright", "hue": "green", "y": "at the top"}),
    ("diamond", {"brightness": "dark", "hue": "cyan", "rotation": "rising"}),
    ("shape", {"thickness": "thick", "hue": "blue", "x": "on the right"}),
)
"""What the prompts for scoring say. None is among the training prompts, but for brightness the third."""


def held_out(attribute: str) -> tuple[str, ...]:
    """The prompts that a slider is scored on: they leave its own attribute unsaid.

    >>> held_out("hue")[:2]
    ('a bar on the left', 'a bright ellipse at the top')
    """
    return tuple(
        phrase({name: word for name, word in said.items() if name != attribute}, noun)
        for noun, said in HELD_OUT
    )


def spec(attribute: str) -> SliderSpec:
    """The slider of an attribute: its two words, in all contexts that the other attributes' words make.

    >>> spec("size").positive
    'a very large {thickness} {hue} {shape} {rotation}'
    """
    low, high = ENDS[attribute]
    kept = {name: words for name, words in CONTEXT.items() if name != attribute}

    def said(word: str) -> str:
        parts = [word if name == attribute else f"{{{name}}}" for name in ORDER if name in (attribute, *kept)]
        return " ".join(["a", *(part for part in parts if part)])

    return SliderSpec(name=attribute, target=said(""), positive=said(high), negative=said(low), preserve=kept)


def plain_spec(attribute: str) -> SliderSpec:
    """The slider as the published trainer is asked for it: one set of prompts, no contexts.

    >>> plain_spec("size").positive
    'a very large shape'
    """
    low, high = ENDS[attribute]
    after = attribute == "rotation"
    return SliderSpec(
        name=attribute,
        target="a shape",
        positive=f"a shape {high}" if after else f"a {high} shape",
        negative=f"a shape {low}" if after else f"a {low} shape",
    )
