"""The study's page of the documentation: what was asked, what came out, where it fails."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

NAME = "curvature_predicts_editing"
ODDS = ("odds", "odds_model", "odds_shape", "lengths")
CURVATURE = ("plain", "seen", "short", "flat", "curved")
SAME, BEATEN, REVERSED = 0.005, 0.1, 0.45
"""Differences of AUROC that are called none, and those aimed at; an AUROC that says the opposite."""


INSPECTED_CONCEPTS = ("places", "city-country", "categories", "person-birthplace", "country-language")
INSPECTED = """What the model says there instead, read edit by edit:

- **Far pushes leave the answers altogether.** City to country at scale 4 in the GPT-2 style (block 0): 0.92
  foreseen, half seen. Of 40 edits 14 end in a word that is no country at all ("02:00", "Norvik", "44"). The
  prediction interpolates between values and knows every other word only as one sum: it carries on in the
  target's direction and cannot see what else lies there.
- **Where the value is being handed over** (block 3 of 6), a part has moved on to later tokens before the
  site, and gradients tell the share that passes only roughly. Places in block 3 of the Llama style, scale 1:
  0.99 foreseen, 0.36 seen, and every failure names another place: what moved on and what was edited add up to
  a third one. Country to language at the last token of block 3 errs the other way: by gradients a share of
  0.28 passes, 0.26 foreseen, 0.73 seen.
- **A threshold that gradients do not show.** Categories at the embedding at half scale, Llama style: 0.01
  foreseen, 0.38 seen. Half of a mean difference already decides the category. The word passes whole there,
  and by the gradients at both ends only a share of 0.51.
