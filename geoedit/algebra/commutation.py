"""Does the order matter? Commutators of changes, and of edits as a model shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from geoedit.algebra.terms import Term, as_edit_errors, common_names, read_terms
from geoedit.edits.base import Edit
from geoedit.errors import EditError
from geoedit.sliders.slider import Scaled, Slider
from manifolds import LowRank
from peft_analysis.updates import WeightUpdate


@dataclass(frozen=True)
class ModuleCommutator:
    """The commutator of two changes of one module.

    Attributes:
        kind: "square" for AB − BA; "dilation" for the blocks of the commutator of the symmetric dilations.
        parts: of "square" {"matrix": AB − BA}; of "dilation" {"written": ABᵀ − BAᵀ, "read": AᵀB − BᵀA}.
        size: the Frobenius norm of the commutator.
        bound: the largest size that changes of these norms could have.
    """

    kind: Literal["square", "dilation"]
    parts: Mapping[str, LowRank]
    size: float
    bound: float

    @property
    def share(self) -> float:
        """Size over bound, 0 (they commute) to 1; NaN where one of the changes is zero."""
        return self.size / self.bound if self.bound else math.nan


@dataclass(frozen=True)
class Commutator:
    """The commutator of two sliders or weight updates, module by module.

    Attributes:
        modules: by name ("component.path" of a slider), for the modules that both change.
        share: the size of all together over its bound, 0 (they commute everywhere) to 1. Modules that only
            one of them changes count with their bound zero.
    """

    modules: Mapping[str, ModuleCommutator]

    @property
    def share(self) -> float:
        """√Σ size² / √Σ bound², over the modules that both change; NaN where there is no change at all."""
        bound = math.hypot(*(module.bound for module in self.modules.values()))
        return math.hypot(*(module.size for module in self.modules.values())) / bound if bound else math.nan

    @property
    def table(self) -> pd.DataFrame:
        """A row for each module: module, kind, size, bound, share."""
        return pd.DataFrame(
            [
                {"module": name, "kind": at.kind, "size": at.size, "bound": at.bound, "share": at.share}
                for name, at in self.modules.items()
            ]
        )


@dataclass(frozen=True)
class EditCommutator:
    """How far two edits of a model are from commuting, at some inputs.

    Attributes:
        difference: f∘g − g∘f, the model's output with g acting first minus that with f acting first
            (rows, …).
        size: for each row the norm of the difference.
        effects: for each row the mean of the norms of both orders' changes against the unedited model.
    """

    difference: Float[Tensor, "rows *shape"]
    size: Float[Tensor, " rows"]
    effects: Float[Tensor, " rows"]

    @property
    def share(self) -> Float[Tensor, " rows"]:
        """Size over effect for each row, 0 (they commute) to 2; NaN where neither changes anything."""
        return torch.where(self.effects > 0, self.size / self.effects, math.nan)


@overload
def commutator(a: Slider | Scaled | WeightUpdate, b: Slider | Scaled | WeightUpdate) -> Commutator: ...
@overload
def commutator(
    a: Edit, b: Edit, *, model: nn.Module | None = ..., inputs: Mapping[str, Any] | None = ...
) -> EditCommutator: ...
def commutator(
    a: Any,
    b: Any,
    *,
    model: nn.Module | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Commutator | EditCommutator:
    r"""How far two changes are from commuting.

    Sums of weights always commute; a commutator tells whether the *maps* that the changes are do. For a
    square module it is \([A, B] = AB - BA\). A rectangular one (and a convolution over more than one pixel)
    has no product of its own; there it is that of the symmetric dilations
    \(\begin{pmatrix} 0 & A \\ A^\top & 0 \end{pmatrix}\), whose blocks are \(AB^\top - BA^\top\) (what is
    written) and \(A^\top B - B^\top A\) (what is read). Both blocks are zero where A and B have singular
    vectors in common, or spaces that are orthogonal. Sizes are held against
    \(\lVert [X, Y] \rVert \le \sqrt 2\, \lVert X \rVert \lVert Y \rVert\). Everything stays in factors.

    Of two edits of a model it is \(f \circ g - g \circ f\) of the model's outputs, measured: edits that act
    at one site one after the other, in both orders.

    Args:
        a: a slider (at a scale), a weight update, or an edit.
        b: the other one, of the same kind.
        model: for edits: the model that runs.
        inputs: for edits: what the model is called with, tensors by name.

    Raises:
        EditError: operands of different kinds or bases, with no matrix in common, not finite; edits without
            a model and inputs, or that do nothing there.

    Source: Böttcher and Wenzel, "The Frobenius norm and the commutator" (2008).

    >>> import torch
    >>> def update(*rows):
    ...     return WeightUpdate.from_tensors({"w": LowRank.from_dense(torch.tensor(rows))})
    >>> up, down = update([0.0, 1.0], [0.0, 0.0]), update([0.0, 0.0], [1.0, 0.0])
    >>> found = commutator(up, down)
    >>> found.modules["w"].parts["matrix"].dense(), round(found.share, 4)
    (tensor([[ 1.,  0.],
            [ 0., -1.]]), 1.0)
    """
    if isinstance(a, Edit) or isinstance(b, Edit):
        if not isinstance(a, Edit) or not isinstance(b, Edit):
            raise EditError(
                f"commutator of a {type(a).__name__} and a {type(b).__name__}; give two of one kind"
            )
        if model is None or inputs is None:
            raise EditError("the commutator of two edits is measured on a model: give model= and inputs=")
        return _of_edits(a, b, model, inputs)
    if model is not None or inputs is not None:
        raise EditError(
            "the commutator of sliders or updates is one of weights; model= and inputs= are for edits"
        )
    one, other = read_terms([a, b], "commutator")
    names = [n for n in common_names([one, other], "commutator") if len(one.update.entries[n].shape) >= 2]
    if not names:
        raise EditError("commutator: the operands have only vectors in common, and translations commute")
    modules = {}
    for name in names:
        with as_edit_errors(f"commutator: {name}"):
            first, second = one.matrix(name) * one.factor, other.matrix(name) * other.factor
            modules[name] = matrix_commutator(first, second, map_of_itself=_maps_itself(one, name))
    return Commutator(modules)


def matrix_commutator(a: LowRank, b: LowRank, *, map_of_itself: bool | None = None) -> ModuleCommutator:
    """The commutator of two matrices of one shape in factors.

    Args:
        a: (m, n).
        b: the same.
        map_of_itself: whether rows and columns mean the same, so that products have a meaning; whether m = n
            if not given.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    norms = float(a.norm()) * float(b.norm())
    if a.shape[-2] == a.shape[-1] if map_of_itself is None else map_of_itself:
        whole = a @ b - b @ a
        return ModuleCommutator("square", {"matrix": whole}, float(whole.norm()), math.sqrt(2) * norms)
    written, read = a @ b.mT - b @ a.mT, a.mT @ b - b.mT @ a
    size = math.hypot(float(written.norm()), float(read.norm()))
    # a dilation has √2 times the norm of its matrix
    return ModuleCommutator("dilation", {"written": written, "read": read}, size, 2 * math.sqrt(2) * norms)


