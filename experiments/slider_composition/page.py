"""The study's page of the documentation: what was asked, what came out, where it fails."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

AIM = 0.1
METHODS = {
    "exact": "factors side by side",
    "truncate": "cut to the rank of one slider",
    "orthogonalise": "spaces made orthogonal to each other",
    "decoupled": "mixed so that first-order interference is gone",
}


def page(found: Mapping[str, Any]) -> str:
    """The page in Markdown."""
    parts = [_opening(found), _short(found)]
    for name, family in found["families"].items():
        parts += [f"## {name}", _alone(family), _composed(family), _crossed(family), _commuting(family)]
    parts += [_limits(found), _again(found)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _opening(found: Mapping[str, Any]) -> str:
    known = found["settings"]
    names = ", ".join(name for name, _ in known["attributes"])
    return f"""# Sliders together

`python -m experiments.slider_composition`: a slider is trained on the shapes pipelines for each attribute of
{names} ({known["training_steps"]} steps of {known["batch_size"]} rows,
guidance {known["slider_guidance"]:g}, words of the other attributes preserved, each from a seed of its own).
Then all pairs, triples and all of them are composed, all ordered pairs crossed, and all pairs put one after
the other. Images: {len(known["prompts"])} prompts that training did not see × {len(known["seeds"])} seeds,
{known["sampling_steps"]} steps, guidance {known["guidance"]:g}; attributes are measured by fitting the
renderer. All changes are against the same noise without a slider; ranges go from −{known["scale"]:g} to
{known["scale"]:g} of the slider's own scale.

