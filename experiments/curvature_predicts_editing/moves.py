"""The edits that are compared, as functions from states to states, over all scales at once.

Tangent edits are the class that everyone uses, called on many states with a direction and a scale of their
own each. Geodesics to a value are found once for all scales, and followed as `GeodesicSteer` follows them. A
linear edit is a sum. A test compares all of them with the edits under hooks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from geoedit.edits import GeodesicSteer, Selected, TangentSteer
from geoedit.edits.geodesic import on_path
from geoedit.edits.on_manifold import ManifoldEdit
from geoedit.site import Site
from manifolds.cloud.learned import ROUGH, LearnedManifold
from manifolds.operations import unchecked

VALUE, STEP = "to a value", "a reused step"
FLOW_STEPS = 8
POINTS = 17


@dataclass(frozen=True)
class Task:
    """States to edit, and what each edit knows; all of it learned from other sentences.

    Attributes:
        states: one a row: sentences and controls alike.
        start: mean of the value that the edit leads away from. end: of the one that it leads to. For a reused
            step both were measured elsewhere.
        end: see `start`.
        site: where the states stand.
        manifold: of the concept there.
        metric: the same manifold in the metric that the answers pull back; None where that was not asked for.
    """

    states: Float[Tensor, "rows width"]
    start: Float[Tensor, "rows width"]
    end: Float[Tensor, "rows width"]
    site: Site
    manifold: LearnedManifold
    metric: LearnedManifold | None = None

    @property
    def vector(self) -> Float[Tensor, "rows width"]:
        """What a linear edit adds at scale 1."""
        return self.end - self.start

    @cached_property
    def feet(self) -> Float[Tensor, "rows width"]:
        """The states' feet on the manifold."""
        return self.manifold.projx(self.states)

    @cached_property
    def path(self) -> Float[Tensor, "rows points width"]:
        """The geodesics from the feet to the foot of the wanted value's mean, that every scale shares."""
        return shortest(self.manifold, self.feet, self.end)


Move = Callable[[Task, Float[Tensor, " scales"]], Float[Tensor, "scales rows width"]]


@dataclass(frozen=True)
class Method:
    """An edit under the name that tables show.

    Attributes:
        name: for tables.
        family: whether it leads to a value (`VALUE`) or repeats a step measured elsewhere (`STEP`).
        move: from a task and scales to new states.
        metric: whether it needs the pulled-back metric.
    """

    name: str
    family: str
    move: Move
    metric: bool = False