def _maps_itself(term: Term, name: str) -> bool:
    entry = term.update.entries[name]
    pixels = math.prod(entry.shape[2:])
    if term.slider is not None:
        component, path = name.split(".", 1)
        pixels = math.prod(term.slider.changes[component][path].kernel)
    return pixels == 1 and entry.shape[0] == entry.shape[1] and entry.layout != "other"


def _of_edits(f: Edit, g: Edit, model: nn.Module, inputs: Mapping[str, Any]) -> EditCommutator:
    with torch.no_grad():
        plain = _output(model(**inputs))
        outputs = []
        for first, second in ((g, f), (f, g)):
            with (first + second).on(model):
                outputs.append(_output(model(**inputs)).clone())
    wide = torch.promote_types(plain.dtype, torch.float32)
    g_first, f_first = (output.to(wide) for output in outputs)
    difference = g_first - f_first
    effects = (_norms(g_first - plain) + _norms(f_first - plain)) / 2
    return EditCommutator(difference, _norms(difference), effects)


def _norms(values: Float[Tensor, "rows *shape"]) -> Float[Tensor, " rows"]:
    return torch.linalg.vector_norm(values.flatten(1), dim=1)


def _output(output: Any) -> Tensor:
    """The tensor that a model is about: logits, the last states, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "sample"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor):
        return output[0]
    raise EditError(f"the model gives a {type(output).__name__} without logits or states to compare")
