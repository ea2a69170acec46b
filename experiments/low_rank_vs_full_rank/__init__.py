"""Is a low-rank update another kind of thing? `python -m experiments.low_rank_vs_full_rank` asks.

The almanac models are taught new facts by LoRA of ranks 1 to 64, DoRA, ReLoRA, `LowRankAdam` and full
fine-tuning; what each changed is read from the weights. `run(Settings())` is the whole study,
`run(Settings.small(folder))` a slice of it.
"""

from experiments.low_rank_vs_full_rank.settings import Settings
from experiments.low_rank_vs_full_rank.study import run

__all__ = ["Settings", "run"]
