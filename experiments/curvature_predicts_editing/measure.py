"""Runs every edit at every scale at one site, and measures success, distance and disturbance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from experiments.curvature_predicts_editing.control import disturbance
from experiments.curvature_predicts_editing.equal_success import Sweep
from experiments.curvature_predicts_editing.ground import Ground
from experiments.curvature_predicts_editing.moves import Method, Task

OFF, NEAR, KL, FLIPS = "off", "near", "kl", "flips"


@dataclass(frozen=True)
class Gate:
    """Which states an edit leaves alone.

    Attributes:
        name: added to the name of the edit.
        sources: for each pair, whether its sentence is edited.
        controls: for each pair, whether its control is.
    """

    name: str
    sources: Bool[np.ndarray, " pairs"]
    controls: Bool[np.ndarray, " pairs"]


def gates(ground: Ground) -> tuple[Gate, ...]:
    """Two ways to leave states alone that the learned sentences say nothing of.

    "inside" is `outside="leave"`: the manifold's own `Projection.inside`. "near" asks only whether the state
    is as near to the manifold as some learned sentence was.
    """
    found = [ground.manifold.project(ground.task(False, controls).states) for controls in (False, True)]
    inside = [part.inside.numpy() for part in found]
    near = [(part.distance <= ground.widest).numpy() for part in found]
    return Gate("inside", inside[0], inside[1]), Gate("near", near[0], near[1])


def sweep(
    ground: Ground, method: Method, tasks: tuple[Task, Task], scales: Sequence[float]
) -> tuple[Sweep, int]:
    """Run one edit at every scale, on the sentences and on their controls.

    Success is whether the likeliest next token begins the target's answer. Costs: `off` and `near`
    (`Ground.off`, `Ground.near`), `kl`, the disturbance of the control in nats, and `flips`, whether the
    control's likeliest next token is another one.

    Args:
        ground: where.
        method: the edit.
        tasks: of its family, for the sentences and for their controls.
        scales: of the edit.

    Returns:
        The sweep, and how many edited states were not finite; those were left as they were.
    """
    laboratory, pairs, sentences = ground.laboratory, ground.pairs, ground.sentences
    given = torch.tensor(scales, dtype=torch.float32)
    count = len(pairs)
    edited, broken = [], 0
    for task in tasks:
        new = method.move(task, given)
        finite = torch.isfinite(new).all(-1, keepdim=True)
        broken += int((~finite).sum())
        edited.append(torch.where(finite, new, task.states))
    wanted = torch.tensor(sentences.token[pairs.target])
    success = torch.zeros(len(scales), count)
    kl, flips = torch.zeros(len(scales), count, dtype=torch.float64), torch.zeros(len(scales), count)

    def see_answers(chosen: list[int], after: Tensor) -> None:
        place = torch.tensor(chosen)
        success.view(-1)[place] = (after.argmax(1).cpu() == wanted[place % count]).float()

    def see_controls(chosen: list[int], after: Tensor) -> None:
        place = torch.tensor(chosen)
        before = laboratory.before[torch.tensor(pairs.controls)[place % count]]
        kl.view(-1)[place] = disturbance(before, after.cpu())
        flips.view(-1)[place] = (before.argmax(1) != after.argmax(1).cpu()).float()

    for rows, states, use in (
        (sentences.rows[pairs.source], edited[0], see_answers),
        (pairs.controls, edited[1], see_controls),
    ):
        every = [int(row) for row in np.tile(rows, len(scales))]
        laboratory.run(ground.site, every, states.flatten(0, 1), use)
    unedited = tasks[0].states[None]
    tables = {
        OFF: torch.cat([ground.off(unedited), ground.off(edited[0])]),
        NEAR: torch.cat([ground.near(unedited), ground.near(edited[0])]),
        KL: torch.cat([torch.zeros(1, count), kl]),
        FLIPS: torch.cat([torch.zeros(1, count), flips]),
    }
    found = Sweep(
        np.array([0.0, *scales]),
        torch.cat([torch.zeros(1, count), success]).double().numpy().T,
        {name: table.double().numpy().T for name, table in tables.items()},
    )
    return found, broken


def gated(found: Sweep, gate: Gate) -> Sweep:
    """What the same edit does when it leaves some states alone: there all is as at scale 0."""

    def left(table: Float[np.ndarray, "pairs m"], edited: Bool[np.ndarray, " pairs"]) -> np.ndarray:
        return np.where(edited[:, None], table, table[:, :1])

    own = {OFF: gate.sources, NEAR: gate.sources, KL: gate.controls, FLIPS: gate.controls}
    costs = {name: left(table, own[name]) for name, table in found.costs.items()}
    return replace(found, success=left(found.success, gate.sources), costs=costs)


def only(found: Sweep, chosen: Bool[np.ndarray, " pairs"]) -> Sweep:
    """The same for some of the pairs."""
    return Sweep(
        found.scales, found.success[chosen], {name: table[chosen] for name, table in found.costs.items()}
    )
