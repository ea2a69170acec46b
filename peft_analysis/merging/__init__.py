"""Several updates of one base made into one, matrix by matrix."""

from peft_analysis.merging.karcher import KarcherMean, karcher_mean
from peft_analysis.merging.linear import linear_merge_error
from peft_analysis.merging.methods import merge

__all__ = ["KarcherMean", "karcher_mean", "linear_merge_error", "merge"]
