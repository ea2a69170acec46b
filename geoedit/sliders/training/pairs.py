"""Sliders from pictures: the same thing at several levels of an attribute, and nothing else changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.bases.base import Base
from geoedit.sliders.training.regression import RegressionTask
from geoedit.sliders.training.task import Batch
from geoedit.sliders.training.trajectories import integers, normal, uniform

if TYPE_CHECKING:
    from geoedit.sliders.training.settings import TrainSettings

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class ImagePairs:
    """Pictures of things at several levels of one attribute.

    Attributes:
        images: (things, levels, 3, height, width), pixels from 0 to 1.
        levels: how much of the attribute each level has, rising; the difference of two is the slider's scale
            that leads from one to the other.
        prompts: what each thing is, without a word of the attribute; empty for no words at all.
    """

    images: Float[Tensor, "things pictures 3 height width"]
    levels: Float[Tensor, " levels"]
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.images.numel() or len(self.levels) < 2:
            raise EditError(f"{len(self.images)} things at {len(self.levels)} levels: give 1 at 2 or more.")
        if self.images.shape[1] != len(self.levels):
            raise EditError(
                f"{self.images.shape[1]} pictures of each thing for {len(self.levels)} levels: one a level."
            )
        if not bool((self.levels.diff() > 0).all()):
            raise EditError(f"the levels {self.levels.tolist()} do not rise: two are equal, or out of order.")
        if (
            not bool(self.images.isfinite().all())
            or not 0 <= float(self.images.min()) <= float(self.images.max()) <= 1
        ):
            raise EditError("the pictures have pixels that are NaN or not from 0 to 1; divide bytes by 255.")
        if self.prompts and len(self.prompts) != len(self.images):
            raise EditError(f"{len(self.prompts)} prompts for {len(self.images)} things: give one for each.")

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def from_folder(cls, path: str | PathLike[str], *, size: tuple[int, int] | None = None) -> ImagePairs:
        """Read a folder with a folder for each level, named by its number, such as ``-1``, ``0`` and ``2.5``.

        A thing has a picture of the same name in every level. A text file of that name beside any of them
        holds its prompt.

        Args:
            path: the folder.
            size: height and width that all pictures are brought to (the shorter side is fitted, the middle
                is kept); the size of the first picture if not given.

        Raises:
            EditError: there are fewer than two levels, a level lacks a picture, or one cannot be read.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise EditError(f"There is no folder {folder}.")
        levels = {
            number: part
            for part in folder.iterdir()
            if part.is_dir() and (number := _number(part.name)) is not None
        }
        if len(levels) < 2:
            raise EditError(
                f"{folder} has {len(levels)} folders named by numbers; give one a level, such as -1 and 1."
            )
        order = sorted(levels)
        files = [
            {f.stem: f for f in sorted(levels[n].iterdir()) if f.suffix.lower() in PICTURES} for n in order
        ]
        names = sorted({name for level in files for name in level})
        for number, level in zip(order, files, strict=True):
            missing = [name for name in names if name not in level]
            if missing or not names:
                lacking = ", ".join(missing[:5]) or "at all"
                raise EditError(
                    f"level {levels[number].name} of {folder} has no picture {lacking}; each thing needs one "
                    "in every level."
                )
        read = [[_read(level[name]) for level in files] for name in names]
        fitted = size or (read[0][0].shape[-2], read[0][0].shape[-1])
        images = torch.stack([torch.stack([_fitted(image, fitted) for image in row]) for row in read])
        prompts = tuple(_said(name, [levels[n] for n in order]) for name in names)
        return cls(images, torch.tensor(order), prompts if any(prompts) else ())


def read_pairs(source: ImagePairs | str | PathLike[str], base: Base) -> ImagePairs:
    """Pairs as they are, or from a folder, brought to the size that a pipeline draws."""
    if isinstance(source, ImagePairs):
        return source
    _, height, width = base.latent_shape()
    return ImagePairs.from_folder(
        source, size=(height * base.autoencoder.cell, width * base.autoencoder.cell)
    )