![Interference, additivity and crossings](slider_composition.png)"""


def _short(found: Mapping[str, Any]) -> str:
    lines = ["## In short", ""]
    for name, family in found["families"].items():
        table = pd.DataFrame(family["composed"])
        for size, rows in table[table["method"] == "exact"].groupby("size"):
            mean, signed = rows["additivity"].mean(), rows["additivity_of_means"].mean()
            met = "met" if mean <= AIM else "missed"
            lines.append(
                f"- {name}, {size} sliders, exact: the effect is {mean:.0%} of the range away from the sum "
                f"of effects image by image (aim {AIM:.0%}: {met}), {signed:.0%} in the mean over images."
            )
        by = table.groupby("method")["from_own_of_means"].mean()
        best = str(by.idxmin())
        lines.append(
            f"- {name}: nearest to what each slider does alone is *{best}*: {by[best]:.0%} of the range away "
            f"in the mean, against {by['exact']:.0%} exact."
        )
        crossed = pd.DataFrame(family["crossed"])
        pairs = crossed[(crossed["writes"] != "twin") & (crossed["reads"] != "twin")]
        near = pairs[pairs["gauge"] == "nearest"]
        lines.append(
            f"- {name}: a crossing of two attributes' sliders has {near['size'].median():.0%} of the effect "
            f"of the one that writes (median), cosine {near['like_left'].mean():.2f} with it and "
            f"{near['like_right'].mean():.2f} with the one that reads."
        )
    return "\n".join(lines)


def _alone(family: Mapping[str, Any]) -> str:
    lines = [
        "### Alone",
        "",
        "| slider | range, natural sds | both ends right | largest other, share of the range | residual |",
        "|---|---|---|---|---|",
    ]
    for row in family["alone"]:
        others = {name: value for name, value in row["effects"].items() if name != row["attribute"]}
        worst = max(others, key=lambda name: abs(others[name]))
        share = others[worst] / row["range"] if row["range"] else float("nan")
        lines.append(
            f"| {row['slider']} | {row['range']:.2f} | {row['both_ends_right']:.0%} | {worst} {share:+.2f} | "
            f"{row['residual']:.3f} |"
        )
    if any(row["slider"] == "twin" for row in family["alone"]):
        lines += ["", "*twin*: a second slider of an attribute, from another seed."]
    return "\n".join(lines)


def _composed(family: Mapping[str, Any]) -> str:
    table = pd.DataFrame(family["composed"])
    lines = [
        "### Composed",
        "",
        "| sliders | method | from the sum of effects | the same, mean over images | from its own effect "
        "| the same, mean over images | every sign right | residual | not read |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in sorted(table["size"].unique()):
        for method in METHODS:
            rows = table[(table["size"] == size) & (table["method"] == method)]
            if len(rows):
                m = rows.mean(numeric_only=True)
                lines.append(
                    f"| {size} (×{len(rows)}) | {method} | {m['additivity']:.2f} | "
                    f"{m['additivity_of_means']:.2f} | {m['from_own']:.2f} | {m['from_own_of_means']:.2f} | "
                    f"{m['all_right']:.0%} | {m['residual']:.3f} | {m['not_read']:.0%} |"
                )
    told = "; ".join(f"*{method}*: {what}" for method, what in METHODS.items())
    lines += [
        "",
        "Shares of each attribute's range. The sum of effects is that of all members' effects on an",
        f"attribute; its own effect is that of its own slider alone. {told}.",
    ]
    return "\n".join(lines)


def _crossed(family: Mapping[str, Any]) -> str:
    table = pd.DataFrame(family["crossed"])
    twins = (table["writes"] == "twin") | (table["reads"] == "twin")
    lines = [
        "### Crossed",
        "",
        "| pairs | gauge | size against the one that writes (median) | like it | like the one that reads "
        "| of its attribute | of the other's | its way in images | residual |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for label, rows in (("two attributes", table[~twins]), ("twins of one attribute", table[twins])):
        for gauge, group in rows.groupby("gauge", sort=False):
            m = group.mean(numeric_only=True)
            lines.append(
                f"| {label} (×{len(group)}) | {gauge} | {group['size'].median():.2f} | "
                f"{m['like_left']:.2f} | {m['like_right']:.2f} | {m['of_left']:.2f} | "
                f"{m['of_right']:.2f} | {m['steady']:.0%} | {m['residual']:.3f} |"
            )
    lines += [
        "",
        "Like: cosine between effects on all attributes. Of its attribute: what is left of the writing",
        "slider's own effect, 1 for all of it. Its way: the share of images in which that attribute moves",
        "its way; 50 % is chance. *random* joins the same balanced factors by a random rotation.",
    ]
    return "\n".join(lines)


def _commuting(family: Mapping[str, Any]) -> str:
    lines = [
        "### One after the other",
        "",
        "| pair | overlap of weights | commutator | order in time | the same, mean over images | additivity "
        "|",
        "|---|---|---|---|---|---|",
    ]
    for row in family["commuting"]:
        lines.append(
            f"| {row['a']}, {row['b']} | {row['overlap']:+.2f} | {row['commutator']:.3f} | "
            f"{row['order']:.2f} | {row['order_of_means']:.2f} | {row['additivity']:.2f} |"
        )
    lines += [
        "",
        "Overlap: cosine between the changes of weights. Commutator: share of its bound. Order in time: one",
        "slider in the noisy half and the other in the rest, against the reverse; share of the range, both",
        "attributes. Do weights foretell what images show, over these pairs?",
        "",
    ]
    for row in family["foretold"]:
        said = (
            "too few pairs to tell"
            if row["spearman"] is None
            else f"Spearman {row['spearman']:+.2f} (p = {row['p']:.2f}, {row['pairs']} pairs)"
        )
        lines.append(f"- {row['told']} and {row['shown']}: {said}")
    return "\n".join(lines)


def _limits(found: Mapping[str, Any]) -> str:
    count = len(found["settings"]["prompts"]) * len(found["settings"]["seeds"])
    return f"""## What does not follow

- {count} images for each number: a mean over images is uncertain by about a third of the spread of one image,
  and the measured errors image by image hold that spread.
- The world is small: seven attributes, one object, a denoiser of a quarter of a million parameters or so.
- Effects at scale ±1 are not small, so that interference that is gone to first order is not gone.
- Ten pairs are few for a correlation; p-values are of one test, not corrected for four.
- One training seed for each slider, two for one attribute."""


def _again(found: Mapping[str, Any]) -> str:
    about = found["about"]
    seconds = ", ".join(
        f"{name} {family['seconds']['training']} s of training and {family['seconds']['measuring']} s of "
        "measuring"
        for name, family in found["families"].items()
    )
    return (
        f"Measured on a {about['machine']}, {about['date']}, torch {about['torch']}, diffusers "
        f"{about['diffusers']}; {seconds} (what the cache held counts as nothing). All numbers are in "
        "`slider_composition.json`; `--small FOLDER` runs a slice."
    )
