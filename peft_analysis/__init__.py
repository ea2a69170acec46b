"""Weight updates: what an adapter, a fine-tune or an edit changed, read from weights alone.

This floor stands on `manifolds` and knows parameters by their names, not what a model computes with them.
"""

from peft_analysis.analyse import analyse
from peft_analysis.base_svd import BaseSVD, SVDCache
from peft_analysis.compare import Comparison, compare
from peft_analysis.directions import (
    DirectionChange,
    DirectionCorrelation,
    direction_change,
    direction_correlation,
)
from peft_analysis.errors import UpdateError
from peft_analysis.forensics import EditTrace, trace
from peft_analysis.intruders import Intruders, IntruderSide, intruders
from peft_analysis.matrix_verdict import MatrixVerdict
from peft_analysis.merging import KarcherMean, karcher_mean, linear_merge_error, merge
from peft_analysis.mitigation import intruder_part, mitigate
from peft_analysis.noise import NoiseEdge, RankEstimate, noise_edge, true_rank
from peft_analysis.predict import Prediction, predict
from peft_analysis.rank_path import RankPath, effective_rank_slope, rank_path
from peft_analysis.report import Report
from peft_analysis.spectrum import Spectrum, singular_values, spectrum
from peft_analysis.subspaces import overlap, overlap_grid, principal_angles
from peft_analysis.updates import Applied, Entry, Weights, WeightUpdate, read_update
from peft_analysis.verdict import Verdict, verdict

__all__ = [
    "Applied",
    "BaseSVD",
    "Comparison",
    "DirectionChange",
    "DirectionCorrelation",
    "EditTrace",
    "Entry",
    "IntruderSide",
    "Intruders",
    "KarcherMean",
    "MatrixVerdict",
    "NoiseEdge",
    "Prediction",
    "RankEstimate",
    "RankPath",
    "Report",
    "SVDCache",
    "Spectrum",
    "UpdateError",
    "Verdict",
    "WeightUpdate",
    "Weights",
    "analyse",
    "compare",
    "direction_change",
    "direction_correlation",
    "effective_rank_slope",
    "intruder_part",
    "intruders",
    "karcher_mean",
    "linear_merge_error",
    "merge",
    "mitigate",
    "noise_edge",
    "overlap",
    "overlap_grid",
    "predict",
    "principal_angles",
    "rank_path",
    "read_update",
    "singular_values",
    "spectrum",
    "trace",
    "true_rank",
    "verdict",
]
