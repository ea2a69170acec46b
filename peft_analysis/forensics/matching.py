"""Which candidates' keys lie in the row space of an update, and how sure that is."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy import special
from torch import Tensor

from peft_analysis.forensics.maps import Basis, RightMap, right_maps

SMALLEST = 1e-12
"""No p-value is given as less: a tail that some hundred decoys tell of cannot be known so far out."""


@dataclass(frozen=True)
class Match:
    """How candidates' keys lie to the row space of one matrix's update.

    Attributes:
        map: the map from key to right vector that explains the right vectors best.
        fits: how well the best map of each kind does: the mean share of a chosen key's right vector that lies
            in the row space.
        separation: by how many deviations of the decoys the best candidates stand out under this map.
        chosen: indices of the candidates that explain the row space, in the order in which they were taken.
        scores: (candidates,) the share of a candidate's key inside what the other chosen ones leave of the
            row space; the best of its contexts.
        contexts: (candidates,) which context that was; the last one is the mean over contexts.
        right: (candidates,) the share of the right vector that the map makes of a candidate's key inside the
            whole row space, in the same context.
        p_values: (candidates,) the chance of such a score or more for a subject that was not edited.
        rank: the dimension of the row space.
    """

    map: RightMap
    separation: float
    fits: dict[str, float]
    chosen: list[int]
    scores: Float[Tensor, " candidates"]
    contexts: Int[Tensor, " candidates"]
    right: Float[Tensor, " candidates"]
    p_values: Float[Tensor, " candidates"]
    rank: int


def right_space(difference: Float[Tensor, "m n"], rank: int) -> Float[Tensor, "n rank"]:
    """An orthonormal basis of the leading right singular vectors, from the smaller Gram matrix in float64."""
    wide = difference.double()
    scale = wide.abs().amax()
    wide = wide / torch.where(scale > 0, scale, 1.0)
    if wide.shape[0] >= wide.shape[1]:
        return torch.linalg.eigh(wide.mT @ wide)[1].flip(1)[:, :rank]
    left = torch.linalg.eigh(wide @ wide.mT)[1].flip(1)[:, :rank]
    return torch.linalg.qr(wide.mT @ left)[0]


def match(
    keys: Float[Tensor, "candidates contexts n"],
    decoys: Float[Tensor, "decoys contexts n"],
    rows: Float[Tensor, "n rank"],
    found: Basis,
) -> Match:
    """Takes candidates one by one until their keys fill the row space; see `Match`.

    With weights t of a map in the eigenvectors of C, an edit's right vector is r = t k, so that √t k lies in
    the span S of r/√t over the edits. Of all candidates the one with the largest share of √t k in S is taken,
    its part of S is taken out, and so on: subjects with keys alike (one family name) do not both count for
    one edit. A taken candidate's score leaves out its own part only, so that the order does not matter.
    """
    own, others = (torch.cat([k, k.mean(1, keepdim=True)], 1).double() for k in (keys, decoys))
    own, others, rows = own @ found.vectors, others @ found.vectors, found.vectors.mT @ rows.double()
    maps = right_maps(found.values)
    seen = [(coordinates(own, rows, one), coordinates(others, rows, one)) for one in maps]
    first = max(seen, key=lambda pair: _separation(*pair))[0]
    chosen = take(first, rows.shape[1])
    best = first.square().sum(-1)[chosen].argmax(1)
    fitted = [float(shares(own[chosen, best], rows, one).mean()) for one in maps]
    index = max(range(len(maps)), key=fitted.__getitem__)
    inside, outside = seen[index]
    chosen = take(inside, rows.shape[1])
    scores, contexts, p_values = judged(inside, outside, chosen)
    fits: dict[str, float] = {}
    for one, value in zip(maps, fitted, strict=True):
        fits[one.kind] = max(value, fits.get(one.kind, 0.0))
    separation = _separation(inside, outside)
    used = own[torch.arange(len(own), device=own.device), contexts]
    right = shares(used, rows, maps[index])
    return Match(maps[index], separation, fits, chosen, scores, contexts, right, p_values, rows.shape[1])


def shares(
    keys: Float[Tensor, "many n"], rows: Float[Tensor, "n rank"], one: RightMap
) -> Float[Tensor, " many"]:
    """The share of each right vector t k that lies in the row space of an update."""
    right = keys * one.weights
    length = right.square().sum(-1)
    return (right @ rows).square().sum(-1) / torch.where(length > 0, length, 1.0)


def coordinates(
    keys: Float[Tensor, "many contexts n"], rows: Float[Tensor, "n rank"], one: RightMap
) -> Float[Tensor, "many contexts rank"]:
    """Unit vectors √t k, in an orthonormal basis of the span of r/√t; the squares' sum is a share."""
    root = one.weights.sqrt()
    inverse = torch.where(root > 0, 1 / torch.where(root > 0, root, 1.0), 0.0)
    frame = torch.linalg.qr(rows * inverse.unsqueeze(-1))[0]
    weighed = keys * root
    length = weighed.norm(dim=-1, keepdim=True)
    return (weighed @ frame) / torch.where(length > 0, length, 1.0)


