"""What algebra works on: sliders, sliders at a scale, and weight updates, read into one form and back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch import Tensor

from geoedit.errors import EditError
from geoedit.sliders.slider import ModuleChange, Scaled, Slider
from manifolds import LowRank, ManifoldError
from peft_analysis.errors import UpdateError
from peft_analysis.updates import WeightUpdate
from peft_analysis.updates.entry import Entry
from peft_analysis.updates.names import listed

Operand: TypeAlias = Slider | Scaled | WeightUpdate
Matrices: TypeAlias = Mapping[str, LowRank | Tensor]


@dataclass(frozen=True)
class Term:
    """One operand: what it changes at factor 1, and the factor.

    Attributes:
        name: what to call it in a message.
        update: its differences; of a slider, each module under "component.path".
        factor: what multiplies them.
        slider: the slider that it was, or None for a weight update.
        scale: of the slider, in its own units.
    """

    name: str
    update: WeightUpdate
    factor: float = 1.0
    slider: Slider | None = None
    scale: float = 1.0

    @classmethod
    def of(cls, operand: Any) -> Term:
        """Read an operand.

        Raises:
            EditError: it is none, or its scale is not finite.
        """
        if isinstance(operand, WeightUpdate):
            return cls(operand.source, operand)
        scaled = Scaled(operand, 1.0) if isinstance(operand, Slider) else operand
        if not isinstance(scaled, Scaled):
            raise EditError(
                f"{operand!r} is a {type(operand).__name__}; give sliders, sliders at a scale (age @ 1.5) or "
                "weight updates"
            )
        slider, scale = scaled.slider, float(scaled.scale)
        if not math.isfinite(scale):
            raise EditError(f"slider {slider.name!r} is taken at the scale {scale}; give a finite number")
        values = {f"{component}.{path}": change.matrix for component, path, change in slider}
        # A scale of 0 is no change in any units, also where a calibration's map would round it to almost 0.
        factor = float(slider.factor(scale)) if scale else 0.0
        if not math.isfinite(factor):
            raise EditError(
                f"slider {slider.name!r}: its calibration gives the factor {factor} at {scale:g}; "
                "calibrate again"
            )
        return cls(slider.name, WeightUpdate.from_tensors(values), factor, slider, scale)

    def matrix(self, name: str) -> LowRank:
        """The difference at factor 1 as a matrix (out, in) in factors; a dense one is decomposed.

        Raises:
            EditError: it holds NaN or infinity.
        """
        value = self.update.matrix(name)
        parts = (value.left, value.right) if isinstance(value, LowRank) else (value,)
        if not all(bool(part.isfinite().all()) for part in parts):
            raise EditError(
                f"{name} of {self.name!r} holds NaN or infinity; mend it, or leave the module out"
            )
        return value if isinstance(value, LowRank) else LowRank.from_dense(value)

    def said(self) -> str:
        """The operand as it would be written."""
        return f"{self.name} @ {self.scale:g}"


def read_terms(operands: Any, what: str, *, least: int = 1) -> list[Term]:
    """Read operands of one kind and one base.

    Raises:
        EditError: too few; sliders and updates mixed; sliders of other bases; modules whose shapes differ.
    """
    if isinstance(operands, Slider | Scaled | WeightUpdate):
        raise EditError(f"{what} takes a list of operands, not one {type(operands).__name__}; give [a, b]")
    terms = [Term.of(operand) for operand in operands]
    if len(terms) < least:
        raise EditError(f"{what} of {len(terms)} operands; give at least {least}")
    if len({term.slider is None for term in terms}) > 1:
        raise EditError(
            f"{what} of sliders and weight updates together; turn the sliders into updates first: "
            'slider.update("unet")'
        )
    _check_bases(terms, what)
    _check_shapes(terms, what)
    return terms


def common_names(terms: Sequence[Term], what: str) -> list[str]:
    """The names that all terms have.

    Raises:
        EditError: there are none.
    """
    names = [name for name in terms[0].update if all(name in term.update for term in terms)]
    if not names:
        owns = "; ".join(f"{term.name!r} has {listed(list(term.update), most=3)}" for term in terms)
        raise EditError(f"{what}: the operands change no module in common ({owns})")
    return names


def rebuilt(terms: Sequence[Term], values: Matrices, name: str, details: Mapping[str, Any]) -> Operand:
    """A slider, or a weight update, with new matrices for some of the terms' names.

    A slider's come in as (out, in · kernel), an update's as they are stored.
    """
    if terms[0].slider is None:
        bases = (term.update.base for term in terms if term.update.base is not None)
        entries = {key: _entry(terms, key, value, details) for key, value in values.items()}
        return WeightUpdate(entries, base=next(bases, None), source=name)
    changes: dict[str, dict[str, ModuleChange]] = {}
    for key, matrix in values.items():
        component, path = key.split(".", 1)
        if not isinstance(matrix, LowRank):
            raise EditError(f"{key}: a slider's change is a LowRank, not a {type(matrix).__name__}")
        kernel = next(
            term.slider.changes[component][path].kernel
            for term in terms
            if term.slider is not None and key in term.update
        )
        changes.setdefault(component, {})[path] = ModuleChange(matrix, kernel)
    facts: dict[str, Any] = {**details, "terms": [{"slider": t.name, "scale": t.scale} for t in terms]}
    base = {
        component: known
        for term in terms
        if term.slider is not None
        for component, known in _base(term.slider).items()
        if component in changes
    }
    return Slider(name, changes, None, {**facts, "base": base} if base else facts)


@contextmanager
def as_edit_errors(what: str) -> Iterator[None]:
    """Errors of the floors below, told as those of this one."""
    try:
        yield
    except (UpdateError, ManifoldError) as error:
        raise EditError(f"{what}: {error}") from error


def check_rank(rank: object, what: str) -> None:
    """Refuse a rank that is none."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise EditError(f"{what}: rank is {rank!r}; it is a whole number of 1 or more")


