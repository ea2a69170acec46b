"""Does a matrix's spectrum tell how well LoRA on it learns?

Run with ``python -m experiments.spectral_entropy_predicts_peft``. `run(Settings())` is the whole study,
`run(Settings.small(folder))` a slice of it.
"""

from experiments.spectral_entropy_predicts_peft.settings import Settings
from experiments.spectral_entropy_predicts_peft.study import run

__all__ = ["Settings", "run"]
