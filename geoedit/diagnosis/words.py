"""What is said beside the tables: what a site holds, what the reader must know, which versions ran."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from jaxtyping import Float
from torch import Tensor

from geoedit.diagnosis.plan import Plan
from geoedit.diagnosis.predict import Rows
from geoedit.diagnosis.result import SiteSummary
from geoedit.site import Site


def describe(
    site: Site,
    depth: int,
    states: Float[Tensor, "rows width"],
    means: Float[Tensor, "values width"],
    rows: Rows,
) -> SiteSummary:
    """Put the class means on their principal axes and measure the spread between and within classes."""
    centred = (means - means.mean(0)).double()
    left, values, _ = torch.linalg.svd(centred, full_matrices=False)
    coordinates = (left * values)[:, :3]
    total = float(values.square().sum())
    explained = (values.square() / total).tolist()[:3] if total > 0 else [0.0] * min(3, len(values))
    residuals = (states - means[rows.value]).double()
    _, template = rows.template.unique(return_inverse=True)
    sums = torch.zeros(int(template.max()) + 1, states.shape[1], dtype=torch.float64)
    sums.index_add_(0, template, states.double())
    free = states.double() - (sums / torch.bincount(template)[:, None])[template]
    class_sums = torch.zeros(rows.values, states.shape[1], dtype=torch.float64).index_add_(
        0, rows.value, free
    )
    counts = torch.bincount(rows.value, minlength=rows.values)
    between = float((counts[:, None] * (class_sums / counts[:, None]).square()).sum())
    whole = float(free.square().sum())
    return SiteSummary(
        label=str(site),
        site=site.to_dict() if not callable(site.token) else {},
        place=site.place,
        token=site.token_name,
        depth=depth,
        coordinates=coordinates.tolist(),
        explained=explained,
        between=float(centred.square().sum(1).mean()),
        within=float(residuals.square().sum(1).mean()),
        separation=between / whole if whole > 0 else 0.0,
    )


def notes(
    landing: bool,
    applied: bool,
    plan: Plan,
    drawn_templates: bool,
    sites: Sequence[SiteSummary] = (),
    *,
    familiar: bool = False,
) -> tuple[str, ...]:
    """What a reader must know before trusting the numbers; `familiar`: the odds were learned here too."""
    found = [
        "Only the first token of an answer counts, and only the next word: what a longer text would say was "
        "not looked at.",
        "Means are taken over the same sentences that are edited. New sentences may do worse.",
        "The concept's templates decide what is asked; a concept can be movable in one use and not in "
        "another.",
    ]
    if landing:
        found.append(
            "The prediction interpolates between the states that the values leave in the same sentence. "
            "Far from all of them (large scales, vectors from elsewhere) it sees less than it seems to."
        )
    else:
        found.append(
            "These templates have no answers, so that the margin says only on which side of the rival an "
            "edit lands, and success can't be seen."
        )
    found.append(
        "The probability was learned on edits of this very concept in this model, among others: how well it "
        "foresees concepts that it has not seen is told by the study in the documentation, not here."
        if familiar
        else "The probability was learned on edits of other concepts or models; how far it holds here is "
        "shown where the edits were run, and unknown where they were not."
    )
    found.extend(_geometry_notes(sites))
    if len(plan.edits) < plan.possible:
        found.append(
            f"Of {plan.possible} possible edits {len(plan.edits)} were drawn at random, the same at every "
            "site."
        )
    if drawn_templates:
        found.append("Not all templates were used; they were drawn at random to bound the work.")
    if not applied:
        found.append("No edit was run.")
    return tuple(found)


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in ("geoedit", "torch", "transformers", "numpy", "scikit-learn", "plotly"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def _geometry_notes(sites: Sequence[SiteSummary]) -> list[str]:
    """What a reader must know of the shapes before trusting them."""
    learned = [site.geometry for site in sites if site.geometry.get("kind")]
    if not learned:
        return []
    found = [
        "The manifold is learned from the values' own states, what each sentence adds taken out; between "
        "the values it is interpolated, and nobody has seen it there.",
        "Distances off the manifold are those of a value's mean state. What a state holds besides moves "
        "along.",
    ]
    bent = sum(bool(geometry.get("reliable")) for geometry in learned)
    if bent < len(learned):
        found.append(
            f"Curvature is known at {bent} of {len(sites)} sites. At the others, neighbouring values lie as "
            "far off a smooth shape as they would bend on one, as values with no geometry in common do; the "
            "number is refused and not guessed."
        )
    found.append(
        "Curvature of few values is that of the coarse shape through them: on a cycle of seven, one step "
        "turns by 51 degrees."
    )
    found.append(
        "Safe scales are predicted at a few scales up to 3, in one sentence a pair of values; what lies "
        "beyond was not looked at."
    )
    return found
