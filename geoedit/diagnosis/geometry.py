"""What shape a concept has at one site: its manifold, how it bends, and how straight the network reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.concept import Concept
from geoedit.diagnosis.bends import Bends, of_curve, of_samples, unknown
from geoedit.diagnosis.predict import Rows, class_means
from geoedit.shapes import ConceptShape, concept_manifold, without_sentences
from manifolds.cloud.path_cloud import PathCloud
from manifolds.curvature import intrinsic_dimension
from manifolds.errors import ManifoldError

MOST_POINTS = 120
"""How many points of a manifold are drawn."""
SHEET_ROWS, SHEET_COLUMNS = 10, 12
FEWEST_VALUES = 6
"""Of fewer values no dimension is told."""
DIGITS = 7


@dataclass(frozen=True)
class Shape:
    """The geometry of a concept at one site.

    Attributes:
        states: of all prompts, what each sentence adds to all of its states taken out.
        concept: the learned manifold, or why there is none.
        bends: its second fundamental form at the values.
        places: the means of the values over these states.
        dimension: intrinsic dimension of these means: value, low, high, method, reason.
    """

    states: Float[Tensor, "rows width"]
    concept: ConceptShape
    bends: Bends
    places: Float[Tensor, "values width"]
    dimension: dict[str, Any]


def learn_shape(states: Float[Tensor, "rows width"], rows: Rows, concept: Concept) -> Shape:
    """Learn the manifold of a concept from the states of all its prompts at one site.

    What each sentence adds to all of its states is taken out first: the manifold is that of the values, and
    its noise what neither value nor sentence explains.

    Args:
        states: of all prompts.
        rows: which value and which sentence each holds.
        concept: how its values lie to one another.
    """
    clean = without_sentences(states, rows.value, rows.template)
    places = class_means(clean, rows.value, rows.values)
    found = concept_manifold(clean, rows.value, concept)
    manifold = found.manifold
    if manifold is None:
        bends = unknown(places, found.reason)
    elif isinstance(manifold, PathCloud) and manifold.dim == 1:
        error = manifold.standard_error
        known = bool(error.isfinite().all())
        bends = of_curve(places, error.to(places) if known else None, closed=manifold.closed)
    elif isinstance(manifold, PathCloud):
        bends = of_samples(places, places, dim=manifold.dim)
    else:
        bends = of_samples(clean, places, dim=manifold.dim)
    return Shape(clean, found, bends, places, dimension(places))


def dimension(means: Float[Tensor, "values width"]) -> dict[str, Any]:
    """Return the intrinsic dimension of the class means by local PCA, with an interval, or why not.

    A third of the values, at least three, are a neighbourhood. Few values leave the size of a neighbourhood
    open, so the interval holds what neighbourhoods of half of that and of all values say too.
    """
    count = len(means)
    if count < FEWEST_VALUES:
        return _no_dimension(
            f"{count} values are too few to tell a dimension; {FEWEST_VALUES} or more would do"
        )
    if float((means - means[0]).abs().max()) == 0:
        return _no_dimension("the values do not differ at this site")
    middle = min(max(3, count // 3), 30)
    try:
        found = [
            intrinsic_dimension(means, neighbors=neighbors)
            for neighbors in (middle, max(3, middle // 2), count - 1)
        ]
    except ManifoldError as error:
        return _no_dimension(str(error))
    most = min(middle - 1, means.shape[1])
    full = found[0].value >= most
    return {
        "value": None if full else found[0].value,
        "low": min(one.low for one in found),
        "high": max(one.high for one in found),
        "method": f"local PCA of {count} class means, {middle} neighbours",
        "reason": f"neighbourhoods of {middle} values fill all of their {most} dimensions" if full else "",
    }


def site_geometry(
    shape: Shape,
    functional: dict[str, Any],
    axes: Float[Tensor, "axes width"],
    centre: Float[Tensor, " width"],
) -> dict[str, Any]:
    """Return the geometry of a site as plain JSON values; None where a number is not known.

    Keys: dimension (value, low, high, method, reason), closed, curvature and radius (1/length and length),
    snr, reliable, reason, reach, noise, kind (of the manifold), note, functional (ratio, radius, first, norm,
    edits, reason), path and path_shape (points of the manifold on the axes; how many there are, or rows and
    columns of a sheet).

    Args:
        shape: from `learn_shape`.
        functional: from `straightness.functional_curvature`.
        axes: the principal axes of the class means.
        centre: of the class means.
    """
    manifold, bends = shape.concept.manifold, shape.bends
    curve = isinstance(manifold, PathCloud) and manifold.dim == 1
    points, layout = _points(shape)
    placed = (points.double() - centre.double()) @ axes.double().mT
    return {
        "dimension": {
            name: plain(entry) if isinstance(entry, float) else entry
            for name, entry in shape.dimension.items()
        },
        "kind": None if manifold is None else manifold.kind,
        "closed": manifold.closed if curve and isinstance(manifold, PathCloud) else None,
        "curvature": plain(bends.curvature),
        "radius": plain(1 / bends.curvature) if bends.curvature > 0 else None,
        "snr": plain(bends.snr),
        "reliable": bends.reliable,
        "reason": bends.reason,
        "note": shape.concept.note,
        "reach": None if manifold is None else plain(manifold.reach),
        "noise": None if manifold is None else plain(manifold.noise),
        "functional": {
            name: plain(entry) if isinstance(entry, float) else entry for name, entry in functional.items()
        },
        "path": [[plain(x) for x in row] for row in placed.tolist()],
        "path_shape": layout,
    }


def plain(number: float | None) -> float | None:
    """A number for JSON with seven digits; None where it is not finite."""
    if number is None or not math.isfinite(number):
        return None
    return float(f"{number:.{DIGITS}g}")


def _points(shape: Shape) -> tuple[Tensor, list[int]]:
    """Points to draw the manifold by, and how they lie: along a curve, in rows and columns, or loose."""
    manifold = shape.concept.manifold
    if manifold is None:
        return shape.places[:0], [0]
    if not isinstance(manifold, PathCloud) or manifold.dim > 2:
        points = manifold.projx(shape.places[:MOST_POINTS])
        return points, [len(points)]
    places = manifold.coordinates.to(shape.places)
    if manifold.dim == 1:
        start = float(places[0, 0])
        end = start + manifold.period if manifold.closed else float(places[-1, 0])
        along = torch.linspace(start, end, MOST_POINTS, dtype=places.dtype, device=places.device)
        return manifold.at(along[:, None]), [MOST_POINTS]
    low, high = places.amin(0), places.amax(0)
    steps = [
        torch.linspace(float(a), float(b), count, dtype=places.dtype, device=places.device)
        for a, b, count in zip(low, high, (SHEET_ROWS, SHEET_COLUMNS), strict=True)
    ]
    return manifold.at(torch.cartesian_prod(*steps)), [SHEET_ROWS, SHEET_COLUMNS]


def _no_dimension(reason: str) -> dict[str, Any]:
    return {"value": None, "low": None, "high": None, "method": "local PCA of class means", "reason": reason}
