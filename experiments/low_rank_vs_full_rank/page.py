"""The study's page: tables and what they say, with the numbers of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.low_rank_vs_full_rank.answer import answer

ABOUT = """# Low rank against full rank

Written by `python -m experiments.low_rank_vs_full_rank`. Two small models that know a made-up world
([the almanac](../concepts/almanac.md)) are taught new facts about entities of which they were never told
anything, by LoRA of ranks 1 to 64, DoRA, ReLoRA, LoRA trained with `manifolds.optim.LowRankAdam`, and full
fine-tuning. What each changed is read from its weights alone. Is the difference one of degree or of kind?
"""
HOW = """## How

- {facts}; each is taught in five wordings and asked in the sixth. `learned`: the share
  answered rightly there.
- {steps} steps of {batch} sentences, warm-up and linear decay, AdamW without weight decay (or `LowRankAdam`);
  α / r = {alpha}. Adapters sit on every linear map of every block; full fine-tuning trains all parameters.
- Three rates for each method, on {first} with the first seed; the one with the largest
  `learned − forgotten` is used on all models and seeds ({seeds}).
  {edge}
- `forgotten`: of the held-out questions that the model answered rightly before (up to {known} of each of
  {families} families), the share that it answers wrongly now; the mean over families. Nothing is rehearsed.
- Weights: the matrices that every method trains. Intruders: ε = {epsilon}, the first {top} singular vectors
  of the tuned matrix (Shuttleworth et al., 2024), counted a matrix. Verdicts: of the merged weights without
  their factors, of the first seed, saved in float32 and in bfloat16.
