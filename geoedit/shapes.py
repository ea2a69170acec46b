"""The manifold of a concept, learned from the states that its values leave at one site."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.concept import Concept
from geoedit.errors import EditError
from manifolds.cloud.learned import LearnedManifold
from manifolds.cloud.path_cloud import PathCloud
from manifolds.cloud.point_cloud import PointCloud
from manifolds.errors import ManifoldError

PATHS = ("cycle", "line")
SHEETS = ("grid", "map")
ROUNDS = 20
"""How often sentence and value effects are taken in turn, where not every value stands in every sentence."""


@dataclass(frozen=True)
class ConceptShape:
    """The manifold that a concept's states form, or why none could be learned.

    Attributes:
        manifold: the manifold; None where the samples do not allow one.
        reason: why there is none; empty where there is one.
        note: where the samples disagree with the concept's kind; empty where they do not.
    """

    manifold: LearnedManifold | None
    reason: str = ""
    note: str = ""


def concept_manifold(
    states: Float[Tensor, "n D"],
    labels: Int[Tensor, " n"],
    concept: Concept,
    *,
    sentences: Int[Tensor, " n"] | None = None,
    closed: bool | None = None,
    dim: int | None = None,
) -> ConceptShape:
    """Learn the manifold of a concept from states at one site.

    Cycles and lines become a curve through the means of their values, grids and maps a sheet over their
    coordinates (`PathCloud`); what has no order becomes a `PointCloud` of all states. A failure of the
    samples, such as too few of them, is an answer and no error: `manifold` is then None and `reason` says
    why.

    A sentence moves all of its states together. With `sentences` that common part is taken out and the mean
    over all sentences put back, so that the noise of the manifold is what neither value nor sentence
    explains.

    Args:
        states: one row a prompt.
        labels: the number of each prompt's value in `concept.values`.
        concept: its kind and coordinates say how the values lie to one another.
        sentences: the number of each prompt's template; None: the states are taken as they are.
        closed: whether a cycle's or line's curve is closed; None: the samples decide, and `note` says where
            they disagree with the concept's kind.
        dim: the dimension of a point cloud; None: estimated.

    Raises:
        EditError: states that are not finite, labels or sentences that do not fit them, a value without
            states.

    Example:
        >>> from geoedit import Concept, Template
        >>> angle = torch.arange(24, dtype=torch.float64) % 12 * (torch.pi / 6)
        >>> states = torch.stack([3 * angle.cos(), 3 * angle.sin()], 1)
        >>> hours = Concept("hours", [str(h) for h in range(12)], [Template("at {value}")], "cycle")
        >>> shape = concept_manifold(states, torch.arange(24) % 12, hours)
        >>> shape.manifold.closed, shape.note
        (True, '')
    """
    check_samples(states, labels, sentences, len(concept.values), concept.name)
    if sentences is not None:
        states = without_sentences(states, labels, sentences)
    try:
        if concept.kind in PATHS:
            manifold = PathCloud.fit(states, labels, closed=closed)
            return ConceptShape(manifold, note=_disagreement(manifold, concept, closed))
        if concept.kind in SHEETS and concept.coordinates is not None:
            places = torch.tensor(concept.coordinates, dtype=torch.float64).reshape(len(concept.values), -1)
            fitted = places.to(device=states.device, dtype=_wide(states.dtype))
            return ConceptShape(PathCloud.fit(states, labels, coordinates=fitted))
        return ConceptShape(PointCloud.fit(states, dim=dim))
    except ManifoldError as error:
        return ConceptShape(None, reason=str(error))


def without_sentences(
    states: Float[Tensor, "n D"], labels: Int[Tensor, " n"], sentences: Int[Tensor, " n"]
) -> Float[Tensor, "n D"]:
    """Take out what each sentence adds to all of its states, and keep the mean over all sentences.

    The model is `state = value + sentence + rest`, fitted by least squares: value and sentence means are
    taken in turn until they stand still, at once where every value stands in every sentence.
    """
    wide = states.to(_wide(states.dtype))
    _, sentence = sentences.to(states.device).unique(return_inverse=True)
    _, value = labels.to(states.device).unique(return_inverse=True)
    offsets = torch.zeros(int(sentence.max()) + 1, wide.shape[1], dtype=wide.dtype, device=wide.device)
    size = float(torch.linalg.vector_norm(wide - wide.mean(0)))
    for _ in range(ROUNDS):
        left = wide - offsets[sentence]
        step = group_means(left - group_means(left, value)[value], sentence)
        offsets = offsets + step
        if float(torch.linalg.vector_norm(step[sentence])) <= 1e-6 * size:
            break
    added = offsets[sentence]
    return (wide - added + added.mean(0)).to(states.dtype)


def group_means(rows: Float[Tensor, "n D"], group: Int[Tensor, " n"]) -> Float[Tensor, "groups D"]:
    """The mean of the rows of each group; groups are numbered from 0, and none is empty."""
    count = torch.bincount(group)
    sums = torch.zeros(len(count), rows.shape[1], dtype=rows.dtype, device=rows.device)
    return sums.index_add_(0, group, rows) / count[:, None]


def check_samples(states: Tensor, labels: Tensor, sentences: Tensor | None, values: int, name: str) -> None:
    """Refuse states, labels and sentences that do not belong together.

    Raises:
        EditError: naming what is wrong.
    """
    if states.dim() != 2 or not states.is_floating_point() or len(states) == 0:
        raise EditError(
            f"states have shape {tuple(states.shape)} and dtype {states.dtype}; give one floating-point row "
            "a prompt."
        )
    for given, what in ((labels, "labels"), (sentences, "sentences")):
        if given is not None and given.shape != states.shape[:1]:
            raise EditError(
                f"{what} have shape {tuple(given.shape)} for {len(states)} states; give one number a state."
            )
    if not bool(torch.isfinite(states).all()):
        bad = (~torch.isfinite(states)).any(1)
        raise EditError(
            f"{int(bad.sum())} of {len(states)} states hold NaN or infinity, the first in row "
            f"{int(bad.nonzero()[0])}; leave them out, or load the model in float32."
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= values:
        raise EditError(
            f"labels run from {low} to {high}; concept {name!r} has the values 0 to {values - 1}."
        )
    absent = (torch.bincount(labels, minlength=values) == 0).nonzero()[:, 0].tolist()
    if absent:
        raise EditError(
            f"concept {name!r}: {len(absent)} of {values} values have no state, the first is number "
            f"{absent[0]}; collect prompts of every value, or make a concept of those that you have."
        )


def _disagreement(manifold: PathCloud, concept: Concept, asked: bool | None) -> str:
    """Say where the samples' curve is not what the concept's kind says."""
    if asked is not None or manifold.closed == (concept.kind == "cycle"):
        return ""
    found, expected = ("a closed", "open") if manifold.closed else ("an open", "closed")
    return (
        f"{concept.name} is a {concept.kind}, whose curve would be {expected}, but its states lie on "
        f"{found} one"
    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
