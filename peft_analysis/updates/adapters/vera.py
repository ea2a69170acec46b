"""VeRA (Kopiczko et al. 2024): ΔW = diag(b) B diag(d) A with random A, B that all modules share."""

from collections.abc import Iterator
from functools import partial

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part, stored_as
from peft_analysis.updates.entry import Layout

SHARED = ("vera_A", "vera_B")
ROLES = frozenset({"vera_lambda_b", "vera_lambda_d"})


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of one module: the first columns of A and rows of B that it has use for.

    Raises:
        UpdateError: for a vector that is missing or does not fit, or without a base, whose inputs are needed.
    """
    part.need("vera_lambda_b", "vera_lambda_d", *SHARED)
    rank, out = (part.tensors[role].shape.numel() for role in ("vera_lambda_d", "vera_lambda_b"))
    a, b = (part.tensors[role].shape for role in SHARED)
    if rank == 0 or a[0] < rank or b[1] < rank or b[0] < out:
        raise UpdateError(
            f"{part.path}: {rank} and {out} numbers do not fit projections of shapes {tuple(b)}, {tuple(a)}"
        )
    shape, layout = stored_as(part, foundation, out, None)
    inputs = shape.numel() // out
    if a[1] < inputs:
        raise UpdateError(f"{part.weight} has {inputs} inputs, more than the {a[1]} of the shared projection")
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_delta, part, foundation, inputs, layout),
        kind="vera",
        layout=layout,
        details={"rank": rank},
    )


def _delta(
    part: Part, foundation: Foundation, inputs: int, layout: Layout, current: Read, start: Read
) -> LowRank:
    out_scale, in_scale = (part.read(role, foundation) for role in ("vera_lambda_b", "vera_lambda_d"))
    down, up = (part.read(role, foundation) for role in SHARED)
    rank = len(in_scale)
    product = LowRank(
        out_scale.unsqueeze(1) * up[: len(out_scale), :rank], in_scale.unsqueeze(1) * down[:rank, :inputs]
    )
    return product.mT if layout == "in_out" else product
