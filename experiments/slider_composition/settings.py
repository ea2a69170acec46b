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
        attributes: of which a slider each is trained.
        twin: the attribute of which a second slider is trained from another seed.
        training_steps: of each slider. batch_size: of training.
        prompts: what is drawn; none of them is among the training prompts.
        seeds: of the noise of images.
        scale: at which sliders are put together, in their own units.
        step: at which first-order effects are measured.
        rank: to which truncated compositions are cut.
        sampling_steps: of an image. guidance: of an image. rows: images in one pass.
        seed: of the first slider's training; the next ones have the next seeds.
        folder: where the results go. cache: where sliders and pictures are kept, so that a run can go on.
    """

    families: tuple[str, ...] = ("shapes-unet", "shapes-flow")
    attributes: tuple[str, ...] = ("size", "thickness", "brightness", "hue", "rotation")
    twin: str = "size"
    training_steps: int = 300
    batch_size: int = 8
    prompts: tuple[str, ...] = ("an orange bar on the left", "a green ellipse at the top")
    seeds: tuple[int, ...] = (100, 101, 102, 103)
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
            attributes=("size", "brightness", "thickness"),
            training_steps=4,
            batch_size=4,
            prompts=("an orange bar on the left",),
            seeds=(100, 101),
            sampling_steps=4,
            folder=folder,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, without places on this machine."""
        return {**asdict(self), "folder": self.folder.name, "cache": None}
