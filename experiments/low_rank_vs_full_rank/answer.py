"""What the numbers of the study say, in words; each paragraph only where its methods were run."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

RIGHT = {"lora": "merged LoRA", "low rank adam": "merged LoRA", "relora": "ReLoRA", "full": "full fine-tune"}
NEAR = 1.3  # times the size of the largest full fine-tune: low-rank updates that are compared with it
STRONG = 0.3  # ‖ΔW‖ / ‖W‖


def answer(found: dict[str, Any]) -> str:
    """The section that answers the study's question."""
    said = [part(found) for part in (degree, size, shape, kind, own_rank, place)]
    return "\n\n".join(["## What it says", *(text for text in said if text)])


def degree(found: dict[str, Any]) -> str:
    """Forgetting at one loss, by rank."""
    rows = [row for row in found["matched"] if row["forgotten"] is not None]
    low = [row for row in rows if row["method"].startswith("LoRA")]
    full = next((row for row in rows if row["method"] == "full"), None)
    if len(low) < 2 or full is None:
        return ""
    order = [*low, full]
    steps = [a["forgotten"] - b["forgotten"] for a, b in pairwise(order)]
    ranks = ", ".join(f"{row['forgotten']:.2f} at {row['method'].removeprefix('LoRA ')}" for row in low)
    text = (
        "**In what it does, the difference is one of degree.** "
        if min(steps) > 0
        else "**What it does does not follow the rank step by step.** "
    )
    text += (
        f"All methods learn the facts. At one loss ({full['loss']:g} nats; the sweep of {full['model']}, one "
        f"seed) LoRA forgets {ranks}, and full "
        f"fine-tuning {full['forgotten']:.2f}. "
    )
    if min(steps) > 0:
        text += f"Every step up in rank forgets less; the last one, to full, {steps[-1]:.2f} less. "
    sizes = [f"{row['relative_norm']:.2f}" for row in (low[0], low[-1], full)]
    return text + (
        f"The size of the update falls with it, ‖ΔW‖ / ‖W‖ from {sizes[0]} to {sizes[1]} and, full, "
        f"{sizes[2]}: the lower the rank, the more of it the same facts need."
    )


def size(found: dict[str, Any]) -> str:
    """Intruders go with size."""
    by_size = found["agreement"]["spearman"]["intruders_left ~ relative_norm"]
    full = [one for one in found["runs"] if one["kind"] == "full"]
    low = [one for one in found["runs"] if one["kind"] != "full"]
    if by_size is None or not full or not low:
        return ""
    reach = max(one["relative_norm"] for one in full)
    near = [one["intruders_left"] for one in low if one["relative_norm"] <= NEAR * reach]
    most = max(low, key=lambda one: one["intruders_left"])
    text = (
        f"**Intruder dimensions go with size** (rank correlation {by_size:.2f} over all runs), up to "
        f"{most['intruders_left']:.1f} a matrix for {most['method']} at the rate {most['rate']:g}. The "
        f"largest full fine-tune moved the weights by {reach:.2f} of their norm; full fine-tuning has "
        f"{max(one['intruders_left'] for one in full):.2f} a matrix at most"
    )
    if near:
        text += f", and the {len(near)} low-rank runs of up to {NEAR:g} times that size {max(near):.2f}"
    return text + ". A full fine-tune as large as the larger adapters was not made."


def shape(found: dict[str, Any]) -> str:
    """Two updates of one rank at one loss."""
    rows = {row["method"]: row for row in found["matched"]}
    lora, spread = rows.get("LoRA r 8"), rows.get("LowRankAdam r 8")
    if not lora or not spread or lora["forgotten"] is None or spread["forgotten"] is None:
        return ""
    stable = {row["method"]: row["stable_rank"]["mean"] for row in found["summary"]}
    fewer = spread["intruders_left"] < lora["intruders_left"]
    no_gain = spread["forgotten"] > lora["forgotten"] - 0.02
    text = "**Fewer intruders alone forget no less.** " if fewer and no_gain else "**One rank, two shapes.** "
    return text + (
        "`LowRankAdam` spreads an update of rank 8 over all its directions (stable rank "
        f"{stable['LowRankAdam r 8']:.1f}, LoRA's {stable['LoRA r 8']:.1f}). At the same loss it is smaller "
        f"({spread['relative_norm']:.2f}, LoRA's {lora['relative_norm']:.2f}), has "
        f"{spread['intruders_left']:.2f} intruders a matrix (LoRA {lora['intruders_left']:.2f}), and forgets "
        f"{spread['forgotten']:.2f} (LoRA {lora['forgotten']:.2f})."
    )


