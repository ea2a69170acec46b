"""What every measurement of sliders begins with: from arguments to what draws and what reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.evaluation.claims import NEUTRAL, Claim, claim, spec_of
from geoedit.sliders.evaluation.drawing import How, Painter, Row, default_guidance, pixels
from geoedit.sliders.evaluation.measures import Measure, draws_shapes, instrument
from geoedit.sliders.evaluation.work import Distance, Work, check_names
from geoedit.sliders.slider import Slider

REFERENCE = 32
"""Unsteered images that natural standard deviations are taken from, where the measure has none."""


def prepare(
    pipe: Any,
    sliders: Slider | Sequence[Slider] | Mapping[str, Slider],
    *,
    prompts: str | Sequence[str] | None,
    seeds: int | Sequence[int],
    measure: Measure | None,
    attributes: Mapping[str, str] | None = None,
    distance: Distance | None = None,
    steps: int = 20,
    guidance: float | int | None = None,
    start: float | int = 0.0,
    stop: float | int = 1.0,
    batch_size: int = 32,
    cache: str | Path | None = None,
) -> tuple[Work, dict[str, Claim]]:
    """What draws and reads, and what each slider claims to move as far as anything tells; see `evaluate`.

    Raises:
        EditError: an argument is not what it should be.
    """
    base = base_of(pipe)
    known = labelled(sliders)
    refuse_unknown("attributes", attributes, known)
    shapes = draws_shapes(base.pipe)
    texts, numbers = prompts_of(prompts, known, shapes=shapes), seeds_of(seeds)
    told = float(default_guidance(base.pipe) if guidance is None else guidance)
    how = How(steps, told, float(start), float(stop), batch_size)
    painter = Painter(base, known, how, cache=None if cache is None else Path(cache))
    tool = instrument(measure, base.pipe, lambda: _reference(painter, texts, numbers))
    check_names(tool)
    given = attributes or {}
    found = {
        label: claim(label, slider, tool.attributes, given.get(label), shapes=shapes)
        for label, slider in known.items()
    }
    told_claims = {label: own for label, own in found.items() if own is not None}
    return Work(painter, tool, distance, texts, numbers), told_claims


def _reference(
    painter: Painter, prompts: Sequence[str], seeds: Sequence[int]
) -> Float[Tensor, "n 3 height width"]:
    """Unsteered images: the evaluation's own, and more seeds until there are enough."""
    count = max(len(seeds), -(-REFERENCE // len(prompts)))
    more = range(max(seeds) + 1, max(seeds) + 1 + count - len(seeds))
    rows = [Row(prompt, seed, {}) for seed in (*seeds, *more) for prompt in prompts]
    return pixels(painter.draw(rows)).to(painter.base.device)


def labelled(sliders: Slider | Sequence[Slider] | Mapping[str, Slider]) -> dict[str, Slider]:
    """Sliders by label: a mapping's keys, else their names; a name that comes again is numbered.

    Raises:
        EditError: there are none, or something is no slider.
    """
    if isinstance(sliders, Slider):
        sliders = [sliders]
    if isinstance(sliders, Mapping):
        found = {str(label): slider for label, slider in sliders.items()}
    else:
        found = {}
        for slider in sliders:
            name = str(getattr(slider, "name", slider))
            label, number = name, 1
            while label in found:
                number += 1
                label = f"{name} ({number})"
            found[label] = slider
    wrong = [type(slider).__name__ for slider in found.values() if not isinstance(slider, Slider)]
    if wrong or not found:
        raise EditError(f"evaluate takes one or more sliders, not {wrong[0] if wrong else 'none'}")
    return found


def seeds_of(seeds: int | Sequence[int]) -> tuple[int, ...]:
    """Seeds without repeats; a number n stands for 0 … n − 1.

    Raises:
        EditError: there are none, or one is no whole number from 0.
    """
    if isinstance(seeds, int) and not isinstance(seeds, bool):
        seeds = range(seeds)
    found = tuple(dict.fromkeys(seeds)) if isinstance(seeds, Sequence) else ()
    if not found or any(isinstance(seed, bool) or not isinstance(seed, int) or seed < 0 for seed in found):
        raise EditError(f"seeds are one or more whole numbers from 0, not {seeds!r}")
    return found


def prompts_of(
    prompts: str | Sequence[str] | None, sliders: Mapping[str, Slider], *, shapes: bool
) -> tuple[str, ...]:
    """Prompts without repeats; see `evaluate` for what None means.

    Raises:
        EditError: there are none, or one is no text.
    """
    if prompts is None:
        targets = [spec_of(slider).get("target") for slider in sliders.values()]
        prompts = NEUTRAL if shapes else [text for text in targets if isinstance(text, str) and text]
    found = (prompts,) if isinstance(prompts, str) else tuple(dict.fromkeys(prompts))
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise EditError(f"prompts are one or more texts, not {prompts!r}; give prompts=[...]")
    return found


def refuse_unknown(name: str, given: Mapping[str, Any] | None, known: Mapping[str, Slider]) -> None:
    """Refuse a mapping by label that names no slider.

    Raises:
        EditError: it does.
    """
    unknown = [label for label in given or {} if label not in known]
    if unknown:
        raise EditError(f"{name} names {unknown[0]!r}, and the sliders are {', '.join(known)}")
