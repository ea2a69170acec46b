"""How straight the rest of the network reads a straight edit: functional curvature from site to answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.anatomy import anatomy
from geoedit.concept import Prompt
from geoedit.diagnosis.plan import MEAN_DIFFERENCE, PlannedEdit
from geoedit.errors import EditError
from geoedit.site import Site
from manifolds.curvature import functional
from manifolds.errors import ManifoldError

SAMPLE = 24
"""How many edits are looked at."""
EPSILON = 0.5
"""The share of the first-order term that the second may reach within the radius."""
LENGTHS = 3
"""From how many lengths of prompts they are drawn: each costs passes of its own."""


def sample_edits(
    edits: Sequence[PlannedEdit], lengths: Sequence[int], *, seed: int, count: int = SAMPLE
) -> list[PlannedEdit]:
    """Draw mean differences whose functional curvature is taken, the same ones at every site.

    No value pair comes twice before all have come, and prompts are of the three commonest lengths, if there
    are more.

    Args:
        edits: the plan's.
        lengths: how many tokens each prompt has.
        seed: of the draw.
        count: how many are drawn, if there are so many.
    """
    differences = [edit for edit in edits if edit.kind == MEAN_DIFFERENCE]
    sizes, frequency = np.unique([lengths[edit.source] for edit in differences], return_counts=True)
    kept = set(sizes[np.argsort(-frequency, kind="stable")][:LENGTHS].tolist())
    order = np.random.default_rng(seed).permutation(len(differences))
    drawn = [differences[place] for place in order if lengths[differences[place].source] in kept]
    first = {(edit.from_value, edit.to_value): edit for edit in reversed(drawn)}
    pairs = [edit for edit in drawn if first[edit.from_value, edit.to_value] is edit]
    chosen = set(map(id, pairs))
    return (pairs + [edit for edit in drawn if id(edit) not in chosen])[:count]


def functional_curvature(
    model: nn.Module,
    tokenizer: Any,
    site: Site,
    prompts: Sequence[Prompt],
    lengths: Sequence[int],
    edits: Sequence[PlannedEdit],
    states: Float[Tensor, "rows width"],
    means: Float[Tensor, "values width"],
    answers: Sequence[int],
) -> dict[str, Any]:
    """Return the medians over edits of the functional curvature along their vectors at scale 1.

    The map takes the state at the site to the logits of the concept's answers, their mean taken off (without
    answers to all logits, their mean taken off; in a model without logits to its last state); its first and
    second derivatives along the vector are exact, by two nested forward derivatives.

    Keys: ratio |f″|/|f′|, in units of 1/scale; radius, the scale up to which the second-order term stays
    under half of the first, 1/ratio; first |f′|; norm, what lengths are measured in; edits, how many; reason,
    why the others are None.

    Args:
        model: it is left as it was.
        tokenizer: its tokenizer.
        site: one token of each prompt.
        prompts: all of them.
        lengths: how many tokens each has.
        edits: from `sample_edits`.
        states: of all prompts at the site.
        means: of the values at the site.
        answers: token ids of the answers; empty without.
    """
    from geoedit.pullback import from_site  # it stands on this package, which must be there first

    head = anatomy(model).unembedding is not None
    norm = "logits of the answers" if answers else "logits" if head else "last state"
    found: dict[str, Any] = {"ratio": None, "radius": None, "first": None, "norm": norm, "edits": 0}
    ratios, radii, sizes = [], [], []
    try:
        for length in sorted({lengths[edit.source] for edit in edits}):
            some = [edit for edit in edits if lengths[edit.source] == length]
            rows = torch.tensor([edit.source for edit in some])
            vectors = torch.stack([means[edit.to_value] - means[edit.from_value] for edit in some])
            rest = from_site(model, tokenizer, [prompts[edit.source] for edit in some], site)
            both = functional(_readout(rest.f, answers, head), states[rows], vectors.to(states))
            ratios.append(both.ratio.detach().double().cpu())
            radii.append(both.radius(EPSILON).detach().double().cpu())
            sizes.append(both.first_norm.detach().double().cpu())
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError, ManifoldError, EditError) as error:
        return found | {
            "reason": f"no second derivative through {type(model).__name__}: {_first_line(error)}"
        }
    ratio, radius, size = (torch.cat(parts) for parts in (ratios, radii, sizes))
    # Where the site does not reach the output, there is nothing to be straight or not.
    moved = size > 0
    if not bool(moved.any()):
        return found | {"edits": len(size), "reason": "the vectors do not change the output at this site"}
    return found | {
        "ratio": float(ratio[moved].median()),
        "radius": float(radius[moved].median()),
        "first": float(size[moved].median()),
        "edits": len(size),
        "reason": "",
    }


def _readout(
    rest: Callable[[Tensor], Tensor], answers: Sequence[int], head: bool
) -> Callable[[Tensor], Tensor]:
    """The numbers whose change is measured."""

    def read(states: Tensor) -> Tensor:
        output = rest(states)
        output = output if output.dtype == torch.float64 else output.float()
        if answers:
            output = output[:, torch.tensor(answers, device=output.device)]
        return output - output.mean(1, keepdim=True) if head else output

    return read


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
