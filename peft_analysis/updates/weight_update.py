"""A weight update: parameter names, and what is added to each."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.applied import Applied, apply_update
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.names import Chosen, Selection
from peft_analysis.updates.weights import Weights

if TYPE_CHECKING:
    Differences = Mapping[str, LowRank | Tensor]
else:
    Differences = Mapping  # who checks types at run time would read a matrix to look at its type


class WeightUpdate(Differences):
    """A mapping from parameter name to the difference: a `LowRank`, or a dense tensor.

    Differences are read when they are asked for and not kept, so that going through `items()` needs the
    memory of one matrix.

    Attributes:
        entries: `Entry` by parameter name: shape, kind, dtypes; known without reading a value.
        base: the weights that the update starts from, or None.
        source: where the update comes from, in words.
        stages: the updates whose sum this is, in their order, where it was read from a sequence.
        skipped: what the files held beside these parameters, each name with the reason why it was left out.

    Example:
        >>> import torch
        >>> from manifolds import LowRank
        >>> rank_one = LowRank.from_factors(torch.tensor([[3.0], [4.0]]), torch.tensor([[1.0, 0.0, 0.0]]))
        >>> update = WeightUpdate.from_tensors({"layer.weight": rank_one, "layer.bias": torch.ones(2)})
        >>> update
        WeightUpdate(2 parameters, kinds=['difference', 'low rank'], source='tensors in memory')
        >>> update.matrices(), (-0.5 * update)["layer.weight"].norm()
        (['layer.weight'], tensor(2.5000))
        >>> layer = torch.nn.Linear(3, 2)
        >>> with update.apply(torch.nn.ModuleDict({"layer": layer})):
        ...     changed = layer.bias.clone()
        >>> torch.allclose(changed - layer.bias, torch.ones(2))
        True
    """

    def __init__(
        self,
        entries: Mapping[str, Entry],
        *,
        base: Weights | None = None,
        source: str = "an update",
        stages: "Sequence[WeightUpdate]" = (),
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self.entries = dict(entries)
        self.base = base
        self.source = source
        self.stages = tuple(stages)
        self.skipped = dict(skipped or {})

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
                "details": {"rank": value.rank} if isinstance(value, LowRank) else {},
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

    # Other updates from this one

    def map(
        self, function: "Callable[[str, LowRank | Tensor], LowRank | Tensor]", **facts: Any
    ) -> "WeightUpdate":
        """An update whose values are `function(name, value)` of these, worked out when they are read.

        `facts` are fields of every `Entry` that are new (kind, rounded, …). DoRA's magnitude is not that of
        the new values and is left out. Stages are not kept.
        """
        facts = {"magnitude": None, **facts}
        entries = {
            name: replace(entry, read=partial(_mapped, function, name, entry.read), **facts)
            for name, entry in self.entries.items()
        }
        return WeightUpdate(entries, base=self.base, source=self.source, skipped=self.skipped)

    def only(self, names: Selection = None, *, without: Selection = None) -> "WeightUpdate":
        """The part of the update in some parameters, values still unread.

        Args:
            names: a regular expression that a name must contain, or the names themselves.
            without: the same for names that are left out.

        Raises:
            UpdateError: a name that is not there, or nothing is left.
        """
        chosen = Chosen(names, without)
        chosen.check(self.entries)
        entries = {name: self.entries[name] for name in chosen.of(self.entries)}
        stages = [
            WeightUpdate(
                {name: entry for name, entry in stage.entries.items() if name in entries},
                base=stage.base,
                source=stage.source,
            )
            for stage in self.stages
        ]
        return WeightUpdate(entries, base=self.base, source=self.source, stages=stages, skipped=self.skipped)

    def changed(self) -> "WeightUpdate":
        """Without the parameters whose difference is exactly zero. Every value is read once to know."""
        names = [name for name in self.entries if _is_not_zero(self[name])]
        entries = {name: self.entries[name] for name in names}
        return WeightUpdate(
            entries, base=self.base, source=self.source, stages=self.stages, skipped=self.skipped
        )

    def __mul__(self, scale: float | int) -> "WeightUpdate":
        """The update times a number; its entries' `details` say by how much it was scaled in all."""
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            return NotImplemented
        if not math.isfinite(scale):
            raise UpdateError(f"an update cannot be scaled by {scale}; give a finite number")
        entries = {}
        for name, entry in self.entries.items():
            details = {**entry.details, "scale": entry.details.get("scale", 1.0) * scale}
            read = partial(_scaled, entry.read, scale)
            entries[name] = replace(entry, read=read, details=details, magnitude=None)
        stages = [stage * scale for stage in self.stages]
        return WeightUpdate(
            entries, base=self.base, source=f"{scale:g} × {self.source}", stages=stages, skipped=self.skipped
        )

    __rmul__ = __mul__

    def __neg__(self) -> "WeightUpdate":
        return self * -1.0

    # Models and files

    def apply(self, model: nn.Module, scale: float | int = 1.0) -> Applied:
        """Adds the update, times `scale`, to a model's parameters in place: all of it, or none.

        Names and shapes are checked before anything changes. Sums are taken in float32 or wider and rounded
        once to the parameter's dtype. Where anything fails midway, what was changed is set back to the bit.
        The original values are kept in main memory as long as the result is: `.remove()` puts them back, and
        as a context manager it does so at the end.

        Raises:
            UpdateError: parameters that the model lacks, of another shape, quantised, on the meta device, or
                tied to one that the update changes otherwise; a sum that is NaN or beyond the dtype's range.
        """
        return apply_update(self, model, scale)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the update to a safetensors file, one parameter in memory at a time, whole or not at all.

        Raises:
            UpdateError: the folder is not there, or a value cannot be read.
        """
        from peft_analysis.updates.saved import write_update

        write_update(self, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, base: Any = None) -> "WeightUpdate":
        """What `save` wrote: the same values to the bit, read one at a time from the file.

        Args:
            path: the file.
            base: the base's weights, as `read_update` takes them, for what needs them later.

        Raises:
            UpdateError: no such file, one that is cut off, one that `save` did not write.
        """
        from peft_analysis.updates.saved import read_saved

        return read_saved(path, base=None if base is None else Weights.of(base))

    def __repr__(self) -> str:
        kinds = sorted({entry.kind for entry in self.entries.values()})
        return f"WeightUpdate({len(self)} parameters, kinds={kinds}, source={self.source!r})"


def _itself(value: LowRank | Tensor) -> LowRank | Tensor:
    return value


def _mapped(
    function: "Callable[[str, LowRank | Tensor], LowRank | Tensor]",
    name: str,
    read: "Callable[[], LowRank | Tensor]",
) -> LowRank | Tensor:
    return function(name, read())


def _scaled(read: "Callable[[], LowRank | Tensor]", scale: float | int) -> LowRank | Tensor:
    return read() * scale


def _is_not_zero(value: LowRank | Tensor) -> bool:
    if isinstance(value, LowRank):
        return bool(value.norm() != 0)
    return bool((value != 0).any())