def linear(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """The state plus s times the vector."""
    return task.states + rearrange(scales, "s -> s 1 1") * task.vector


def projected(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """The foot of x + s v, with what x holds besides its own foot: linear, then put back."""
    return task.manifold.projx(linear(task, scales)) + (task.states - task.feet)


def projected_only(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """The foot of x + s v and nothing besides."""
    return task.manifold.projx(linear(task, scales))


def tangent(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """`TangentSteer` in the linear edit's direction."""
    return _changed(task, scales, _tangent_edit(task, 1))


def flow(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """`TangentSteer` in several steps, the direction projected anew before each."""
    return _changed(task, scales, _tangent_edit(task, FLOW_STEPS))


def geodesic(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """`GeodesicSteer` to the mean of the wanted value."""
    return _along(task.manifold, task.path, scales) + (task.states - task.feet)


def geodesic_only(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """`GeodesicSteer` to the mean of the wanted value, dropping what is not the concept's."""
    return _along(task.manifold, task.path, scales)


def geodesic_in_metric(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """`GeodesicSteer` to the mean of the wanted value in the metric of the answers."""
    manifold = task.metric or task.manifold
    return _along(manifold, shortest(manifold, task.feet, task.end), scales) + (task.states - task.feet)


def geodesic_direction(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """`GeodesicSteer` along the tangent part of the vector."""
    return _changed(task, scales, lambda repeated: GeodesicSteer(
        task.site, task.manifold, direction=repeated(task.vector)
    ))  # fmt: skip


def carried_step(task: Task, scales: Float[Tensor, " scales"]) -> Float[Tensor, "scales rows width"]:
    """`GeodesicSteer` by the step's own geodesic, carried along the manifold to where the state stands."""
    velocity = carry(task.manifold, task.start, task.end, task.states)
    return _changed(task, scales, lambda repeated: GeodesicSteer(
        task.site, task.manifold, direction=repeated(velocity)
    ))  # fmt: skip


METHODS = (
    Method("linear", VALUE, linear),
    Method("linear, then projected", VALUE, projected),
    Method("linear, then projected, residual dropped", VALUE, projected_only),
    Method("tangent", VALUE, tangent),
    Method("tangent, 8 steps", VALUE, flow),
    Method("geodesic", VALUE, geodesic),
    Method("geodesic, residual dropped", VALUE, geodesic_only),
    Method("geodesic, Fisher", VALUE, geodesic_in_metric, metric=True),
    Method("linear, reused", STEP, linear),
    Method("tangent, reused", STEP, tangent),
    Method("geodesic, reused direction", STEP, geodesic_direction),
    Method("geodesic, carried step", STEP, carried_step),
)
BASELINES = {VALUE: "linear", STEP: "linear, reused"}


def carry(
    manifold: LearnedManifold,
    start: Float[Tensor, "rows width"],
    end: Float[Tensor, "rows width"],
    states: Float[Tensor, "rows width"],
) -> Float[Tensor, "rows width"]:
    """The velocity of the geodesic from start to end, carried along the manifold to the feet of states.

    It is projected on one tangent space after the other on the geodesic between, and keeps its length: the
    transport of Levi-Civita up to the square of the distance between the points.
    """
    with unchecked():
        first = manifold.projx(start)
        velocity = manifold.logmap(first, manifold.projx(end))
        length = torch.linalg.vector_norm(velocity, dim=-1, keepdim=True)
        for point in manifold.shortest_path(first, manifold.projx(states), POINTS).path.unbind(-2):
            velocity = manifold.proju(point, velocity)
            size = torch.linalg.vector_norm(velocity, dim=-1, keepdim=True)
            velocity = velocity * (length / torch.where(size > 0, size, 1.0))
    return velocity


Repeated = Callable[[Float[Tensor, "rows width"]], Float[Tensor, "runs width"]]


def _tangent_edit(task: Task, steps: int) -> Callable[[Repeated], ManifoldEdit]:
    return lambda repeated: TangentSteer(task.site, task.manifold, repeated(task.vector), steps=steps)


def shortest(
    manifold: LearnedManifold, feet: Float[Tensor, "rows width"], ends: Float[Tensor, "rows width"]
) -> Float[Tensor, "rows points width"]:
    """Geodesics from feet to the feet of ends; NaN where none was found that is fit for use.

    `LearnedManifold.geodesic`, which refuses all pairs where one of them is too rough.
    """
    with unchecked():
        found = manifold.shortest_path(feet, manifold.projx(ends), POINTS)
    return torch.where((found.residual > ROUGH)[:, None, None], torch.nan, found.path)


def _along(
    manifold: LearnedManifold, path: Float[Tensor, "rows points width"], scales: Float[Tensor, " scales"]
) -> Float[Tensor, "scales rows width"]:
    """Where one is after each share of the paths, as `GeodesicSteer` goes; NaN where there is no path."""
    usable = path.isfinite().all(-1).all(-1)
    new = torch.full((len(scales), len(path), path.shape[-1]), torch.nan, dtype=path.dtype)
    with unchecked():
        for number, scale in enumerate(scales.tolist()):
            new[number, usable] = on_path(manifold, path[usable], scale)
    return new


def _changed(
    task: Task, scales: Float[Tensor, " scales"], make: Callable[[Repeated], ManifoldEdit]
) -> Float[Tensor, "scales rows width"]:
    """Apply an edit at every scale to every state, each with its own vector."""
    count = len(scales)

    def repeated(vectors: Tensor) -> Tensor:
        return repeat(vectors, "r d -> (s r) d", s=count)

    states, edit = repeated(task.states), make(repeated)
    rows = torch.arange(len(states), device=states.device)
    scale = repeat(scales.to(states), "s -> (s r) 1", r=len(task.states))
    new = edit.change(states, Selected(rows, torch.zeros_like(rows), len(states), scale))
    return rearrange(new, "(s r) d -> s r d", s=count)
