"""Change or read one thing inside a neural network, and know beforehand whether it will work."""

from geoedit import algebra, pullback, sliders, testbeds
from geoedit.activations import Activations, Moments, Statistics, collect, run_with, statistics
from geoedit.anatomy import Anatomy, Block, Location, Stack, anatomy
from geoedit.concept import Concept, Prompt, Template, concepts
from geoedit.diagnosis.result import Diagnosis
from geoedit.diagnosis.run import diagnose
from geoedit.edits import (
    ActivationEdit,
    Compose,
    Edit,
    EditHandle,
    GeodesicSteer,
    LinearSteer,
    Patch,
    SwapMeans,
    TangentSteer,
    load_edit,
)
from geoedit.errors import EditError
from geoedit.functional import functional_curvature
from geoedit.loading import load_model
from geoedit.shapes import ConceptShape, concept_manifold
from geoedit.site import Site

__version__ = "0.1.0"

__all__ = [
    "ActivationEdit",
    "Activations",
    "Anatomy",
    "Block",
    "Compose",
    "Concept",
    "ConceptShape",
    "Diagnosis",
    "Edit",
    "EditError",
    "EditHandle",
    "GeodesicSteer",
    "LinearSteer",
    "Location",
    "Moments",
    "Patch",
    "Prompt",
    "Site",
    "Stack",
    "Statistics",
    "SwapMeans",
    "TangentSteer",
    "Template",
    "algebra",
    "anatomy",
    "collect",
    "concept_manifold",
    "concepts",
    "diagnose",
    "functional_curvature",
    "load_edit",
    "load_model",
    "pullback",
    "run_with",
    "sliders",
    "statistics",
    "testbeds",
]
