r"""How far a slider may be pushed: predicted from derivatives of the sampler, and found by a sweep.

One definition serves both. A scale is safe if from 0 up to it the attribute's mean keeps rising, with a fifth
of its slope at 0 or more, and the mean residual (distance off the manifold of images) stays within twice that
of unsteered images. Where no attribute is known, the path's way along its own first direction counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from geoedit.errors import EditError
from geoedit.sliders.evaluation.claims import Claim
from geoedit.sliders.evaluation.edges import Edges, bootstrap, edges, edges_of_slopes
from geoedit.sliders.evaluation.measures import RESIDUAL, Measure
from geoedit.sliders.evaluation.prepare import prepare
from geoedit.sliders.evaluation.work import Series, Work
from geoedit.sliders.slider import Slider
from manifolds.forward_mode import WrittenOut

REACH = 1.0
"""The largest scale at which the derivative along the path is taken: as far as sliders are trained."""
STEPS = 10
"""Sampling steps of a prediction: the path bends as it does in twice as many."""
TANGENT = 0.05
"""How far an image is moved along its tangent to read an attribute's slope, in the slider's units."""
ROWS = 8
"""Images that a prediction looks at."""
STRIDE = 0.5
FARTHEST = 6.0
"""A sweep goes no farther than this."""


@dataclass(frozen=True)
class SafeRange:
    """Scales between which a slider does what it claims and images stay images.

    Attributes:
        low: the end below 0, in the slider's units; −inf where no end was found, NaN where nothing is known.
        high: the end above 0.
        interval: 90 % intervals of both ends over images (bootstrap).
        reason: what ends the range on either side, or why nothing is known.
        details: the numbers behind it, as plain JSON.
    """

    low: float
    high: float
    interval: tuple[tuple[float, float], tuple[float, float]]
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict)

    def __contains__(self, scale: float | int) -> bool:
        return bool(self.low <= scale <= self.high)

    @property
    def known(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON; what is not finite becomes None."""

        def plain(value: float) -> float | None:
            return value if math.isfinite(value) else None

        return {
            "low": plain(self.low),
            "high": plain(self.high),
            "interval": [[plain(bound) for bound in bounds] for bounds in self.interval],
            "reason": self.reason,
            "details": dict(self.details),
        }


def safe_range(
    pipe: Any,
    slider: Slider,
    *,
    measure: Measure | None = None,
    attribute: str | None = None,
    prompts: str | Sequence[str] | None = None,
    seeds: int | Sequence[int] = 2,
    reach: float | int = REACH,
    steps: int = STEPS,
    guidance: float | int | None = None,
    start: float | int = 0.0,
    stop: float | int = 1.0,
    batch_size: int = 32,
) -> SafeRange:
    r"""Predict how far a slider may be pushed, from the curvature of its path, without sweeping.

    The path \(z(s)\) is what the sampler gives at scale s. Its exact derivative \(z'(s)\) through all
    sampling steps (forward mode) is taken at five scales from −reach to reach. An attribute's slope
    \(g(s)\) is its change along the tangent \(z'(s)\). Where a fifth of its slope at 0 is left among these
    scales, the range ends there. Else the nearest \(\ln g(s) = α − 2 \ln\cosh(k s + c)\) is followed to
    there: the slope of a sigmoid, whose steepness and offset are the curvature of the path seen in the
    attribute. The residual's square is followed along the nearest parabola to four times that at 0.

    Args:
        pipe: the pipeline.
        slider: calibrated or not; the range is in its own units.
        measure: as for `evaluate`.
        attribute: as for `calibrate`; if nothing tells, the path's way along its own first direction counts.
        prompts: as for `evaluate`; eight images at most are looked at.
        seeds: as for `evaluate`.
        reach: the largest scale at which the derivative is taken, in the slider's units.
        steps: sampling steps; half of the usual serve.
        guidance: classifier-free guidance; the pipeline's own if None.
        start: share of the way at which the slider begins to act.
        stop: share at which it ends.
        batch_size: images in one pass.

    Raises:
        EditError: an argument is not what it should be, or the slider does not fit the pipeline.

    Source: nested and directional derivatives as in Betancourt, "A geometric theory of higher-order automatic
    differentiation" (2018); functional curvature as in `geoedit.functional_curvature`.
    """
    if not (math.isfinite(reach) and reach > 0):
        raise EditError(f"reach is {reach}; it is a scale above 0")
    work, claims = _prepared(
        pipe,
        slider,
        attribute,
        measure=measure,
        prompts=prompts,
        seeds=seeds,
        steps=steps,
        guidance=guidance,
        start=start,
        stop=stop,
        batch_size=batch_size,
        cache=None,
    )
    return predict(work, slider.name, claims.get(slider.name), reach=float(reach))


