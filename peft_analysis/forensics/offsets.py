"""What an update adds for a subject: for the whole of it, or for the subject's own part of a joint fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peft_analysis.errors import UpdateError
from peft_analysis.forensics.maps import Basis, RightMap
from peft_analysis.forensics.matching import Match
from peft_analysis.forensics.places import dense
from peft_analysis.updates import WeightUpdate


@dataclass(frozen=True)
class Matched:
    """A matrix whose row space was matched: the match, C's eigenvectors, and the candidates' keys."""

    match: Match
    basis: Basis
    keys: Tensor


def weights_in(
    update: WeightUpdate, model: nn.Module, modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The edited and the unedited values of changed matrices, as the model's own parameters.

    Without the base's weights the model is taken for the base.
    """
    known = dict(model.named_parameters(remove_duplicate=False))
    now, before = {}, {}
    for name in modules:
        own = known[name].detach()
        has_base = update.base is not None and name in update.base
        start = update.base[name].to(own.device) if has_base and update.base is not None else own
        wide = torch.promote_types(start.dtype, torch.float32)
        if tuple(start.shape) != tuple(own.shape):
            raise UpdateError(
                f"{name} has shape {tuple(start.shape)} in the base and {tuple(own.shape)} in the model"
            )
        before[name] = start.to(own.dtype)
        now[name] = (start.to(wide) + update.dense(name).to(own.device, wide)).to(own.dtype)
    return now, before


def certainty(one: Match) -> float:
    """How sure the chosen candidates of a matrix are: the mean of −log p."""
    return float(-one.p_values[one.chosen].log().mean()) if one.chosen else 0.0


def chosen_keys(one: Matched, which: Sequence[int]) -> Tensor:
    """The keys (subjects, n) of some candidates, each in the context in which it fits best."""
    return with_mean(one.keys)[list(which), one.match.contexts[list(which)]].double()


def whole_offsets(
    update: WeightUpdate, matched: Mapping[str, Matched], names: Sequence[str], which: Sequence[int]
) -> Tensor:
    """Σ ΔW k (subjects, out): what the whole update adds for a subject."""
    total = []
    for name in names:
        keys = chosen_keys(matched[name], which)
        total.append((keys @ dense(update.matrix(name)).to(keys).mT).float())
    return torch.stack(total).sum(0)


def own_offsets(one: Matched, part: tuple[Tensor, Tensor], which: Sequence[int]) -> Tensor:
    """λ (r·k) (subjects, out): what a subject's own part of the joint fit adds for it."""
    left, right = part
    return left.mT * (right * chosen_keys(one, which).to(right)).sum(1, keepdim=True)


def joint(update: WeightUpdate, name: str, one: Matched, chosen: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Left (out, edits) and right (edits, n) factors: ΔW fitted by the right vectors of these subjects."""
    right = mapped(chosen_keys(one, chosen), one.match.map, one.basis)
    left = dense(update.matrix(name)).to(right) @ torch.linalg.pinv(right)
    return left.float(), right.float()


def with_mean(keys: Tensor) -> Tensor:
    """Keys (candidates, contexts + 1, n): the last one is the mean over the contexts."""
    return torch.cat([keys, keys.mean(1, keepdim=True)], 1)


def mapped(keys: Tensor, one: RightMap, eigen: Basis) -> Tensor:
    """The right vectors of keys (edits, n)."""
    return ((keys @ eigen.vectors) * one.weights) @ eigen.vectors.mT
