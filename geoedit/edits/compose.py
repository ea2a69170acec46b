"""Several edits as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from geoedit.edits.base import Edit, Work
from geoedit.edits.io import described, rebuilt
from geoedit.errors import EditError


class Compose(Edit, kind="compose"):
    """Several edits at once; at one site they act in their order. `a + b` makes one.

    Args:
        edits: The edits. Compositions among them are taken apart.

    Raises:
        EditError: there are none.
    """

    edits: tuple[Edit, ...]
    scale: float | int | Tensor = 1.0  # what with_scale multiplies; the edits keep their own scales

    def __init__(self, edits: Iterable[Edit]) -> None:
        parts: list[Edit] = []
        for edit in edits:
            parts.extend(edit.edits if isinstance(edit, Compose) else [edit])
        if not parts:
            raise EditError("Compose([]) would do nothing; give at least one edit.")
        self.edits = tuple(parts)

    def start(self, model: nn.Module, *, allow_other_model: bool) -> Work:
        """Begin to work on a model; `attach` calls it."""
        works: list[Work] = []
        try:
            for edit in self.edits:
                works.append(edit.start(model, allow_other_model=allow_other_model))
        except BaseException:
            _Together(works).remove()
            raise
        return _Together(works)

    def with_scale(self, scale: float | int | Tensor) -> Compose:
        """Every edit's own scale, multiplied by one number."""
        return Compose(edit.with_scale(edit.scale * scale) for edit in self.edits)

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give what a file must hold: every edit, its tensors named by its place."""
        values, tensors = [], {}
        for place, edit in enumerate(self.edits):
            description, own = described(edit)
            values.append(description)
            tensors.update({f"{place}.{name}": tensor for name, tensor in own.items()})
        return {"edits": values}, tensors

    @classmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Compose:
        """Make the composition again from what `describe` gave."""
        edits = []
        for place, description in enumerate(values.get("edits", ())):
            start = f"{place}."
            own = {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)}
            edits.append(rebuilt(description, own))
        return Compose(edits)

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.edits))


class _Together(Work):
    def __init__(self, works: list[Work]) -> None:
        self.works = works

    def remove(self) -> None:
        for work in reversed(self.works):
            work.remove()

    def check(self) -> None:
        for work in self.works:
            work.check()
