"""What the study looks at."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass(frozen=True)
class Settings:
    """The settings of the study.

    Attributes:
        families: built-in pipelines.
        attributes: of which a slider each is trained, with the seed of its training. They differ: sliders of
            one seed begin with the same right factors, and keep most of them.
        twin: the attribute of which a second slider is trained, and its seed.
        training_steps: of each slider. batch_size: of training. slider_guidance: how far scale 1 goes along
            the difference of two words.
        prompts: what is drawn; none of them is among the training prompts, or names what a slider moves.
        seeds: of the noise of images.
        scale: at which sliders are put together, in their own units.
        step: at which first-order effects are measured.
        rank: to which truncated compositions are cut.
        sampling_steps: of an image. guidance: of an image. rows: images in one pass.
        seed: of the random rotations.
        folder: where the results go. cache: where sliders and pictures are kept, so that a run can go on.
    """

    families: tuple[str, ...] = ("shapes-unet", "shapes-flow")
    attributes: tuple[tuple[str, int], ...] = (
        ("size", 1),
        ("thickness", 2),
        ("brightness", 0),
        ("hue", 3),
        ("rotation", 4),
    )
    twin: tuple[str, int] = ("size", 0)
    training_steps: int = 200
    batch_size: int = 8
    slider_guidance: float = 1.0
    prompts: tuple[str, ...] = ("a bar on the left", "an ellipse at the top")
    seeds: tuple[int, ...] = (100, 101, 102)
    scale: float = 1.0
    step: float = 0.5
    rank: int = 4
    sampling_steps: int = 20
    guidance: float = 3.0
    rows: int = 48
    seed: int = 0
    folder: Path = RESULTS
    cache: Path | None = None

    @classmethod
    def small(cls, folder: Path) -> Settings:
        """A slice for a look: two sliders of one pipeline, hardly trained."""
        return replace(
            cls(),
            families=("shapes-unet",),
            attributes=(("size", 1), ("brightness", 0), ("thickness", 2)),
            training_steps=4,
            batch_size=4,
            prompts=("a bar on the left",),
            seeds=(100, 101),
            sampling_steps=4,
            folder=folder,
        )

    @property
    def labels(self) -> list[str]:
        """The attributes' names."""
        return [name for name, _ in self.attributes]

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, without places on this machine."""
        return {**asdict(self), "folder": self.folder.name, "cache": None}
