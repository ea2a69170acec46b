"""What is read from images: attributes in their own units, and how far an image lies off the manifold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.testbeds.shapes.measure import ShapesMeasure
from geoedit.testbeds.shapes.measure import measure as measure_shapes
from geoedit.testbeds.shapes.render import SIZE
from geoedit.testbeds.shapes.world import ATTRIBUTES, vocabulary

Measure = Callable[[Tensor], Mapping[str, Tensor]]
"""Images (n, 3, height, width) with pixels from 0 to 1 to a number for each image under each name.

Optional attributes of the callable: ``natural_sd`` (what one natural standard deviation of each attribute is)
and ``period`` (360 for a hue in degrees). Two names are no attributes: "residual", the distance off the
manifold of natural images, and "kind", a class number, −1 where there is none.
"""

RESIDUAL, KIND = "residual", "kind"


@dataclass(frozen=True)
class Reading:
    """What was read from images.

    Attributes:
        values: each attribute of each image in its own unit; NaN where there is none to read.
        residual: distance off the manifold of natural images, if the measure knows one.
        kind: class numbers, if the measure knows classes.
    """

    values: Mapping[str, Float[Tensor, " n"]]
    residual: Float[Tensor, " n"] | None = None
    kind: Float[Tensor, " n"] | None = None


@dataclass(frozen=True)
class Instrument:
    """A measure with its units.

    Attributes:
        measure: what reads.
        natural_sd: one natural standard deviation of each attribute, in its own unit.
        period: of the attributes that go round, in their own unit.
        source: where the natural standard deviations come from, in words.
    """

    measure: Measure
    natural_sd: Mapping[str, float]
    period: Mapping[str, float] = field(default_factory=dict)
    source: str = "given with the measure"

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of what is read."""
        return tuple(self.natural_sd)

    def read(self, images: Float[Tensor, "n 3 height width"]) -> Reading:
        """Read images.

        Raises:
            EditError: the measure gave no mapping, lacks an attribute, or has another number of values.
        """
        found = _asked(self.measure, images)
        missing = [name for name in self.natural_sd if name not in found]
        if missing:
            raise EditError(f"the measure gave {sorted(found)}, and no {missing}, which has a natural_sd")
        return Reading({name: found[name] for name in self.natural_sd}, found.get(RESIDUAL), found.get(KIND))


def instrument(
    measure: Measure | None, pipe: Any, reference: Callable[[], Float[Tensor, "n 3 height width"]]
) -> Instrument:
    """A measure with its natural standard deviations.

    Args:
        measure: what reads; if None, the exact measure of the drawn shapes for a pipeline that knows their
            words, and for any other pipeline `GenericMeasure`.
        pipe: the pipeline.
        reference: gives unsteered images, whose standard deviations are taken where the measure has none.

    Raises:
        EditError: the measure gives nothing that can be used, or an attribute that never varies.
    """
    if measure is None:
        measure = ShapesWithResidual() if draws_shapes(pipe) else GenericMeasure()
    elif isinstance(measure, ShapesMeasure):
        measure = ShapesWithResidual()
    period = dict(getattr(measure, "period", {}))
    known = getattr(measure, "natural_sd", None)
    if known is not None:
        bad = {name: sd for name, sd in known.items() if not (math.isfinite(sd) and sd > 0)}
        if bad or not known:
            raise EditError(f"natural_sd must be a positive number for each attribute, not {bad or known}")
        return Instrument(measure, {name: float(sd) for name, sd in known.items()}, period)
    images = reference()
    found = _asked(measure, images)
    sizes = {}
    for name in (name for name in found if name not in (RESIDUAL, KIND)):
        values = found[name].double()
        values = values[values.isfinite()]
        sizes[name] = float(values.std()) if len(values) > 1 else math.nan
    flat = [name for name, sd in sizes.items() if not sd > 0]
    if flat or not sizes:
        raise EditError(
            f"the measure gives {sorted(found)}, and {flat} does not vary over {len(images)} unsteered "
            "images, so that it has no natural standard deviation; give the measure a `natural_sd`, or more "
            "prompts and seeds"
        )
    return Instrument(measure, sizes, period, f"taken over {len(images)} unsteered images")


