"""What foretells a straight edit: numbers of its geometry, from what the unedited model did.

Plain functions on the tensors of one site; no edited state is run. In a sentence the rows w are the states
that all values leave there, with outputs f_w (log-probabilities of the answers) and Jacobians J_w. An edit
takes row a, adds v and hopes for row b: it walks along x(t) = x_a + t v to y = x(1). Every feature is a pure
number (nats count as one), so that what is learned on one model can be asked about another; none knows a name
or a depth.

Lengths are measured twice: plainly, and in the metric that the rest of the network pulls back,
`g_w = J_w^T C J_w / k` with C the centring over the answers (the Fisher metric of the answers weighed alike),
or that of drawn labels or projections where there are no answers. Features of the first kind end in `_plain`,
of the second in `_fisher`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from geoedit.diagnosis.landing import margins, output_margin
from geoedit.diagnosis.paths import STEPS, Paths, Sentence, entry, ratio, weights
from geoedit.diagnosis.predict import Edits, Gradients, Rows, shifts
from geoedit.errors import EditError

CHUNK, NUMBERS = 64, 2**18
"""Edits in one step: at least so many, and of small sentences as hold so many responses."""
BEYOND = 1.25
"""And once past its end: an edit that only just arrives there is less sure than one that stays."""

MARGINS: dict[str, str] = {
    "landing": "logit margin of the target's answer at the landing point, interpolated between rows (nats)",
    "landing_free": "the same as if all that tells the values apart passed through the site (nats)",
    "landing_rows": "the same with each row weighed by the distance in its own metric (nats)",
    "landing_sharp": "the same with weights by the inverse fourth power of distances, not the square (nats)",
    "landing_sphere": "the same where the norm of the landing point is that of source and target (nats)",
    "landing_sphere_sharp": "both (nats)",
    "landing_beyond": "the same a quarter further along the path (nats)",
    "landing_before": "the same three quarters along the path (nats)",
    "landing_half": "the same half way (nats)",
    "along_path": "margin after integrating the rows' Jacobians along the whole path (nats)",
    "first_order": "margin by the gradient at the source alone (nats)",
    "two_ends": "margin by the mean of the gradients at source and target (nats)",
    "second_order": "margin by the source's gradient and its change along the chord (nats)",
    "from_target": "margin by the target's output and gradient (nats)",
    "doubt": "spread of these estimates of the margin (nats)",
    "start": "margin of the wanted answer at the source, unedited (nats)",
    "end": "margin of the wanted answer in the target's own prompt (nats)",
    "confidence": "margin of the best answer over the second at the source, unedited (nats)",
    "moved": "how far the outputs move along the path, root mean square over answers (nats)",
    "progress": "share of the way from `start` to `end` that the landing covers",
    "share": "share of the outputs' change between values that passes through the site, median over pairs",
    "pair_share": "the same for source and target, counting only change in the right direction",
    "closure": "part of the outputs' change from source to target that their gradients do not explain",
}
LENGTHS: dict[str, str] = {
    "nearer_fisher": "distance from the landing to the nearest rival minus that to the target, over the sum",
    "nearer_rows": "the same, each row in its own metric",
    "nearer_plain": "the same in plain distance",
    "length_fisher": "length of the vector over the chord from source to target",
    "length_plain": "the same in plain distance",
    "reach_fisher": "length of the vector over the typical distance from a value to its nearest other",
    "reach_plain": "the same in plain distance",
    "cosine_fisher": "cosine of the vector with the chord, mean of the metrics at both ends",
    "cosine_plain": "the same in plain angles",
    "missed_fisher": "distance from the landing point to the target over the chord",
    "missed_plain": "the same in plain distance",
    "missed_spread": "distance from the landing point to the target over the spread within classes, plain",
    "growth": "norm of the landing point over the mean norm of source and target",
    "off_fisher": "distance from the landing point to the nearest row over the rows' typical distance",
    "off_plain": "the same in plain distance",
    "bend_fisher": "second- over first-order response to the vector from source to target: "
    "|(J_b - J_a) v| / (|J_a v| + |J_b v|), the curvature of the network's answer",
    "wander_fisher": "how much the response to the vector changes along the path, over its mean",
    "detour_fisher": "the way from source to target through close rows, over the chord",
    "detour_plain": "the same in plain distance",
}
FEATURES: dict[str, str] = {**MARGINS, **LENGTHS}


def edit_features(
    states: Float[Tensor, "rows width"],
    means: Float[Tensor, "values width"],
    gradients: Gradients,
    rows: Rows,
    edits: Edits,
) -> dict[str, Float[Tensor, " edits"]]:
    """Return every feature of `FEATURES` for every edit; NaN where it cannot be known.

    Without answers the features of `MARGINS` are all NaN, and the metric is that of drawn labels, or of
    random projections of the output. A length over a length that is zero is NaN too. The cost is linear in
    the edits: one product of each with the gradients of its sentence.

    Args:
        states: of all prompts at the site. means: of all values there.
        means: see `states`.
        gradients: at the site.
        rows: what the prompts are; `rows.answers` wherever `gradients.answers` is.
        edits: what is to be judged.

    Raises:
        EditError: the gradients are of no kind, or answers' gradients come without the answers' outputs.
    """
    jacobians = _jacobians(gradients)
    answered = gradients.answers is not None
    if answered and (rows.answers is None or edits.answer is None):
        raise EditError("gradients of answers were given without the answers themselves: set rows.answers.")
    shift = shifts(means, edits)
    spread = (states - means[rows.value]).square().sum(1).mean().sqrt()
    found = {name: torch.full_like(shift[:, 0], torch.nan) for name in FEATURES}
    for template in rows.template[edits.source].unique():
        inside = ((rows.template == template) & (rows.group >= 0)).nonzero()[:, 0]
        place = torch.full_like(rows.template, -1)
        place[inside] = torch.arange(len(inside), device=place.device)
        sentence = Sentence(
            states[inside],
            jacobians[inside],
            rows.group[inside],
            rows.answers[inside] if answered and rows.answers is not None else None,
        )
        chosen = (rows.template[edits.source] == template).nonzero()[:, 0]
        for part in chosen.split(max(CHUNK, NUMBERS // sentence.images[0].numel())):
            path = Paths.of(sentence, place[edits.source[part]], place[edits.target[part]], shift[part])
            numbers = length_features(sentence, path)
            numbers["missed_spread"] = ratio(path.plain.gather(1, path.target[:, None])[:, 0], spread)
            if answered and edits.answer is not None:
                numbers |= margin_features(sentence, path, edits.answer[part])
            for name, column in numbers.items():
                found[name][part] = column
    return found


def margin_features(
    sentence: Sentence, path: Paths, answer: Int[Tensor, " edits"]
) -> dict[str, Float[Tensor, " edits"]]:
    """Return the features of `MARGINS`: what the network, as far as the rows tell, says along the path.

    At a point x(t) the rows are weighed by `a_w ~ 1 / D_w^2` and carried over to it,
    `z(t) = sum_w a_w [f_a + share (f_w - f_a) + J_w (x(t) - x_w)]` (see `landing.interpolated_outputs`);
    along the path, `f_a + ∫ sum_w a_w(t) J_w v dt` by the trapezoid rule asks no output but the source's.

    Raises:
        EditError: the sentence has no outputs.
    """
    if sentence.outputs is None:
        raise EditError("margins need the outputs of the sentence's rows.")
    source, target = path.source, path.target
    start = sentence.outputs[source]
    change, there = sentence.change[source], sentence.there[source]

    def margin(outputs: Float[Tensor, "edits k"]) -> Float[Tensor, " edits"]:
        return output_margin(outputs, answer)[0]

    def landed(
        t: float, share: Tensor, own: bool = False, power: int = 2, on: Paths = path
    ) -> Float[Tensor, " edits"]:
        near = weights(on.distances(t, own), power)[:, None]
        carried = (near @ (share * change + there) + t * (near @ on.response))[:, 0]
        return margin(start + carried)

    near = torch.stack([weights(path.distances(step / STEPS)) for step in range(STEPS + 1)], 1)
    speeds = near @ path.response
    whole = torch.trapezoid(speeds, dx=1 / STEPS, dim=1)
    first, last = path.response_at(source), path.response_at(target)
    chord = sentence.states[target] - sentence.states[source]
    along = ratio((path.shift * chord).sum(1), chord.square().sum(1))
    everyone = torch.ones_like(sentence.share)
    sphere = path.on_sphere(sentence)
    found = {
        "landing": landed(1.0, sentence.share),
        "landing_free": landed(1.0, everyone),
        "landing_rows": landed(1.0, sentence.share, own=True),
        "landing_sharp": landed(1.0, sentence.share, power=4),
        "landing_sphere": landed(1.0, sentence.share, on=sphere),
        "landing_sphere_sharp": landed(1.0, sentence.share, power=4, on=sphere),
        "landing_beyond": landed(BEYOND, sentence.share),
        "landing_before": landed(0.75, sentence.share),
        "landing_half": landed(0.5, sentence.share),
        "along_path": margin(start + whole),
        "first_order": margin(start + first),
        "two_ends": margin(start + (first + last) / 2),
        "second_order": margin(start + first + along[:, None] / 2 * (last - first)),
        "from_target": margin(start + sentence.share * entry(change, target) + entry(there, target) + last),
        "start": margin(start),
        "end": margin(sentence.outputs[target]),
        "moved": sentence.norm(whole),
        "share": sentence.share.expand(len(source)),
    }
    spread = [found[name] for name in ("landing", "landing_rows", "along_path", "two_ends", "from_target")]
    found["doubt"] = torch.stack(spread).std(0)
    best = start.topk(min(2, start.shape[1]), dim=1).values
    found["confidence"] = best[:, 0] - best[:, -1]
    found["progress"] = ratio(found["landing"] - found["start"], found["end"] - found["start"])
    # The mean of J_a (x_b - x_a) and J_b (x_b - x_a), beside what the outputs differ by.
    bridge = (sentence.there[target, source] - sentence.there[source, target]) / 2
    seen, differ = sentence.seen(bridge), sentence.seen(entry(change, target))
    found["pair_share"] = ratio((seen * differ).sum(-1), differ.square().sum(-1))
    found["closure"] = ratio((differ - seen).square().sum(-1).sqrt(), differ.square().sum(-1).sqrt())
    return found


def length_features(sentence: Sentence, path: Paths) -> dict[str, Float[Tensor, " edits"]]:
    """Return the features of `LENGTHS` but for the spread within classes, which is of the whole site."""
    source, target = path.source, path.target
    fisher, rows = path.distances(1.0), path.distances(1.0, own=True)
    chord = sentence.states[target] - sentence.states[source]
    length = path.shift.norm(dim=1)
    first, last = sentence.seen(path.response_at(source)), sentence.seen(path.response_at(target))
    # The chord as source and target see it: J_a (x_b - x_a), J_b (x_b - x_a).
    at_source = sentence.seen(sentence.there[target, source])
    at_target = sentence.seen(-sentence.there[source, target])
    straight = path.of_rows(sentence.fisher)
    moved = ((first.square().sum(-1) + last.square().sum(-1)) / 2).sqrt()
    ends = [sentence.states[row] + sentence.centre for row in (source, target)]
    near = torch.stack([weights(path.distances(step / STEPS)) for step in range(STEPS + 1)], 1)
    speeds = sentence.seen(near @ path.response)
    mean = speeds.mean(1)
    turned = (speeds - mean[:, None]).square().sum(-1).mean(1).sqrt()
    return {
        "nearer_fisher": margins(fisher, sentence.group, target).relative,
        "nearer_rows": margins(rows, sentence.group, target).relative,
        "nearer_plain": margins(path.plain, sentence.group, target).relative,
        "length_fisher": ratio(moved, straight),
        "length_plain": ratio(length, chord.norm(dim=1)),
        "reach_fisher": ratio(moved, sentence.typical_fisher),
        "reach_plain": ratio(length, sentence.typical_plain),
        "cosine_fisher": ratio(
            ((first * at_source).sum(-1) + (last * at_target).sum(-1)) / 2, moved * straight
        ),
        "cosine_plain": ratio((path.shift * chord).sum(1), length * chord.norm(dim=1)),
        "missed_fisher": ratio(fisher.gather(1, target[:, None])[:, 0], straight),
        "missed_plain": ratio(path.plain.gather(1, target[:, None])[:, 0], chord.norm(dim=1)),
        "growth": ratio(2 * (ends[0] + path.shift).norm(dim=1), ends[0].norm(dim=1) + ends[1].norm(dim=1)),
        "off_fisher": ratio(fisher.amin(1), sentence.typical_fisher),
        "off_plain": ratio(path.plain.amin(1), sentence.typical_plain),
        "bend_fisher": ratio(
            (last - first).square().sum(-1).sqrt(),
            first.square().sum(-1).sqrt() + last.square().sum(-1).sqrt(),
        ),
        "wander_fisher": ratio(turned, mean.square().sum(-1).sqrt()),
        "detour_fisher": path.of_rows(sentence.detour_fisher),
        "detour_plain": path.of_rows(sentence.detour_plain),
    }


def _jacobians(gradients: Gradients) -> Float[Tensor, "rows k width"]:
    for found in (gradients.answers, gradients.sampled, gradients.output):
        if found is not None:
            return found
    raise EditError("no gradients were given: features need those of answers, of labels or of the output.")
