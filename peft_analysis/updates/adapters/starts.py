"""Starts that peft takes from the base when an adapter is loaded: PiSSA and OLoRA."""

from collections.abc import Iterator
from functools import partial

import torch

from manifolds import LowRank
from peft_analysis.errors import UpdateError
from peft_analysis.updates.adapters import lora
from peft_analysis.updates.adapters.change import Change, Read
from peft_analysis.updates.adapters.foundation import Foundation
from peft_analysis.updates.adapters.part import Part
from peft_analysis.updates.entry import Layout

LOST = {
    "corda": "CorDA",
    "lora_ga": "LoRA-GA",
    "loftq": "LoftQ",
}
TAKEN = {"pissa", "olora", *LOST}
"""Starts that are taken off the base inside a live model."""


def changes(part: Part, foundation: Foundation) -> Iterator[Change]:
    """What was taken off the base before training, where the adapter's start says so; for a folder only.

    PiSSA (Meng et al. 2024) takes off the best approximation of rank r, OLoRA (Büyükakyüz 2024) s times the
    first r columns of Q times the first r rows of R. The steps of PiSSA's fast start are random and are not
    stored; the exact approximation, to which they converge, stands in for them.

    Raises:
        UpdateError: for a start that cannot be worked out from the base and the folder.
    """
    start = str(part.settings.get("init_lora_weights", True)).lower()
    lost = next((name for key, name in LOST.items() if start.startswith(key)), None)
    if lost is not None:
        raise UpdateError(
            f"{part.path}: {lost} took values off the base before training that neither the adapter nor the "
            "base tells; save it with path_initial_model_for_weight_conversion, or give the live model and "
            "the base"
        )
    down = part.tensors.get(lora.LINEAR[0])
    if down is None or len(down.shape) > 2:
        return  # peft starts embeddings and convolutions as any LoRA
    if start.startswith("pissa") or start == "olora":
        shape, layout = lora.stored_shape(part, foundation)
        rank = down.shape[0]
        details = {"start": start}
        if "niter" in start:
            details["start_is"] = "approximate: peft starts from a random decomposition that is not stored"
        yield Change(
            name=part.weight,
            shape=shape,
            delta=partial(
                _taken_off, start == "olora", lora.scaling_in(part) if start == "olora" else 1.0, rank, layout
            ),
            kind="start",
            layout=layout,
            needs_base=True,
            details=details,
            moves_start=True,
        )


def _taken_off(
    orthogonal: bool, scaling: float, rank: int, layout: Layout, current: Read, start: Read
) -> LowRank:
    weight = current()
    if orthogonal:  # peft decomposes a Conv1D's weight as it is stored
        q, r = torch.linalg.qr(weight)
        return LowRank(-scaling * q[:, :rank], r[:rank])
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return LowRank(-left[:, :rank] * values[:rank], right[:rank])
