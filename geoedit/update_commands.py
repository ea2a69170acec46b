"""The commands on weight updates: what one changed, which facts were edited, several made into one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console

from geoedit.errors import EditError
from geoedit.terminal import AsJson, Device, Quiet, run, writable
from geoedit.update_inputs import NONE, find_weights, read_lines, read_numbers, read_side
from geoedit.update_tables import tell, tell_trace

if TYPE_CHECKING:
    from peft_analysis import WeightUpdate

app = typer.Typer()

Base = Annotated[
    str,
    typer.Argument(
        help="What was tuned: a built-in model, a folder, a file or a hub id; 'none' for an adapter alone.",
        show_default=False,
    ),
]
Tuned = Annotated[
    str,
    typer.Argument(
        help="An adapter's folder, a tuned model's folder, a file of weights or a hub id.",
        show_default=False,
    ),
]
Out = Annotated[Path, typer.Option(help="Folder for the page and the JSON.")]


@app.command()
def spectra(
    base: Base,
    tuned: Tuned,
    out: Out = Path("geoedit-out"),
    only: Annotated[
        str | None, typer.Option(help="Only parameters whose name holds this regular expression.")
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the table in the terminal; the page has all.")] = 12,
    base_svd: Annotated[
        str,
        typer.Option(
            help="Which base matrices to decompose for angles, overlap and intruders: those whose smaller "
            "side is at most this number, 'all' or 'none'. A side of 4096 takes about a minute on a CPU."
        ),
    ] = "2048",
    top: Annotated[int, typer.Option(help="Strongest directions of the base to compare with.")] = 16,
    epsilon: Annotated[float, typer.Option(help="Intruders: cosine below which a direction is new.")] = 0.5,
    k: Annotated[int, typer.Option(help="Intruders: how many directions to look at.")] = 10,
    cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps decompositions of the base for the next adapter.")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Folder that keeps finished matrices; a stopped run goes on from it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    as_json: AsJson = False,
    device: Device = "cpu",
    quiet: Quiet = False,
) -> None:
    """What did an update change? Size, true rank, alignment and intruders of every matrix.

    For instance: geoedit spectra almanac-gpt2 my-adapter
    """
    options: dict[str, Any] = {"top": top, "epsilon": epsilon, "k": k, "cache": cache, "resume": resume}
    options |= {"seed": seed, "device": device, "progress": False if quiet else None}
    run(lambda: _spectra(base, tuned, out, only, rows, base_svd, as_json, options))


@app.command()
def trace(
    base: Base,
    edited: Annotated[
        str, typer.Argument(help="The edited model's folder, or a file of the edit.", show_default=False)
    ],
    subjects: Annotated[
        str | None,
        typer.Option(
            help="Names among which the edited ones are looked for: a file with one a line, or a,b,c."
        ),
    ] = None,
    relation: Annotated[
        list[str] | None,
        typer.Option(help="A prompt with {} for the subject, or a file of them; give it several times."),
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="Texts, one a line, over which the inputs' covariance is taken.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the JSON.")] = Path("geoedit-out"),
    reverse: Annotated[
        Path | None,
        typer.Option(help="Also write the update that undoes the edits to this safetensors file."),
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of the tables in the terminal.")] = 12,
    false_alarm: Annotated[
        float, typer.Option(help="Chance of naming anybody in a model that nobody edited.")
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    as_json: AsJson = False,
    device: Device = "cpu",
) -> None:
    """Which facts were edited? Layers, how many, by which method, of whom, to what.

    Layers, number and method are read from weights alone. Subjects are looked for among candidates; for a
    built-in model these are the almanac's own. For instance: geoedit trace almanac-gpt2 edited-model
    """
    options = {"false_alarm": false_alarm, "seed": seed}
    run(
        lambda: _trace(
            base, edited, subjects, relation or [], texts, out, reverse, rows, as_json, device, options
        )
    )


@app.command()
def merge(
    updates: Annotated[
        list[str], typer.Argument(help="Adapters or update files, of one base.", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The file to write: safetensors.")] = Path("merged.safetensors"),
    base: Annotated[
        str, typer.Option(help="Their base; needed for kinds that are made of it, such as DoRA.")
    ] = NONE,
    weights: Annotated[
        str | None,
        typer.Option(help="A number for each, of any sign, separated by commas: 1,-0.7. Default: ones."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="exact: the sum, factors side by side. svd: the nearest of a rank. ties, dare, dare_ties: "
            "as in their papers. karcher: the mean along the matrices of one rank."
        ),
    ] = "exact",
    rank: Annotated[int | None, typer.Option(help="Of the result, where the method takes one.")] = None,
    density: Annotated[
        float | None, typer.Option(help="ties and dare: the share of entries that stay.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of dare's draws.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make one update of several: sum, SVD, TIES, DARE or Karcher mean.

    For instance: geoedit merge style-adapter facts-adapter --weights 1,-0.7 --out both.safetensors
    """
    options = {"method": method, "rank": rank, "density": density}
    run(lambda: _merge(updates, out, base, weights, options, seed, as_json))


