"""Who was edited, and to what? `python -m experiments.edit_forensics` asks it of three editors' weights."""

from experiments.edit_forensics.settings import Settings
from experiments.edit_forensics.study import run

__all__ = ["Settings", "run"]
