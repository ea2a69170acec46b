"""What every edit has: it is attached, taken off again, saved, composed, and it is never silent."""

from __future__ import annotations

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn

from geoedit.edits.io import register, write_edit
from geoedit.errors import EditError

if TYPE_CHECKING:
    from geoedit.edits.compose import Compose

AnyEdit = TypeVar("AnyEdit", bound="Edit")


class Work(ABC):
    """An edit at work on one model."""

    @abstractmethod
    def remove(self) -> None:
        """Leave the model as it was, to the bit."""

    @abstractmethod
    def check(self) -> None:
        """Raise EditError when the edit did nothing, and say why."""


class EditHandle:
    """An attached edit: `remove()` takes it off. Also a context manager that removes at its end.

    Attributes:
        edit: The edit.
        attached: Whether it is still at work.
    """

    def __init__(self, edit: Edit, model: nn.Module, work: Work) -> None:
        self.edit = edit
        self._model = weakref.ref(model)
        self._work = work
        self.attached = True

    def remove(self) -> None:
        """Take the edit off, leaving the model as it was to the bit; once is enough, more does no harm.

        Warns with `UserWarning` when the edit did nothing while it was attached; `check` raises instead.
        """
        if not self.attached:
            return
        self._take_off()
        try:
            self.check()
        except EditError as error:
            warnings.warn(str(error), stacklevel=2)

    def _take_off(self) -> None:
        if not self.attached:
            return
        self.attached = False
        self._work.remove()
        model = self._model()
        if model is not None:
            self.edit.models.discard(model)

    def check(self) -> None:
        """Ask whether the edit has had an effect so far (or had, before it was removed).

        Raises:
            EditError: the model was not called, it did not reach the site, no token was selected, or nothing
                changed; the message says which, and what to do.
        """
        self._work.check()

    def __enter__(self) -> EditHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.remove()
        else:
            self._take_off()


class Edit(ABC):
    """A reversible change to a model.

    A subclass says how it starts to work on a model, and what of it goes into a file. With `kind="name"` in
    its class statement it can be saved, and `load_edit` finds it by that name.
    """

    kind: ClassVar[str | None] = None
    scale: float | int | Tensor

    def __init_subclass__(cls, kind: str | None = None, **others: Any) -> None:
        super().__init_subclass__(**others)
        cls.kind = kind
        if kind is not None:
            register(kind, cls)

    @abstractmethod
    def start(self, model: nn.Module, *, allow_other_model: bool) -> Work:
        """Begin to work on a model; `attach` calls it."""

    @abstractmethod
    def with_scale(self: AnyEdit, scale: float | int | Tensor) -> AnyEdit:
        """The same edit at another scale."""

    @abstractmethod
    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give what a file must hold: values for JSON, and tensors."""

    @classmethod
    @abstractmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Edit:
        """Make the edit again from what `describe` gave."""

    @property
    def models(self) -> weakref.WeakSet[nn.Module]:
        """The models that the edit is attached to."""
        if "_models" not in self.__dict__:
            object.__setattr__(self, "_models", weakref.WeakSet())
        return self.__dict__["_models"]

    def attach(self, model: nn.Module, *, allow_other_model: bool = False) -> EditHandle:
        """Put the edit to work until its handle is removed.

        Args:
            model: The model that will be called (a PEFT wrapper is fine).
            allow_other_model: Attach even if the edit was made from another model.

        Raises:
            EditError: it is attached to this model already; the site does not exist there; the edit is of
                another width, or was made from another model.
        """
        if model in self.models:
            raise EditError(
                f"{self} is attached to this {type(model).__name__} already; remove that handle first."
                " To apply it twice, attach a copy at twice the scale: with_scale(2 * scale)."
            )
        work = self.start(model, allow_other_model=allow_other_model)
        self.models.add(model)
        return EditHandle(self, model, work)

    @contextmanager
    def on(
        self, model: nn.Module, *, must_change: bool = True, allow_other_model: bool = False
    ) -> Iterator[EditHandle]:
        """Put the edit to work for a `with` block.

        Args:
            model: The model that will be called inside the block.
            must_change: Raise at the end of the block if the edit did nothing.
            allow_other_model: Attach even if the edit was made from another model.

        Raises:
            EditError: as `attach`; and at the end of the block, as `EditHandle.check`. If the block itself
                raises, that goes through as it is.
        """
        handle = self.attach(model, allow_other_model=allow_other_model)
        try:
            yield handle
        finally:
            handle._take_off()
        if must_change:
            handle.check()

    def save(self, path: str | PathLike[str]) -> None:
        """Write the edit to a safetensors file; it is there as a whole or not at all.

        Raises:
            EditError: the edit holds something that no safe file can hold, or its class has no kind.
        """
        write_edit(self, path)

    def __add__(self, other: Edit) -> Compose:
        """Both edits at once, this one first."""
        from geoedit.edits.compose import Compose

        if not isinstance(other, Edit):
            return NotImplemented
        return Compose([self, other])
