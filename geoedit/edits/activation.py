"""Edits of activations: a subclass says how states change, everything else is here."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from geoedit.edits.base import Edit, Work
from geoedit.edits.io import from_json, to_json
from geoedit.errors import EditError
from geoedit.fingerprint import Fingerprint
from geoedit.fingerprint import fingerprint as fingerprint_of
from geoedit.hooks import Tally, find, intercept
from geoedit.passes import Pass
from geoedit.site import Site
from geoedit.tokens import check_phase

AnyActivationEdit = TypeVar("AnyActivationEdit", bound="ActivationEdit")


@dataclass(frozen=True, eq=False)
class Selected:
    """Where the states that an edit changes come from.

    Attributes:
        rows: For each state, the row of the batch that was given to the model or to its `generate`.
        positions: For each state, its place in the pass.
        batch: Number of rows given.
        scale: The edit's scale: a number, or one for each state as (selected, 1).
        notes: What `note` counted, over all passes.
    """

    rows: Int[Tensor, " selected"]
    positions: Int[Tensor, " selected"]
    batch: int
    scale: float | int | Tensor
    notes: dict[str, Tally] = field(default_factory=dict)

    def note(self, reason: str, where: Bool[Tensor, " selected"]) -> None:
        """Count states that could not be changed; the message of an edit without effect gives the reason."""
        self.notes.setdefault(reason, Tally()).add(where.long())

    def of_rows(self, tensor: Tensor, name: str) -> Float[Tensor, "some width"]:
        """For each state the vector of its row; a single one (width,) or (1, width) is for all of them.

        Raises:
            EditError: there are neither one nor as many as rows in the batch.
        """
        if tensor.dim() == 1 or tensor.shape[0] == 1:
            return tensor.reshape(1, -1)
        if tensor.shape[0] == self.batch:
            return tensor[self.rows]
        raise EditError(
            f"{name} has {tensor.shape[0]} rows, but the batch has {self.batch}; give one a row, or a single"
            " one for all."
        )


@dataclass(frozen=True, eq=False)
class ActivationEdit(Edit):
    """An edit of the states at a site.

    A subclass is a frozen dataclass that adds its tensors and fields and defines `change`. It gets the
    selected states in float32 or wider, with its own tensors on their device and in their dtype; the base
    takes care of hooks, tokens, precision, gradients, checks, saving and loading.

    Args:
        site: Where, and at which tokens.
        scale: How much: a number, or a tensor (batch,) with one for each row.
        phase: "prompt", "new" (generated tokens) or "both". Under `generate`, "last" and "all" both mean
            each of the new tokens; other tokens lie in the prompt.
        value_ids: For token "value": the ways to spell the values in ids (`geoedit.tokens.spellings`).
        fingerprint: Of the model that the edit was made from; attaching to another raises. An edit without
            one is saved with that of the model that it was last attached to.
        metadata: Anything of the user's that JSON can hold; saved with the edit.

    Raises:
        EditError: a tensor holds NaN or infinity, or is not floating-point; a field that no model could
            satisfy.

    >>> import torch
    >>> from dataclasses import dataclass
    >>> from geoedit.edits import ActivationEdit
    >>> @dataclass(frozen=True, eq=False, repr=False)
    ... class Clip(ActivationEdit, kind="clip-example"):
    ...     limit: float
    ...
    ...     def change(self, states, at):
    ...         return states.clamp(-self.limit * at.scale, self.limit * at.scale)
    >>> Clip(Site(2), 3.0, scale=0.5)
    Clip(block 2 residual_out @ last, scale=0.5)
    """

    saved_apart: ClassVar[frozenset[str]] = frozenset()
    """Fields that a subclass puts into `describe` and takes out in `rebuild` by itself."""

    site: Site
    _: KW_ONLY
    scale: float | int | Tensor = 1.0
    phase: str = "both"
    value_ids: Sequence[Sequence[int]] | None = None
    fingerprint: Fingerprint | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what could not work on any model."""
        if not isinstance(self.site, Site):
            raise EditError(f"site is {self.site!r}; give a geoedit.Site, such as Site(block=3).")
        self._check_types()
        check_phase(self.phase, self.site.token)
        if self.value_ids is not None:
            object.__setattr__(self, "value_ids", tuple(tuple(way) for way in self.value_ids))
        if self.site.token == "value" and not self.value_ids:
            raise EditError(
                f"{self.site} needs to know how the values are spelled in ids: give value_ids,"
                " for instance geoedit.tokens.spellings(tokenizer, values)."
            )
        if not isinstance(self.scale, Tensor) and not abs(self.scale) < float("inf"):
            raise EditError(f"scale={self.scale}: give a finite number.")
        for name, tensor in self.tensors().items():
            _check_tensor(f"{type(self).__name__}.{name}", tensor)
        if isinstance(self.scale, Tensor) and self.scale.dim() > 1:
            raise EditError(
                f"scale has shape {tuple(self.scale.shape)}; give one number, or one a row (batch,)."
            )

    def _check_types(self) -> None:
        """Refuse arrays and lists where tensors belong, and take any number as the scale."""
        for each in fields(self):
            value = getattr(self, each.name)
            if each.type in ("Tensor", Tensor) and not isinstance(value, Tensor):
                raise EditError(
                    f"{type(self).__name__}.{each.name} is a {type(value).__name__}; give a tensor, for"
                    " instance torch.as_tensor(...)."
                )
        if not isinstance(self.scale, Tensor):
            try:
                object.__setattr__(self, "scale", float(self.scale))
            except (TypeError, ValueError):
                raise EditError(f"scale={self.scale!r}: give a number, or a tensor (batch,).") from None

    @abstractmethod
    def change(
        self, states: Float[Tensor, "selected width"], at: Selected
    ) -> Float[Tensor, "selected width"]:
        """Give the new states, of the same shape, without changing the old ones in place."""

    def check_width(self, width: int) -> None:
        """Refuse a site of another width; by default every tensor's last dimension must be that width.

        Raises:
            EditError: a tensor does not fit.
        """
        for name, tensor in self.tensors().items():
            if name != "scale" and tensor.shape[-1] != width:
                raise EditError(
                    f"{type(self).__name__}.{name} has width {tensor.shape[-1]},"
                    f" but the states at {self.site} have width {width}."
                )

    def unchanged_because(self) -> str | None:
        """Say why the edit would change nothing anywhere, if its own tensors are the reason."""
        return None

    def tensors(self) -> dict[str, Tensor]:
        """The fields that are tensors, by name."""
        named = ((each.name, getattr(self, each.name)) for each in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    def placed(self: AnyActivationEdit, device: torch.device, dtype: torch.dtype) -> AnyActivationEdit:
        """The same edit with its tensors on a device and in a dtype, to work on states there."""
        found = copy.copy(self)
        for name, tensor in self.tensors().items():
            object.__setattr__(found, name, tensor.to(device=device, dtype=dtype))
        return found

    def with_scale(self: AnyActivationEdit, scale: float | int | Tensor) -> AnyActivationEdit:
        """The same edit at another scale."""
        return replace(self, scale=scale)

    def for_model(self: AnyActivationEdit, model: nn.Module) -> AnyActivationEdit:
        """The same edit, marked as made from this model: attaching it to another one will raise."""
        return replace(self, fingerprint=fingerprint_of(model))

    def start(self, model: nn.Module, *, allow_other_model: bool) -> Work:
        """Begin to work on a model; `attach` calls it."""
        if self.fingerprint is not None and not allow_other_model:
            difference = self.fingerprint.difference(fingerprint_of(model))
            if difference:
                raise EditError(
                    f"{self} was made from another model: {difference}. Its states mean something else there;"
                    " pass allow_other_model=True if you are sure."
                )
        work = _Running(self, model)
        if self.fingerprint is None and not allow_other_model:
            object.__setattr__(self, "_used_on", fingerprint_of(model))  # `describe` saves it
        return work

    def describe(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Give what a file must hold: the fields."""
        tensors = self.tensors()
        apart = tensors.keys() | self.saved_apart
        others = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in apart}
        others["fingerprint"] = self.fingerprint or getattr(self, "_used_on", None)
        return {
            name: to_json(value, f"{type(self).__name__}.{name}") for name, value in others.items()
        }, tensors

    @classmethod
    def rebuild(cls, values: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ActivationEdit:
        """Make the edit again from what `describe` gave."""
        given = {**{name: from_json(value) for name, value in values.items()}, **tensors}
        known = {each.name for each in fields(cls)}
        unknown = sorted(given.keys() - known)
        if unknown:
            raise EditError(f"{cls.__name__} has no field {unknown[0]!r}.")
        try:
            return cls(**given)
        except TypeError as error:
            raise EditError(
                f"{cls.__name__} cannot be made from the fields {sorted(given)}: {error}."
            ) from error

    def __repr__(self) -> str:
        scale = f"{tuple(self.scale.shape)} tensor" if isinstance(self.scale, Tensor) else f"{self.scale:g}"
        return f"{type(self).__name__}({self.site}, scale={scale})"

    def __str__(self) -> str:
        return repr(self)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise EditError(
            f"{name} has dtype {tensor.dtype}; states are floating-point, so convert it with .float()."
        )
    if not bool(torch.isfinite(tensor.detach()).all()):
        bad = int((~torch.isfinite(tensor.detach())).sum())
        raise EditError(
            f"{name} holds {bad} values that are NaN or infinite; look at the states it was made from."
        )
    if tensor.numel() == 0:
        raise EditError(f"{name} is empty: its shape is {tuple(tensor.shape)}.")


class _Running(Work):
    """An activation edit at work on one model."""

    def __init__(self, edit: ActivationEdit, model: nn.Module) -> None:
        location = find(model, edit.site)
        if location.width:
            edit.check_width(location.width)
        self.edit = edit
        self.model_name = type(model).__name__
        self.dtype: torch.dtype | None = None
        self.width = location.width
        self.placed: dict[tuple[torch.device, torch.dtype], ActivationEdit] = {}
        self.moved, self.broken, self.never_finite = Tally(), Tally(), Tally()
        self.notes: dict[str, Tally] = {}
        self.handle = intercept(
            model, edit.site, self.apply, phase=edit.phase, value_ids=edit.value_ids, location=location
        )

    def remove(self) -> None:
        self.handle.remove()
        self.placed.clear()

    def apply(self, states: Tensor, selected: Tensor, this_pass: Pass) -> Tensor | None:
        """Change the selected states, in float32 or wider, and put them among the others."""
        rows, positions = selected.nonzero().unbind(1)
        if rows.shape[0] == 0:
            return None
        self._check_width(states.shape[-1])
        self.dtype = states.dtype
        wide = torch.promote_types(states.dtype, torch.float32)
        old = states[rows, positions].to(wide)
        edit = self._on(states.device, wide)
        owners, batch = rows // this_pass.expansion, this_pass.shape[0] // this_pass.expansion
        at = Selected(owners, positions, batch, _scale_for(edit, owners, batch), self.notes)
        with torch.autocast(states.device.type, enabled=False):
            new = edit.change(old, at)
        if new.shape != old.shape:
            raise EditError(
                f"{type(edit).__name__}.change returned shape {tuple(new.shape)} for states"
                f" {tuple(old.shape)};"
                " it must keep the shape."
            )
        narrow = new.to(states.dtype)
        self.moved.add((new.detach() != old.detach()).any())
        finite = torch.isfinite(old.detach()).all()
        self.broken.add(~torch.isfinite(narrow.detach()).all() & finite)
        self.never_finite.add(~finite)
        return states.index_put((rows, positions), narrow)

    def _check_width(self, width: int) -> None:
        if width != self.width:
            self.edit.check_width(width)
            self.width = width

    def _on(self, device: torch.device, dtype: torch.dtype) -> ActivationEdit:
        """The edit with all it needs on the states' device and in their dtype, moved at the first need.

        Tensors that are being learned are taken anew in every pass.
        """
        found = self.placed.get((device, dtype))
        if found is None:
            # Tensors made in inference mode could not be used for gradients later.
            with torch.inference_mode(False), torch.no_grad():
                found = self.placed[device, dtype] = self.edit.placed(device, dtype)
        learned = {name: each for name, each in self.edit.tensors().items() if each.requires_grad}
        if learned:
            found = copy.copy(found)
            for name, tensor in learned.items():
                object.__setattr__(found, name, tensor.to(device=device, dtype=dtype))
        return found

    def check(self) -> None:
        """Raise when the edit did nothing, and say which of the possible reasons it was."""
        edit, handle = self.edit, self.handle
        if handle.calls == 0 and handle.model_calls == 0:
            raise EditError(
                f"{edit} did nothing: the {self.model_name} was not called while it was attached. Call"
                " the model"
                " that the edit is on (not a copy of it, and not one compiled before)."
            )
        if handle.calls == 0:
            raise EditError(
                f"{edit} did nothing: the {self.model_name} ran, but never reached {handle.path}. A stack"
                " that this"
                " input does not use, an early exit, or a model compiled before the edit was attached?"
            )
        if handle.selected == 0:
            raise EditError(
                f"{edit} did nothing: {handle.path} ran {handle.calls} times, but no token was selected by"
                f" token={edit.site.token_name!r} in phase={edit.phase!r}."
            )
        if self.never_finite:
            raise EditError(
                f"{edit}: the model's own states there are NaN or infinite; look at its weights and its"
                f" inputs, or run it in another precision than {self.dtype}."
            )
        if self.broken:
            raise EditError(
                f"{edit} turned finite states into infinite or NaN ones in {self.dtype}: lower the scale,"
                f" or run the model in float32 or bfloat16.{self._noted(' It found that ', '.')}"
            )
        if not handle.changed:
            raise EditError(f"{edit} changed nothing at {handle.selected} selected tokens: {self._reason()}.")

    def _reason(self) -> str:
        scale = self.edit.scale
        if not bool(scale.any() if isinstance(scale, Tensor) else scale):
            return "its scale is 0"
        if not self.moved:
            return (self.edit.unchanged_because() or self._noted()) or (
                f"the new states are the old ones, as far as {self.dtype} can tell; is the scale too small?"
            )
        return f"the change was lost to rounding in {self.dtype}; raise the scale or run the model in float32"

    def _noted(self, before: str = "", after: str = "") -> str:
        """What the edit noted of its states, in words; empty when it noted nothing."""
        counts = {reason: int(tally) for reason, tally in self.notes.items()}
        said = "; ".join(f"at {count} of them {reason}" for reason, count in counts.items() if count)
        return f"{before}{said}{after}" if said else ""


def _scale_for(edit: ActivationEdit, rows: Tensor, batch: int) -> float | int | Tensor:
    scale = edit.scale
    if not isinstance(scale, Tensor) or scale.dim() == 0:
        return scale
    if scale.shape[0] not in (1, batch):
        raise EditError(
            f"{edit}: scale has {scale.shape[0]} rows, but the batch has {batch}; give one a row."
        )
    return scale[rows if scale.shape[0] > 1 else torch.zeros_like(rows), None]
