"""The card of a shapes pipeline: does it follow its words, and how near is it to what can be drawn?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.testbeds.shapes.digits import digit_caption, digits
from geoedit.testbeds.shapes.files import world_fingerprint
from geoedit.testbeds.shapes.measure import measure
from geoedit.testbeds.shapes.render import render
from geoedit.testbeds.shapes.world import ATTRIBUTES, BEFORE, CLASSES, ranges, sample

ENDS: Mapping[str, tuple[str, str]] = {
    "size": ("small", "large"),
    "thickness": ("thin", "thick"),
    "brightness": ("dark", "bright"),
    "hue": ("red", "blue"),
    "rotation": ("falling", "rising"),
    "x": ("on the left", "on the right"),
    "y": ("at the bottom", "at the top"),
}
"""For each attribute a word for a low value and one for a high value."""
STEPS = 25
GUIDANCE = 3.0
RESTORED = 128
"""Shapes that the autoencoder alone is tried on."""
EACH_DIGIT = 8
"""Images of each digit."""


def phrase(words: Mapping[str, str], noun: str) -> str:
    """Say words of attributes around a noun, in the order that captions have.

    Raises:
        EditError: an attribute that there is not.

    >>> phrase({"x": "on the left", "size": "small", "hue": "orange"}, "bar")
    'a small orange bar on the left'
    """
    strange = [name for name in words if name not in ATTRIBUTES]
    if strange:
        raise EditError(f"shapes have no attribute {strange[0]!r}; they have {', '.join(ATTRIBUTES)}")
    told = [name for name in ATTRIBUTES if words.get(name)]
    before = [words[name] for name in told if name in BEFORE]
    after = [words[name] for name in told if name not in BEFORE]
    text = " ".join([*before, noun, *after])
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def contexts(count: int, *, generator: torch.Generator) -> list[tuple[dict[str, str], str]]:
    """Draw what else a prompt says: each attribute at an end or, as often, not at all; and a noun."""
    choices = torch.randint(4, (count, len(ENDS)), generator=generator).tolist()
    nouns = torch.randint(len(CLASSES), (count,), generator=generator).tolist()
    said = [
        {name: ENDS[name][choice] for name, choice in zip(ENDS, row, strict=True) if choice < 2}
        for row in choices
    ]
    return [(words, CLASSES[kind]) for words, kind in zip(said, nouns, strict=True)]


@torch.no_grad()
def drawn(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, batch: int = 64
) -> Float[Tensor, "n 3 h w"]:
    """Images of prompts by the pipeline's own call, each from the noise of its seed: pixels from 0 to 1."""
    options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "output_type": "pt"}
    if getattr(pipe, "transformer", None) is not None:
        options["max_sequence_length"] = 1  # there is no third text encoder to speak at greater length
    images = []
    for start in range(0, len(prompts), batch):
        some = list(prompts[start : start + batch])
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch]]
        images.append(pipe(some, generator=noise, **options).images.float())
    return torch.cat(images)