def shapes_pairs(
    attribute: str,
    count: int,
    *,
    levels: Sequence[float | int] = (-1.0, 0.0, 1.0),
    generator: torch.Generator,
) -> ImagePairs:
    """Drawn shapes at several levels of an attribute, in natural standard deviations, all else being equal.

    The shape at level 0 is drawn as the world draws it; what a level would carry over the end of the natural
    range stays at the end. Its prompt says some of what it is, and nothing of the attribute.

    Raises:
        EditError: there is no such attribute.
    """
    from geoedit.testbeds.shapes.render import render
    from geoedit.testbeds.shapes.world import ATTRIBUTES, caption, sample, shares

    if attribute not in ATTRIBUTES:
        raise EditError(f"there is no attribute {attribute!r} of shapes; there are {', '.join(ATTRIBUTES)}.")
    known = ATTRIBUTES[attribute]
    column = list(ATTRIBUTES).index(attribute)
    parameters, kinds = sample(count, generator=generator)
    order = torch.tensor(sorted(levels), dtype=torch.float32)
    rows = parameters[:, None].repeat(1, len(order), 1)
    rows[..., column] = (rows[..., column] + order * known.natural_sd).clamp(known.low, known.high)
    known_shares = shares(parameters)
    known_shares[:, column] = torch.nan  # no word fits what is not known
    prompts = (
        caption(row, kind, generator=generator)
        for row, kind in zip(known_shares.tolist(), kinds.tolist(), strict=True)
    )
    return ImagePairs(render(rows, kinds[:, None].expand(-1, len(order))), order, tuple(prompts))


class PairTask(RegressionTask):
    r"""What leads from one level of an attribute to another, from pictures of the same things.

    A thing has the clean latents \(x_a\) and \(x_b\) at two levels. At noised latents
    \(z = \alpha x_a + \sigma \varepsilon\) the student at scale \(s = b - a\) is taught

    .. math:: D_s(z) = D(z) + \kappa\,(x_b - x_a),

    with \(D\) the frozen denoiser's clean latents. The least squares of it is
    \(D + \kappa\,\mathrm E[x_b - x_a \mid z]\): the field of ways from level to level, as far as the noise
    lets it be seen, and nothing else of the pictures, since the frozen model's own error stands on both
    sides. Sampling follows that field while the noise falls: a step from \(\rho = \sigma / \alpha\) to
    \(\rho'\) goes the share \(1 - \rho' / \rho\) of what is added, so that
    \(\kappa = 1 / \sum (1 - \rho' / \rho)\) over the steps makes one scale of one level, wherever the
    picture follows its latents. Early on, where it does not, some of it is lost: see `calibrate`.

    The published image sliders (Gandikota et al. 2023) fit the drawn noise itself at each end; their rows
    carry all of the denoiser's own error.

    Args:
        base: the pipeline.
        pairs: the pictures, of the size that the pipeline draws.
        prompts: what the denoiser is told, beside the things' own prompts if they have any; by default both
            halves of guidance hear it: the things' prompts and the empty one.
        batch_size: rows of a step.
        name: what the slider moves.
    """

    def __init__(
        self,
        base: Base,
        pairs: ImagePairs,
        *,
        prompts: Sequence[str] = ("",),
        batch_size: int = 8,
        name: str = "pairs",
    ) -> None:
        said = tuple(dict.fromkeys([*prompts, *pairs.prompts]))
        super().__init__(base, name, said, batch_size=batch_size)
        self.pairs, self.shared = pairs, [said.index(prompt) for prompt in prompts]
        self.own = [said.index(prompt) for prompt in pairs.prompts]

    def make(self, couples: int, settings: TrainSettings, generator: torch.Generator) -> Batch:
        """Things, two levels of each, times and noise; the couple is the way there and the way back."""
        base, pairs = self.base, self.pairs
        count = len(pairs.levels)
        thing, a = integers(len(pairs), couples, generator), integers(count, couples, generator)
        b = (a + 1 + integers(count - 1, couples, generator)) % count
        first, second = (self.clean[thing.to(base.device), level.to(base.device)] for level in (a, b))
        times = self._times(couples, settings, generator)
        noise = normal(first.shape, generator, first)
        told = self._told(thing, generator).to(base.device).repeat_interleave(2)
        clean = torch.stack([first, second], 1).flatten(0, 1)
        way = torch.stack([second - first, first - second], 1).flatten(0, 1)
        times = times.repeat_interleave(2)
        signal, amount = (level.to(clean) for level in base.levels(times))
        noisy = signal * clean + amount * noise.repeat_interleave(2, 0)
        slope = output_by_clean(base, times)
        targets = self.frozen(noisy, times, told) + self.share * slope.to(way) * way
        step = (pairs.levels[b] - pairs.levels[a]).to(clean)
        ratio = (signal / amount).square().flatten()
        return Batch(
            {
                "latents": noisy,
                "times": times,
                "prompts": told,
                "scales": torch.stack([step, -step], 1).flatten(),
                "targets": targets,
                "weights": (ratio.clamp_max(settings.min_snr) / slope.flatten().square()).nan_to_num(1.0),
            }
        )

    def prepare(self, settings: TrainSettings, generator: torch.Generator) -> None:
        """Encode pictures and prompts, and make the first rows."""
        base, images = self.base, self.pairs.images
        with torch.no_grad():
            flat = images.flatten(0, 1).to(base.device, base.dtype)
            clean = torch.cat([base.encode_images(part) for part in flat.split(32)])
        if clean.shape[1:] != base.latent_shape():
            raise EditError(
                f"pictures of {images.shape[-2]} × {images.shape[-1]} pixels have latents of shape "
                f"{tuple(clean.shape[1:])}; the pipeline draws {base.latent_shape()}. Read them with size=…."
            )
        self.clean = clean.unflatten(0, images.shape[:2])
        self.share = push(base, settings.trajectory_steps)
        super().prepare(settings, generator)

    def _times(self, count: int, settings: TrainSettings, generator: torch.Generator) -> Tensor:
        """Times that sampling visits, each equally often."""
        visited = self.base.schedule(settings.trajectory_steps, self.base.latent_shape())
        return visited[integers(len(visited), count, generator).to(visited.device)]

    def _told(self, thing: Tensor, generator: torch.Generator) -> Tensor:
        """Half of the rows hear the thing's own prompt, if it has one; the others one that all share."""
        shared = torch.tensor(self.shared)[integers(len(self.shared), len(thing), generator)]
        if not self.own:
            return shared
        own = uniform(len(thing), generator) < 0.5
        return torch.where(own, torch.tensor(self.own)[thing], shared)


