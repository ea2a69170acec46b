"""Draw what an evaluation looks at: rows of prompt, seed and scales, in large batches, kept in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import io
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from geoedit.edits.io import write_whole
from geoedit.errors import EditError
from geoedit.fingerprint import weights_digest
from geoedit.sliders.apply import together
from geoedit.sliders.bases.conditioning import Conditioning

if TYPE_CHECKING:
    from geoedit.sliders.bases.base import Base
    from geoedit.sliders.slider import Slider

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One image to draw.

    Attributes:
        prompt: what is asked for.
        seed: of the noise, which is what the pipeline draws from ``torch.Generator().manual_seed(seed)``.
        scales: the sliders at work, by their labels, each in its own units; one that is not named is off.
    """

    prompt: str
    seed: int
    scales: Mapping[str, float]


@dataclass(frozen=True)
class How:
    """How images are drawn.

    Attributes:
        steps: sampling steps.
        guidance: classifier-free guidance.
        start: the share of the way at which sliders begin to act.
        stop: the share at which they end.
        batch_size: images in one pass.
    """

    steps: int
    guidance: float
    start: float = 0.0
    stop: float = 1.0
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise EditError(f"steps is {self.steps} and batch_size {self.batch_size}; give 1 or more of each")
        if not 0 <= self.start < self.stop <= 1:
            raise EditError(f"start is {self.start} and stop {self.stop}; 0 ≤ start < stop ≤ 1 is needed")


def default_guidance(pipe: Any) -> float:
    """The guidance that a pipeline takes when it is not told one; 1 if it knows none."""
    found = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
    return 1.0 if found is None or found.default is inspect.Parameter.empty else float(found.default)


class Painter:
    """Draws rows with sliders at work, and keeps the pictures.

    Images are rounded to 8 bits, as saved pictures are, so that a kept picture and a fresh one are the same.

    Args:
        base: the pipeline, seen through its denoiser.
        sliders: by label.
        how: the settings.
        cache: a folder of pictures, one for each row; what is there is not drawn again. None keeps nothing.
        progress: called with the number of images after each batch.
    """

    def __init__(
        self,
        base: Base,
        sliders: Mapping[str, Slider],
        how: How,
        *,
        cache: Path | None = None,
        progress: Callable[[int], Any] | None = None,
    ) -> None:
        self.base, self.sliders, self.how, self.cache = base, dict(sliders), how, cache
        # A sweep leaves the safe range on purpose: nothing to warn of.
        self._plain = {
            label: replace(slider, details=_unmeasured(slider)) for label, slider in sliders.items()
        }
        self.progress = progress
        self._encoded: dict[str, Conditioning] = {}
        self._unsteered: dict[tuple[str, int], Tensor] = {}
        self._keys: dict[str, str] = {}
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            self._keys = {label: slider_digest(slider) for label, slider in self.sliders.items()}
            self._model = pipeline_digest(base.pipe)

    def draw(self, rows: Sequence[Row]) -> UInt8[Tensor, "rows 3 height width"]:
        """The images of all rows, in their order, on the CPU.

        Raises:
            EditError: no rows, an unknown label, or images that are not finite.
        """
        if not rows:
            raise EditError("there are no images to draw: no prompts, seeds or scales")
        found = {index: image for index, row in enumerate(rows) if (image := self._kept(row)) is not None}
        self._tell(len(found))
        missing = [index for index in range(len(rows)) if index not in found]
        for batch in self._batches(rows, missing):
            images = self._draw([rows[index] for index in batch])
            for index, image in zip(batch, images, strict=True):
                found[index] = image
                self._keep(rows[index], image)
            self._tell(len(batch))
        return torch.stack([found[index] for index in range(len(rows))])

    def _tell(self, count: int) -> None:
        if self.progress is not None and count:
            self.progress(count)

    def _batches(self, rows: Sequence[Row], missing: Sequence[int]) -> Iterable[list[int]]:
        """Rows with the same sliders at work go together; where one moves a text encoder, the same scales."""
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index in missing:
            at_work = {label: scale for label, scale in rows[index].scales.items() if scale != 0}
            unknown = [label for label in at_work if label not in self.sliders]
            if unknown:
                raise EditError(f"there is no slider {unknown[0]!r}; there are {', '.join(self.sliders)}")
            key = tuple(sorted(at_work.items() if self._moves_words(at_work) else at_work))
            groups.setdefault(key, []).append(index)
        size = self.how.batch_size
        for group in groups.values():
            yield from (group[start : start + size] for start in range(0, len(group), size))

    def _moves_words(self, labels: Iterable[str]) -> bool:
        return any(set(self.sliders[label].changes) - {self.base.component} for label in labels)

    @torch.no_grad()
    def _draw(self, rows: Sequence[Row]) -> UInt8[Tensor, "rows 3 height width"]:
        labels = [label for label in self.sliders if any(row.scales.get(label, 0) != 0 for row in rows)]
        terms: list[tuple[str, Any]] = []
        for label in labels:
            scales = [float(row.scales.get(label, 0)) for row in rows]
            terms.append((label, scales[0] if len(set(scales)) == 1 else torch.tensor(scales)))
        latents = self.latents([(row.prompt, row.seed) for row in rows], terms)
        return self._rounded(self.base.decode(latents), rows)

    def latents(
        self, rows: Sequence[tuple[str, int]], scaled: Sequence[tuple[str, Any]], *, steps: int | None = None
    ) -> Float[Tensor, "rows *shape"]:
        """Clean latents of prompts and seeds with sliders at scales, which may carry derivatives.

        Args:
            rows: prompt and seed of each image.
            scaled: labels and scales: a number, or a tensor () or (rows,).
            steps: sampling steps, where not the painter's own.
        """
        base, how = self.base, self.how
        labels = [label for label, _ in scaled]
        terms = [(self._plain[label], scale) for label, scale in scaled]
        at_work = together(base.pipe, terms, start=how.start, stop=how.stop) if terms else None
        with at_work or contextlib.nullcontext():
            fresh = self._moves_words(labels)
            prompts = [prompt for prompt, _ in rows]
            words = base.encode(prompts) if fresh else self._encode(prompts)
            guided = how.guidance != 1 and not base.guidance_distilled
            latents, _ = base.sample(
                words,
                steps=steps or how.steps,
                guidance=how.guidance,
                noise=noise(base, [seed for _, seed in rows]),
                unconditional=base.unconditional(len(rows)) if guided else None,
            )
        return latents

    def _encode(self, prompts: Sequence[str]) -> Conditioning:
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if new:
            whole = self.base.encode(new)
            for place, prompt in enumerate(new):
                self._encoded[prompt] = whole.rows(torch.tensor([place], device=self.base.device))
        return Conditioning.concatenate([self._encoded[prompt] for prompt in prompts])

    @staticmethod
    def _rounded(images: Tensor, rows: Sequence[Row]) -> Tensor:
        finite = images.flatten(1).isfinite().all(1)
        if not bool(finite.all()):
            row = rows[int((~finite).nonzero()[0, 0])]
            raise EditError(
                f"the image of {row.prompt!r}, seed {row.seed}, scales {dict(row.scales)} is not finite: the "
                "scale is far too large for the model, or half precision overflowed; use smaller scales"
            )
        return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    # Pictures that are kept

    def _place(self, row: Row, folder: Path) -> Path:
        at_work = {self._keys[name]: scale for name, scale in sorted(row.scales.items()) if scale != 0}
        how = [self.how.steps, self.how.guidance, *([self.how.start, self.how.stop] if at_work else [])]
        told = json.dumps([self._model, how, row.prompt, row.seed, sorted(at_work.items())])
        return folder / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.png"

    def _keep(self, row: Row, image: Tensor) -> None:
        if not any(row.scales.values()):
            self._unsteered[row.prompt, row.seed] = image
        if self.cache is not None:
            write_whole(self._place(row, self.cache), png(image))

    def _kept(self, row: Row) -> Tensor | None:
        if not any(row.scales.values()) and (row.prompt, row.seed) in self._unsteered:
            return self._unsteered[row.prompt, row.seed]
        if self.cache is None:
            return None
        place = self._place(row, self.cache)
        if not place.is_file():
            return None
        try:
            return from_png(place.read_bytes())
        except (OSError, ValueError) as error:
            logger.warning("%s is damaged (%s) and is drawn again", place, error)
            return None


