"""The comparison as a section of the results page; every number in it comes from the result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from experiments.curvature_predicts_editing.compared import ComparedCell, Result
from experiments.curvature_predicts_editing.equal_success import Average, Ratio, Rule
from experiments.curvature_predicts_editing.measure import FLIPS, KL, NEAR, OFF
from experiments.curvature_predicts_editing.moves import BASELINES, METHODS, STEP, VALUE

AIMS = {OFF: 0.2, KL: 0.5}
COLUMNS: tuple[tuple[str, str, Average], ...] = (
    ("off its sentence", OFF, "mean"),
    ("from real states", NEAR, "mean"),
    ("KL, mean", KL, "mean"),
    ("KL, median", KL, "median"),
    ("answers changed", FLIPS, "mean"),
)

HEADING = "## Do edits along the manifold do better?"


def section(result: Result) -> str:
    """The section in Markdown; its pictures are those that `figures` writes."""
    if not result.cells:
        return f"{HEADING}\n\nNo site of any concept carried it, so that no edits were compared.\n"
    lines = [
        HEADING,
        "",
        *_opening(result),
        "",
        *_verdict(result),
        "",
        "![Success against each cost, over the scales of every edit](comparison_sweeps.png)",
        "",
        "![Costs at equal success over those of the straight edit, by concept](comparison_ratios.png)",
        "",
    ]
    for family, title in ((VALUE, "To a value"), (STEP, "A reused step")):
        if any(cell.sweeps.get(BASELINES[family]) for cell in result.cells):
            lines += [f"### {title}", "", *_family_table(result, family), ""]
    lines += [
        "### With the same gates",
        "",
        *_gates(result),
        "",
        "### By concept",
        "",
        *_by_concept(result),
        "",
    ]
    lines += ["### Why", "", *_reasons(result), ""]
    return "\n".join(lines).rstrip() + "\n"


def _opening(result: Result) -> list[str]:
    settings = result.settings
    cells = result.cells
    edits = sum(
        sweep.success.size for cell in cells for name, sweep in cell.sweeps.items() if "[" not in name
    )
    ways = ", ".join(f"{scale:g}" for scale in settings.scales)
    found = [
        f"{len(cells)} cells (a concept at a site of a model; {len({c.concept for c in cells})} concepts, "
        f"{len({c.model for c in cells})} models), {_pairs(cells)} pairs in each, scales {ways}: "
        f"{edits} edits in all, each also run on a prompt of another concept. Everything an edit knows comes "
        "from one half of the sentences; the other half is edited, and its own states judge how far an edit "
        "left them. Ratios are costs over those of the straight edit **at the highest success that both "
        "reach**, the median over cells; brackets hold the 95 % interval of a bootstrap over concepts and "
        "pairs; the number after it says in how many cells both succeed in a fifth of the sentences or more."
    ]
    if result.left:
        reasons = sorted(
            {f"{left.concept} at {left.site} in {left.model} ({left.reason})" for left in result.left}
        )
        found += ["", f"Left out: {'; '.join(reasons)}."]
    return found


def _verdict(result: Result) -> list[str]:
    """The aims, and what came out."""
    found = []
    names = {OFF: "a fifth of the distance off the manifold", KL: "half of the disturbance"}
    for cost, aim in AIMS.items():
        for judged in ("geodesic", "tangent, 8 steps"):
            ratio = result.line(judged, "linear", cost)
            if ratio is None or math.isnan(ratio.value):
                continue
            met = "met" if ratio.value <= aim else "missed"
            found.append(f"- Aim, {names[cost]}: **{judged} edits have {_short(ratio)} of it: {met}.**")
    tops = [_top(result.cells, name) for name in ("geodesic, carried step", "linear, reused")]
    if any(math.isnan(top) for top in tops):
        return found
    found.append(
        f"- A step measured elsewhere succeeds, at each edit's best scale, in {tops[0]:.0%} of the "
        f"sentences when it is carried along the manifold and in {tops[1]:.0%} when it is added."
    )
    off, kl = (result.line("geodesic, carried step", "linear, reused", cost) for cost in (OFF, KL))
    if off is not None and kl is not None and off.cells:
        found.append(
            f"- In the {off.cells} of {off.of} cells where adding it succeeds often enough to compare, the "
            f"carried step has {_short(off)} of the distance and {_short(kl)} of the disturbance."
        )
    return found


def _family_table(result: Result, family: str) -> list[str]:
    base = BASELINES[family]
    lines = [
        "| edit | best success | " + " | ".join(title for title, _, _ in COLUMNS) + " | cells |",
        "|---|---|" + "---|" * (len(COLUMNS) + 1),
    ]
    for method in METHODS:
        if method.family != family or not any(method.name in cell.sweeps for cell in result.cells):
            continue
        top = f"{_top(result.cells, method.name):.0%}"
        if method.name == base:
            lines.append(f"| {method.name} | {top} | " + " | ".join("1" for _ in COLUMNS) + " | |")
            continue
        ratios = [result.line(method.name, base, cost, average=average) for _, cost, average in COLUMNS]
        counts = next((f"{r.cells} of {r.of}" for r in ratios[1:] if r is not None), "")
        lines.append(f"| {method.name} | {top} | " + " | ".join(map(_short, ratios)) + f" | {counts} |")
    lines += ["", *_other_readings(result, family)]
    return lines


def _other_readings(result: Result, family: str) -> list[str]:
    """Fixed levels of success, and the scale that leaves the manifold least."""
    judged, base = ("geodesic" if family == VALUE else "geodesic, carried step"), BASELINES[family]
    said = []
    readings: tuple[tuple[str, float | None, Rule], ...] = (
        ("at half of the sentences", 0.5, "first"),
        ("at four fifths", 0.8, "first"),
        ("each at the scale that costs it least, at the same success or more", None, "least"),
    )
    for words, level, rule in readings:
        off = result.line(judged, base, OFF, level=level, rule=rule)
        kl = result.line(judged, base, KL, level=level, rule=rule)
        if off is not None and kl is not None and not math.isnan(off.value):
            said.append(f"{words}: distance {_short(off)} ({off.cells} cells), KL {_short(kl)}")
    return [f"Read otherwise, {judged} over {base}: " + "; ".join(said) + "."] if said else []


def _gates(result: Result) -> list[str]:
    rows = []
    for gate, words in (("inside", '`outside="leave"`'), ("near", "as near as a learned sentence")):
        shares = np.array([cell.inside[gate] for cell in result.cells])
        rows.append(
            f"- {words}: edits {np.median(shares[:, 0]):.0%} of the held-out sentences and "
            f"{np.median(shares[:, 1]):.0%} of the controls (medians over cells)."
        )
    lines = [
        *rows,
        "",
        "| edit | over | best success | KL, mean | answers changed | cells |",
        "|---|---|---|---|---|---|",
    ]
    for line in _gate_pairs():
        judged, against = line
        kl, flips = (result.line(judged, against, cost) for cost in (KL, FLIPS))
        if kl is None or flips is None or kl.of == 0:
            continue
        lines.append(
            f"| {judged} | {against} | {_top(result.cells, judged):.0%} | {_short(kl)} | {_short(flips)} | "
            f"{kl.cells} of {kl.of} |"
        )
    return lines


def _gate_pairs() -> list[tuple[str, str]]:
    found = []
    for gate in ("inside", "near"):
        found += [(f"linear [{gate}]", "linear"), (f"geodesic [{gate}]", "linear")]
        found.append((f"geodesic [{gate}]", f"linear [{gate}]"))
    return found


def _by_concept(result: Result) -> list[str]:
    lines = [
        "| concept | best success: linear | geodesic | off its sentence | from real states | KL, mean | "
        "reused step: linear | carried |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(cell.concept for cell in result.cells):
        cells = [cell for cell in result.cells if cell.concept == name]
        ratios = [
            result.line("geodesic", "linear", cost, where=f"concept {name}") for cost in (OFF, NEAR, KL)
        ]
        tops = [_percent(_top(cells, each)) for each in ("linear", "geodesic")]
        steps = [_percent(_top(cells, each)) for each in ("linear, reused", "geodesic, carried step")]
        lines.append(f"| {name} | " + " | ".join([*tops, *map(_short, ratios), *steps]) + " |")
    return lines


def _reasons(result: Result) -> list[str]:
    """What the measurements say about where the differences come from."""
    cells = result.cells
    found = []
    judged = [cell for cell in cells if not math.isnan(cell.units[OFF]) and "geodesic" in cell.sweeps]
    if judged:
        straight, along = (
            np.median([_at_one(cell, name) for cell in judged]) for name in ("linear", "geodesic")
        )
        found.append(
            f"- *The end is the same.* At scale 1 both edits aim at the wanted value's mean, and land "
            f"{straight:.2f} (straight) and {along:.2f} (geodesic) off the sentence's own manifold, where a "
            "real state left out has 1. What is left is how this sentence differs from those in which the "
            "means were learned; no path to the mean changes it. Only on the way is a straight edit farther."
        )
    bend = np.median([cell.manifold["reach"] / cell.manifold["vector"] for cell in cells])
    found.append(
        f"- *The manifold bends sooner than edits end.* Its reach is {bend:.2f} of the length of the linear "
        "edit's vector (median). The tangent at a state says little of where the next value lies, so that "
        f"tangent edits stay near the manifold and seldom arrive (best success {_top(cells, 'tangent'):.0%}; "
        f"in eight steps {_top(cells, 'tangent, 8 steps'):.0%})."
    )
    found.append(
        "- *A geodesic passes the values between.* On the way the answer is theirs. The first measured scale "
        f"that turns half of the sentences is {_turning(cells, 'linear'):.2g} for a straight edit and "
        f"{_turning(cells, 'geodesic'):.2g} for a geodesic (medians over cells), and who goes less far "
        "disturbs other prompts less."
    )
    shut = [result.line(f"{name} [near]", "linear", KL) for name in ("linear", "geodesic")]
    found.append(
        "- *Other prompts do not stand on the manifold.* Their feet on it mean nothing, and an edit along "
        "it moves them all the same. A gate leaves them alone, and a straight edit can have it too: with "
        f"the second gate a straight edit has {_short(shut[0])} of its KL, and a geodesic {_short(shut[1])}."
    )
    broken = sum(sum(cell.not_finite.values()) for cell in cells)
    if broken:
        found.append(
            f"- {broken} states had no foot, or no geodesic fit for use; they were left as they were and "
            "count as edits that failed."
        )
    failed = sorted({f"{name} ({reason})" for cell in cells for name, reason in cell.impossible.items()})
    return found + [f"- Not possible somewhere: {each}" for each in failed]


def _pairs(cells: Sequence[ComparedCell]) -> str:
    """How many pairs the cells have: one number, or the fewest and the most."""
    counts = sorted({len(next(iter(cell.sweeps.values())).success) for cell in cells if cell.sweeps})
    return f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def _at_one(cell: ComparedCell, name: str) -> float:
    sweep = cell.sweeps[name]
    return float(sweep.costs[OFF].mean(0)[np.argmin(np.abs(sweep.scales - 1))])


def _turning(cells: Sequence[ComparedCell], name: str) -> float:
    """The median over cells of the first scale at which half of the sentences are turned."""
    found = []
    for cell in cells:
        if name in cell.sweeps:
            sweep = cell.sweeps[name]
            reached = np.flatnonzero(sweep.success.mean(0) >= 0.5)
            if len(reached):
                found.append(float(sweep.scales[reached[0]]))
    return float(np.median(found)) if found else math.nan


def _top(cells: Sequence[ComparedCell], name: str) -> float:
    """The mean over cells of the share of successes at the edit's best scale."""
    found = [cell.sweeps[name].top for cell in cells if name in cell.sweeps]
    return float(np.mean(found)) if found else math.nan


def _percent(share: float) -> str:
    return "–" if math.isnan(share) else f"{share:.0%}"


def _number(value: float) -> str:
    return "–" if math.isnan(value) else "∞" if math.isinf(value) else f"{value:.2f}"


def _short(ratio: Ratio | None) -> str:
    if ratio is None or math.isnan(ratio.value):
        return "–"
    if math.isnan(ratio.low):
        return _number(ratio.value)
    return f"{_number(ratio.value)} [{_number(ratio.low)}, {_number(ratio.high)}]"