def push(base: Base, steps: int) -> float:
    """κ = 1 / Σ (1 − ρ′ / ρ) over the steps of sampling, ρ = σ / α, with ρ′ = 0 after the last."""
    times = base.schedule(steps, base.latent_shape())
    signal, noise = (level.flatten().double() for level in base.levels(times))
    below = torch.cat([(noise / signal)[1:], noise.new_zeros(1)])
    return 1 / float((1 - below * signal / noise).sum())


def output_by_clean(base: Base, times: Float[Tensor, " rows"]) -> Float[Tensor, "rows 1 1 1"]:
    """The derivative of a denoiser's output by the clean latents that it means, the noised ones being given.

    −α / σ for noise, −(α² + σ²) / σ for v = α ε − σ x, 1 for clean latents, −(α + σ) / σ for ε − x.
    """
    signal, noise = base.levels(times)
    match base.prediction:
        case "epsilon":
            return -signal / noise
        case "v_prediction":
            return -(signal.square() + noise.square()) / noise
        case "sample":
            return torch.ones_like(noise)
        case "flow":
            return -(signal + noise) / noise


def _number(name: str) -> float | None:
    try:
        number = float(name)
    except ValueError:
        return None
    return number if number - number == 0 else None


def _read(path: Path) -> Float[Tensor, "3 height width"]:
    """Pixels of a picture, red, green and blue, from 0 to 1."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise EditError(f"{path} cannot be read as a picture; cut off or damaged? ({error})") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def _fitted(image: Tensor, size: tuple[int, int]) -> Tensor:
    """The shorter side fitted, the middle kept."""
    height, width = size
    scale = max(height / image.shape[-2], width / image.shape[-1])
    wanted = (max(height, round(image.shape[-2] * scale)), max(width, round(image.shape[-1] * scale)))
    if wanted != image.shape[-2:]:
        image = torch.nn.functional.interpolate(
            image[None], wanted, mode="bicubic", antialias=True, align_corners=False
        )[0].clamp(0, 1)
    top, left = (wanted[0] - height) // 2, (wanted[1] - width) // 2
    return image[:, top : top + height, left : left + width]


def _said(name: str, folders: Sequence[Path]) -> str:
    """What the text file of a thing says, in the first folder that has one."""
    found = (folder / f"{name}.txt" for folder in folders)
    return next((file.read_text(encoding="utf-8").strip() for file in found if file.is_file()), "")
