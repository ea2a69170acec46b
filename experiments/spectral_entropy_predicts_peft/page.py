"""The study's page of the documentation."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from experiments.spectral_entropy_predicts_peft.judge import PREDICTORS, TRIVIAL

NAME = "spectral_entropy_predicts_peft"


def page(found: Mapping[str, Any]) -> str:
    """Return the page in Markdown."""
    return "\n\n".join([_opening(found), _answer(found), _table(found), _tasks(found), _again(found)]) + "\n"


def _score(found: Mapping[str, Any], name: str, by: str, target: str = "all") -> Mapping[str, Any]:
    return next(
        one
        for one in found["scores"]
        if (one["predictor"], one["left_out"], one["target"]) == (name, by, target)
    )


def _opening(found: Mapping[str, Any]) -> str:
    settings = found["settings"]
    rates = " or ".join(f"{rate:g}" for rate in settings["rates"])
    return "\n\n".join(
        [
            "# Does a matrix's spectrum tell how well LoRA on it learns?",
            prose(
                "Tools choose where to put adapters by the spectrum of the base weights: by its entropy,",
                "by the exponent of its tail, by how large an update must be to show. Here that is put to",
                f"the test. Each of {len(found['matrices']['path'])} matrices of",
                f"{len(settings['models'])} models gets a LoRA of rank {settings['rank']} of its own,",
                f"everything else frozen, and {settings['steps']} steps of AdamW at a rate of {rates},",
                f"whichever leaves less loss on what was taught ({found['runs']} runs). Three things are",
                'taught: facts that the model was never told ("new"), other answers to facts that it',
                'knows ("changed"), and a rule: every answer about weekdays, months and hours moves one',
                'step on ("rule").',
            ),
            prose(
                "The *gain* of a matrix is the share of the loss that training removed in wordings, or on",
                "values, that were not trained on; its mean over the tasks is what is predicted. A",
                "predictor is a ridge regression on its features, fitted on the other architecture, or on",
                "the other kinds of matrices (attention in, attention out, MLP in, MLP out). Its *skill* is",
                "the share of the squared error of the mean that it removes: 0 is as good as the mean,",
                "below 0 is worse.",
            ),
        ]
    )


def _answer(found: Mapping[str, Any]) -> str:
    spectrum, other = (_score(found, "spectrum", by) for by in ("architecture", "kind"))
    trivial = max((_score(found, name, "architecture") for name in TRIVIAL), key=lambda one: one["skill"])
    trivial_kind = max((_score(found, name, "kind") for name in TRIVIAL), key=lambda one: one["skill"])
    gradient = _score(found, "gradient", "architecture")
    with_it, without = (
        _score(found, name, "architecture")
        for name in ("kind, depth, size and spectrum", "kind, depth and size")
    )
    alone = _score(found, "entropy alone", "architecture")
    helps = spectrum["low"] is not None and spectrum["low"] > 0
    beats = spectrum["skill"] > trivial["skill"]
    if helps and beats:
        head = "**The spectrum tells something that the matrix's place does not.**"
    elif helps:
        head = "**The spectrum tells something, and the matrix's place tells more.**"
    else:
        head = "**The spectrum alone does not tell it on an architecture that was not seen.**"
    return "\n\n".join(
        [
            "## In short",
            prose(
                f"{head} With the other architecture left out, the spectrum's",
                f"{len(found['fit']['coefficients'])} numbers have a skill of {_skill(spectrum)}, entropy",
                f"alone {_skill(alone)}. The best that knows no spectrum, {trivial['predictor']}, has",
                f"{_skill(trivial)}. With a kind of matrix left out: {_skill(other)} for the spectrum,",
                f"{_skill(trivial_kind)} for {trivial_kind['predictor']}.",
            ),
            prose(
                f"Beside kind, depth and size the spectrum changes the skill from {without['skill']:.2f} to",
                f"{with_it['skill']:.2f} on the other architecture. One gradient of the task at the base",
                f"weights, which is no rival because it needs the task, has {_skill(gradient)}.",
            ),
            prose(
                "`peft_analysis.predict` ships the spectrum's fit, with these numbers in every result and",
                "`reliable` false wherever they do not carry it.",
            ),
        ]
    )


def _table(found: Mapping[str, Any]) -> str:
    lines = [
        "## Predictors side by side",
        f"![Skill of every predictor]({NAME}.png)",
        "\n".join(
            [
                "| predictor | architecture left out | ρ within | kind left out | ρ within |",
                "|---|---|---|---|---|",
                *(
                    "| "
                    + " | ".join(
                        [name]
                        + [
                            cell
                            for by in ("architecture", "kind")
                            for cell in (
                                _skill(_score(found, name, by)),
                                _number(_score(found, name, by)["rho"]),
                            )
                        ]
                    )
                    + " |"
                    for name in PREDICTORS
                ),
            ]
        ),
        prose(
            "Skill with its 95 % interval, bootstrap over matrices; two architectures are too few to draw",
            "from, so the interval says nothing of a third. *ρ within*: Spearman's correlation inside each",
            "group that was left out, averaged.",
        ),
        f"![Gain against spectral entropy]({NAME}_entropy.png)",
    ]
    return "\n\n".join(lines)


def _tasks(found: Mapping[str, Any]) -> str:
    tasks = found["settings"]["tasks"]
    rows = [
        f"| {name} | "
        + " | ".join(f"{_score(found, name, 'architecture', task)['skill']:.2f}" for task in tasks)
        + " |"
        for name in ("spectrum", "entropy alone", *TRIVIAL, "gradient")
    ]
    pairs = ", ".join(f"{value:.2f} ({pair})" for pair, value in found["reliability"].items())
    parts = [
        "## Task by task",
        "\n".join(
            [
                f"| skill, architecture left out | {' | '.join(tasks)} |",
                "|---" * (len(tasks) + 1) + "|",
                *rows,
            ]
        ),
    ]
    if pairs:
        parts.append(prose(f"How far matrices keep their order from task to task (Spearman): {pairs}."))
    return "\n\n".join(parts)


def _again(found: Mapping[str, Any]) -> str:
    return "\n\n".join(
        [
            "## What this does not show",
            prose(
                "Two models of 1.3 million parameters, short runs, one rank, one optimizer. A matrix that",
                "learns little alone may matter together with others. Published findings on larger models",
                "disagree with one another; this page adds two small models to them, with everything",
                "needed to repeat it.",
            ),
            "## Again",
            "```bash\npython -m experiments.spectral_entropy_predicts_peft\n```",
            prose(f"The runs took {found['seconds'] / 60:.0f} minutes on a core shared with other work."),
        ]
    )


def _skill(one: Mapping[str, Any]) -> str:
    return f"{_number(one['skill'])} ({_number(one['low'])} to {_number(one['high'])})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value + 0.0 if abs(value) >= 0.005 else 0.0:.2f}"


def prose(*parts: str) -> str:
    """Join and wrap text."""
    return textwrap.fill(" ".join(parts), 106, break_long_words=False, break_on_hyphens=False)
