"""What the study edits and traces, how often, and where it writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from experiments.edit_forensics.editors import Editing

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass(frozen=True)
class Settings:
    """The whole study, as it is published.

    Attributes:
        models: built-in models.
        methods: stand-ins of editors, by name.
        runs: pairs of a number of edits and how many sets of so many edits are drawn.
        dtypes: in which base and edited weights are stored.
        editing: how the stand-ins edit.
        texts: sentences for C: so many for the editor, and as many others for the tracer.
        templates: of each relation, given to the tracer; the edits are made with any of all six.
        decoys: how many names that nobody edited are made up.
        controls: kinds of updates that edit nobody. control_seeds: of their training.
        control_steps: steps of their training.
        seed: of all draws.
        folder: where the results go. cache: where finished cases are kept, so that a run can go on.
    """

    models: tuple[str, ...] = ("almanac-gpt2", "almanac-llama")
    methods: tuple[str, ...] = ("ROME", "MEMIT", "AlphaEdit")
    runs: tuple[tuple[int, int], ...] = ((1, 4), (10, 1), (100, 1))
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    editing: Editing = field(default_factory=Editing)
    texts: int = 2000
    templates: int = 2
    decoys: int = 80
    controls: tuple[str, ...] = ("rounding", "LoRA", "LoRA, one matrix", "fine-tune", "fine-tune, one matrix")
    control_seeds: tuple[int, ...] = (0,)
    control_steps: int = 40
    seed: int = 0
    folder: Path = RESULTS
    cache: Path | None = None

    @classmethod
    def small(cls, folder: Path) -> Settings:
        """A slice that takes about a minute."""
        return replace(
            cls(),
            models=("almanac-gpt2",),
            runs=((1, 1), (4, 1)),
            dtypes=("float32",),
            texts=300,
            templates=1,
            decoys=30,
            controls=("rounding", "LoRA, one matrix"),
            control_seeds=(0,),
            control_steps=3,
            folder=folder,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, without places on this machine."""
        return {**asdict(self), "folder": self.folder.name, "cache": None}
