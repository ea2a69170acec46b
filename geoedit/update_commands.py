"""The commands on weight updates: what one changed, which facts were edited, several made into one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from geoedit.errors import EditError
from geoedit.terminal import AsJson, Device, Quiet, run, writable

if TYPE_CHECKING:
    from peft_analysis import Report, WeightUpdate

app = typer.Typer()

NONE = "none"
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


def tell(report: Report, rows: int, console: Console | None = None) -> None:
    """Print a report: the matrices that changed most, then what it comes to in words."""
    from peft_analysis.report import words

    console = console or Console()
    shown = sorted(words.changed(report), key=lambda row: -(row.get("relative_norm") or row["norm"]))
    if shown:
        console.print(spectra_table(shown[:rows]))
    if len(shown) > rows:
        console.print(f"{len(shown) - rows} more on the page.", style="dim", highlight=False)
    console.print()
    console.print(words.headline(report), style="bold", markup=False, highlight=False)
    for line in [*words.lines(report), *(f"Left out: {line}" for line in words.left_out(report))]:
        console.print(line, markup=False, highlight=False)
    console.print()


def spectra_table(rows: list[dict[str, Any]]) -> Table:
    """Rows of a report for a terminal of 80 columns."""
    from peft_analysis.report import words

    table = Table(header_style="bold", pad_edge=False, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("matrix", no_wrap=True, overflow="ellipsis")
    for name in (
        "change",
        "true\nrank",
        "effective\nrank",
        "intruders\nout + in",
        "overlap\nout / in",
        "verdict",
    ):
        table.add_column(name, justify="left" if name == "rank\nis" else "right", no_wrap=True)
    for row in rows:
        changed = row.get("relative_norm")
        table.add_row(
            row["kind"] if row["block"] is None else f"{row['block']} {row['kind']}",
            f"norm {row['norm']:.3g}" if changed is None else words.percent(changed),
            words.rank_of(row),
            f"{row.get('effective_rank_above') or row['effective_rank']:.3g}",
            _pair(row, "intruders", " + ", str),
            _pair(row, "overlap", " / ", lambda share: f"{100 * share:.0f}"),
            row["verdict"].removesuffix(" rank"),
        )
    return table


def _pair(row: dict[str, Any], name: str, between: str, form: Any) -> str:
    sides = [row.get(f"{name}_{side}") for side in ("left", "right")]
    return "–" if None in sides else between.join(form(side) for side in sides)


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

    if out.suffix != ".safetensors":
        raise EditError(f"--out is {str(out)!r}; give a file that ends with .safetensors.")
    writable(out.parent)
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


# What a user writes


def find_weights(name: str) -> Path | None:
    """Where weights lie: a built-in model, a path, a hub id; None for "none".

    Raises:
        EditError: there is no such thing.
    """
    from geoedit.testbeds import TESTBEDS, folder

    if name == NONE:
        return None
    if name in TESTBEDS:
        return folder(name)
    path = Path(name).expanduser()
    if path.exists():
        return path
    from geoedit.loading import check_hub_id

    check_hub_id(name, TESTBEDS)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, ValueError) as error:
        text = str(error).strip().splitlines()
        raise EditError(
            f"can't get {name!r}: {text[0] if text else type(error).__name__} If it is a folder, the path "
            "does not exist; if it is a hub id, check its spelling and the network."
        ) from error


def read_side(text: str) -> int | None:
    """Read --base-svd: a number, 'all' (None) or 'none' (0).

    Raises:
        EditError: it is none of these.
    """
    if text in ("all", NONE):
        return None if text == "all" else 0
    if not text.isdecimal():
        raise EditError(f"--base-svd is {text!r}; give a number, 'all' or 'none'.")
    return int(text)


def read_numbers(text: str | None, count: int) -> list[float]:
    """Read --weights: as many numbers as there are updates, ones if there are none.

    Raises:
        EditError: they are not numbers, or another count.
    """
    if text is None:
        return [1.0] * count
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise EditError(f"--weights is {text!r}; give numbers separated by commas: 1,-0.7.") from None
    if len(numbers) != count:
        raise EditError(f"--weights has {len(numbers)} numbers for {count} updates; give one for each.")
    return numbers
