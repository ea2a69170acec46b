"""Which method made an edit, with what speaks for it and against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from peft_analysis.forensics.matching import Match
from peft_analysis.forensics.places import Place

CLEAR = 0.05
"""By so much of the right vectors one kind of map must explain more than the others to be called clear."""


@dataclass(frozen=True)
class Method:
    """What an update looks like.

    Attributes:
        name: "ROME", "MEMIT", "AlphaEdit", "edit" (one of them, unknown which), "adapter" (small rank in many
            places), "fine-tune", "rounding" (stored in another precision), "none".
        clear: whether the evidence leaves no other name.
        alternatives: the names that it does not rule out.
        evidence: what was seen, in words.
    """

    name: str
    clear: bool
    alternatives: tuple[str, ...]
    evidence: tuple[str, ...]

    def __str__(self) -> str:
        if self.clear:
            return self.name
        return (
            f"{self.name}?" if not self.alternatives else f"{self.name} or {' or '.join(self.alternatives)}"
        )


def recognise(
    found: Sequence[Place],
    vectors: Sequence[str],
    wide: str,
    matches: Mapping[str, Match],
    flagged: int,
) -> Method:
    """The method that an update looks like.

    Args:
        found: the changed matrices. vectors: the changed vectors.
        wide: why the places are not those of an edit, or "".
        matches: of candidates' keys with row spaces, by parameter.
        flagged: how many subjects were found.
    """
    if not found:
        if not vectors:
            return Method("none", True, (), ("nothing was changed",))
        told = f"only vectors were changed: {', '.join(vectors[:3])}"
        return Method("fine-tune", False, ("adapter",), (told,))
    evidence = _told(found)
    if not any(place.rank.rank for place in found):
        told = "no component of any matrix stands above the noise of rounding"
        return Method("rounding", False, ("fine-tune",), (told, *evidence))
    if wide:
        small = [place for place in found if place.rank.high <= place.full // 2]
        evidence.append(wide)
        if len(small) == len(found):
            evidence.append("every rank is at most half of what it could be")
            return Method("adapter", not vectors, ("fine-tune",) if vectors else (), tuple(evidence))
        evidence.append(f"{len(found) - len(small)} of {len(found)} matrices may have full rank")
        return Method("fine-tune", True, (), tuple(evidence))
    several = len(found) > 1
    if not matches:
        evidence.append("the places are those of an edit; without candidates and C its kind stays open")
        names = ("MEMIT", "AlphaEdit", "adapter") if several else ("ROME", "AlphaEdit", "adapter")
        return Method("edit", False, names, tuple(evidence))
    best = max(
        matches.values(), key=lambda one: len(one.chosen) and -float(one.p_values[one.chosen].log().mean())
    )
    evidence.append(
        f"right vectors look like {best.map}: {best.fits[best.map.kind]:.0%} of what the subjects' keys give "
        f"lies in the row space; so mapped, candidates as a whole stand {best.separation:.1f} deviations "
        "above decoys"
    )
    evidence += [f"as {kind}: {fit:.0%}" for kind, fit in best.fits.items() if kind != best.map.kind]
    if best.map.kind == "identity":
        if all(place.rank.high <= place.full // 2 for place in found):
            return Method("adapter", False, ("fine-tune",), tuple(evidence))
        return Method("fine-tune", True, (), tuple(evidence))
    if not flagged:
        evidence.append(
            "no single candidate is beyond what chance gives one of so many; other subjects, or no edit"
        )
        return Method("adapter", False, ("edit",), tuple(evidence))
    kinds = {
        "inverse": "MEMIT" if several else "ROME",
        "null space": "AlphaEdit",
        "identity": "fine-tune",
    }
    least = best.fits[best.map.kind] - CLEAR
    near = [kinds[kind] for kind, fit in best.fits.items() if fit > least and kind != best.map.kind]
    return Method(kinds[best.map.kind], not near, tuple(near), tuple(evidence))


def _told(found: Sequence[Place]) -> list[str]:
    first = found[0]
    if len(found) == 1:
        return [
            f"one matrix was changed, {first.parameter}: rank {first.rank.rank} "
            f"({first.rank.low} to {first.rank.high} of {first.full})"
        ]
    blocks = sorted({place.block for place in found if place.block is not None})
    ranks = sorted(place.rank.rank for place in found)
    told = [f"{len(found)} matrices were changed; ranks {ranks[0]} to {ranks[-1]}"]
    if len({place.role for place in found}) == 1 and blocks:
        adjacent = blocks[-1] - blocks[0] == len(blocks) - 1
        told.append(f"blocks {', '.join(map(str, blocks))}, {'' if adjacent else 'not '}adjacent")
        norms = [place.norm for place in sorted(found, key=lambda place: place.block or 0)]
        growing = all(a < b for a, b in pairwise(norms))
        told.append(f"norms {', '.join(f'{norm:.3g}' for norm in norms)}{', growing' if growing else ''}")
    return told
