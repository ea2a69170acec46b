"""Weight updates: read from adapters, checkpoints and files, applied, saved."""

from peft_analysis.updates.applied import Applied
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.read import read_update
from peft_analysis.updates.weight_update import WeightUpdate
from peft_analysis.updates.weights import Weights

__all__ = ["Applied", "Entry", "WeightUpdate", "Weights", "read_update"]