- **Answers crowded together.** Birthplaces at the last token of block 4, Llama style, scale 1: 0.93 foreseen,
  0.38 seen; of 32 edits 11 end in another person's place and 9 in no place. The landing margins are small
  (-1 to 3 nats), where fewer answers would be enough to be sure."""


HEADINGS = {
    "comparison": "## Edits that follow the manifold, at equal success",
    "encoder": "## A real sentence encoder",
}


def titled(name: str, section: str) -> str:
    """Put the heading of a part above its section, unless it brings one."""
    if section.startswith("## ") or name not in HEADINGS:
        return section
    return f"{HEADINGS[name]}\n\n{section}"


def page(found: Mapping[str, Any], sections: Sequence[str] = ()) -> str:
    """Return the page in Markdown; `sections` are those of the study's other parts."""
    parts = [
        _opening(found),
        _answer(found),
        _table(found),
        _ceilings(found),
        _calibration(found),
        _curvature(found),
        _failures(found),
        *(section.strip() for section in sections),
        _again(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _score(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return next(score for score in found["scores"] if score["name"] == name)


def _baselines(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [score for score in found["scores"] if score["held_out"] == "nothing is learned"]


def _opening(found: Mapping[str, Any]) -> str:
    counts, settings = found["counts"], found["settings"]
    scales = ", ".join(f"{scale:g}" for scale in settings["scales"])
    share = 100 * counts["successes"] / counts["edits"]
    return "\n\n".join(
        [
            "# Does curvature predict where straight edits fail?",
            prose(
                "A concept's states lie on a manifold. A straight edit leaves it, the sooner the more it",
                "bends. So the curvature should tell whether the edit succeeds. Here that is asked of",
                f"{counts['edits']:,} edits in {counts['cells']:,} cells: every default site of",
                f"{len(settings['models'])} models, {len(settings['concepts'])} concepts of the almanac,",
                "mean",
                f"differences and reused vectors at the scales {scales}. A cell is a site, a pair of",
                "values, a",
                "kind of edit and a scale; its rate is the share of its sentences (up to",
                f"{settings['sentences']}) after which the likeliest next token begins the target's answer.",
                f"{share:.0f} % of the edits succeed.",
            ),
            prose(
                "The prediction sees states, outputs and gradients of the unedited model",
                "([what is measured](../concepts/diagnosis.md)). It is a sum of small trees, learned",
                "from edits of",
                "*other* concepts: the concept (or the model, or all concepts of one shape) that is",
                "judged was left",
                "out whenever something was learned.",
            ),
        ]
    )


def _answer(found: Mapping[str, Any]) -> str:
    odds, landing, model = (_score(found, name) for name in ("odds", "landing", "odds_model"))
    flat, short, plain, seen = (_score(found, name) for name in ("flat", "short", "plain", "seen"))
    singles = _baselines(found)
    best = max(singles, key=lambda score: score["auroc"][0] or 0)
    auroc, counts = odds["auroc"][0], odds["rho_counts"][0]
    gain = (short["auroc"][0] or 0) - (flat["auroc"][0] or 0)
    beaten = [score for score in singles if _gap(odds, score, "auroc") >= BEATEN]
    beaten_rho = [score for score in singles if _gap(odds, score, "rho_counts") >= BEATEN]
    adds = "adds nothing" if abs(gain) < SAME else f"changes the AUROC by {gain:+.3f}"
    return "\n\n".join(
        [
            "## In short",
            prose(
                "**Success can be foreseen.** On concepts that the odds never saw: AUROC",
                f"{_number(auroc)} over",
                f"single edits (aim 0.95: {_met(auroc, 0.95)}), Spearman's ρ {_number(counts)} over cells",
                "(aim 0.9:",
                f"{_met(counts, 0.9)}; {_number(odds['rho'][0])} of at most",
                f"{_number(found['ceilings']['cells'])}",
                "where predictions are not rounded to counts), probabilities off by",
                f"{_points(odds['error'])} on average. On a model of the other architecture: AUROC",
                f"{_number(model['auroc'][0])}.",
            ),
            prose(
                "**What tells is where the edit lands, read through the network**, not how the manifold",
                "bends.",
                "Curvature by itself ranks edits poorly: with all of its measures learned together, AUROC",
                f"{_number(plain['auroc'][0])} in the plain metric of the states and",
                f"{_number(seen['auroc'][0])} in",
                f"the metric that the network pulls back. Beside everything else, curvature {adds} (all",
                "concepts",
                "of a shape left out).",
            ),
            prose(
                f"**Baselines.** The odds beat {len(beaten)} of {len(singles)} single numbers by 0.1 or",
                "more in",
                f"AUROC, and {len(beaten_rho)} of {len(singles)} in ρ over cells (counts). The strongest is",
                f'"{best["label"]}" with AUROC {_number(best["auroc"][0])}: 0.1 above it does not exist.',
                "Within a",
                "site, where it does not help to know *which* sites work at all, the odds have",
                f"{_number(odds['within_site'])} and the landing margin {_number(landing['within_site'])}.",
            ),
        ]
    )


def _table(found: Mapping[str, Any]) -> str:
    lines = [
        "## Predictors side by side",
        "",
        f"![AUROC and ρ of every predictor]({NAME}_predictors.png)",
        "",
        "| predictor | left out | AUROC, edits | within a site | ρ, cells | ρ, counts | ρ, edits | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for score in [_score(found, name) for name in ODDS] + _baselines(found):
        lines.append(
            f"| {score['label']} | {score['held_out']} | {_interval(score['auroc'])} | "
            f"{_number(score['within_site'])} | {_interval(score['rho'])} | "
            f"{_interval(score['rho_counts'])} | "
            f"{_number(score['rho_edits'])} | {_points(score['error'])} |"
        )
    note = prose(
        "Intervals: 95 %, bootstrap over concepts. *Within a site*: the mean AUROC over sites that see both",
        "outcomes at least ten times. *ρ, counts*: over cells, predictions rounded to the likeliest",
        "number of",
        "successes",
        "among so many sentences; a single number is first made a probability by isotonic regression on",
        "the other",
        "concepts, so that it may be rounded as well. *Error*: expected calibration error. Where a",
        "number is not",
        "known for an edit, its median stands in:",
        _known(found),
    )
    reversed_ = [score for score in _baselines(found) if (score["auroc"][0] or 0.5) < REVERSED]
    if reversed_:
        listed = "; ".join(f"{score['label']} ({_number(score['auroc'][0])})" for score in reversed_)
        note += "\n\n" + prose(
            "All distances and curvatures were taken to speak against an edit before anything was seen.",
            f"An AUROC below one half says the opposite: {listed}. A departure that the network sees is",
            "also a sign that the edit moves anything at all, which short vectors, and vectors at sites that",
            "nothing passes, do not.",
        )
    return "\n".join([*lines, "", note])


def _known(found: Mapping[str, Any]) -> str:
    partly = [s for s in _baselines(found) if s["known"] < 0.995]
    if not partly:
        return "all are known everywhere."
    return "; ".join(f"{s['label']} is known for {100 * s['known']:.0f} %" for s in partly) + "."


def _ceilings(found: Mapping[str, Any]) -> str:
    ceilings, odds = found["ceilings"], _score(found, "odds")
    return "\n\n".join(
        [
            "## The highest ρ there could be",
            prose(
                "Outcomes are tied: most cells fail always or succeed always. A predictor that gives",
                "every cell",
                "another number orders cells that ended alike, and Spearman's ρ counts that as error.",
                "With \\(t\\)",
                "the sizes of the tied groups among \\(n\\) outcomes, a perfect order reaches",
            ),
            "\\[ \\rho_{\\max} = \\sqrt{1 - \\frac{\\sum_t (t^3 - t)}{n^3 - n}}, \\]",
            prose(
                f"which is **{_number(ceilings['edits'])}** for single edits and",
                f"**{_number(ceilings['cells'])}**",
                f"for cells. The odds reach {_number(odds['rho_edits'])} and {_number(odds['rho'][0])}.",
                "Only a",
                "predictor with ties of its own can pass this: the odds, rounded to a whole number of",
                "successes,",
                f"reach {_number(odds['rho_counts'][0])}.",
            ),
        ]
    )


def _calibration(found: Mapping[str, Any]) -> str:
    return "\n\n".join(
        [
            "## Is a probability a probability?",
            f"![Reliability of the predicted probabilities]({NAME}_calibration.png)",
            "By scale and by the shape of the concept:",
            f"![Success against scale, seen and foreseen]({NAME}_scales.png)",
        ]
    )


def _curvature(found: Mapping[str, Any]) -> str:
    lines = [
        "## Curvature: in which metric, and does it matter?",
        "",
        prose(
            "Curvature in the plain metric of the states: the expected departure from the manifold by",
            "its second",
            "fundamental form, over the chord; the distance from the learned manifold over its noise;",
            "the detour",
            "from source to target through neighbouring values. Curvature as the network sees it: that",
            "departure in",
            "the pulled-back metric; the same detour in Fisher length; the second- over first-order",
            "response to",
            "the vector, and how it turns along the path. Each group was learned alone, then left out",
            "of, or put",
            "beside, everything else.",
        ),
        "",
        "| learned from | left out | AUROC | within a site | ρ, counts |",
        "|---|---|---|---|---|",
    ]
    for name in CURVATURE:
        score = _score(found, name)
        lines.append(
            f"| {score['label']} | {score['held_out']} | {_interval(score['auroc'])} | "
            f"{_number(score['within_site'])} | {_interval(score['rho_counts'])} |"
        )
    return "\n".join(lines)


def _failures(found: Mapping[str, Any]) -> str:
    if not found["failures"]:
        return ""
    lines = [
        "## Where it fails",
        "",
        f"![Foreseen and seen, site by site]({NAME}_sites.png)",
        "",
        "The sites that cost most (mean negative log-likelihood, the concept left out):",
        "",
        "| model | concept | site | edit | seen | foreseen | loss | share that passes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in found["failures"][:12]:
        lines.append(
            f"| {entry['model']} | {entry['concept']} | {entry['site']} | {entry['kind']} | "
            f"{100 * entry['observed']:.0f} % | {100 * entry['predicted']:.0f} % | {entry['loss']:.2f} | "
            f"{entry['share']:.2f} |"
        )
    far, partly, both = (found["lost"][name] for name in ("far", "partly", "both"))
    lines += [
        "",
        prose(
            f"Scales of 3 and more are {_percent(far['edits'])} of the edits and {_percent(far['loss'])}",
            "of the",
            f"loss; sites where a part of the value passes (share 0.2 to 0.8) {_percent(partly['edits'])}",
            "and",
            f"{_percent(partly['loss'])}; one or the other {_percent(both['edits'])} and",
            f"{_percent(both['loss'])}.",
        ),
    ]
    if set(INSPECTED_CONCEPTS) <= set(found["settings"]["concepts"]):
        lines += ["", INSPECTED]
    return "\n".join(lines)


def _again(found: Mapping[str, Any]) -> str:
    took = ", ".join(f"{name} {value} s" for name, value in found["seconds"].items())
    versions = ", ".join(f"{name} {value}" for name, value in found["record"]["versions"].items())
    return "## Again\n\n" + prose(
        "`python -m experiments.curvature_predicts_editing` makes all of this anew (here:",
        f"{took}; {versions}; seed {found['settings']['seed']}), with `--small FOLDER` a slice of it.",
        "`python -m experiments.curvature_predicts_editing.fit` learns the odds that ship with the",
        "package. All",
        f"numbers are in [{NAME}.json]({NAME}.json).",
    )


def prose(*sentences: str) -> str:
    """One paragraph, wrapped for people who read the source."""
    return textwrap.fill(" ".join(sentences), 110, break_long_words=False, break_on_hyphens=False)


def _gap(a: Mapping[str, Any], b: Mapping[str, Any], key: str) -> float:
    first, second = a[key][0], b[key][0]
    return float("-inf") if first is None or second is None else first - second


def _met(value: float | None, aim: float) -> str:
    return "met" if value is not None and value >= aim else "missed"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"


def _points(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} points"


def _interval(value: Sequence[float | None]) -> str:
    middle, low, high = value
    if middle is None:
        return "–"
    return f"{middle:.3f}" if low is None or high is None else f"{middle:.3f} ({low:.2f}–{high:.2f})"
