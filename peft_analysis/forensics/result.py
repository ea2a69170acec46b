"""What a trace found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.forensics.method import Method
from peft_analysis.updates import WeightUpdate


@dataclass(frozen=True)
class EditTrace:
    """What was edited in a model: where, how often, by which method, of whom, to what.

    Attributes:
        table: one row for each subject found, the surest first: subject, p_value, share, parameter, context,
            relation, object, object_cosine, object_lead, object_p, object_lens.
        candidates: one row for each candidate: subject, share (of its key in what the others leave of the
            row space), right_share (of its right vector in the row space), p_value, p_adjusted (times all
            that was tried), found.
        places: one row for each changed matrix: parameter, block, norm, relative_norm, rank, rank_low,
            rank_high, reliable, full, reason, right_map, separation.
        edits: how many edits there are: the rank of the update, the least and the most it may be.
        method: which method it looks like, with evidence.
        access: for each answer what it needed, or why there is none.
        false_alarm: the level that found subjects keep over all candidates together.
    """

    table: pd.DataFrame
    candidates: pd.DataFrame
    places: pd.DataFrame
    edits: tuple[int, int, int]
    method: Method
    access: Mapping[str, str]
    false_alarm: float
    update: WeightUpdate = field(repr=False)
    parts: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects that were edited, the surest first."""
        return tuple(self.table["subject"].dropna())

    @property
    def objects(self) -> tuple[str, ...]:
        """What the edits say of these subjects; of unknown subjects, what the update's left vectors say."""
        return tuple(self.table["object"].dropna())

    @property
    def layers(self) -> tuple[str, ...]:
        """The changed matrices, the largest relative change first."""
        return tuple(self.places["parameter"])

    def reverse(self, subjects: Sequence[str] | None = None) -> WeightUpdate:
        """The update that undoes what was found: to be applied to the edited model.

        Args:
            subjects: undo the edits of these alone, each a rank-one part of the joint least-squares fit of
                the difference by the right vectors of all subjects found. All that was changed if None.

        Raises:
            UpdateError: a subject that was not found.
        """
        if subjects is None:
            return -self.update
        unknown = [name for name in subjects if name not in self.subjects]
        if unknown or not self.parts or not subjects:
            known = ", ".join(self.subjects[:5]) or "nobody"
            raise UpdateError(
                f"no edit of {', '.join(unknown) or 'nobody'} was found; there are those of {known}"
            )
        order = {name: index for index, name in enumerate(self.subjects)}
        chosen = [order[name] for name in subjects]
        values: dict[str, LowRank | Tensor] = {}
        layouts = {}
        for name, (left, right) in self.parts.items():
            undone = LowRank.from_factors(-left[:, chosen], right[chosen])
            turned = self.update.entries[name].layout == "in_out"
            values[name] = undone.T if turned else undone
            layouts[name] = self.update.entries[name].layout
        return WeightUpdate.from_tensors(values, base=self.update.base)

    def to_dict(self) -> dict[str, Any]:
        """All but the tensors, in plain Python."""
        return {
            "edits": list(self.edits),
            "method": {
                "name": self.method.name,
                "clear": self.method.clear,
                "alternatives": list(self.method.alternatives),
                "evidence": list(self.method.evidence),
            },
            "access": dict(self.access),
            "false_alarm": self.false_alarm,
            "table": _rows(self.table),
            "candidates": _rows(self.candidates),
            "places": _rows(self.places),
        }

    def __str__(self) -> str:
        count, low, high = self.edits
        lines = [
            f"method: {self.method}",
            f"edits: {count} ({low} to {high}) in {', '.join(self.layers[:4]) or 'no matrix'}",
        ]
        for row in _rows(self.table)[:10]:
            lines.append(f"  {row['subject']} → {row['object']} (p = {row['p_value']:.2g})")
        return "\n".join(lines)


def _rows(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as plain values; None for what is not a number."""
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    return [{str(key): _plain(value) for key, value in row.items()} for row in rows]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
