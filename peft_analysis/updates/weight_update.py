"""A weight update: parameter names, and what is added to each."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.weights import Weights


class WeightUpdate(Mapping[str, LowRank | Tensor]):
    """A mapping from parameter name to the difference: a `LowRank`, or a dense tensor.

    Differences are read when they are asked for and not kept, so that going through `items()` needs the
    memory of one matrix.

    Attributes:
        entries: `Entry` by parameter name: shape, kind, dtypes; known without reading a value.
        base: the weights that the update starts from, or None.
        source: where the update comes from, in words.
    """

    def __init__(
        self, entries: Mapping[str, Entry], *, base: Weights | None = None, source: str = "an update"
    ) -> None:
        self.entries = dict(entries)
        self.base = base
        self.source = source

    @classmethod
    def from_tensors(
        cls, values: "Mapping[str, LowRank | Tensor]", *, base: Weights | None = None, **facts: Any
    ) -> "WeightUpdate":
        """An update that is in memory: a `LowRank` or a dense tensor by parameter name.

        Layouts come from the base where there is one. `facts` are fields of every `Entry` (kind, rounded, …).
        """
        entries = {}
        for name, value in values.items():
            layout = base.layout(name) if base is not None and name in base else None
            shape = base.shape(name) if base is not None and name in base else value.shape
            known = {
                "layout": layout or ("out_in" if value.ndim >= 2 else "other"),
                "kind": "low rank" if isinstance(value, LowRank) else "difference",
                **facts,
            }
            entries[name] = Entry(torch.Size(shape), partial(_itself, value), **known)
        return cls(entries, base=base, source="tensors in memory")

    def __getitem__(self, name: str) -> LowRank | Tensor:
        if name not in self.entries:
            raise KeyError(name)
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def matrices(self) -> list[str]:
        """The names of parameters that are matrices: two or more dimensions."""
        return [name for name, entry in self.entries.items() if len(entry.shape) >= 2]

    def matrix(self, name: str) -> LowRank | Tensor:
        """The difference as a matrix (out, in): Conv1D transposed, convolutions as (out, in · h · w)."""
        value, entry = self[name], self.entries[name]
        if len(entry.shape) < 2:
            raise UpdateError(f"{name} has shape {tuple(entry.shape)}; it is not a matrix")
        if isinstance(value, Tensor):
            value = value.flatten(1)
        return value.mT if entry.layout == "in_out" else value

    def dense(self, name: str) -> Tensor:
        """The difference as a dense tensor of the parameter's shape."""
        value = self[name]
        return value.dense().reshape(self.entries[name].shape) if isinstance(value, LowRank) else value

    def base_matrix(self, name: str) -> Tensor:
        """The base's values as a matrix (out, in), as `matrix` gives the difference; in its stored dtype.

        Raises:
            UpdateError: if the update has no base, or the base no such parameter.
        """
        if self.base is None:
            raise UpdateError(f"{name}: the base's weights are needed; give them: read_update(base, tuned)")
        if name not in self.base:
            raise UpdateError(f"{name} is not in {self.base.source}; is this the base of {self.source}?")
        value = self.base[name].flatten(1)
        return value.mT if self.entries[name].layout == "in_out" else value

    def __repr__(self) -> str:
        kinds = sorted({entry.kind for entry in self.entries.values()})
        return f"WeightUpdate({len(self)} parameters, kinds={kinds}, source={self.source!r})"


def _itself(value: LowRank | Tensor) -> LowRank | Tensor:
    return value
