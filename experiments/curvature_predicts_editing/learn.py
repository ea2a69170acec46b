"""Learn trees from edits and their outcomes, and write them down so that no library is needed to ask them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from sklearn.ensemble import HistGradientBoostingClassifier

from geoedit.diagnosis.odds import Tree, Trees
from geoedit.errors import EditError

RISING = (
    "landing",
    "landing_rows",
    "landing_sharp",
    "landing_sphere",
    "landing_sphere_sharp",
    "landing_beyond",
    "landing_before",
    "along_path",
    "from_target",
    "progress",
    "end",
    "nearer_fisher",
    "nearer_rows",
    "nearer_plain",
)
"""Features of which more can only be better for the edit: the trees are held to that."""
DIGITS = 7


@dataclass(frozen=True)
class Learning:
    """How the trees are learned: how many, how deep, how slowly, and on how many edits at most.

    `hidden`: so large a share of the edits is seen a second time with half of the features hidden, drawn anew
    for each, so that the trees know what to do where a feature is missing.
    """

    trees: int = 240
    depth: int = 4
    rate: float = 0.08
    smallest_leaf: int = 100
    shrinkage: float = 5.0
    edits: int = 90_000
    hidden: float = 0.15


def learn(
    columns: Mapping[str, Float[np.ndarray, " edits"]],
    success: Bool[np.ndarray, " edits"],
    *,
    name: str,
    needs: str,
    groups: Sequence[Any] | None = None,
    learning: Learning | None = None,
    seed: int = 0,
) -> Trees:
    """Fit boosted trees to the outcomes of edits.

    The loss is the mean negative log-likelihood, so that the sum of the trees is a calibrated logit; every
    group (a concept in a model) counts alike, however many edits it has. Features in `RISING` may only raise
    the odds.

    Args:
        columns: features, NaN where unknown.
        success: what happened.
        name: of the set of trees. needs: see `Trees`.
        needs: see `name`.
        groups: the group of each edit; None: every edit counts alike.
        learning: how.
        seed: of the draw, where there are more edits than `learning.edits`.

    Raises:
        EditError: no edits, or only one outcome.
    """
    learning = learning or Learning()
    if len(success) == 0 or bool(success.all()) or not bool(success.any()):
        raise EditError(
            f"{int(success.sum())} of {len(success)} edits succeeded: trees need successes and failures."
        )
    chosen = draw_alike(groups if groups is not None else [0] * len(success), learning.edits, seed)
    # What is not known of any edit, and what is beyond all numbers, cannot be asked about.
    usable = {key: np.where(np.isfinite(column), column, np.nan)[chosen] for key, column in columns.items()}
    names = [column for column, numbers in usable.items() if not np.isnan(numbers).all()]
    outcome = success[chosen]
    if not names:
        rate = (outcome.sum() + 0.5) / (len(outcome) + 1)
        return Trees(name, needs, math.log(rate / (1 - rate)), ())
    table = np.stack([usable[column] for column in names], 1)
    if len(names) > 1 and learning.hidden > 0:
        generator = np.random.default_rng(seed)
        again = generator.permutation(len(table))[: round(learning.hidden * len(table))]
        partly = np.where(generator.random((len(again), len(names))) < 0.5, np.nan, table[again])
        table, outcome = np.concatenate([table, partly]), np.concatenate([outcome, outcome[again]])
    booster = HistGradientBoostingClassifier(
        max_iter=learning.trees,
        max_depth=learning.depth,
        max_leaf_nodes=None,
        learning_rate=learning.rate,
        min_samples_leaf=learning.smallest_leaf,
        l2_regularization=learning.shrinkage,
        monotonic_cst=[int(column in RISING) for column in names],
        max_bins=128,
        early_stopping=False,
        random_state=seed,
    ).fit(table, outcome)
    # scikit-learn keeps the trees in private attributes; a test compares what is read with what it says.
    trees = tuple(_tree(stage[0].nodes, names, learning.depth) for stage in booster._predictors)
    return Trees(name, needs, float(np.ravel(booster._baseline_prediction)[0]), trees)


def draw_alike(groups: Sequence[Any], most: int, seed: int) -> Int[np.ndarray, " drawn"]:
    """Draw as many edits of every group, at most so many in all; a smaller group is repeated.

    Weights would do the same, but scikit-learn 1.9 takes most of its time to find bins by weight.
    """
    generator = np.random.default_rng(seed)
    _, number, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    each = max(1, min(most // len(counts), int(counts.max())))
    drawn = []
    for group, count in enumerate(counts):
        members = np.nonzero(number == group)[0]
        whole, rest = divmod(each, int(count))
        drawn += [members] * whole + [generator.permutation(members)[:rest]]
    return np.sort(np.concatenate(drawn))


def probabilities(
    trees: Trees, columns: Mapping[str, Float[np.ndarray, " edits"]]
) -> Float[np.ndarray, " edits"]:
    """Ask the trees, in pieces that stay small."""
    count = len(next(iter(columns.values())))
    found = np.empty(count)
    for start in range(0, count, 20_000):
        part = {name: torch.from_numpy(column[start : start + 20_000]) for name, column in columns.items()}
        found[start : start + 20_000] = torch.sigmoid(trees.logit(part)).numpy()
    return found


def _tree(nodes: np.ndarray, names: Sequence[str], depth: int) -> Tree:
    """Fill a heap of the full depth: below an early leaf every question leads to the same number."""
    inner, leaves = 2**depth - 1, 2**depth
    asks, above, missing = [names[0]] * inner, [math.inf] * inner, [False] * inner
    values = [0.0] * leaves

    def fill(place: int, node: int) -> None:
        row = nodes[node]
        if place >= inner:
            values[place - inner] = _short(row["value"])
        elif row["is_leaf"]:
            fill(2 * place + 1, node)
            fill(2 * place + 2, node)
        else:
            asks[place] = names[int(row["feature_idx"])]
            # A threshold may be a number that was seen: rounded, it would send that edit the other way.
            above[place] = float(row["num_threshold"])
            missing[place] = not bool(row["missing_go_to_left"])
            fill(2 * place + 1, int(row["left"]))
            fill(2 * place + 2, int(row["right"]))

    fill(0, 0)
    return Tree(tuple(asks), tuple(above), tuple(missing), tuple(values))


def _short(number: Any) -> float:
    return float(f"{float(number):.{DIGITS}g}")