def observed_range(
    pipe: Any,
    slider: Slider,
    *,
    measure: Measure | None = None,
    attribute: str | None = None,
    prompts: str | Sequence[str] | None = None,
    seeds: int | Sequence[int] = 5,
    steps: int = 20,
    guidance: float | int | None = None,
    start: float | int = 0.0,
    stop: float | int = 1.0,
    batch_size: int = 32,
    cache: str | Path | None = None,
) -> SafeRange:
    """Sweep a slider outwards until the range ends, or to scale ±6; what a prediction is scored by.

    Args: as for `safe_range`; `cache` is a folder for pictures.

    Raises:
        EditError: nothing tells which attribute counts; else as for `evaluate`.
    """
    work, claims = _prepared(
        pipe,
        slider,
        attribute,
        measure=measure,
        prompts=prompts,
        seeds=seeds,
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
    return observe(work, slider.name, own)


def _prepared(pipe: Any, slider: Slider, attribute: str | None, **options: Any) -> Any:
    attributes = None if attribute is None else {slider.name: attribute}
    return prepare(pipe, slider, attributes=attributes, **options)


def observe(work: Work, label: str, own: Claim, series: Series | None = None) -> SafeRange:
    """The observed range of one slider of an evaluation; a series that was drawn before is gone on from."""
    scales = [STRIDE * step for step in range(-2, 3)]
    found = series if series is not None else work.sweep(label, scales)
    while True:
        moved, residual = _curves(work, found, own)
        ends = edges(np.array(found.scales), moved, residual)
        more = []
        if not math.isfinite(ends.low) and found.scales[0] > -FARTHEST:
            more += [found.scales[0] - STRIDE * step for step in (1, 2)]
        if not math.isfinite(ends.high) and found.scales[-1] < FARTHEST:
            more += [found.scales[-1] + STRIDE * step for step in (1, 2)]
        if not more:
            break
        found = work.extend(found, more)
    scales_array = np.array(found.scales)

    def again(rows: np.ndarray) -> Edges:
        return edges(scales_array, moved[rows], None if residual is None else residual[rows])

    return SafeRange(
        ends.low,
        ends.high,
        bootstrap(again, len(moved)),
        ends.reason,
        {"scales": list(found.scales), "images": len(moved)},
    )


def _curves(work: Work, series: Series, own: Claim) -> tuple[np.ndarray, np.ndarray | None]:
    moved = own.sign * series.values[own.attribute] / work.tool.natural_sd[own.attribute]
    return moved, series.extra.get(RESIDUAL)


def predict(work: Work, label: str, own: Claim | None, *, reach: float = REACH) -> SafeRange:
    """The predicted range of one slider of an evaluation."""
    count = len(work.rows)
    chosen = torch.linspace(0, count - 1, min(ROWS, count)).round().int().tolist()
    rows = [work.rows[index] for index in chosen]
    scales = (-reach, -reach / 2, 0.0, reach / 2, reach)
    latents, tangents = _path(work, label, rows, scales)
    if not bool(tangents.isfinite().all()):
        unknown = (math.nan, math.nan)
        return SafeRange(math.nan, math.nan, (unknown, unknown), "the derivatives are not finite")
    flat = tangents.flatten(2).double()  # (scales, rows, numbers)
    slopes = _progress(flat)
    told = "the path's way along its first direction"
    residual = None
    if own is not None:
        read, residual = _attribute_slopes(work, own, latents, tangents)
        if np.isfinite(read).all(0).any():
            slopes, told = read, own.attribute
    nodes = np.array(scales)
    mean = edges_of_slopes(nodes, slopes, residual)

    def again(some: np.ndarray) -> Edges:
        return edges_of_slopes(nodes, slopes[:, some], None if residual is None else residual[:, some])

    return SafeRange(
        mean.low,
        mean.high,
        bootstrap(again, len(rows)),
        f"{mean.reason} (slopes of {told})",
        {"images": len(rows), "reach": reach, **_curvature(flat, reach)},
    )


def _path(
    work: Work, label: str, rows: Sequence[tuple[str, int]], scales: Sequence[float]
) -> tuple[Float[Tensor, "scales rows *shape"], Float[Tensor, "scales rows *shape"]]:
    """Clean latents at some scales, and their exact derivatives by the scale."""
    size, steps = work.painter.how.batch_size, min(STEPS, work.painter.how.steps)
    latents, tangents = [], []
    for scale in scales:
        at = torch.tensor(scale, device=work.painter.base.device, dtype=torch.float32)
        for first in range(0, len(rows), size):
            # Dual numbers rather than torch.func: schedulers turn their own tensors into numpy's meanwhile.
            # The fused attention kernels know no forward mode, and some norms want help in it.
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), WrittenOut(), torch.no_grad():
                here = forward_ad.make_dual(at, torch.ones_like(at))
                found = work.painter.latents(rows[first : first + size], [(label, here)], steps=steps)
                value, tangent = forward_ad.unpack_dual(found)
                latents.append(value)
                tangents.append(torch.zeros_like(value) if tangent is None else tangent)
    shape = (len(scales), len(rows))
    return torch.cat(latents).unflatten(0, shape), torch.cat(tangents).unflatten(0, shape)


