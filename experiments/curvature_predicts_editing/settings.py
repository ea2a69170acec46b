"""What the study looks at, how much of it, and with which seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.curvature_predicts_editing.learn import Learning

RESULTS = Path(__file__).parents[2] / "docs" / "results"
ALMANAC = (
    "weekdays",
    "months",
    "hours",
    "numbers",
    "sizes",
    "temperatures",
    "categories",
    "places",
    "person-birthplace",
    "person-profession",
    "city-country",
    "country-language",
    "country-currency",
    "country-capital",
)


@dataclass(frozen=True)
class Settings:
    """The whole study, as it is published.

    Attributes:
        models: built-in models. concepts: of the almanac.
        scales: how far each vector is pushed.
        pairs: pairs of values drawn for each concept, the same in every model.
        sentences: edits in a cell at most, each of another sentence (or form of the value).
        max_prompts: prompts of a concept at most, all of which are derived.
        resamples: of the bootstrap.
        seed: of all draws.
        learning: how the trees are learned.
        parts: what else to run and tell: the comparison of edits, the sentence encoder.
        folder: where the results go.
    """

    models: tuple[str, ...] = ("almanac-gpt2", "almanac-llama")
    concepts: tuple[str, ...] = ALMANAC
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
    pairs: int = 8
    sentences: int = 5
    max_prompts: int = 300
    resamples: int = 200
    seed: int = 0
    learning: Learning = field(default_factory=Learning)
    parts: tuple[str, ...] = ("comparison", "encoder")
    folder: Path = RESULTS

    @classmethod
    def small(cls, folder: Path = RESULTS) -> Settings:
        """A slice that takes well under a minute: three concepts, one model, learned from one another."""
        return replace(
            cls(),
            models=("almanac-gpt2",),
            concepts=("weekdays", "sizes", "country-capital"),
            scales=(0.5, 1.0, 2.0),
            pairs=4,
            sentences=3,
            max_prompts=60,
            resamples=20,
            learning=Learning(trees=30, depth=3, smallest_leaf=30, edits=2_000),
            parts=(),
            folder=folder,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, without the folder's place on this machine."""
        return {**asdict(self), "folder": self.folder.name}
