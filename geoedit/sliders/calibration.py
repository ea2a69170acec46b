"""How a scale in natural standard deviations becomes a factor on a slider's changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from geoedit.errors import EditError

Scale = TypeVar("Scale", float, Tensor)


@dataclass(frozen=True)
class Calibration:
    """A rising, piecewise linear map from scales to factors; scale 0 is factor 0 and scale 1 is factor 1.

    Beyond its ends the map goes on with the slope of its last piece, which is a guess: `low` and `high` say
    how far it was measured.

    Attributes:
        attribute: what was measured.
        scales: rising, in natural standard deviations of the attribute; 0 and 1 are among them.
        factors: what multiplies the changes to get there; rising, 0 at 0 and 1 at 1.
        unit: what scale 1 is, in words.
        error: standard error of the attribute's change at scale 1, in the unit; NaN if unknown.
        details: how it was measured, as plain JSON.

    Example:
        >>> curve = Calibration("size", (-1.0, 0.0, 1.0, 2.0), (-0.8, 0.0, 1.0, 2.4))
        >>> curve.factor(-0.5), curve.factor(2.0), curve.scale(2.4)
        (-0.4, 2.4, 2.0)
    """

    attribute: str
    scales: tuple[float, ...]
    factors: tuple[float, ...]
    unit: str = "natural standard deviation"
    error: float = math.nan
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", tuple(float(value) for value in self.scales))
        object.__setattr__(self, "factors", tuple(float(value) for value in self.factors))
        if len(self.scales) != len(self.factors) or len(self.scales) < 2:
            raise EditError(
                f"calibration of {self.attribute!r}: {len(self.scales)} scales and {len(self.factors)} "
                "factors; give as many of the one as of the other, two or more"
            )
        for name in ("scales", "factors"):
            values = getattr(self, name)
            if not all(math.isfinite(value) for value in values):
                raise EditError(f"calibration of {self.attribute!r}: {name} {values} are not all finite")
            if any(b <= a for a, b in pairwise(values)):
                raise EditError(
                    f"calibration of {self.attribute!r}: {name} {values} do not rise; measure again where "
                    "the attribute rises with the factor"
                )
        for fixed in (0.0, 1.0):
            if (fixed, fixed) not in zip(self.scales, self.factors, strict=True):
                raise EditError(
                    f"calibration of {self.attribute!r}: scale {fixed:g} must be factor {fixed:g}; "
                    f"the scales are {self.scales}, the factors {self.factors}"
                )

    @property
    def low(self) -> float:
        """The least scale that was measured."""
        return self.scales[0]

    @property
    def high(self) -> float:
        """The largest scale that was measured."""
        return self.scales[-1]

    def factor(self, scale: Scale) -> Scale:
        """The factor on the changes at a scale, or at each scale of a tensor (differentiable)."""
        return _along(scale, self.scales, self.factors)

    def scale(self, factor: Scale) -> Scale:
        """The scale that a factor is: the inverse of `factor`."""
        return _along(factor, self.factors, self.scales)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON; an unknown error is None."""
        return {
            "attribute": self.attribute,
            "scales": list(self.scales),
            "factors": list(self.factors),
            "unit": self.unit,
            "error": self.error if math.isfinite(self.error) else None,
            "details": dict(self.details),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Calibration:
        """Rebuild from `to_dict`.

        Raises:
            EditError: a field is missing, of the wrong type, or does not rise.
        """
        try:
            error = fields.get("error")
            return cls(
                str(fields["attribute"]),
                tuple(float(value) for value in fields["scales"]),
                tuple(float(value) for value in fields["factors"]),
                str(fields.get("unit", cls.unit)),
                math.nan if error is None else float(error),
                dict(fields.get("details", {})),
            )
        except EditError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EditError(f"this is no calibration of a slider: {fields!r} ({error!r})") from error


def _along(value: Scale, inputs: tuple[float, ...], outputs: tuple[float, ...]) -> Scale:
    """Piecewise linear, the end pieces going on for ever."""
    if not isinstance(value, Tensor):
        exact = torch.tensor(float(value), dtype=torch.float64)
        return float(_along(exact, inputs, outputs))
    knots, levels = value.new_tensor(inputs), value.new_tensor(outputs)
    piece = torch.bucketize(value.detach(), knots[1:-1].contiguous(), right=True)
    slope = (levels[1:] - levels[:-1]) / (knots[1:] - knots[:-1])
    return levels[piece] + (value - knots[piece]) * slope[piece]
