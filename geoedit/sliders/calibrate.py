"""Give a slider the attribute's own units: scale 1 is one natural standard deviation, all along the range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from geoedit.errors import EditError
from geoedit.sliders.calibration import Calibration
from geoedit.sliders.evaluation.claims import Claim
from geoedit.sliders.evaluation.curves import FLAT, check_scales, mean_curve, slope_at_zero, standard_error
from geoedit.sliders.evaluation.measures import Measure
from geoedit.sliders.evaluation.prepare import prepare
from geoedit.sliders.evaluation.work import Work
from geoedit.sliders.slider import Slider

FACTORS = (-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0)
FARTHEST = 8.0
"""The factors are widened up to this size until one natural standard deviation is reached."""


def calibrate(
    pipe: Any,
    slider: Slider,
    *,
    measure: Measure | None = None,
    attribute: str | None = None,
    prompts: str | Sequence[str] | None = None,
    seeds: int | Sequence[int] = 5,
    factors: Sequence[float | int] = FACTORS,
    steps: int = 20,
    guidance: float | int | None = None,
    start: float | int = 0.0,
    stop: float | int = 1.0,
    batch_size: int = 32,
    cache: str | Path | None = None,
) -> Slider:
    """The same slider, whose scale counts natural standard deviations of its attribute.

    The attribute's mean change over prompts and seeds is measured at some factors on the changes and inverted
    where it rises. What takes it to one standard deviation is multiplied into the changes, so that scale 1 is
    factor 1 in every program that reads the file; the rest of the curve goes into `Slider.calibration`, a
    rising piecewise linear map, so that equal steps of the scale are equal steps of the attribute.

    Args:
        pipe: the pipeline that the slider is for.
        slider: calibrated already or not.
        measure: as for `evaluate`.
        attribute: what counts, with a minus before it for one that should fall; else as `evaluate` finds it.
        prompts: as for `evaluate`.
        seeds: as for `evaluate`.
        factors: on the slider's changes as they are; rising, with 0 among them. They are widened, up to 8,
            until the attribute has moved by one standard deviation.
        steps: sampling steps.
        guidance: classifier-free guidance; the pipeline's own if None.
        start: share of the way at which the slider begins to act.
        stop: share at which it ends.
        batch_size: images in one pass.
        cache: a folder for pictures.

    Raises:
        EditError: nothing tells which attribute counts; it falls with the factor, or never moves by one
            standard deviation.
    """
    plain = replace(slider, calibration=None)
    grid = np.array([float(factor) for factor in factors])
    check_scales(grid)
    work, claims = prepare(
        pipe,
        plain,
        prompts=prompts,
        seeds=seeds,
        measure=measure,
        attributes=None if attribute is None else {slider.name: attribute},
        steps=steps,
        guidance=guidance,
        start=start,
        stop=stop,
        batch_size=batch_size,
        cache=cache,
    )
    own = claims.get(slider.name)
    if own is None:
        raise EditError(
            f"nothing tells which attribute the slider {slider.name!r} moves; give attribute=, one of "
            f"{', '.join(work.tool.attributes)}"
        )
    while True:
        change = _change(work, slider.name, own, grid)
        mean = mean_curve(change)
        slope = slope_at_zero(grid, mean)
        if not slope > 0:
            raise EditError(
                f"{own.attribute} does not rise with the factor of {slider.name!r}: its slope at 0 is "
                f"{slope:.3g} natural sds; give attribute='-{own.attribute}' if it should fall"
            )
        first, last = rising(grid, mean, slope)
        if mean[last] >= 1:
            break
        if last < len(grid) - 1 or grid[-1] >= FARTHEST:
            raise EditError(
                f"the slider {slider.name!r} moves {own.attribute} by {mean[last]:.2f} natural standard "
                f"deviations at most (at factor {grid[last]:g}), never by 1: train it further, or leave it "
                "in its own units"
            )
        grid = np.unique(np.concatenate([grid, 2 * grid[grid > 0]]))
    unit = float(np.interp(1.0, mean[first : last + 1], grid[first : last + 1]))
    knots = [
        (float(mean[i]), float(grid[i] / unit)) for i in range(first, last + 1) if abs(mean[i] - 1) > 1e-6
    ]
    scales, values = zip(*sorted({*knots, (0.0, 0.0), (1.0, 1.0)}), strict=True)
    error = standard_error(np.array([np.interp(unit, grid, row) for row in change]))
    curve = Calibration(
        own.attribute if own.sign > 0 else f"-{own.attribute}",
        scales,
        values,
        error=error,
        details={
            "natural_sd": work.tool.natural_sd[own.attribute],
            "factor": unit,
            "images": len(change),
            "steps": work.painter.how.steps,
            "guidance": work.painter.how.guidance,
        },
    )
    folded = plain.map(lambda matrix: matrix * unit)
    return replace(plain, changes=folded.changes, calibration=curve, details=_moved(slider, unit, curve))


def rising(
    grid: Float[np.ndarray, " factors"], mean: Float[np.ndarray, " factors"], slope: float
) -> tuple[int, int]:
    """First and last place of the stretch around 0 on which every step has a fifth of the slope at 0."""
    zero = int(np.flatnonzero(grid == 0)[0])
    good = np.diff(mean) / np.diff(grid) >= FLAT * slope
    first = last = zero
    while first > 0 and good[first - 1]:
        first -= 1
    while last < len(grid) - 1 and good[last]:
        last += 1
    return first, last


def _change(
    work: Work, label: str, own: Claim, grid: Float[np.ndarray, " factors"]
) -> Float[np.ndarray, "images factors"]:
    """The attribute's change from factor 0, in natural standard deviations, image by image."""
    series = work.sweep(label, grid.tolist())
    values = own.sign * series.values[own.attribute] / work.tool.natural_sd[own.attribute]
    return values - values[:, np.flatnonzero(grid == 0)]


def _moved(slider: Slider, unit: float, curve: Calibration) -> dict[str, Any]:
    """The slider's details with its safe range in the new units; what else was measured is dropped."""
    details = {name: value for name, value in slider.details.items() if name != "measured"}
    if slider.safe_range is not None:
        ends = [curve.scale(float(slider.factor(end)) / unit) for end in slider.safe_range]
        details["measured"] = {"safe_range": ends}
    return details