def _entry(terms: Sequence[Term], key: str, value: LowRank | Tensor, details: Mapping[str, Any]) -> Entry:
    """The parameter's facts as the first term knows them, with a new value."""
    first = next(term.update.entries[key] for term in terms if key in term.update)
    ranked = {"rank": value.rank} if isinstance(value, LowRank) else {}
    return Entry(first.shape, partial(_itself, value), "algebra", first.layout, details={**details, **ranked})


def _itself(value: LowRank | Tensor) -> LowRank | Tensor:
    return value


def _check_bases(terms: Sequence[Term], what: str) -> None:
    seen: dict[str, tuple[str, Any]] = {}
    for term in terms:
        for component, known in (_base(term.slider) if term.slider is not None else {}).items():
            name, other = seen.setdefault(component, (term.name, known))
            if other != known:
                raise EditError(
                    f"{what}: {name!r} was made for another {component} than {term.name!r}: "
                    f"{_apart(other, known)}; only sliders of one base go together"
                )


def _check_shapes(terms: Sequence[Term], what: str) -> None:
    wrong = []
    for key in dict.fromkeys(key for term in terms for key in term.update):
        found: dict[tuple[tuple[int, ...], tuple[int, ...]], str] = {}
        for term in terms:
            if key in term.update:
                kernel: tuple[int, ...] = ()
                if term.slider is not None:
                    component, path = key.split(".", 1)
                    kernel = tuple(term.slider.changes[component][path].kernel)
                found.setdefault((tuple(term.update.entries[key].shape), kernel), term.name)
        if len(found) > 1:
            told = ", ".join(
                f"{shape}{f' of kernel {kernel}' if kernel else ''} in {name!r}"
                for (shape, kernel), name in found.items()
            )
            wrong.append(f"{key} is {told}")
    if wrong:
        raise EditError(f"{what}: the operands are not of one base: {listed(wrong, '; ')}")


def _base(slider: Slider) -> Mapping[str, Any]:
    base = slider.details.get("base")
    return base if isinstance(base, Mapping) else {}


def _apart(one: Any, other: Any) -> str:
    """The first fields in which two descriptions differ."""
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return f"{one!r} and {other!r}"
    fields = [key for key in {**one, **other} if one.get(key) != other.get(key)]
    told = [f"{key} {_short(one.get(key))} and {_short(other.get(key))}" for key in fields]
    return listed(told, most=3)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
