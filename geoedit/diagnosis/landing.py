"""Where an edited state lands: distances to the states of every value, and the margin of the target.

Everything here is a plain function on tensors of one template ("frame"): `states` are the n rows that the
concept's values leave at one site in that template; an edit e takes the row `source[e]` and adds `shift[e]`,
hoping to arrive at the row `target[e]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CHUNK = 128


@dataclass(frozen=True)
class Margin:
    """How clearly edited states land on their target.

    Attributes:
        gap: distance to the nearest rival minus distance to the target (units of the metric); positive: on
            target.
        relative: the same over the sum of the two distances, in [-1, 1]; 0 where both vanish.
        rival: row of the nearest rival.
    """

    gap: Float[Tensor, " edits"]
    relative: Float[Tensor, " edits"]
    rival: Int[Tensor, " edits"]


def margins(
    distances: Float[Tensor, "edits rows"], groups: Int[Tensor, " rows"], target: Int[Tensor, " edits"]
) -> Margin:
    """Return the margin of each edit between its target group and the nearest row of any other group.

    `gap = min_{w not in group(b)} D_w - min_{w in group(b)} D_w`. Rows that would give the same answer as the
    target share its group, so that landing on one of them counts as landing on the target. With no rival at
    all the gap is infinite and the relative margin 1.
    """
    own: Bool[Tensor, "edits rows"] = groups[None, :] == groups[target][:, None]
    infinite = torch.full_like(distances, torch.inf)
    near = torch.where(own, distances, infinite).amin(1)
    rival_distance, rival = torch.where(own, infinite, distances).min(1)
    gap = rival_distance - near
    total = rival_distance + near
    relative = torch.where(
        total > 0, gap / total.clamp_min(torch.finfo(total.dtype).tiny), torch.zeros_like(gap)
    )
    return Margin(gap, torch.where(torch.isinf(gap), torch.ones_like(gap), relative), rival)


def euclidean_distances(
    states: Float[Tensor, "rows width"], source: Int[Tensor, " edits"], shift: Float[Tensor, "edits width"]
) -> Float[Tensor, "edits rows"]:
    """Return `D[e, w] = |x_source[e] + shift[e] - x_w|`."""
    return torch.cdist(states[source] + shift, states)


def pulled_back_distances(
    factor: Float[Tensor, "rows rank width"],
    states: Float[Tensor, "rows width"],
    source: Int[Tensor, " edits"],
    target: Int[Tensor, " edits"],
    shift: Float[Tensor, "edits width"],
) -> Float[Tensor, "edits rows"]:
    """Return distances in a metric that is given by factors at every row, averaged over an edit's two ends.

    With `g(x_v) = F_v^T F_v` (F_v is `factor[v]`) and `g = (g(x_source) + g(x_target)) / 2`:
    `D[e, w]^2 = (y - x_w)^T g (y - x_w)`, `y = x_source[e] + shift[e]`. The metric is never multiplied out:
    the cost is edits · rank · (rows + width).
    """
    images = torch.einsum("vrd,wd->vrw", factor, states)
    found = []
    for part in torch.arange(len(source), device=source.device).split(CHUNK):
        start, moved = source[part], shift[part]
        squared = torch.zeros(len(part), len(states), dtype=states.dtype, device=states.device)
        for place in (start, target[part]):
            landed = images[place, :, start] + torch.einsum("erd,ed->er", factor[place], moved)
            squared = squared + (landed[:, :, None] - images[place]).square().sum(1) / 2
        found.append(squared.sqrt())
    return (
        torch.cat(found) if found else torch.zeros(0, len(states), dtype=states.dtype, device=states.device)
    )


def linear_outputs(
    outputs: Float[Tensor, "rows k"],
    gradients: Float[Tensor, "rows k width"],
    source: Int[Tensor, " edits"],
    target: Int[Tensor, " edits"],
    shift: Float[Tensor, "edits width"],
) -> Float[Tensor, "edits k"]:
    """Return the outputs that the rest of the network would give after the edit, to first order.

    `z(y) = f(x_source) + (J_source + J_target) / 2 · shift`: the trapezoid rule along the edit, which is
    exact where the outputs are quadratic between the two ends and the edit reaches the target. The network is
    not run at y.
    """
    found = [
        outputs[source[part]]
        + torch.einsum("ekd,ed->ek", (gradients[source[part]] + gradients[target[part]]) / 2, shift[part])
        for part in torch.arange(len(source), device=source.device).split(CHUNK)
    ]
    return torch.cat(found) if found else outputs.new_zeros(0, outputs.shape[1])


def carried_share(
    outputs: Float[Tensor, "rows k"],
    factor: Float[Tensor, "rows k width"],
    states: Float[Tensor, "rows width"],
    groups: Int[Tensor, " rows"],
) -> Float[Tensor, ""]:
    """Return how much of the outputs' change from one value to another passes through the site, in [0, 1].

    A prompt holds its value at other tokens and in other streams too; an edit at one site moves only what
    passes there. For rows v, w of different groups the site moves the outputs by `|x_w - x_v|_g` (to first
    order, mean square of both ends), while they differ by `|z_w - z_v|` (both in root mean squares over the
    k outputs): the share is the median over pairs of the ratio, cut at 1. The size is compared and not the
    direction, because gradients turn along the way long before they fade.

    Args:
        outputs: what the network gives for each row, centred over k.
        factor: of the metric: gradients of `outputs`, over the square root of k.
        states: of each row.
        groups: rows of one group are not compared.
    """
    images = torch.einsum("vkd,wd->vkw", factor, states)
    own = torch.einsum("vkd,vd->vk", factor, states)
    squared = (images - own[:, :, None]).square().sum(1)
    moved = ((squared + squared.T) / 2).sqrt()
    differ = torch.cdist(outputs, outputs) / outputs.shape[1] ** 0.5
    compared = (groups[:, None] != groups[None, :]) & (differ > 0)
    if not bool(compared.any()):
        return outputs.new_zeros(())
    return (moved[compared] / differ[compared]).clamp(max=1).median()


def interpolated_outputs(
    outputs: Float[Tensor, "rows k"],
    gradients: Float[Tensor, "rows k width"],
    states: Float[Tensor, "rows width"],
    distances: Float[Tensor, "edits rows"],
    share: Float[Tensor, ""],
    source: Int[Tensor, " edits"],
    shift: Float[Tensor, "edits width"],
) -> Float[Tensor, "edits k"]:
    """Return the outputs after each edit, interpolated between the rows of the same sentence.

    Every row w is a point where the outputs and their gradients are known, so that they can be carried over
    to the edited state y = x_a + v; the nearer a row, the more it counts:

        z(y) = sum_w a_w [ f_a + share (f_w - f_a) + J_w (y - x_w) ],   a_w ~ 1 / D_w(y)^2

    `share` turns the outputs of another prompt into what they would be in the prompt of the source, where
    only the site holds w. At y = x_w all weight is on w. The network is not run at y. Interpolation by
    inverse squares of distances with gradients: Shepard, ACM National Conference (1968), section 5; here
    the distances are those of the pulled-back metric.

    Args:
        outputs: f_w; gradients: J_w, of the outputs; states: x_w.
        gradients: see `outputs`. states: see `outputs`.
        distances: D, from `pulled_back_distances`.
        share: from `carried_share`.
        source: the row a of each edit. shift: the vector v.
    """
    own = torch.einsum("vkd,vd->vk", gradients, states)
    landed = states[source] + shift
    floor = (1e-3 * distances.amax(1, keepdim=True)).square() + torch.finfo(distances.dtype).tiny
    weights = 1 / (distances.square() + floor)
    weights = weights / weights.sum(1, keepdim=True)
    found = []
    for part in torch.arange(len(source), device=source.device).split(CHUNK):
        near, start = weights[part], outputs[source[part]]
        step = torch.einsum("vkd,ed->evk", gradients, landed[part]) - own
        found.append(start + share * (near @ outputs - start) + torch.einsum("ev,evk->ek", near, step))
    return torch.cat(found) if found else outputs.new_zeros(0, outputs.shape[1])


def output_margin(
    outputs: Float[Tensor, "edits answers"], answer: Int[Tensor, " edits"]
) -> tuple[Float[Tensor, " edits"], Int[Tensor, " edits"]]:
    """Return the logit of the wanted answer minus the largest other (nats), and which that is."""
    wanted = outputs.gather(1, answer[:, None])[:, 0]
    others = outputs.scatter(1, answer[:, None], -torch.inf)
    best, rival = others.max(1)
    return wanted - best, rival


def chord_cosines(
    states: Float[Tensor, "rows width"],
    source: Int[Tensor, " edits"],
    target: Int[Tensor, " edits"],
    shift: Float[Tensor, "edits width"],
) -> Float[Tensor, " edits"]:
    """Return the cosine between each edit's direction and the local chord from source row to target row."""
    return torch.nn.functional.cosine_similarity(shift, states[target] - states[source], dim=1, eps=1e-12)
