"""The steps of an evaluation: which rows are drawn for what, and what is read from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.evaluation.claims import Claim, spec_of, written
from geoedit.sliders.evaluation.curves import unwrap
from geoedit.sliders.evaluation.drawing import Painter, Row, pixels
from geoedit.sliders.evaluation.measures import KIND, RESIDUAL, Instrument
from geoedit.sliders.evaluation.table import DISTANCE, RESERVED, Block

AT_ONCE = 64
"""Images that are read together."""

Distance = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Series:
    """Images of every prompt and seed at rising scales, and what was read from them.

    Attributes:
        label: the slider's label.
        method: "slider" or "prompting".
        scales: rising, with 0 among them.
        rows: for each image its prompt and its seed.
        images: all of them, scale by scale.
        values: by attribute, in its own unit, angles followed along the scales.
        extra: residual, kind and distance, where they are known.
    """

    label: str
    method: str
    scales: tuple[float, ...]
    rows: tuple[tuple[str, int], ...]
    images: UInt8[Tensor, "scales rows 3 height width"]
    values: Mapping[str, Float[np.ndarray, "rows scales"]]
    extra: Mapping[str, Float[np.ndarray, "rows scales"]]

    def block(self, natural_sd: Mapping[str, float]) -> Block:
        """The same as arrays in natural standard deviations."""
        values = {name: value / natural_sd[name] for name, value in self.values.items()}
        prompts, seeds = zip(*self.rows, strict=True)
        return Block(np.array(self.scales), seeds, prompts, values, self.extra)

    def records(self) -> list[dict[str, Any]]:
        """One record for each image."""
        return [
            {
                "slider": self.label,
                "method": self.method,
                "seed": seed,
                "prompt": prompt,
                "scale": scale,
                **{name: float(value[row, place]) for name, value in self.values.items()},
                **{name: float(value[row, place]) for name, value in self.extra.items()},
            }
            for row, (prompt, seed) in enumerate(self.rows)
            for place, scale in enumerate(self.scales)
        ]


@dataclass(frozen=True)
class Work:
    """What stays the same for all series of an evaluation.

    Attributes:
        painter: draws.
        tool: reads.
        distance: compares; None leaves it out.
        prompts: what is asked for.
        seeds: of the noise.
    """

    painter: Painter
    tool: Instrument
    distance: Distance | None
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def rows(self) -> tuple[tuple[str, int], ...]:
        """Every prompt with every seed."""
        return tuple((prompt, seed) for seed, prompt in product(self.seeds, self.prompts))

    def sweep(self, label: str, scales: Sequence[float]) -> Series:
        """Every image at every scale of one slider."""
        drawn = [
            Row(prompt, seed, {label: scale} if scale else {})
            for scale in scales
            for prompt, seed in self.rows
        ]
        return self.read(label, "slider", scales, drawn)

    def extend(self, series: Series, more: Sequence[float]) -> Series:
        """A slider's series with more scales; what was drawn is not drawn again."""
        new = self.sweep(series.label, sorted({0.0, *more}))
        fresh = [index for index, scale in enumerate(new.scales) if scale not in series.scales]
        scales = [*series.scales, *(new.scales[index] for index in fresh)]
        order = np.argsort(scales)

        def joined(name: str, mine: Any, theirs: Any) -> Any:
            whole = np.concatenate([mine[name], theirs[name][:, fresh]], 1)[:, order]
            return unwrap(whole, self.tool.period[name], zero) if name in self.tool.period else whole

        zero = int(np.flatnonzero(np.array(scales)[order] == 0)[0])
        return Series(
            series.label,
            series.method,
            tuple(float(scales[index]) for index in order),
            series.rows,
            torch.cat([series.images, new.images[fresh]])[torch.from_numpy(order)],
            {name: joined(name, series.values, new.values) for name in series.values},
            {name: joined(name, series.extra, new.extra) for name in series.extra},
        )

    def worded(self, label: str, ends: tuple[str, str]) -> Series:
        """The same change asked for in words, at scales −1 and 1."""
        target = spec_of(self.painter.sliders[label]).get("target")
        target = target if isinstance(target, str) else None
        low, high = ends
        drawn = [
            *(Row(written(prompt, low, target=target), seed, {}) for prompt, seed in self.rows),
            *(Row(prompt, seed, {}) for prompt, seed in self.rows),
            *(Row(written(prompt, high, target=target), seed, {}) for prompt, seed in self.rows),
        ]
        return self.read(label, "prompting", (-1.0, 0.0, 1.0), drawn)

    def read(self, label: str, method: str, scales: Sequence[float], drawn: Sequence[Row]) -> Series:
        """Draw rows, scale by scale, and read them."""
        images = self.painter.draw(drawn).unflatten(0, (len(scales), len(self.rows)))
        zero = [float(scale) for scale in scales].index(0.0)
        found = self.measured(images.flatten(0, 1))
        far = self._distances(images, zero)
        if far is not None:
            found[DISTANCE] = far
        arrays = {name: value.reshape(len(scales), -1).T.copy() for name, value in found.items()}
        extra = {name: arrays.pop(name) for name in (RESIDUAL, KIND, DISTANCE) if name in arrays}
        for name, period in self.tool.period.items():
            arrays[name] = unwrap(arrays[name], period, zero)
        steps = tuple(float(scale) for scale in scales)
        return Series(label, method, steps, self.rows, images, arrays, extra)

    def measured(self, images: UInt8[Tensor, "n 3 height width"]) -> dict[str, Float[np.ndarray, " n"]]:
        """What the measure reads from images, computed where the model is.

        Raises:
            EditError: the measure gave something else than a number for each image.
        """
        parts: dict[str, list[np.ndarray]] = {}
        for part in images.split(AT_ONCE):
            for name, values in self.read_pixels(pixels(part.to(self.painter.base.device))).items():
                parts.setdefault(name, []).append(values)
        return {name: np.concatenate(values) for name, values in parts.items()}

    def read_pixels(self, images: Float[Tensor, "n 3 height width"]) -> dict[str, Float[np.ndarray, " n"]]:
        """What the measure reads from images with pixels from 0 to 1: attributes, residual and kind."""
        reading = self.tool.read(images)
        found = {**reading.values}
        if reading.residual is not None:
            found[RESIDUAL] = reading.residual
        if reading.kind is not None:
            found[KIND] = reading.kind
        return {name: values.double().cpu().numpy() for name, values in found.items()}

    @torch.no_grad()
    def _distances(self, images: Tensor, zero: int) -> Float[np.ndarray, " n"] | None:
        """How far each image is from its own at scale 0."""
        if self.distance is None:
            return None
        device = self.painter.base.device
        origin = images[zero]
        parts = []
        for at_scale in images:
            for here, there in zip(at_scale.split(AT_ONCE), origin.split(AT_ONCE), strict=True):
                found = self.distance(pixels(here.to(device)), pixels(there.to(device)))
                if found.shape != (len(here),):
                    raise EditError(
                        f"the distance gave shape {tuple(found.shape)} for {len(here)} pairs of images; "
                        f"it must give ({len(here)},)"
                    )
                parts.append(found)
        return torch.cat(parts).double().cpu().numpy()

    def compose(
        self, number: int, terms: Sequence[tuple[str, float]], claims: Mapping[str, Claim]
    ) -> list[dict[str, Any]]:
        """What members do together, beside the sum of what each does alone.

        A record for each member whose attribute is known: the mean over images of the change of that
        attribute together, of the sum of the changes apart, and of their difference with and without sign; in
        natural standard deviations.
        """
        whole = dict(terms)
        drawn = [Row(prompt, seed, {}) for prompt, seed in self.rows]
        drawn += [Row(prompt, seed, whole) for prompt, seed in self.rows]
        for label, scale in terms:
            drawn += [Row(prompt, seed, {label: scale}) for prompt, seed in self.rows]
        found = self.measured(self.painter.draw(drawn))
        records = []
        for label, scale in terms:
            if label not in claims:
                continue
            name = claims[label].attribute
            values = found[name].reshape(2 + len(terms), -1)
            change = values - values[0]
            if name in self.tool.period:
                period = self.tool.period[name]
                change = (change + period / 2) % period - period / 2
            change = change / self.tool.natural_sd[name]
            error = change[1] - change[2:].sum(0)
            records.append(
                {
                    "composition": number,
                    "members": " + ".join(f"{name} @ {value:g}" for name, value in terms),
                    "sliders": len(terms),
                    "slider": label,
                    "scale": scale,
                    "attribute": name,
                    "together": float(np.nanmean(change[1])),
                    "apart": float(np.nanmean(change[2:].sum(0))),
                    "error": float(np.nanmean(error)),
                    "error_absolute": float(np.nanmean(np.abs(error))),
                }
            )
        return records


def check_names(tool: Instrument) -> None:
    """Refuse attributes that are called like a column of the curves.

    Raises:
        EditError: one is.
    """
    taken = sorted(set(tool.attributes) & set(RESERVED))
    if taken:
        raise EditError(f"the measure's attributes {taken} have names that the table needs: rename them")
