"""What is seen of a run while it goes on: a bar, sheets of sample images, curves for tensorboard."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from geoedit.edits.io import write_whole
from geoedit.errors import EditError

Sheet = Callable[[], Float[Tensor, "rows columns 3 height width"]]


class Progress:
    """Shows a run: ``with Progress(steps, …) as progress: … progress.step(n, {"loss": 0.1})``.

    Nothing of it touches what is trained: the sheet draws from a generator of its own.

    Args:
        steps: the last step's number plus one.
        start: steps that an earlier run has done.
        name: stands before the bar.
        show: whether to draw the bar; None: on a terminal only.
        output: folder for sheets (``samples/step-….png``) and curves (``tensorboard/``); None: no files.
        sheet: draws sample images with the adapter as it is, a row for each prompt, a column for each scale.
        every: write a sheet each so many steps, and after the last; 0: never.
        tensorboard: also write scalars and sheets for tensorboard.
        first: whether this process is the one that shows and writes; the others only draw.

    Raises:
        EditError: sheets or curves without an output folder, or tensorboard is not installed.
    """

    def __init__(
        self,
        steps: int,
        *,
        start: int = 0,
        name: str = "slider",
        show: bool | None = None,
        output: str | PathLike[str] | None = None,
        sheet: Sheet | None = None,
        every: int = 0,
        tensorboard: bool = False,
        first: bool = True,
    ) -> None:
        if every < 0:
            raise EditError(f"a sheet every {every} steps: give a positive number, or 0 for none")
        if output is None and (tensorboard or (every and sheet is not None)):
            raise EditError("sample sheets and tensorboard curves need an output folder; give output=…")
        self.steps, self.every, self.sheet, self.first = steps, every, sheet, first
        self.output = None if output is None else Path(output)
        self._writer = _writer(self.output, start) if tensorboard and first and self.output else None
        hidden = True if not first else None if show is None else not show
        self._bar = tqdm(total=steps, initial=start, desc=name, unit="step", disable=hidden)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        if self._writer is not None:
            self._writer.close()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Record step number `step` (the first is 0) once it is done.

        All processes call it: a sheet is drawn by each, and kept by the first.
        """
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._bar.update()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"train/{name}", value, step)
        done = step + 1
        if self.sheet is not None and self.every and (done % self.every == 0 or done == self.steps):
            self._draw(done, self.sheet())

    def _draw(self, done: int, images: Tensor) -> None:
        if not self.first or self.output is None:
            return
        folder = self.output / "samples"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / f"step-{done:06d}.png", png(tile(images)))
        except OSError as error:
            raise EditError(
                f"can't write a sheet to {folder}: {error.strerror or error}; give a writable folder"
            ) from error
        if self._writer is not None:
            self._writer.add_image("samples", tile(images).float().cpu(), done)


def tile(images: Float[Tensor, "rows columns 3 height width"], gap: int = 2) -> Float[Tensor, "3 tall wide"]:
    """Images side by side on white with a gap of so many pixels between them.

    Raises:
        EditError: there are no images.
    """
    if not images.numel():
        raise EditError(f"images of shape {tuple(images.shape)}: there is nothing to draw")
    rows, columns, _, height, width = images.shape
    sheet = images.new_ones(3, rows * (height + gap) - gap, columns * (width + gap) - gap)
    for row in range(rows):
        for column in range(columns):
            top, left = row * (height + gap), column * (width + gap)
            sheet[:, top : top + height, left : left + width] = images[row, column]
    return sheet


def png(image: Float[Tensor, "3 height width"]) -> bytes:
    """An image with pixels from 0 to 1 as the content of a PNG file; pixels that are NaN come out black."""
    from PIL import Image

    pixels = image.detach().float().nan_to_num(0.0).clamp(0, 1).mul(255).round().byte()
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, format="PNG")
    return file.getvalue()


def _writer(output: Path, start: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EditError(
            "tensorboard=True needs the package tensorboard, which is not installed: pip install tensorboard"
        ) from error
    return SummaryWriter(str(output / "tensorboard"), purge_step=start)
