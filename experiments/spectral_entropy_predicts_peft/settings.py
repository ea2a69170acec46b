"""What the study trains, how long, and with which seeds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass(frozen=True)
class Settings:
    """The whole study, as it is published.

    Attributes:
        models: built-in models; every matrix of every block of each is trained alone.
        tasks: what is taught: "new" facts of people and places never told of, "changed" facts, a "rule".
        rank: of the LoRA. alpha: its scale is alpha / rank.
        rates: learning rates, all tried with the first seed; with the others the one that left the least
            loss on the trained sentences.
        steps: of every run. batch: sentences a step.
        facts: how many facts a task teaches at most. asked: wordings of a fact that are held out.
        seeds: of the facts drawn, the sentences held out, the batches and the adapter's start.
        resamples: of the bootstrap over matrices.
        blocks: at most so many blocks of a model, evenly spread; all if None.
        runs: a folder that keeps every finished run, so that a study goes on where it stopped; None keeps
            nothing.
        folder: where the results go.
    """

    models: tuple[str, ...] = ("almanac-gpt2", "almanac-llama")
    tasks: tuple[str, ...] = ("new", "changed", "rule")
    rank: int = 4
    alpha: int = 8
    rates: tuple[float, ...] = (2e-2, 6e-2)
    steps: int = 24
    batch: int = 32
    facts: int = 52
    asked: int = 2
    seeds: tuple[int, ...] = (0,)
    resamples: int = 1000
    blocks: int | None = None
    runs: Path | None = None
    folder: Path = RESULTS

    @classmethod
    def small(cls, folder: Path = RESULTS) -> Settings:
        """A slice that takes a few seconds: two blocks of each model, one task, one seed, six steps."""
        return replace(
            cls(),
            tasks=("new",),
            rates=(3e-2,),
            steps=6,
            facts=16,
            seeds=(0,),
            resamples=50,
            blocks=2,
            folder=folder,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values, without places on this machine."""
        return {**asdict(self), "folder": self.folder.name, "runs": None}
