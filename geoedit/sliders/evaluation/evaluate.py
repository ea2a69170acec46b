"""Measure sliders: draw, read, compare with words, with what was predicted, and with one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm.auto import tqdm

from geoedit.errors import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.evaluation import claims
from geoedit.sliders.evaluation.claims import Claim
from geoedit.sliders.evaluation.curves import check_scales
from geoedit.sliders.evaluation.drawing import How, Painter, Row, default_guidance, pixels
from geoedit.sliders.evaluation.measures import Measure, draws_shapes, instrument
from geoedit.sliders.evaluation.pictures import strips
from geoedit.sliders.evaluation.result import Evaluation
from geoedit.sliders.evaluation.table import largest_effect
from geoedit.sliders.evaluation.work import Work, check_names
from geoedit.sliders.slider import Scaled, Slider

SCALES = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
REFERENCE = 32
"""Unsteered images that natural standard deviations are taken from, where the measure has none."""

Distance = Callable[[Tensor, Tensor], Tensor]


def evaluate(
    pipe: Any,
    sliders: Slider | Sequence[Slider] | Mapping[str, Slider],
    *,
    prompts: str | Sequence[str] | None = None,
    seeds: int | Sequence[int] = 5,
    scales: Sequence[float | int] = SCALES,
    measure: Measure | None = None,
    attributes: Mapping[str, str] | None = None,
    words: Mapping[str, tuple[str, str]] | None = None,
    prompting: bool = True,
    compositions: Sequence[Sequence[Scaled]] = (),
    safe_range: bool = True,
    within: tuple[float | int, float | int] = (-1.0, 1.0),
    distance: Distance | None = None,
    steps: int = 20,
    guidance: float | int | None = None,
    start: float | int = 0.0,
    stop: float | int = 1.0,
    batch_size: int = 32,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Evaluation:
    """Draw every prompt and seed at every scale of every slider, and measure what moved and what stayed.

    The image of a prompt, a seed and scale 0 is what the pipeline itself draws with
    ``generator=torch.Generator().manual_seed(seed)``; it is shared by all sliders. Images are rounded to 8
    bits. See `geoedit.sliders.evaluation.COLUMNS` for the table.

    Args:
        pipe: a diffusers pipeline.
        sliders: one, several, or a mapping from labels; a published trainer's slider is just one more.
        prompts: what is asked for, held out from training. If None, neutral prompts of the drawn shapes for a
            pipeline that draws them, else the targets of the sliders' specs.
        seeds: of the noise; a number n stands for 0 … n − 1.
        scales: rising, with 0 among them, in each slider's own units.
        measure: what reads images; see `geoedit.sliders.evaluation.Measure`. If None, the exact measure of
            the drawn shapes, or `GenericMeasure` for a pipeline that does not draw them.
        attributes: by label, the attribute that a slider is judged by ("-size" if a positive scale should
            lower it); else it is read from the slider's spec or name, else its largest effect counts.
        words: by label, two texts that ask for scale −1 and for scale 1 in words; with ``{}`` for the prompt.
        prompting: whether asking in words is measured beside the sliders.
        compositions: terms such as ``[size @ 1, hue @ -0.5]`` whose effect is compared with the sum of its
            members'.
        safe_range: whether the safe range is predicted, and observed by sweeping further.
        within: the scales that the table's numbers are about; all scales if fewer than three lie within.
        distance: perceptual distance of image batches (n, 3, h, w), (n, 3, h, w) → (n,); if None, of features
            of the pipeline's own autoencoder at several depths.
        steps: sampling steps.
        guidance: classifier-free guidance; the pipeline's own if None.
        start: share of the way at which sliders begin to act.
        stop: share at which they end.
        batch_size: images in one pass.
        cache: a folder for pictures; an evaluation that was cut off goes on where it stood.
        progress: whether a bar is shown.

    Raises:
        EditError: no sliders, prompts or seeds; scales that do not rise or lack 0; an attribute that is not
            measured; a slider of another base; images that are not finite.
    """
    base = base_of(pipe)
    known = labelled(sliders)
    steep = [float(scale) for scale in scales]
    check_scales(np.array(steep))
    shapes = draws_shapes(base.pipe)
    texts = prompts_of(prompts, known, shapes=shapes)
    numbers = seeds_of(seeds)
    how = How(
        steps,
        float(default_guidance(base.pipe) if guidance is None else guidance),
        float(start),
        float(stop),
        batch_size,
    )
    members = _members(compositions, known)
    for name, given in (("attributes", attributes), ("words", words)):
        _refuse_unknown(name, given, known)
    painter = Painter(base, known, how, cache=None if cache is None else Path(cache))
    tool = instrument(measure, base.pipe, lambda: _reference(painter, texts, numbers))
    check_names(tool)
    work = Work(painter, tool, distance, texts, numbers)
    given = attributes or {}
    own = {
        label: claims.claim(label, slider, tool.attributes, given.get(label), shapes=shapes)
        for label, slider in known.items()
    }
    ends = {
        label: claims.prompting(label, slider, own[label], words or {}, shapes=shapes)
        for label, slider in known.items()
        if prompting
    }
    written = {label: pair for label, pair in ends.items() if pair is not None}
    passes = 1 + len(steep) * len(known) + 3 * len(written) + sum(2 + len(terms) for terms in members)
    with tqdm(total=passes * len(work.rows), desc="images", disable=not progress) as bar:
        painter.progress = bar.update
        series = []
        for label in known:
            series.append(work.sweep(label, steep))
            if label in written:
                series.append(work.worded(label, written[label]))
        found = {label: claim for label, claim in own.items() if claim is not None}
        for one in series:
            if one.method == "slider" and one.label not in found:
                found[one.label] = largest_effect(one.block(tool.natural_sd).within(*within))
        together = [row for number, terms in enumerate(members) for row in work.compose(number, terms, found)]
        ranges = {label: _ranges(work, label, found[label]) for label in known} if safe_range else {}
    notes = [f"One natural standard deviation of each attribute is {tool.source}."]
    notes += [
        f"{label}: nothing tells which words ask for the same, so that prompting is not measured."
        for label in ends
        if label not in written
    ]
    return Evaluation(
        records=tuple(row for one in series for row in one.records()),
        natural_sd=tool.natural_sd,
        claims=found,
        within=(float(within[0]), float(within[1])),
        ranges=ranges,
        compositions=tuple(together),
        pictures=tuple(strips(one) for one in series),
        notes=tuple(notes),
        settings={
            "pipeline": type(base.pipe).__name__,
            "prompts": list(texts),
            "seeds": list(numbers),
            "scales": steep,
            "steps": steps,
            "guidance": how.guidance,
            "start": how.start,
            "stop": how.stop,
        },
    )


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
        targets = [claims.spec_of(slider).get("target") for slider in sliders.values()]
        prompts = claims.NEUTRAL if shapes else [text for text in targets if isinstance(text, str) and text]
    found = (prompts,) if isinstance(prompts, str) else tuple(dict.fromkeys(prompts))
    if not found or not all(isinstance(prompt, str) for prompt in found):
        raise EditError(f"prompts are one or more texts, not {prompts!r}; give prompts=[...]")
    return found


def _members(
    compositions: Sequence[Sequence[Scaled]], sliders: Mapping[str, Slider]
) -> list[list[tuple[str, float]]]:
    labels = {id(slider): label for label, slider in sliders.items()}
    found = []
    for terms in compositions:
        strange = [term for term in terms if not isinstance(term, Scaled) or id(term.slider) not in labels]
        if strange or len(terms) < 2:
            raise EditError(
                "a composition is two or more of the evaluated sliders at scales, such as [a @ 1, b @ -0.5], "
                f"not {list(terms)!r}"
            )
        pairs = [(labels[id(term.slider)], term.scale) for term in terms]
        if len(dict(pairs)) < len(pairs):
            raise EditError(f"a composition names a slider twice: {pairs}; add up its scales")
        found.append(pairs)
    return found


def _refuse_unknown(name: str, given: Mapping[str, Any] | None, known: Mapping[str, Slider]) -> None:
    unknown = [label for label in given or {} if label not in known]
    if unknown:
        raise EditError(f"{name} names {unknown[0]!r}, and the sliders are {', '.join(known)}")


def _reference(painter: Painter, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """Unsteered images: the evaluation's own, and more seeds until there are enough."""
    count = max(len(seeds), -(-REFERENCE // len(prompts)))
    more = range(max(seeds) + 1, max(seeds) + 1 + count - len(seeds))
    rows = [Row(prompt, seed, {}) for seed in (*seeds, *more) for prompt in prompts]
    return pixels(painter.draw(rows)).to(painter.base.device)


def _ranges(work: Work, label: str, own: Claim) -> dict[str, Any]:
    """The safe range of one slider as it is predicted, and as a sweep finds it."""
    from geoedit.sliders.safe import observe, predict  # which stands on this package

    return {
        "predicted": predict(work, label, own).to_dict(),
        "observed": observe(work, label, own).to_dict(),
    }
