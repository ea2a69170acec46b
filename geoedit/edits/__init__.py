"""Reversible edits of a model."""

from geoedit.edits.activation import ActivationEdit, Selected
from geoedit.edits.base import Edit, EditHandle
from geoedit.edits.compose import Compose
from geoedit.edits.geodesic import GeodesicSteer
from geoedit.edits.io import load_edit
from geoedit.edits.patch import Patch
from geoedit.edits.steer import LinearSteer
from geoedit.edits.swap import SwapMeans
from geoedit.edits.tangent import TangentSteer

__all__ = [
    "ActivationEdit",
    "Compose",
    "Edit",
    "EditHandle",
    "GeodesicSteer",
    "LinearSteer",
    "Patch",
    "Selected",
    "SwapMeans",
    "TangentSteer",
    "load_edit",
]