def _spectra(
    base: str,
    tuned: str,
    out: Path,
    only: str | None,
    rows: int,
    base_svd: str,
    as_json: bool,
    options: dict[str, Any],
) -> None:
    from peft_analysis import analyse
    from peft_analysis.report.processes import Processes

    writable(out)
    options["max_base_side"] = read_side(base_svd)
    report = analyse(find_weights(base), find_weights(tuned), name=Path(tuned).name, only=only, **options)
    if Processes.current().rank:
        return
    stem = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in Path(tuned).name)
    data, page = report.to_json(out / f"{stem}-spectra.json"), report.to_html(out / f"{stem}-spectra.html")
    if as_json:
        print(json.dumps(report.to_dict(), allow_nan=False, ensure_ascii=False))
        print(f"page: {page}", file=sys.stderr)
        return
    tell(report, rows)
    print(f"data: {data}")
    print(f"page: {page}")


def _trace(
    base: str,
    edited: str,
    subjects: str | None,
    relations: list[str],
    texts: Path | None,
    out: Path,
    reverse: Path | None,
    rows: int,
    as_json: bool,
    device: str,
    options: dict[str, Any],
) -> None:
    from geoedit.testbeds import TESTBEDS
    from peft_analysis.forensics import trace as traced
    from peft_analysis.report.files import write_text

    check_file(reverse, "--reverse")
    writable(out)
    below, tuned = find_weights(base), find_weights(edited)
    names = None if subjects is None else read_lines(subjects)
    asked: Any = [line for one in relations for line in (read_lines(one) if Path(one).is_file() else [one])]
    if base in TESTBEDS:
        names, asked = names or almanac_subjects(), asked or almanac_relations()
    model = tokenizer = None
    if below is not None and (names or asked):
        from transformers.utils import logging as transformers_logging

        from geoedit.loading import load_model

        transformers_logging.disable_progress_bar()
        model, tokenizer = load_model(base, device=device)
    found = traced(
        below,
        tuned,
        model,
        tokenizer,
        names,
        asked or None,
        texts=None if texts is None else read_lines(str(texts)),
        **options,
    )
    data = write_text(
        out / f"{Path(edited).name}-trace.json",
        json.dumps(found.to_dict(), allow_nan=False, ensure_ascii=False) + "\n",
    )
    if reverse is not None:
        found.reverse().changed().save(reverse)
    if as_json:
        print(data.read_text(encoding="utf-8"), end="")
        return
    tell_trace(found, rows)
    print(f"data: {data}")
    if reverse is not None:
        print(f"undoes it: {reverse}")


def almanac_subjects() -> list[str]:
    """Everybody and everything that the built-in models were told of."""
    from geoedit.testbeds import world

    return list(dict.fromkeys(fact.subject.name for fact in world().facts))


def almanac_relations() -> dict[str, list[str]]:
    """What may be asked of them, with {} for the subject."""
    from geoedit.testbeds import world

    return {
        relation.name: [template.replace("{x}", "{}") for template in relation.templates]
        for relation in world().relations
    }


def check_file(path: Path | None, option: str) -> None:
    """Refuse a file of another kind, or one that can't be written, before the work is done.

    Raises:
        EditError: its name does not end with .safetensors, or its folder can't be written to.
    """
    if path is None:
        return
    if path.suffix != ".safetensors":
        raise EditError(f"{option} is {str(path)!r}; give a file that ends with .safetensors.")
    writable(path.parent)


def _merge(
    updates: list[str],
    out: Path,
    base: str,
    weights: str | None,
    options: dict[str, Any],
    seed: int,
    as_json: bool,
) -> None:
    import torch

    from peft_analysis import read_update
    from peft_analysis.merging import merge as merged_of
    from peft_analysis.merging.methods import Method

    check_file(out, "--out")
    if options["method"] not in get_args(Method):
        raise EditError(f"--method is {options['method']!r}; it is one of {', '.join(get_args(Method))}.")
    numbers = read_numbers(weights, len(updates))
    below = find_weights(base)
    parts = [read_update(below, find_weights(one)) for one in updates]
    if options["method"].startswith("dare"):
        options["generator"] = torch.Generator().manual_seed(seed)
    merged = merged_of(parts, numbers, **options)
    merged.save(out)
    facts = _merge_facts(parts, numbers, merged)
    if as_json:
        print(json.dumps({"file": str(out), **facts}, allow_nan=False))
        return
    console = Console()
    console.print(
        f"{len(parts)} updates of {facts['parameters']} parameters, method {options['method']}; "
        f"stored rank {facts['rank'] or 'dense'}, norm {facts['norm']:.4g}.",
        highlight=False,
    )
    if facts["linear_error"] is not None:
        console.print(
            f"peft's combination_type='linear' would be off by {100 * facts['linear_error']:.0f} % of the "
            "sum (median over the matrices), because it multiplies sums of factors.",
            highlight=False,
        )
    print(f"file: {out}")


def _merge_facts(parts: list[WeightUpdate], weights: list[float], merged: WeightUpdate) -> dict[str, Any]:
    """What was made: size, stored rank, and how far peft's linear merge would be from the sum."""
    import math
    from statistics import median

    from manifolds import LowRank
    from peft_analysis import UpdateError
    from peft_analysis.merging import linear_merge_error

    square, ranks = 0.0, []
    for name in merged:
        value = merged[name]
        square += float(value.double().norm() if not isinstance(value, LowRank) else value.norm()) ** 2
        ranks += [value.rank] if isinstance(value, LowRank) else []
    try:
        errors = [error for error in linear_merge_error(parts, weights).values() if not math.isnan(error)]
    except UpdateError:
        errors = []  # dense differences or unequal ranks, which peft refuses to merge that way
    return {
        "parameters": len(merged),
        "rank": max(ranks) if ranks else None,
        "norm": math.sqrt(square),
        "linear_error": median(errors) if errors else None,
    }
