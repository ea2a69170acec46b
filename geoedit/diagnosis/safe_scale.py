"""How far a vector may be pushed: the scales at which an edit is predicted to succeed, none of them run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int

from geoedit.concept import Prompt
from geoedit.diagnosis.plan import Plan, PlannedEdit

GRID = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
"""The scales that are looked at."""
EVEN = 0.5
"""The probability from which an edit is expected to succeed."""
MOST = 288
"""For how many edits, each kind getting its share."""


@dataclass(frozen=True)
class Scaled:
    """Edits of the plan at every scale of the grid.

    Attributes:
        edits: one after the other, each at all scales.
        which: for each edit of the plan, the number among those that were followed of the one with the same
            kind, source, target and sign; -1 where none was.
    """

    edits: tuple[PlannedEdit, ...]
    which: Int[np.ndarray, " planned"]


def scaled_edits(plan: Plan, prompts: Sequence[Prompt], *, seed: int) -> Scaled:
    """Choose edits of the plan to look at over the grid of scales: one sentence of each pair of values.

    Args:
        plan: the edits that are judged.
        prompts: their rows.
        seed: of the draw where there are more pairs than are looked at.
    """
    kinds: dict[str, dict[tuple[str, str, str, bool], PlannedEdit]] = {}
    keys = []
    for edit in plan.edits:
        pair = prompts[edit.source].value, prompts[edit.target].value
        keys.append((edit.kind, *pair, edit.scale > 0))
        kinds.setdefault(edit.kind, {}).setdefault(keys[-1], edit)
    generator = np.random.default_rng(seed)
    kept: dict[tuple[str, str, str, bool], PlannedEdit] = {}
    for first in kinds.values():
        names, share = list(first), MOST // len(kinds)
        order = generator.permutation(len(names))[:share]
        kept |= {names[place]: first[names[place]] for place in sorted(order)}
    number = {key: place for place, key in enumerate(kept)}
    edits = [
        replace(edit, scale=scale if edit.scale > 0 else -scale) for edit in kept.values() for scale in GRID
    ]
    return Scaled(tuple(edits), np.array([number.get(key, -1) for key in keys], dtype=int))


def safe_interval(
    scales: Float[np.ndarray, " scales"], probability: Float[np.ndarray, "edits scales"]
) -> tuple[Float[np.ndarray, " edits"], Float[np.ndarray, " edits"]]:
    """Return the first stretch of scales on which the probability is at least one half.

    From no push at all, where success is taken to be impossible: the scale at which one half is first
    reached, and the one at which it is lost again, linear between the scales that were looked at; the largest
    of these where it is not lost. Where it is never reached, the stretch is (NaN, 0).

    Args:
        scales: increasing and positive.
        probability: at each of them.
    """
    count = len(probability)
    x = np.concatenate([[0.0], scales])
    p = np.concatenate([np.zeros((count, 1)), probability], 1)
    above = p >= EVEN
    first = above.argmax(1)
    rows = np.arange(count)
    after = ~above & (np.arange(len(x))[None, :] > first[:, None])
    lost = np.where(after.any(1), after.argmax(1), len(x) - 1)
    low = _crossing(x, p, rows, np.maximum(first, 1))
    high = np.where(after.any(1), _crossing(x, p, rows, np.maximum(lost, 1)), x[-1])
    reached = above.any(1)
    return np.where(reached, low, np.nan), np.where(reached, high, 0.0)


def _crossing(
    x: Float[np.ndarray, " scales"],
    p: Float[np.ndarray, "edits scales"],
    rows: Int[np.ndarray, " edits"],
    place: Int[np.ndarray, " edits"],
) -> Float[np.ndarray, " edits"]:
    """Where the line from the scale before `place` to that at it passes one half."""
    before, here = p[rows, place - 1], p[rows, place]
    rise = here - before
    share = np.divide(EVEN - before, rise, out=np.zeros_like(rise), where=rise != 0)
    return np.asarray(x[place - 1] + share.clip(0, 1) * (x[place] - x[place - 1]))
