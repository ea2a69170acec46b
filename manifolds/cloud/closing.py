"""Whether classes in the order of a path go round a loop.

On a loop the last class stands as near to the first as classes next to each other do. An arc is told from a
loop by that step alone: how the rest of it bends says nothing, as any arc of a circle could go on. So the
test compares the closing step with the others, without the noise of the class means, and with its error.
Where that error leaves both possible, neighbouring classes are put together, which makes the steps longer and
the errors smaller. A loop has two more signs: classes two apart at its closing stand farther from each
other than those that close it (of classes that are all equally far from each other nothing can be said), and
a closed path without an end class passes as near to it as it does without another class.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manifolds.cloud.splines import curves

THRESHOLD = 1.4
"""How much longer than a step between neighbours the closing step of a loop may be. The closing step of three
quarters of a circle is 1.85 steps long for 7 classes, and longer for more."""
SECOND = 1.1
"""How much longer the steps over one class must be than the closing one, in squares."""
MISSED = 4.0
"""How many times as far as others the end classes may lie from the closed path without them."""
SAME = 1e-5
"""The share of the usual step that is no step: the classes are one."""
FEWEST = 7
"""The fewest classes that putting together leaves."""


@dataclass(frozen=True)
class Closing:
    """Whether a path is closed, and why it is thought so.

    Attributes:
        closed: True, False, or None where the samples do not tell.
        ratio: the closing step by the usual step, √ of the squares without their noise.
        low: the ratio less two standard errors.
        high: the ratio plus two standard errors.
        limit: the ratio up to which a path counts as closed; more for uneven steps.
        second: the steps over one class, at the closing, by the closing step.
        missed: how far the end classes lie from the closed path without them, by how far others do.
        merged: how many neighbouring classes were put together.
        reason: the decision in words.
    """

    closed: bool | None
    ratio: float
    low: float
    high: float
    limit: float
    second: float
    missed: float
    merged: int
    reason: str


def decide_closing(means: Float[Tensor, "c D"], variance: Float[Tensor, "c"], directions: float) -> Closing:
    """Decides whether the path through class means is closed.

    Args:
        means: the class means, in the order of the path.
        variance: the expected ‖error‖² of each.
        directions: in how many directions the noise goes, (tr Σ)² / tr Σ².
    """
    if len(means) < 4:
        nothing = float("nan")
        return Closing(
            None, nothing, nothing, nothing, THRESHOLD, nothing, nothing, 1,
            f"{len(means)} classes say nothing of a loop; at least 4 do",
        )  # fmt: skip
    merged, found = 1, _judge(means, variance, directions, 1)
    while found.closed is None and found.low <= found.limit <= found.high and len(means) // 2 >= FEWEST:
        even = len(means) // 2 * 2
        rest = means[even:]
        means = torch.cat([means[:even].reshape(-1, 2, means.shape[1]).mean(1), rest])
        variance = torch.cat([variance[:even].reshape(-1, 2).mean(1) / 2, variance[even:]])
        merged *= 2
        found = _judge(means, variance, directions, merged)
    return found


def _judge(means: Tensor, variance: Tensor, directions: float, merged: int) -> Closing:
    count = len(means)

    def steps(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Squared steps without their noise, and the variance of those."""
        apart = (means[first] - means[second]).square().sum(-1)
        noise = variance[first] + variance[second]
        return apart - noise, (2 * noise**2 + 4 * (apart - noise).clamp_min(0) * noise) / directions

    place = torch.arange(count, device=means.device)
    others, error = steps(place[:-1], place[1:])
    closing, doubt = (float(each[0]) for each in steps(place[-1:], place[:1]))
    usual = float(others.mean())
    scale = float((means - means.mean(0)).square().sum(-1).mean())
    if not usual > 1e-12 * scale:
        usual = float(others.abs().mean()) + 1e-12 * scale
    uneven = float((others - 2 * error.sqrt()).max()) / usual
    limit = THRESHOLD * max(1.0, uneven) ** 0.25
    spread = (doubt + closing**2 / usual**2 * float(error.mean()) / (count - 1)) ** 0.5
    low, high = (max(closing + way * 2 * spread, 0.0) / usual for way in (-1, 1))
    skipped = float(steps(place[[0, 1]], place[[-2, -1]])[0].mean())
    second = (max(skipped, 0.0) / closing) ** 0.5 if closing > 0 else float("nan")
    missed = _missed(means, variance, directions, usual)
    ratio = (max(closing, 0.0) / usual) ** 0.5
    numbers = (ratio, low**0.5, high**0.5, limit, second, missed, merged)
    if low**0.5 > limit:
        return Closing(False, *numbers, f"the closing step is {ratio:.2g} times the usual one")
    if high**0.5 > limit:
        said = f"the closing step is {low**0.5:.2g} to {high**0.5:.2g} times the usual one: too noisy to tell"
        return Closing(None, *numbers, said)
    if closing > 0 and second**2 < SECOND:
        return Closing(None, *numbers, "classes at the closing are all equally far from each other")
    if missed > MISSED:
        said = f"the closed path misses its end classes {missed:.2g} times as far as others"
        return Closing(False, *numbers, said)
    return Closing(True, *numbers, f"the closing step is {ratio:.2g} times the usual one")


def _missed(means: Tensor, variance: Tensor, directions: float, usual: float) -> float:
    """How far the first and last class lie from the closed path without them, by the median of the others.

    Each is predicted where it stood. Three standard errors of noise, and a tenth of a step, count as no miss.
    """
    count = len(means)
    chords = (means - means.roll(-1, 0)).square().sum(-1).sqrt()
    if count < 5 or not bool((chords > SAME * chords.mean()).all()):
        return 1.0
    breaks = torch.cat([chords.new_zeros(1), chords.cumsum(0)])
    tried = torch.linspace(0, count - 1, min(count, 16), device=means.device).round().long().tolist()
    found = []
    for left_out in tried:
        # Begin after the class that is left out, so that it lies in the last piece.
        turned = (torch.arange(1, count, device=means.device) + left_out) % count
        places = (breaks[turned] - breaks[left_out + 1]) % breaks[-1]
        places = places - places[0]
        gap = chords[left_out - 1] + chords[left_out]
        knots = torch.cat([places, (places[-1] + gap)[None]])
        family = curves(knots.cpu().double().numpy(), True)
        at = (places[-1] + chords[left_out - 1])[None, None].cpu().double()
        rows = family.cardinal.derivatives(at, 0)[0].to(means)
        miss = float((rows @ means[turned] - means[left_out]).square().sum())
        noise = float(variance[left_out] + (rows[0] ** 2 * variance[turned]).sum())
        doubt = ((2 * noise**2 + 4 * miss * noise) / directions) ** 0.5
        found.append((max(miss - noise - 3 * doubt, 0.0), max(miss - noise, 0.0)))
    ends = (found[0][0] + found[-1][0]) / 2
    inner = sorted(most for _, most in found[1:-1])
    others = inner[len(inner) // 2] + 0.01 * usual
    return (ends / others) ** 0.5