def make_card(pipe: Any, *, prompts: int = 24, seed: int = 1_000_003) -> dict[str, Any]:
    """Measure a shapes pipeline on prompts that its recipe did not draw.

    For each attribute, prompts come in pairs that differ in one word, low and high, and are drawn from the
    same noise. Values are counted in natural standard deviations from the middle of the natural range.

    Args:
        pipe: the pipeline, in float32.
        prompts: pairs of prompts an attribute.
        seed: decides prompts and noise.

    Returns:
        What goes into ``card.json``.
    """
    generator = torch.Generator().manual_seed(seed)
    followed, kinds, relative, residual, found = {}, [], [], [], []
    for name, ends in ENDS.items():
        others = contexts(prompts, generator=generator)
        seeds = torch.randint(2**31, (prompts,), generator=generator).tolist()
        texts = [phrase({**words, name: end}, noun) for end in ends for words, noun in others]
        seen = measure(drawn(pipe, texts, seeds * 2))
        followed[name] = _followed(name, seen.values[name])
        told = torch.tensor([CLASSES.index(noun) for _, noun in others] * 2, device=seen.kinds.device)
        kinds.append((seen.kinds == told).float())
        relative.append(seen.relative)
        residual.append(seen.residual)
        found.append(seen.found.float())
    named = torch.cat(kinds)
    return {
        "world": world_fingerprint(),
        "parameters": {
            name: sum(weight.numel() for weight in part.parameters())
            for name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module)
        },
        "sampling": {"steps": STEPS, "guidance": GUIDANCE, "scheduler": type(pipe.scheduler).__name__},
        "autoencoder": _restored(pipe, generator),
        "held_out": {
            "images": len(named),
            "attributes": followed,
            "class_accuracy": _round(named.mean()),
            "one_shape_found": _round(torch.cat(found).mean()),
            "residual": _quantiles(torch.cat(residual)),
            "relative_residual": _quantiles(torch.cat(relative)),
        },
        "digits": _digits(pipe, EACH_DIGIT, generator),
    }


def _followed(name: str, values: Tensor) -> dict[str, Any]:
    """How the attribute's measured values answer its two words; the first half of them is the low word's."""
    attribute = ATTRIBUTES[name]
    middle = (attribute.low + attribute.high) / 2
    low, high = ((values - middle) / attribute.natural_sd).chunk(2)
    known = ~(low + high).isnan()
    gap = (high - low)[known]
    spread = gap.std() if len(gap) > 1 else gap.new_tensor(torch.nan)
    told = [12**0.5 * (sum(attribute.words[word]) / 2 - 0.5) for word in ENDS[name]]
    return {
        "words": list(ENDS[name]),
        "told": [round(value, 2) for value in told],
        "mean": [_round(low.nanmean()), _round(high.nanmean())],
        "range": _round(gap.mean()),
        "standard_error": _round(spread / max(1, len(gap)) ** 0.5),
        "right_way": _round((gap > 0).float().mean()),
    }


def _restored(pipe: Any, generator: torch.Generator) -> dict[str, Any]:
    """What the autoencoder alone makes of shapes: how far pixels and attributes move."""
    parameters, kinds = sample(RESTORED, generator=generator, device=pipe.vae.device)
    images = render(parameters, kinds)
    with torch.no_grad():
        latents = pipe.vae.encode((images * 2 - 1).to(pipe.vae.dtype)).latent_dist.mean
        again = (pipe.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
    seen = measure(again)
    low, high = ranges(parameters)
    error = (seen.parameters - parameters) / (high - low) * 12**0.5
    return {
        "pixel_error": _round((again - images).square().mean().sqrt()),
        "class_accuracy": _round((seen.kinds == kinds).float().mean()),
        "attribute_error": {
            name: _round(error[:, i].square().nanmean().sqrt()) for i, name in enumerate(ATTRIBUTES)
        },
    }


def _digits(pipe: Any, each: int, generator: torch.Generator) -> dict[str, Any]:
    """How often the nearest of scikit-learn's digits is the one that was asked for."""
    asked = [digit for digit in range(10) for _ in range(each)]
    seeds = torch.randint(2**31, (len(asked),), generator=generator).tolist()
    images = drawn(pipe, [digit_caption(digit) for digit in asked], seeds)
    pictures, names = digits(images.shape[-1])
    nearest = torch.cdist(images.flatten(1), pictures.flatten(1).to(images)).argmin(-1).to(names.device)
    right = names[nearest] == torch.tensor(asked)
    return {"images": len(asked), "accuracy": _round(right.float().mean())}


def _quantiles(values: Tensor) -> dict[str, float | None]:
    middle, worst = values.nanquantile(values.new_tensor([0.5, 0.95]))
    return {"median": _round(middle), "95 %": _round(worst)}


def _round(value: Tensor) -> float | None:
    """Four digits; nothing for what is not known, as JSON has no other word for it."""
    return round(float(value), 4) if bool(value.isfinite()) else None
