"""The `geoedit` command: a thin layer over the library."""

from __future__ import annotations

import difflib
import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from geoedit.errors import EditError
from geoedit.slider_commands import app as sliders
from geoedit.terminal import AsJson, Device, Quiet, writable
from geoedit.terminal import run as run_command
from geoedit.update_commands import app as updates

app = typer.Typer(
    name="geoedit",
    help="Shapes of concepts inside networks, and edits that respect them.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

DEFAULT_MODEL = "almanac-gpt2"

ModelArgument = Annotated[
    str, typer.Argument(help="A built-in model, a local folder or a hub id (owner/name).", show_default=True)
]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32, bfloat16, float16 or float64. Default: as stored; built-in: float32."),
]
app.add_typer(updates)
app.add_typer(sliders, name="slider")


@app.command()
def diagnose(
    model: ModelArgument = DEFAULT_MODEL,
    concept: Annotated[
        str, typer.Option(help="A concept's name (see `geoedit concepts`) or a YAML file.")
    ] = "months",
    sites: Annotated[
        str | None,
        typer.Option(
            help="Which sites, separated by commas: '3', '3:last', '2:mlp_out:value', 'embedding:value', "
            "'module.path:last'. Default: the embedding and every block."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page and the JSON.")] = Path("geoedit-out"),
    apply: Annotated[
        bool, typer.Option("--apply", help="Also make the edits, and show what happened.")
    ] = False,
    scale: Annotated[list[float] | None, typer.Option(help="How far to push; give it several times.")] = None,
    seed: Annotated[int, typer.Option(help="Of every random draw.")] = 0,
    max_edits: Annotated[int, typer.Option(help="Edits at each site; of more, a random draw.")] = 1200,
    as_json: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    quiet: Quiet = False,
) -> None:
    """Will straight edits move a concept? Predict at every site; with --apply, make the edits and compare."""
    run_command(
        lambda: _diagnose(
            model, concept, sites, out, apply, scale or [1.0], seed, max_edits, as_json, device, dtype, quiet
        )
    )


@app.command()
def concepts(as_json: AsJson = False) -> None:
    """List the concepts that there are: the almanac's for built-in models, English ones for any."""
    run_command(lambda: _concepts(as_json))


@app.command()
def sites(
    model: ModelArgument = DEFAULT_MODEL, as_json: AsJson = False, device: Device = "cpu", dtype: Dtype = None
) -> None:
    """List the sites of a model."""
    run_command(lambda: _sites(model, as_json, device, dtype))


def _diagnose(
    model: str,
    concept: str,
    sites: str | None,
    out: Path,
    apply: bool,
    scales: list[float],
    seed: int,
    max_edits: int,
    as_json: bool,
    device: str,
    dtype: str | None,
    quiet: bool,
) -> None:
    from geoedit.diagnosis import diagnose as run
    from geoedit.report import geometry_table, predictor_table, site_table, verdict

    writable(out)
    chosen = None if sites is None else [read_site(part) for part in sites.split(",")]
    wanted = find_concept(concept, model)
    network, tokenizer = _load(model, device, dtype, quiet)
    found = run(
        network,
        tokenizer,
        wanted,
        chosen,
        apply=apply,
        scale=scales,
        seed=seed,
        max_edits=max_edits,
        progress=False if quiet else None,
        name=Path(model).name if Path(model).exists() else model,
    )
    stem = "".join(
        letter if letter.isalnum() or letter in "-_." else "-" for letter in f"{found.model}-{wanted.name}"
    )
    data, page = found.to_json(out / f"{stem}.json"), found.to_html(out / f"{stem}.html")
    if as_json:
        print(json.dumps(found.to_dict(), allow_nan=False, ensure_ascii=False))
        print(f"page: {page}", file=sys.stderr)
        return
    console = Console()
    words = verdict(found)
    console.print(site_table(found))
    console.print(geometry_table(found))
    if found.applied:
        console.print(predictor_table(found))
    console.print()
    console.print(words.headline, style="bold", markup=False, highlight=False)
    for line in words.lines:
        console.print(line, markup=False, highlight=False)
    console.print()
    print(f"data: {data}")
    print(f"page: {page}")


def _concepts(as_json: bool) -> None:
    from geoedit.concept import concept as built_in
    from geoedit.concept import concepts as names
    from geoedit.testbeds import world

    rows = [("almanac", entry) for entry in world().concepts.values()] + [
        ("English", built_in(name)) for name in names()
    ]
    if as_json:
        keys = ("for", "name", "kind", "values", "templates", "answers", "description")
        print(
            json.dumps(
                [dict(zip(keys, _about(origin, entry), strict=True)) for origin, entry in rows],
                ensure_ascii=False,
            )
        )
        return
    table = Table("for", "name", "kind", "values", "templates", "answers", "description", header_style="bold")
    for origin, entry in rows:
        table.add_row(*(str(cell) for cell in _about(origin, entry)))
    Console().print(table)


def _about(origin: str, concept: Any) -> tuple[str, str, str, int, int, bool, str]:
    answers = any(template.answers is not None for template in concept.templates)
    return (
        origin,
        concept.name,
        concept.kind,
        len(concept.values),
        len(concept.templates),
        answers,
        concept.description,
    )


def _sites(model: str, as_json: bool, device: str, dtype: str | None) -> None:
    from geoedit.anatomy import anatomy

    network, _ = _load(model, device, dtype, quiet=True)
    known = anatomy(network)
    if as_json:
        stacks = {
            name: {
                "width": stack.width,
                "blocks": [
                    {"index": block.index, "path": block.path, "streams": list(block.streams)}
                    for block in stack.blocks
                ],
            }
            for name, stack in known.stacks.items()
        }
        print(
            json.dumps(
                {"model": model, "main": known.main, "embedding": known.embedding_path, "stacks": stacks}
            )
        )
        return
    print(known)
    print(
        "\nName a site as block:stream:token, for instance 3:residual_out:last, embedding:value or "
        "module.path:last."
    )


def read_site(text: str) -> Any:
    """Read `block[:stream][:token]`, `embedding[:token]` or `module.path[:input][:token]`.

    The stream is `residual_out` and the token `last` where they are left out.

    Raises:
        EditError: it reads as no site.
    """
    from geoedit.site import STREAMS, Site

    parts = [part.strip() for part in text.split(":")]
    if not parts[0]:
        raise EditError(
            f"site {text!r} is empty; write block:stream:token, for instance 3:residual_out:last."
        )
    first, rest = parts[0], parts[1:]
    token: str | int = "last"
    if rest and (rest[-1] in ("last", "value", "all") or _whole(rest[-1])):
        token = int(rest.pop()) if _whole(rest[-1]) else rest.pop()
    if _whole(first):
        stream = rest.pop(0) if rest else "residual_out"
        if rest or stream not in STREAMS:
            raise EditError(
                f"site {text!r}: {(rest or [stream])[0]!r} is neither a stream ({', '.join(STREAMS)}) nor a "
                "token (last, value or a number)."
            )
        return Site(int(first), stream, token)
    if first == "embedding" and not rest:
        return Site(stream="embedding", token=token)
    if rest not in ([], ["input"]):
        raise EditError(f"site {text!r}: {rest[0]!r} is no token; use last, value or a number.")
    return Site(module=":".join([first, *rest]), token=token)


def find_concept(name: str, model: str) -> Any:
    """A concept by its file, or by its name: the almanac's for a built-in model, else the English ones.

    Raises:
        EditError: there is no such file or name; the message lists those that come close.
    """
    from geoedit.concept import Concept, concept, concepts
    from geoedit.testbeds import TESTBEDS, world

    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return Concept.from_yaml(name)
    if model not in TESTBEDS:
        return concept(name)
    known = world().concepts
    if name in known:
        return known[name]
    if name in concepts():
        return concept(name)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are: {', '.join(known)}."
    raise EditError(f"there is no concept {name!r}; {hint}")


def _load(model: str, device: str, dtype: str | None, quiet: bool) -> tuple[Any, Any]:
    from transformers.utils import logging as transformers_logging

    from geoedit.loading import dtype_of, load_model

    transformers_logging.disable_progress_bar()
    return load_model(model, dtype=dtype_of(dtype), device=device)


def _whole(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", text) is not None
