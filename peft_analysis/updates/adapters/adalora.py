"""AdaLoRA (Zhang et al. 2023): ΔW = s P diag(λ) Q / r₀, with ranks that training has cut down."""

from collections.abc import Iterator
from functools import partial

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part, stored_as
from peft_analysis.updates.entry import Layout

ROLES = frozenset({"lora_A", "lora_B", "lora_E"})
LITTLE = 1e-5
"""What peft adds to the rank that it divides by."""


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """The change of one module; of stored rank 0 where training has left it none.

    Raises:
        UpdateError: for a factor that is missing or does not fit.
    """
    part.need("lora_A", "lora_B", "lora_E")
    a, b, values = (part.tensors[role].shape for role in ("lora_A", "lora_B", "lora_E"))
    if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == values.numel():
        raise UpdateError(
            f"{part.path}: factors of shapes {tuple(b)}, {tuple(values)}, {tuple(a)} do not multiply"
        )
    shape, layout = stored_as(part, foundation, b[0], a[1])
    scaling = _scaling(part, a[0])
    yield Change(
        name=part.weight,
        shape=shape,
        delta=partial(_delta, part, foundation, scaling, layout),
        kind="adalora",
        layout=layout,
        details={"rank": a[0], "scaling": scaling},
    )


def _scaling(part: Part, rank: int) -> float:
    """α / (r₀ + 10⁻⁵); peft divides by the rank at the start and takes r for an α that is not positive."""
    if part.layer is not None:
        divisor = float(part.tensors["ranknum"].read()) if "ranknum" in part.tensors else rank
        return float(part.scaling or 0.0) / (divisor + LITTLE)
    settings = part.settings
    alpha = settings.get("lora_alpha", 8)
    first = settings.get("init_r", 12) if rank else 0
    return (alpha if alpha > 0 else float(rank)) / (first + LITTLE)


def _delta(
    part: Part, foundation: Foundation, scaling: float, layout: Layout, current: Read, start: Read
) -> LowRank:
    values = part.read("lora_E", foundation).flatten() * scaling
    product = LowRank(part.read("lora_B", foundation) * values, part.read("lora_A", foundation))
    return product.mT if layout == "in_out" else product
