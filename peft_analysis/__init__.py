"""Weight updates: what an adapter, a fine-tune or an edit changed, read from weights alone.

This floor stands on `manifolds` and knows parameters by their names, not what a model computes with them.
"""

from peft_analysis.analyse import analyse
from peft_analysis.errors import UpdateError
from peft_analysis.intruders import intruders
from peft_analysis.report import Report
from peft_analysis.spectrum import Spectrum, singular_values, spectrum
from peft_analysis.subspaces import overlap, overlap_grid, principal_angles
from peft_analysis.updates import Entry, Weights, WeightUpdate, read_update

__all__ = [
    "Entry",
    "Report",
    "Spectrum",
    "UpdateError",
    "WeightUpdate",
    "Weights",
    "analyse",
    "intruders",
    "overlap",
    "overlap_grid",
    "principal_angles",
    "read_update",
    "singular_values",
    "spectrum",
]
