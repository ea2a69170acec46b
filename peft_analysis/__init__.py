"""Weight updates: what an adapter, a fine-tune or an edit changed, read from weights alone.

This floor stands on `manifolds` and knows parameters by their names, not what a model computes with them.
"""

from peft_analysis.errors import UpdateError
from peft_analysis.updates import Entry, Weights, WeightUpdate

__all__ = ["Entry", "UpdateError", "WeightUpdate", "Weights"]