def _unmeasured(slider: Slider) -> dict[str, Any]:
    return {name: value for name, value in slider.details.items() if name != "measured"}


def noise(base: Base, seeds: Sequence[int]) -> Float[Tensor, "rows *shape"]:
    """The noise that the pipeline itself would draw for each seed from a generator on the CPU."""
    shape = base.latent_shape()
    drawn = {
        seed: torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=base.dtype)
        for seed in dict.fromkeys(seeds)
    }
    return torch.cat([drawn[seed] for seed in seeds]).to(base.device)


def pixels(images: UInt8[Tensor, "rows 3 height width"]) -> Float[Tensor, "rows 3 height width"]:
    """Bytes as pixels from 0 to 1."""
    return images.float() / 255


def png(image: UInt8[Tensor, "3 height width"]) -> bytes:
    """A picture's file."""
    from PIL import Image

    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, format="PNG")
    return content.getvalue()


def from_png(content: bytes) -> UInt8[Tensor, "3 height width"]:
    """The picture in a file.

    Raises:
        OSError: it is no picture, or cut off.
    """
    from PIL import Image

    with Image.open(io.BytesIO(content)) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def slider_digest(slider: Slider) -> str:
    """A hash of what a slider does: its changes and its calibration, not its name."""
    digest = hashlib.sha256()
    for component, path, change in slider:
        digest.update(f"{component}/{path}/{change.kernel}".encode())
        for factor in (change.matrix.left, change.matrix.right):
            digest.update(factor.detach().double().cpu().contiguous().numpy().tobytes())
    curve = slider.calibration
    digest.update(json.dumps(None if curve is None else curve.to_dict(), sort_keys=True).encode())
    return digest.hexdigest()


def pipeline_digest(pipe: Any) -> str:
    """A hash of a pipeline's weights (samples and sums of each) and of its scheduler's settings."""
    digest = hashlib.sha256()
    for name, part in sorted(pipe.components.items()):
        if isinstance(part, torch.nn.Module):
            digest.update(f"{name}:{weights_digest(part)}".encode())
    config = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    return digest.hexdigest()
