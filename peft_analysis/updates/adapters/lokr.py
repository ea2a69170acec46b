"""LoKr (Yeh et al. 2024): ΔW = s W₁ ⊗ W₂, each of them whole or in two factors."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part, stored_as
from peft_analysis.updates.adapters.settings import scaling_of

ROLES = frozenset(
    {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"},
)


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of one module; low rank where the ranks of the two multiply to less than full.

    Raises:
        UpdateError: for a factor that is missing or does not fit.
    """
    for which in ("lokr_w1", "lokr_w2"):
        if which not in part.tensors:
            part.need(f"{which}_a", f"{which}_b")
    out, inputs, rank = _sizes(part)
    if min(out, inputs) == 0 or rank == 0:
        raise UpdateError(f"{part.path}: factors of rank 0 change nothing")
    shape, layout = stored_as(part, foundation, out, inputs)
    scaling = (
        part.scaling
        if part.scaling is not None
        else scaling_of(part.settings, part.patterned, rank, key="alpha")
    )
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_delta, part, foundation, scaling, shape),
        kind="lokr",
        layout=layout,
        details={"scaling": scaling} if rank is None else {"rank": rank, "scaling": scaling},
    )


def _sizes(part: Part) -> tuple[int, int, int | None]:
    """Outputs, inputs with the kernel, and the rank where a factor shows it."""
    rank = None
    shapes = []
    for which in ("lokr_w1", "lokr_w2"):
        if which in part.tensors:
            whole = part.tensors[which].shape
            shapes.append((whole[0], whole[1:].numel()))
            continue
        first, last = (part.tensors[f"{which}_{end}"].shape for end in "ab")
        rank = last[0]
        if "lokr_t2" in part.tensors and which == "lokr_w2":
            shapes.append((first[1], last[1] * part.tensors["lokr_t2"].shape[2:].numel()))
        else:
            shapes.append((first[0], last[1]))
    return shapes[0][0] * shapes[1][0], shapes[0][1] * shapes[1][1], rank


def _delta(
    part: Part, foundation: Foundation, scaling: float, shape: torch.Size, current: Read, start: Read
) -> LowRank | Tensor:
    if "lokr_w2" in part.tensors and len(part.tensors["lokr_w2"].shape) == 3:
        # For the kernel of a Conv1d peft leaves it to torch.kron to line up three dimensions with two, from
        # the last on, and reshapes.
        return (scaling * torch.kron(_whole(part, foundation), part.read("lokr_w2", foundation))).reshape(
            shape
        )
    left, right = _factors(part, foundation, "lokr_w1")
    other_left, other_right = _factors(part, foundation, "lokr_w2")
    rank = left.shape[1] * other_left.shape[1]
    if rank < min(left.shape[0] * other_left.shape[0], right.shape[1] * other_right.shape[1]):
        return LowRank(scaling * torch.kron(left, other_left), torch.kron(right, other_right))
    return (scaling * torch.kron(left @ right, other_left @ other_right)).reshape(shape)


def _whole(part: Part, foundation: Foundation) -> Tensor:
    left, right = _factors(part, foundation, "lokr_w1")
    return left @ right


def _factors(part: Part, foundation: Foundation, which: str) -> tuple[Tensor, Tensor]:
    """Two factors of W₁ or W₂; an identity beside it where it is stored whole."""
    if which in part.tensors:
        whole = part.read(which, foundation).flatten(1)
        rows, columns = whole.shape
        eye = torch.eye(min(rows, columns), dtype=whole.dtype, device=whole.device)
        return (eye, whole) if rows <= columns else (whole, eye)
    first, last = (part.read(f"{which}_{end}", foundation) for end in "ab")
    if which == "lokr_w2" and "lokr_t2" in part.tensors:
        kernel = part.read("lokr_t2", foundation)
        return first.mT, torch.einsum("pqkl,qi->pikl", kernel, last).flatten(1)
    return first, last