"""


def page(found: dict[str, Any], figures: Sequence[str]) -> str:
    """The page as Markdown."""
    settings = found["settings"]
    models = settings["models"]
    parts = [ABOUT, answer(found), HOW.format(
        facts="Facts are drawn anew for each seed",
        steps=settings["steps"], batch=settings["batch"], alpha=settings["alpha_over_rank"], first=models[0],
        seeds=", ".join(map(str, settings["seeds"])), edge=edge(found), known=settings["known"]["sentences"],
        families=len(settings["known"]["families"]), epsilon=settings["epsilon"], top=settings["top"],
    )]  # fmt: skip
    for model in models:
        rows = [row for row in found["summary"] if row["model"] == model]
        parts += [f"## {model}", learning(rows), weights(rows), verdicts(rows)]
    parts += ["## At one loss", matched(found), "## What goes with what", regression(found)]
    parts += [f"![{name.rsplit('_', 1)[-1].removesuffix('.png')}]({name})" for name in figures]
    parts += [LIMITS]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def spread(value: dict[str, float], digits: int = 2) -> str:
    """A mean, and the least and largest if they differ."""
    mean, low, high = (f"{value[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low}–{high})"


def learning(rows: Sequence[dict[str, Any]]) -> str:
    """What was learned and forgotten."""
    head = ("method", "rate", "loss", "learned", "forgotten", "‖ΔW‖ / ‖W‖")
    return table(head, [
        (row["method"], f"{row['rate']:g}", spread(row["loss"], 3), spread(row["learned"]),
         spread(row["forgotten"]), spread(row["relative_norm"], 3))
        for row in rows
    ])  # fmt: skip


def weights(rows: Sequence[dict[str, Any]]) -> str:
    """What the weights show."""
    head = (
        "method", "effective rank", "stable rank", "90 % of energy", "intruders left", "right",
        "effective rank of W + ΔW", "matrices that lose rank", "cosine with full",
        "overlap with full (chance)",
    )  # fmt: skip
    lines = []
    for row in rows:
        like = row.get("like_full")
        lines.append((
            row["method"], spread(row["effective_rank"], 1), spread(row["stable_rank"], 1),
            spread(row["energy_rank_90"], 1), spread(row["intruders_left"]), spread(row["intruders_right"]),
            f"{row['rank_path'][PLACE]:+.2f}", f"{row['loses_rank']['mean']:.0%}",
            f"{like['cosine']:.2f}" if like else "",
            f"{like['overlap_left']:.2f} ({like['overlap_chance_left']:.2f})" if like else "",
        ))  # fmt: skip
    return table(head, lines)


PLACE = 4  # of t = 1 in the path


def verdicts(rows: Sequence[dict[str, Any]]) -> str:
    """What the verdicts say, and the median rank of the matrices."""
    head = ("method", "float32: origin", "rank", "matrices", "bfloat16: origin", "rank", "matrices")
    lines = []
    for row in rows:
        cells = [row["method"]]
        for stored in ("float32", "bfloat16"):
            cells += [
                counts(row[f"origin_{stored}"]),
                f"{row[f'rank_{stored}']:g}",
                counts(row[f"statements_{stored}"]),
            ]
        lines.append(cells)
    return table(head, lines)


def counts(values: dict[str, int]) -> str:
    """Names with how often each came."""
    return ", ".join(f"{name} {count}" for name, count in sorted(values.items(), key=lambda one: -one[1]))


def matched(found: dict[str, Any]) -> str:
    """The sweep at one loss."""
    rows = found["matched"]
    head = ("method", "forgotten", "‖ΔW‖ / ‖W‖", "intruders left", "right")
    names = ("forgotten", "relative_norm", "intruders_left", "intruders_right")
    text = (
        f"The sweep of {rows[0]['model']}, interpolated to a loss of {rows[0]['loss']:g} nats; empty where "
        "the swept rates do not enclose it."
    )
    cells = [(row["method"], *("" if row[n] is None else f"{row[n]:.3f}" for n in names)) for row in rows]
    return f"{text}\n\n{table(head, cells)}"


def regression(found: dict[str, Any]) -> str:
    """Rank correlations and the fits."""
    seen = found["agreement"]
    lines = [f"Rank correlations over all {seen['runs']} runs, the sweep's included:", ""]
    lines += [
        f"- {pair}: {'not defined' if value is None else f'{value:+.2f}'}"
        for pair, value in seen["spearman"].items()
    ]
    lines += [
        "",
        "Least squares, coefficient ± standard error. `low rank` is 1 for every method but full fine-tuning:",
        "what low rank adds at the same size of update and the same loss. " + overlap(found["runs"]),
        "",
    ]
    rows = []
    for label, key in (("share forgotten", "forgotten_by"), ("intruders, left", "intruders_by")):
        fit = seen[key]
        terms = fit["coefficients"].items()
        cells = ", ".join(f"{name} {value:+.3f} ± {error:.3f}" for name, (value, error) in terms)
        rows.append((label, cells, "" if fit["explained"] is None else f"{fit['explained']:.0%}"))
    return "\n".join(lines) + "\n" + table(("of", "by", "variance explained"), rows)


def overlap(runs: Sequence[dict[str, Any]]) -> str:
    """How far the sizes of both sorts of update overlap."""
    sizes = {
        full: [r["relative_norm"] for r in runs if (r["kind"] == "full") == full] for full in (True, False)
    }
    if not sizes[True] or not sizes[False]:
        return ""
    ranges = [f"{min(sizes[full]):.2f} to {max(sizes[full]):.2f}" for full in (True, False)]
    return (
        f"Full fine-tunes are of size {ranges[0]}, the others {ranges[1]}: where these do not overlap the "
        "coefficient is an extrapolation."
    )


def edge(found: dict[str, Any]) -> str:
    """Which methods chose the least or largest rate that they were offered."""
    offered = found["settings"]["rates"]
    chosen = {row["method"]: row["rate"] for row in found["summary"]}
    least = [name for name, rate in chosen.items() if rate == min(offered[name]) and len(offered[name]) > 1]
    if not least:
        return "None is at the lower end of what was offered."
    which = "Every method" if len(least) == len(chosen) else ", ".join(least)
    return f"{which} chose the lowest rate it was offered: still lower ones might forget less."


LIMITS = """## What this does not show

- Two models of 1.2 million parameters, trained on a closed world; facts, not skills; nothing rehearsed. What
  large models forget may follow other laws.
- Rates were swept on one model and one seed, in factors of two. The comparison at one loss interpolates
  between them.
- The regression is one of few runs that share models and seeds: its standard errors take them as independent
  and are too small.
- A LoRA of rank 64 is of full rank where a matrix has 64 rows, as the key and value maps of almanac-llama
  have: "full rank" is the right answer there.
- Full fine-tuning also moves embeddings and norms; the tables compare the matrices that all methods train.
"""