def kind(found: dict[str, Any]) -> str:
    """What the verdicts made of the merged weights."""
    kinds = {one["method"]: one["kind"] for one in found["runs"]}
    judged = [row for row in found["summary"] if kinds[row["method"]] in RIGHT and row["origin_float32"]]
    full = [row["effective_rank"]["mean"] for row in found["summary"] if row["method"] == "full"]
    if not judged or not full:
        return ""
    counts, wrong = [], []
    for stored in ("bfloat16", "float32"):
        right = total = 0
        for row in judged:
            wanted, origins = RIGHT[kinds[row["method"]]], row[f"origin_{stored}"]
            right, total = right + origins.get(wanted, 0), total + sum(origins.values())
            others = [name for name in origins if name != wanted]
            if others:
                wrong.append(f"{row['method']} of {row['model']} in {stored}: {', '.join(others)}")
        counts.append(f"{right} of {total} in {stored}")
    text = (
        "**In what it is, the difference is one of kind.** The singular values of a merged LoRA end at its "
        f"rank; those of a full fine-tune go on (effective rank {min(full):.0f} and more). The verdict, "
        f"given the merged weights alone, names the origin rightly for {' and '.join(counts)}"
    )
    text += f" (wrong: {'; '.join(wrong)}). " if wrong else ". "
    if "dora" in kinds.values():
        text += "DoRA rescales W: its difference is of full rank, and is taken for a full fine-tune."
    return text.strip()


def own_rank(found: dict[str, Any]) -> str:
    """Whether W + ΔW loses rank."""
    at, first = found["settings"]["path"].index(1.0), found["settings"]["models"][0]
    rows = [row for row in found["summary"] if row["model"] == first and row["base_rank"] is not None]
    rows = [row for row in rows if row["method"].startswith("LoRA") or row["method"] == "full"]
    if len(rows) < 2:
        return ""
    told = "; ".join(f"{row['method'].removeprefix('LoRA ')} {row['rank_path'][at]:+.2f}" for row in rows)
    low = [one for one in found["runs"] if one["kind"] != "full"]
    strong = [one["rank_path"][at] < 0 for one in low if one["relative_norm"] > STRONG]
    weak = [one["rank_path"][at] < 0 for one in low if one["relative_norm"] <= STRONG]
    full = [one["rank_path"][at] < 0 for one in found["runs"] if one["kind"] == "full"]
    most = min(low, key=lambda one: one["rank_path"][at])
    text = (
        "**Does W + ΔW lose rank?** The effective rank of the matrix itself changes, at the chosen rates on "
        f"{first} and at t = 1, by {told}, of {rows[0]['base_rank']:.0f}: means over matrices. It falls in "
        f"{sum(strong)} of {len(strong)} low-rank runs that move the weights by more than {STRONG:g} of "
        f"their norm, in {sum(weak)} of {len(weak)} weaker ones, and in {sum(full)} of {len(full)} full "
        f"fine-tunes; furthest, by {-most['rank_path'][at]:.1f}, with {most['method']} at the rate "
        f"{most['rate']:g}."
    )
    if 2 * sum(strong) > len(strong) and 2 * sum(weak) < len(weak):
        text += " So a strong update of low rank mostly lowers it, and a weak one mostly raises it a little."
    return text


def place(found: dict[str, Any]) -> str:
    """How near low rank comes to what full fine-tuning does."""
    rows = [row for row in found["summary"] if "like_full" in row and row["method"].startswith("LoRA")]
    if len(rows) < 2:
        return ""
    least, most = (pick(rows, key=lambda row: row["like_full"]["cosine"]) for pick in (min, max))
    return (
        "**They go the same way in part.** Between a LoRA's update and full fine-tuning on the same facts "
        f"the cosine is {least['like_full']['cosine']:.2f} ({least['method']}) to "
        f"{most['like_full']['cosine']:.2f} ({most['method']}); chance is "
        f"±{least['like_full']['cosine_chance']:.3f}."
    )
