"""From features to odds: the probability that a straight edit succeeds, learned from edits of other concepts.

A sum of small trees: each asks a few yes-or-no questions of the features and adds what it learned to the
logit (gradient boosting; Friedman, Annals of Statistics 29, 2001). The trees, and the record of what they
were learned from, are plain JSON in odds.json, written by
`python -m experiments.curvature_predicts_editing.fit`. There are two sets of trees: one that knows answers,
and one that knows lengths only, for models without a head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.diagnosis.result import write_text
from geoedit.errors import EditError

FORMAT = "geoedit.odds"
VERSION = 1
BUILT_IN = Path(__file__).with_name("odds.json")
ANSWERS, LENGTHS = "answers", "lengths"
"""The two sets of trees."""


@dataclass(frozen=True)
class Tree:
    """Questions in the order of a heap: after question i come 2i + 1 (no) and 2i + 2 (yes), then the leaves.

    Attributes:
        asks: the feature of each question.
        above: "is it larger than this?"; infinite: whatever is known answers no.
        missing: whether the answer is yes where the feature is NaN.
        leaves: what is added to the logit, one number for each way through the questions.
    """

    asks: tuple[str, ...]
    above: tuple[float, ...]
    missing: tuple[bool, ...]
    leaves: tuple[float, ...]

    def __post_init__(self) -> None:
        count = len(self.leaves)
        if count & (count - 1) or not len(self.asks) == len(self.above) == len(self.missing) == count - 1:
            raise EditError(
                f"a tree has {len(self.asks)} questions, {len(self.above)} thresholds, {len(self.missing)} "
                f"answers for what is missing and {count} leaves; leaves must be a power of two, and one "
                "more than each of the others."
            )
        if any(math.isnan(number) for number in self.above) or not all(map(math.isfinite, self.leaves)):
            raise EditError("a tree holds a number that is not finite; write odds.json anew.")


@dataclass(frozen=True)
class Trees:
    """A sum of trees of one depth.

    Attributes:
        name: what this set is for.
        needs: the feature that must be known for the set to speak.
        base: the logit before any tree.
        trees: what is summed.
    """

    name: str
    needs: str
    base: float
    trees: tuple[Tree, ...]

    def __post_init__(self) -> None:
        if len({len(tree.leaves) for tree in self.trees}) > 1:
            raise EditError(f"the trees of {self.name!r} are of several depths; give them all the same.")

    @cached_property
    def features(self) -> tuple[str, ...]:
        """Every feature that some tree asks for."""
        return tuple(dict.fromkeys(name for tree in self.trees for name in tree.asks))

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        number = {name: place for place, name in enumerate(self.features)}
        return (
            torch.tensor([[number[name] for name in tree.asks] for tree in self.trees]),
            torch.tensor([tree.above for tree in self.trees], dtype=torch.float64),
            torch.tensor([tree.missing for tree in self.trees]),
            torch.tensor([tree.leaves for tree in self.trees], dtype=torch.float64),
        )

    def logit(self, features: Mapping[str, Float[Tensor, " edits"]]) -> Float[Tensor, " edits"]:
        """Return the sum of the trees, in float64; a feature that is absent counts as unknown."""
        first = next(iter(features.values()))
        if not self.trees:
            return torch.full_like(first, self.base, dtype=torch.float64)
        unknown = torch.full_like(first, torch.nan, dtype=torch.float64)
        columns = [features[name].double() if name in features else unknown for name in self.features]
        known = torch.stack(columns, 1)
        asks, above, missing, leaves = (table.to(first.device) for table in self._tables)
        place = torch.zeros(len(first), len(self.trees), dtype=torch.long, device=first.device)
        every = torch.arange(len(self.trees), device=first.device)
        for _ in range(int(math.log2(leaves.shape[1]))):
            values = known.gather(1, asks[every, place])
            yes = torch.where(values.isnan(), missing[every, place], values > above[every, place])
            place = 2 * place + 1 + yes.long()
        return self.base + leaves[every, place - (leaves.shape[1] - 1)].sum(1)

    def to_dict(self) -> dict[str, Any]:
        """Give the trees as plain JSON values; None stands for an infinite threshold."""
        return {
            "name": self.name,
            "needs": self.needs,
            "base": self.base,
            "trees": [
                {
                    "asks": list(tree.asks),
                    "above": [None if math.isinf(number) else number for number in tree.above],
                    "missing": [int(answer) for answer in tree.missing],
                    "leaves": list(tree.leaves),
                }
                for tree in self.trees
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trees:
        """Read what `to_dict` gave."""
        trees = tuple(
            Tree(
                tuple(tree["asks"]),
                tuple(math.inf if number is None else float(number) for number in tree["above"]),
                tuple(bool(answer) for answer in tree["missing"]),
                tuple(float(number) for number in tree["leaves"]),
            )
            for tree in data["trees"]
        )
        return cls(str(data["name"]), str(data["needs"]), float(data["base"]), trees)


@dataclass(frozen=True)
class Odds:
    """The probability that a straight edit succeeds, as a function of its features.

    Attributes:
        sets: sets of trees, the best informed first.
        record: what they were learned from (models, concepts, sites, scales, counts, versions, seed) and how
            well they did on concepts and models that they had not seen.

    `Odds.load().probability(edit_features(...))` asks those that ship with the package.
    """

    sets: tuple[Trees, ...]
    record: dict[str, Any] = field(default_factory=dict)

    def probability(self, features: Mapping[str, Float[Tensor, " edits"]]) -> Float[Tensor, " edits"]:
        """Return the predicted probability of success of each edit, from `features.edit_features`.

        The first set of trees whose needs are met speaks for an edit; NaN where none can. Features may be
        absent or NaN. Type and device follow the input.

        Raises:
            EditError: no features were given.
        """
        self._check(features)
        first = next(iter(features.values()))
        found = torch.full_like(first, torch.nan, dtype=torch.float64)
        chosen = self.which(features)
        for number, trees in enumerate(self.sets):
            speaks = chosen == number
            if bool(speaks.any()):
                found = torch.where(speaks, torch.sigmoid(trees.logit(features)), found)
        return found.to(first.dtype)

    def has_seen(self, model: str, concept: str) -> bool:
        """Whether edits of this concept in this model were among those that the odds were learned from."""
        return model in self.record.get("models", ()) and concept in self.record.get("concepts", ())

    def which(self, features: Mapping[str, Float[Tensor, " edits"]]) -> Int[Tensor, " edits"]:
        """Return the number of the set that speaks for each edit, -1 where none does.

        Raises:
            EditError: no features were given.
        """
        self._check(features)
        first = next(iter(features.values()))
        chosen = torch.full_like(first, -1, dtype=torch.long)
        for number, trees in enumerate(self.sets):
            if trees.needs in features:
                chosen = torch.where((chosen < 0) & ~features[trees.needs].isnan(), number, chosen)
        return chosen

    @staticmethod
    def _check(features: Mapping[str, Tensor]) -> None:
        if not features:
            raise EditError("no features were given; compute them with edit_features.")

    def save(self, path: str | Path) -> Path:
        """Write trees and record as JSON, at once or not at all, and return the path."""
        head = {"format": FORMAT, "version": VERSION, "record": self.record}
        sets = [trees.to_dict() for trees in self.sets]
        lines = json.dumps(head, indent=1, allow_nan=False)[:-2] + ',\n "sets": [\n'
        lines += ",\n".join(_set_text(entry) for entry in sets) + "\n ]\n}\n"
        return write_text(Path(path), lines)

    @classmethod
    def load(cls, path: str | Path | None = None) -> Odds:
        """Read odds from a file; without a path those that come with the package.

        Raises:
            EditError: no such file, or not odds that this version reads.
        """
        path = BUILT_IN if path is None else Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise EditError(
                f"there is no file {path}; write it with `python -m "
                "experiments.curvature_predicts_editing.fit`."
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise EditError(f"{path} is not JSON: {error}.") from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise EditError(f"{path} is JSON but holds no odds (its format should be {FORMAT!r}).")
        if data.get("version") != VERSION:
            raise EditError(
                f"{path} has version {data.get('version')}; this geoedit reads version {VERSION}."
            )
        try:
            return cls(tuple(Trees.from_dict(entry) for entry in data["sets"]), data["record"])
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(f"{path} lacks a part, or holds one of another kind: {error}.") from error


def _set_text(entry: dict[str, Any]) -> str:
    """One tree a line, so that a change of the file can be read."""
    head = {name: value for name, value in entry.items() if name != "trees"}
    trees = ",\n".join("   " + json.dumps(tree, allow_nan=False) for tree in entry["trees"])
    return "  " + json.dumps(head, allow_nan=False)[:-1] + ', "trees": [\n' + trees + "\n  ]}"
