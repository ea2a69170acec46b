"""What the study trains and looks at, how much of it, and with which seeds."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "results"


@dataclass(frozen=True)
class Method:
    """A way of training.

    Attributes:
        name: what tables call it.
        kind: "lora", "dora", "relora", "full" or "low rank adam".
        rank: of the adapter; 0 for full fine-tuning.
        rates: the learning rates that are tried with the first seed, the same number for every method.
        stages: how often an adapter is merged and begun anew; 1 but for ReLoRA.
    """

    name: str
    kind: str
    rank: int
    rates: tuple[float, ...]
    stages: int = 1


FAST, MIDDLE, SLOW = (5e-3, 1e-2, 2e-2), (2.5e-3, 5e-3, 1e-2), (1.25e-3, 2.5e-3, 5e-3)
RATES = {1: FAST, 2: FAST, 4: MIDDLE, 8: MIDDLE, 16: SLOW, 32: SLOW, 64: SLOW}
METHODS = (
    *(Method(f"LoRA r {rank}", "lora", rank, rates) for rank, rates in RATES.items()),
    Method("DoRA r 8", "dora", 8, MIDDLE),
    Method("ReLoRA 4 × r 8", "relora", 8, MIDDLE, stages=4),
    Method("LowRankAdam r 8", "low rank adam", 8, (3.5e-3, 7e-3, 1.4e-2)),
    Method("full", "full", 0, (2.5e-4, 5e-4, 1e-3)),
)


@dataclass(frozen=True)
class Settings:
    """The whole study, as it is published.

    Attributes:
        models: built-in models.
        methods: ways of training.
        steps: of every run, all stages together.
        batch: sentences a step.
        warmup: steps until the full learning rate, after a start or a restart; it falls linearly to zero.
        alpha: LoRA's α for each unit of rank, so that every rank has this scaling.
        seeds: of the facts, of the adapters' start and of the batches; the first chooses the rates.
        judged: how many of the seeds get verdicts, which take longer than everything else that is read.
        known: sentences of each family that tell what is forgotten, at most.
        matrices: how many of the matrices that all methods train are read; all if None.
        runs: where trained weights lie; a run that is there is not repeated.
        folder: where the results go.
    """

    models: tuple[str, ...] = ("almanac-gpt2", "almanac-llama")
    methods: tuple[Method, ...] = METHODS
    steps: int = 120
    batch: int = 32
    warmup: int = 10
    alpha: int = 2
    seeds: tuple[int, ...] = (0, 1, 2)
    judged: int = 1
    known: int = 100
    matrices: int | None = None
    runs: Path = field(default_factory=lambda: Path("low-rank-vs-full-rank-runs"))
    folder: Path = RESULTS

    @classmethod
    def small(cls, folder: Path, *, runs: Path | None = None) -> Settings:
        """A slice that takes seconds: one model, two methods, one rate, a few steps."""
        methods = (
            Method("LoRA r 4", "lora", 4, (5e-3,)),
            Method("full", "full", 0, (1e-3,)),
        )
        return replace(
            cls(),
            models=("almanac-gpt2",),
            methods=methods,
            steps=4,
            batch=16,
            warmup=1,
            seeds=(0,),
            known=5,
            matrices=2,
            runs=folder / "runs" if runs is None else runs,
            folder=folder,
        )