def _attribute_slopes(
    work: Work, own: Claim, latents: Tensor, tangents: Tensor
) -> tuple[Float[np.ndarray, "scales rows"], Float[np.ndarray, "scales rows"] | None]:
    """The attribute's slope along each tangent, in natural standard deviations, and the residuals."""
    base, scales = work.painter.base, len(latents)
    with torch.no_grad():
        images = [
            base.decode((latents + side * TANGENT * tangents).flatten(0, 1)).clamp(0, 1)
            for side in (-1, 0, 1)
        ]
    low, middle, high = (work.read_pixels(each) for each in images)
    rise = high[own.attribute] - low[own.attribute]
    period = work.tool.period.get(own.attribute)
    if period is not None:
        rise = (rise + period / 2) % period - period / 2
    slope = own.sign * rise / work.tool.natural_sd[own.attribute] / (2 * TANGENT)
    residual = middle.get(RESIDUAL)
    return slope.reshape(scales, -1), None if residual is None else residual.reshape(scales, -1)


def _progress(flat: Float[Tensor, "scales rows numbers"]) -> Float[np.ndarray, "scales rows"]:
    """⟨z′(s), z′(0)⟩ / |z′(0)|²: how fast the path still goes along its first direction."""
    first = flat[len(flat) // 2]
    size = first.square().sum(-1)
    along = (flat * first).sum(-1)
    found = torch.where(size > 0, along / size.clamp_min(torch.finfo(size.dtype).tiny), torch.nan)
    return found.cpu().numpy()


def _curvature(flat: Float[Tensor, "scales rows numbers"], reach: float) -> dict[str, float]:
    """Functional curvature |z″| / |z′| at scale 0, mean over the images, in units of 1 / scale."""
    middle = len(flat) // 2
    second = (flat[middle + 1] - flat[middle - 1]) / reach  # half of the reach apart from 0 on either side
    first = flat[middle].norm(dim=-1)
    ratio = (second.norm(dim=-1) / first)[first > 0]
    return {"functional_curvature": float(ratio.mean()) if len(ratio) else math.nan}
