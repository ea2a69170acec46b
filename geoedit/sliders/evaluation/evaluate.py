"""Measure sliders: draw, read, compare with words, with what was predicted, and with one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from geoedit.errors import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.evaluation import claims
from geoedit.sliders.evaluation.claims import Claim
from geoedit.sliders.evaluation.curves import check_scales
from geoedit.sliders.evaluation.measures import Measure, draws_shapes
from geoedit.sliders.evaluation.pictures import strips
from geoedit.sliders.evaluation.prepare import prepare, refuse_unknown
from geoedit.sliders.evaluation.result import Evaluation
from geoedit.sliders.evaluation.table import largest_effect
from geoedit.sliders.evaluation.work import Distance, Series, Work
from geoedit.sliders.slider import Scaled, Slider
from geoedit.testbeds.shapes.encoder import FeatureDistance

SCALES = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)


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
    steep = [float(scale) for scale in scales]
    check_scales(np.array(steep))
    if not within[0] <= 0 <= within[1]:
        raise EditError(f"within is {within}; it must hold scale 0, from which all is counted")
    work, own = prepare(
        pipe,
        sliders,
        prompts=prompts,
        seeds=seeds,
        measure=measure,
        attributes=attributes,
        distance=distance or _own_distance(pipe),
        steps=steps,
        guidance=guidance,
        start=start,
        stop=stop,
        batch_size=batch_size,
        cache=cache,
    )
    painter, tool, known = work.painter, work.tool, work.painter.sliders
    members = _members(compositions, known)
    refuse_unknown("words", words, known)
    shapes = draws_shapes(painter.base.pipe)
    ends = {
        label: claims.prompting(label, slider, own.get(label), words or {}, shapes=shapes)
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
        found = dict(own)
        for one in series:
            if one.method == "slider" and one.label not in found:
                found[one.label] = largest_effect(one.block(tool.natural_sd).within(*within))
        together = [row for number, terms in enumerate(members) for row in work.compose(number, terms, found)]
        swept = {one.label: one for one in series if one.method == "slider"}
        ranges = {label: _ranges(work, swept[label], found[label]) for label in known} if safe_range else {}
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
            "pipeline": type(painter.base.pipe).__name__,
            "prompts": list(work.prompts),
            "seeds": list(work.seeds),
            "scales": steep,
            "steps": painter.how.steps,
            "guidance": painter.how.guidance,
            "start": painter.how.start,
            "stop": painter.how.stop,
        },
    )


def _own_distance(pipe: Any) -> Distance | None:
    """Of features of the pipeline's own autoencoder; None for a pipeline without one."""
    autoencoder = getattr(base_of(pipe).pipe, "vae", None)
    return None if autoencoder is None else FeatureDistance(autoencoder)


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


def _ranges(work: Work, swept: Series, own: Claim) -> dict[str, Any]:
    """The safe range of one slider as it is predicted, and as a sweep finds it."""
    from geoedit.sliders.safe import observe, predict  # which stands on this package

    return {
        "predicted": predict(work, swept.label, own).to_dict(),
        "observed": observe(work, swept.label, own, swept).to_dict(),
    }
