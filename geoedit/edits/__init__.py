"""Reversible edits of a model."""

from geoedit.edits.activation import ActivationEdit, Selected
from geoedit.edits.base import Edit, EditHandle
from geoedit.edits.compose import Compose
from geoedit.edits.io import load_edit
from geoedit.edits.patch import Patch
from geoedit.edits.steer import LinearSteer
from geoedit.edits.swap import SwapMeans

__all__ = [
    "ActivationEdit",
    "Compose",
    "Edit",
    "EditHandle",
    "LinearSteer",
    "Patch",
    "Selected",
    "SwapMeans",
    "load_edit",
]
