"""What a slider says that it moves, and the words that ask for the same."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geoedit.errors import EditError
from geoedit.sliders.slider import Slider
from geoedit.testbeds.shapes.world import ATTRIBUTES, BEFORE, CLASSES


@dataclass(frozen=True)
class Claim:
    """The attribute that a slider is judged by.

    Attributes:
        attribute: its name in the measure.
        sign: 1 if a positive scale should raise it, −1 if it should lower it.
        source: how this is known: "given", "spec", "name" or "largest effect".
    """

    attribute: str
    sign: int = 1
    source: str = "given"


ENDS: Mapping[str, tuple[str, str]] = {
    "size": ("small", "large"),
    "thickness": ("thin", "thick"),
    "brightness": ("dark", "bright"),
    "hue": ("warm", "cool"),
    "rotation": ("falling", "rising"),
    "x": ("on the left", "on the right"),
    "y": ("at the bottom", "at the top"),
}
"""For each attribute of the drawn shapes the words for its low and its high end."""


def claim(
    label: str, slider: Slider, attributes: Sequence[str], given: str | None, *, shapes: bool
) -> Claim | None:
    """What a slider claims to move; None if nothing tells, so that its largest effect must.

    In this order: what the caller says; the "attribute" of its details or its spec; for the drawn shapes the
    words of its spec; its label or its name, if an attribute is called so.

    Args:
        label: what the evaluation calls it.
        slider: the slider.
        attributes: what the measure reads.
        given: an attribute's name from the caller, with a minus before it for one that should fall.
        shapes: whether the words are those of the drawn shapes.

    Raises:
        EditError: the caller's attribute is none that the measure reads.
    """
    if given is not None:
        name, sign = (given[1:], -1) if given[:1] in ("-", "−") else (given, 1)
        if name not in attributes:
            raise EditError(
                f"slider {label!r} is to be judged by {name!r}, and the measure reads {', '.join(attributes)}"
            )
        return Claim(name, sign)
    spec = spec_of(slider)
    for told in (slider.details.get("attribute"), spec.get("attribute")):
        if told in attributes:
            return Claim(str(told), 1, "spec")
    if shapes and (found := _from_words(spec)) is not None and found.attribute in attributes:
        return found
    for name in (label, slider.name):
        if name in attributes:
            return Claim(name, 1, "name")
    return None


def spec_of(slider: Slider) -> Mapping[str, Any]:
    """The spec that a slider was trained by, as its details keep it; empty if they keep none."""
    spec = slider.details.get("spec")
    return spec if isinstance(spec, Mapping) else {}


def _from_words(spec: Mapping[str, Any]) -> Claim | None:
    """The one attribute whose words differ between a spec's positive and its negative prompt."""
    shares = [_said(_text(spec.get(end))) for end in ("negative", "positive")]
    moved = [name for name in ATTRIBUTES if len({share.get(name, 0.5) for share in shares}) > 1]
    if len(moved) != 1:
        return None
    low, high = (share.get(moved[0], 0.5) for share in shares)
    sign = 1 if (high > low) == (spec.get("action") != "erase") else -1
    return Claim(moved[0], sign, "spec")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return " ".join(map(str, value)) if isinstance(value, Iterable) else ""


def _bare(text: str) -> str:
    """A prompt without the places where a spec's contexts go."""
    return " ".join(re.sub(r"\{\w*\}", " ", text).split())


def _said(text: str) -> dict[str, float]:
    """The middle share of each attribute's range that a prompt's words name."""
    padded = f" {' '.join(text.lower().split())} "
    found = {}
    for name, attribute in ATTRIBUTES.items():
        for word, (low, high) in sorted(attribute.words.items(), key=lambda item: len(item[0])):
            if f" {word} " in padded:
                found[name] = (low + high) / 2
    return found


def worded(prompt: str, word: str) -> str:
    """A prompt of the drawn shapes with one more word, where the captions say it.

    >>> worded("a red bar", "large"), worded("an ellipse", "thin"), worded("a bar", "rising")
    ('a large red bar', 'a thin ellipse', 'a bar rising')
    """
    order = {said: place for place, name in enumerate(ATTRIBUTES) for said in ATTRIBUTES[name].words}
    if word not in order:
        raise EditError(f"{word!r} is no word of the drawn shapes; there are {', '.join(order)}")
    before = any(word in ATTRIBUTES[name].words for name in BEFORE)
    tokens = prompt.split()
    if not before:
        later = [said for said in order if order[said] > order[word] and f" {said}" in prompt]
        place = min((prompt.index(f" {said}") for said in later), default=len(prompt))
        return f"{prompt[:place]} {word}{prompt[place:]}"
    rest = tokens[1:] if tokens and tokens[0] in ("a", "an") else tokens
    place = next((i for i, token in enumerate(rest) if order.get(token, -1) > order[word]), len(rest))
    place = min(place, next((i for i, token in enumerate(rest) if token in (*CLASSES, "shape")), place))
    if place > 0 and rest[place - 1] == "very":
        place -= 1
    whole = [*rest[:place], *word.split(), *rest[place:]]
    return " ".join(["an" if whole[0][0] in "aeiou" else "a", *whole])


def prompting(
    label: str,
    slider: Slider,
    known: Claim | None,
    words: Mapping[str, tuple[str, str]],
    *,
    shapes: bool,
) -> tuple[str, str] | None:
    """Two templates with ``{}`` for the prompt: what one would write for scale −1 and 1 without a slider.

    From the caller's `words`, else for drawn shapes the attribute's own two words, else the spec's negative
    and positive. None if there is nothing to write.

    Raises:
        EditError: the caller's words are no two templates.
    """
    if label in words:
        found = tuple(words[label])
        if len(found) != 2 or not all(isinstance(text, str) and text for text in found):
            raise EditError(
                f"the words for {label!r} must be two texts, for scale −1 and for scale 1, not {found}"
            )
        return tuple(text if "{}" in text else f"{{}}, {text}" for text in found)  # type: ignore[return-value]
    if shapes and known is not None and known.attribute in ENDS:
        low, high = ENDS[known.attribute]
        return (low, high) if known.sign > 0 else (high, low)
    spec = spec_of(slider)
    ends = [_bare(_text(spec.get(end))) for end in ("negative", "positive")]
    return (f"{{}}, {ends[0]}", f"{{}}, {ends[1]}") if all(ends) else None


def written(prompt: str, template: str, *, target: str | None = None) -> str:
    """The prompt that a template and a prompt make; a bare word of the drawn shapes goes to its place."""
    if "{}" not in template:
        return worded(prompt, template)
    bare = template.removeprefix("{}, ")
    if target and target in prompt and bare != template:
        return prompt.replace(target, bare, 1)
    return template.replace("{}", prompt)


NEUTRAL = ("a bar", "an ellipse on the left", "a diamond at the top", "a shape on the right")
"""Prompts for drawn shapes that name only what is seldom trained: the class, and the place."""