def take(inside: Float[Tensor, "candidates contexts rank"], count: int) -> list[int]:
    """Candidates in the order in which each has the largest share in what the ones before it leave."""
    rest = inside.clone()
    chosen: list[int] = []
    for _ in range(min(count, len(inside))):
        shares = rest.square().sum(-1)
        shares[chosen] = -1.0
        best = int(shares.amax(1).argmax())
        vector = rest[best, shares[best].argmax()]
        length = vector.norm()
        if not bool(length > 1e-6):
            break
        chosen.append(best)
        unit = vector / length
        rest = rest - (rest @ unit).unsqueeze(-1) * unit
    return chosen


def judged(
    inside: Float[Tensor, "candidates contexts rank"],
    outside: Float[Tensor, "decoys contexts rank"],
    chosen: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, contexts and p-values of all candidates, given those that are taken."""
    shares = inside.square().sum(-1)
    which = shares.argmax(1)
    taken = inside[chosen, which[chosen]]
    dual, left_over = _dual(taken)
    scores = (inside @ left_over).square().sum(-1)
    null = (outside @ left_over).square().sum(-1)
    p_values = torch.ones(len(inside), dtype=torch.float64)
    contexts = scores.argmax(1) if left_over.shape[1] else which
    best = scores.amax(1)
    if left_over.shape[1]:
        p_values = tail(best, null.amax(1))
    for column, index in enumerate(chosen):
        direction = dual[:, column]
        alone = scores[index] + (inside[index] @ direction).square()
        by_chance = null + (outside @ direction).square()
        best[index] = alone.max()
        contexts[index] = alone.argmax()
        p_values[index] = tail(alone.max().view(1), by_chance.amax(1))[0]
    return best.clamp(max=1.0), contexts, p_values


def _dual(taken: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors (rank, taken), each at right angles to all taken ones but its own; and the complement."""
    rank = taken.shape[1]
    if not len(taken):
        return taken.new_zeros(rank, 0), torch.eye(rank, dtype=taken.dtype, device=taken.device)
    dual = torch.linalg.pinv(taken)
    _, sizes, frame = torch.linalg.svd(taken, full_matrices=True)
    full = int((sizes > 1e-9 * sizes[0]).sum())
    return dual / dual.norm(dim=0).clamp_min(1e-300), frame[full:].mT


def _separation(inside: Tensor, outside: Tensor) -> float:
    """How far the best candidates, as many as the rank, stand above the decoys: in their deviations."""
    own, null = (part.square().sum(-1).amax(1) for part in (inside, outside))
    top = own.topk(min(inside.shape[-1], len(own))).values
    middle = null.median()
    spread = (null - middle).abs().median() * 1.4826
    return float((top.mean() - middle) / spread.clamp_min(1e-6))


def tail(scores: Float[Tensor, " many"], null: Float[Tensor, " decoys"]) -> Float[Tensor, " many"]:
    """P(score or more) under a beta distribution fitted to the decoys' median and 90 % point.

    A few decoys that resemble an edited subject do not move these points. Far out the tail is extrapolated
    from the decoys; chances below 1e-12 are given as 1e-12.
    """
    points = np.quantile(null.double().numpy(force=True), [0.5, 0.9]).clip(1e-12, 1 - 1e-9)
    a, b = fit_beta(float(points[0]), float(points[1]))
    chances = special.betaincc(a, b, scores.double().numpy(force=True).clip(0.0, 1.0))
    return torch.from_numpy(np.asarray(chances)).clamp(SMALLEST, 1.0)


def fit_beta(middle: float, high: float) -> tuple[float, float]:
    """The beta distribution whose median is `middle` and whose 90 % point is nearest to `high`."""
    shapes = np.geomspace(0.1, 200.0, 240)
    low, top = np.full_like(shapes, 1e-3), np.full_like(shapes, 1e9)
    for _ in range(50):
        scale = np.sqrt(low * top)
        below = special.betainc(shapes, scale, middle) < 0.5
        low, top = np.where(below, scale, low), np.where(below, top, scale)
    scale = np.sqrt(low * top)
    best = int(np.abs(special.betainc(shapes, scale, high) - 0.9).argmin())
    return float(shapes[best]), float(scale[best])
