"""A row of images: one prompt, one noise, a slider at several scales."""

from __future__ import annotations

import inspect
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.edits.io import write_whole
from geoedit.errors import EditError
from geoedit.sliders.slider import Slider

SIDE = 96
"""Images with a shorter side than this are shown enlarged, each pixel as a square."""
GAP, TEXT = 4, 16
"""Pixels between images, and of the line with the scales."""


@dataclass(frozen=True)
class Strip:
    """Images of one prompt and noise at rising or falling scales; a notebook shows them in a row.

    Attributes:
        images: with pixels from 0 to 1, on the CPU.
        scales: of each image, in the slider's units.
        name: the slider's.
        prompt: what was drawn; None for a pipeline without prompts.
        seed: of the noise.
    """

    images: Float[Tensor, "scales 3 height width"]
    scales: tuple[float, ...]
    name: str
    prompt: str | None
    seed: int

    def picture(self) -> Any:
        """The row as an image of PIL, the scale under each."""
        from PIL import Image, ImageDraw, ImageFont

        height, width = self.images.shape[-2:]
        times = max(1, math.ceil(SIDE / min(height, width)))
        height, width = height * times, width * times
        row = Image.new("RGB", (len(self.scales) * (width + GAP) + GAP, height + TEXT + 2 * GAP), "white")
        pen, font = ImageDraw.Draw(row), ImageFont.load_default(TEXT - 4)
        pixels = (self.images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for place, (scale, image) in enumerate(zip(self.scales, pixels, strict=True)):
            left = GAP + place * (width + GAP)
            shown = Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST)
            row.paste(shown, (left, GAP))
            middle = (left + width / 2, height + GAP + TEXT / 2)
            pen.text(middle, f"{scale:+g}" if scale else "0", fill="black", font=font, anchor="mm")
        return row

    def save(self, path: str | PathLike[str]) -> None:
        """Write the row as a PNG file, whole or not at all.

        Raises:
            EditError: the name does not end with .png, or there is no such folder.
        """
        target = Path(path)
        if target.suffix.lower() != ".png" or not target.parent.is_dir():
            raise EditError(f"{target}: a strip is saved as a .png file in a folder that exists")
        write_whole(target, self._repr_png_())

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        content = io.BytesIO()
        self.picture().save(content, format="PNG")
        return content.getvalue()


def strip(
    pipe: Any,
    slider: Slider,
    scales: Sequence[float | int] | Tensor = (-2.0, -1.0, 0.0, 1.0, 2.0),
    *,
    prompt: str | None = None,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    start: float | int = 0.0,
    stop: float | int = 1.0,
    region: Any = None,
    batch_size: int = 16,
    allow_other_base: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Strip:
    """Draw one prompt from one noise with a slider at several scales, many in one pass.

    The images are those of the pipeline itself: `pipe(prompt, generator=torch.Generator().manual_seed(seed))`
    inside `slider.at(pipe, scale)`, for each scale.

    Args:
        pipe: a diffusers pipeline.
        slider: the slider.
        scales: in the slider's own units.
        prompt: what is drawn; if None, the prompt that the slider was taught on, as its details tell.
        seed: of the noise, drawn on the CPU.
        steps: sampling steps; the pipeline's default if None.
        guidance: the pipeline's guidance scale; its default if None.
        start: the progress from which the slider works, from 0 (noise) to 1 (image).
        stop: the progress at which it ends.
        region: a mask: where it works.
        batch_size: images in one pass.
        allow_other_base: use the slider even if the weights are not those that it was made for.
        options: further arguments of the pipeline's call, such as `height` and `width`.

    Raises:
        EditError: no scales, one that is not finite, no prompt where the pipeline needs one, a slider
            that does not fit; `together` says more.
    """
    values = [float(scale) for scale in scales]
    if not values or batch_size < 1:
        raise EditError(f"strip: {len(values)} scales and batch_size {batch_size}; give one or more")
    if isinstance(pipe, nn.Module) or not callable(pipe):
        raise EditError(f"strip: a {type(pipe).__name__} draws no images; give a diffusers pipeline")
    call = inspect.signature(type(pipe).__call__).parameters
    given: dict[str, Any] = dict(options or {})
    if steps is not None:
        given["num_inference_steps"] = steps
    if guidance is not None:
        given["guidance_scale"] = guidance
    words = _prompt(slider, prompt) if "prompt" in call else None
    images = []
    for first in range(0, len(values), batch_size):
        part = torch.tensor(values[first : first + batch_size])
        asked = {"prompt": [words] * len(part)} if words is not None else {"batch_size": len(part)}
        generators = [torch.Generator().manual_seed(seed) for _ in part]
        with slider.at(pipe, part, start=start, stop=stop, region=region, allow_other_base=allow_other_base):
            drawn = pipe(**asked, generator=generators, output_type="np", **given).images
        images.append(torch.from_numpy(np.asarray(drawn)).float().permute(0, 3, 1, 2))
    return Strip(torch.cat(images), tuple(values), slider.name, words, seed)


def _prompt(slider: Slider, prompt: str | None) -> str:
    """The prompt, or the one that the slider was taught on."""
    if prompt is not None:
        return prompt
    spec = slider.details.get("spec")
    known: Mapping[str, Any] = spec if isinstance(spec, Mapping) else {}
    for name in ("target", "neutral"):
        found = known.get(name)
        if isinstance(found, str) and found.strip():
            return _filled(found, known.get("preserve"))
    raise EditError(f"strip: slider {slider.name!r} does not tell what it was taught on; give prompt=…")


def _filled(prompt: str, words: Any) -> str:
    """A prompt with the first of its words in each place that is left for them."""

    def first(place: re.Match[str]) -> str:
        known = words.get(place[1]) if isinstance(words, Mapping) else None
        return str(known[0]) if known else ""

    return re.sub(r"\s+", " ", re.sub(r"\{(\w*)\}", first, prompt)).strip()