def _asked(measure: Measure, images: Tensor) -> dict[str, Tensor]:
    found = measure(images)
    if not isinstance(found, Mapping):
        raise EditError(
            f"a measure gives a mapping from names to tensors ({len(images)},), not {type(found).__name__}"
        )
    whole = {}
    for name, values in found.items():
        tensor = torch.as_tensor(values).detach()
        if tensor.shape != (len(images),):
            raise EditError(
                f"the measure gave {name!r} in shape {tuple(tensor.shape)} for {len(images)} images; "
                f"it must be ({len(images)},)"
            )
        whole[str(name)] = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return whole


class ShapesWithResidual:
    """The exact measure of drawn shapes, with the distance to the nearest drawing and its class.

    The distance is relative to the image's own root mean square, so that large and bright shapes are not
    farther off for their size: 0 for a drawing, 1 for an image of which no shape explains anything.

    Example:
        >>> from geoedit.testbeds.shapes import render, sample
        >>> found = ShapesWithResidual()(render(*sample(3, generator=torch.Generator().manual_seed(0))))
        >>> sorted(found)[:4], bool((found["residual"] < 1e-3).all())
        (['brightness', 'hue', 'kind', 'residual'], True)
    """

    period: Mapping[str, float] = {"hue": 360.0, "rotation": 180.0}

    @property
    def natural_sd(self) -> Mapping[str, float]:
        """One standard deviation of each attribute over the world."""
        return {name: attribute.natural_sd for name, attribute in ATTRIBUTES.items()}

    def __call__(self, images: Float[Tensor, "n 3 size size"]) -> Mapping[str, Float[Tensor, " n"]]:
        """Attributes, "residual" (relative) and "kind"."""
        found = measure_shapes(images)
        return {**found.values, RESIDUAL: found.relative, KIND: found.kinds.to(found.relative.dtype)}


def draws_shapes(pipe: Any) -> bool:
    """Whether a pipeline speaks the words of the drawn shapes and draws images of their size."""
    config = getattr(getattr(pipe, "vae", None), "config", None)
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None or getattr(config, "sample_size", None) != SIZE:
        return False
    ids = tokenizer(vocabulary(), add_special_tokens=False).input_ids
    return all(len(tokens) == 1 for tokens in ids) and len({tokens[0] for tokens in ids}) == len(ids)


class GenericMeasure:
    """Numbers that any image has, for pipelines without a measure of their own; they know no objects.

    "mean luma" (Rec. 709 weights), "contrast" (standard deviation of luma), "colourfulness" (Hasler and
    Süsstrunk, "Measuring colourfulness in natural images", 2003, pixels from 0 to 1), "warmth" (mean red less
    mean blue), "sharpness" (mean length of the luma's gradient, a pixel).
    """

    def __call__(self, images: Float[Tensor, "n 3 height width"]) -> Mapping[str, Float[Tensor, " n"]]:
        """The five numbers of each image."""
        red, green, blue = images.unbind(1)
        luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        across, down = red - green, (red + green) / 2 - blue
        spread = torch.hypot(across.flatten(1).std(1), down.flatten(1).std(1))
        offset = torch.hypot(across.flatten(1).mean(1), down.flatten(1).mean(1))
        slope = torch.hypot(luma[:, 1:, :-1] - luma[:, :-1, :-1], luma[:, :-1, 1:] - luma[:, :-1, :-1])
        return {
            "mean luma": luma.flatten(1).mean(1),
            "contrast": luma.flatten(1).std(1),
            "colourfulness": spread + 0.3 * offset,
            "warmth": (red - blue).flatten(1).mean(1),
            "sharpness": slope.flatten(1).mean(1),
        }
