"""The commands on concept sliders: teach one, draw it, put several together, measure them, write a card."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from geoedit.errors import EditError
from geoedit.slider_inputs import (
    DEFAULT_MODEL,
    file_name,
    load_base,
    read_scales,
    read_settings,
    read_term,
)
from geoedit.slider_tables import slider_table
from geoedit.terminal import AsJson, Device, Quiet, run, writable

app = typer.Typer(
    help="Concept sliders: LoRAs that move one attribute up and down by their scale.", no_args_is_help=True
)

SliderFile = Annotated[str, typer.Argument(help="A slider's file or folder.", show_default=False)]
SliderFiles = Annotated[list[str], typer.Argument(help="Files or folders of sliders.", show_default=False)]
Model = Annotated[
    str, typer.Option(help="A built-in name, a folder of diffusers or transformers, or a hub id.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16, float16 or float64.")]
Seed = Annotated[int, typer.Option(help="Of every random draw.")]
Scales = Annotated[str, typer.Option(help="Scales in the slider's own units, separated by commas.")]


@app.command()
def train(
    spec: Annotated[
        Path,
        typer.Argument(
            help="A YAML file: ours, or the published trainer's prompts or config.", show_default=False
        ),
    ],
    model: Model = DEFAULT_MODEL,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; called again it goes on. Default: geoedit-out/NAME of the spec."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="How many; else the spec's, or 300.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a step; else the spec's, or 8.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Any setting of the run as name=value: rank=8, targets=cross-attn, learning_rate=1e-3, "
            "sample_every=50, tensorboard=true. Give it several times.",
        ),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Afterwards evaluate the slider; its file and card tell the figures."),
    ] = False,
    seed: Seed = 0,
    as_json: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    quiet: Quiet = False,
) -> None:
    """Teach a slider: writes its file, a card and checkpoints, and goes on from these if it was stopped.

    For instance: geoedit slider train size.yaml --model shapes-unet. On several devices:
    accelerate launch --no_python geoedit slider train size.yaml.
    """
    asked = {"steps": steps, "batch_size": batch_size}
    run(lambda: _train(spec, model, out, asked, setting or [], measure, seed, as_json, device, dtype, quiet))


@app.command()
def strip(
    slider: SliderFile,
    model: Model = DEFAULT_MODEL,
    scales: Scales = "-2,-1,0,1,2",
    prompt: Annotated[
        str | None, typer.Option(help="What is drawn; else what the slider was taught on.")
    ] = None,
    start: Annotated[
        float,
        typer.Option(help="Share of the way at which the slider begins; later keeps more of the image."),
    ] = 0.0,
    steps: Annotated[int | None, typer.Option(help="Sampling steps.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The PNG to write. Default: geoedit-out/NAME-strip.png.")
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Draw one prompt from one noise at several scales, in a row.

    For instance: geoedit slider strip size.safetensors --scales -2,-1,0,1,2
    """
    options = {"prompt": prompt, "start": start, "steps": steps, "seed": seed}
    run(lambda: _strip(slider, model, scales, out, device, dtype, options))


@app.command()
def compose(
    sliders: Annotated[
        list[str], typer.Argument(help="Files, each with its scale: age.safetensors@1.5", show_default=False)
    ],
    out: Annotated[Path, typer.Option(help="The file to write: safetensors.")] = Path("composed.safetensors"),
    method: Annotated[
        str,
        typer.Option(
            help="exact: the sum, factors side by side. truncate: the nearest of a rank. orthogonalise: "
            "column and row spaces made orthogonal first."
        ),
    ] = "exact",
    rank: Annotated[int | None, typer.Option(help="Of the result, where the method takes one.")] = None,
    form: Annotated[str, typer.Option("--format", help="diffusers, kohya or peft.")] = "diffusers",
    name: Annotated[str | None, typer.Option(help="Of the result.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make one slider of several.

    For instance: geoedit slider compose age.safetensors@1.5 smile.safetensors@-0.7 --out both.safetensors
    """
    run(lambda: _compose(sliders, out, form, as_json, {"method": method, "rank": rank, "name": name}))


@app.command()
def evaluate(
    sliders: SliderFiles,
    model: Model = DEFAULT_MODEL,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt held out from training; give it several times.")
    ] = None,
    seeds: Annotated[int, typer.Option(help="How many noises each prompt is drawn from.")] = 5,
    scales: Scales = "-2,-1.5,-1,-0.5,0,0.5,1,1.5,2",
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    safe_range: Annotated[
        bool, typer.Option(help="Predict how far each may be pushed, and observe it by going further.")
    ] = True,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write the figures into the sliders' files and cards as well.")
    ] = False,
    cache: Annotated[Path | None, typer.Option(help="Folder of drawn images; a stopped run goes on.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the page and the JSON.")] = Path("geoedit-out"),
    as_json: AsJson = False,
    device: Device = "cpu",
    dtype: Dtype = None,
    quiet: Quiet = False,
) -> None:
    """Measure sliders on images: monotone, bipolar, far enough, nothing else moved; and prompting likewise.

    For instance: geoedit slider evaluate size.safetensors hue.safetensors --seeds 5
    """
    options = {"prompts": prompt, "seeds": seeds, "steps": steps, "safe_range": safe_range, "cache": cache}
    options["progress"] = not quiet and sys.stderr.isatty()
    run(lambda: _evaluate(sliders, model, scales, keep, out, as_json, device, dtype, options))


@app.command()
def card(
    slider: SliderFile,
    model: Annotated[
        str | None, typer.Option(help="Draw a sample strip with this base; else the card has none.")
    ] = None,
    scales: Scales = "-2,-1,0,1,2",
    evaluation: Annotated[
        Path | None,
        typer.Option(help="The JSON of an evaluation of this slider; its figures go into the card."),
    ] = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Write README.md beside a slider's file: what it is, how to use it, what was measured.

    For instance: geoedit slider card size.safetensors --model shapes-unet
    """
    run(lambda: _card(slider, model, scales, evaluation, seed, device, dtype))


def _train(
    spec: Path,
    model: str,
    out: Path | None,
    asked: dict[str, Any],
    settings: list[str],
    measure: bool,
    seed: int,
    as_json: bool,
    device: str,
    dtype: str | None,
    quiet: bool,
) -> None:
    import torch

    from geoedit.sliders.spec import SliderSpec
    from geoedit.sliders.training.processes import Workers
    from geoedit.sliders.training.run import train as teach

    wanted = SliderSpec.load(spec)
    folder = Path("geoedit-out") / file_name(wanted.name) if out is None else out
    workers = Workers.current()
    options = {**asked, "show": False if quiet else None, **read_settings(settings)}
    writable(folder)
    pipe, tokenizer = load_base(model, dtype=dtype, device=device, language=wanted.kind == "language")
    generator = torch.Generator().manual_seed(seed)
    slider = teach(pipe, wanted, generator=generator, output=folder, tokenizer=tokenizer, **options)
    if not workers.first:
        return
    file = folder / f"{slider.name}.safetensors"
    if measure:
        slider = _measure(pipe, slider, file, folder, quiet)
    if as_json:
        _say(
            {"file": str(file), "name": slider.name, "modules": len(slider), "details": dict(slider.details)}
        )
        return
    Console().print(repr(slider), highlight=False, markup=False, soft_wrap=True)
    print(f"file: {file}")
    print(f"card: {folder / 'README.md'}")


def _measure(pipe: Any, slider: Any, file: Path, folder: Path, quiet: bool) -> Any:
    """Evaluate a fresh slider, and let its file and card tell the figures."""
    from geoedit.sliders.evaluation.evaluate import evaluate as measured_on

    if set(slider.changes) == {"model"}:
        raise EditError("--measure reads images, and a language model draws none; leave it out.")
    found = measured_on(pipe, slider, progress=not quiet and sys.stderr.isatty())
    found.to_json(folder / "evaluation.json")
    found.to_html(folder / "evaluation.html")
    return _keep(pipe, slider, file, found, slider.name)


def _keep(pipe: Any, slider: Any, file: Path, evaluation: Any, label: str) -> Any:
    from geoedit.sliders.card import write_card
    from geoedit.sliders.measured import measured

    told = measured(slider, evaluation, label)
    told.save(file)
    row, scales = _row(pipe, told, read_scales("-2,-1,0,1,2"))
    write_card(told, file, strip=row, scales=scales)
    return told


def _row(pipe: Any, slider: Any, scales: list[float], seed: int = 0) -> tuple[Any, list[float]]:
    """A strip as one row of a sheet."""
    from geoedit.sliders.strips import strip as drawn

    return drawn(pipe, slider, scales, seed=seed).images[None], scales


def _strip(
    slider: str,
    model: str,
    scales: str,
    out: Path | None,
    device: str,
    dtype: str | None,
    options: dict[str, Any],
) -> None:
    from geoedit.sliders.strips import strip as drawn

    wanted, known = read_scales(scales), _load(slider)
    target = Path("geoedit-out") / f"{file_name(known.name)}-strip.png" if out is None else out
    writable(target.parent)
    pipe, _ = load_base(model, dtype=dtype, device=device)
    drawn(pipe, known, wanted, **options).save(target)
    print(f"image: {target}")


def _compose(sliders: list[str], out: Path, form: str, as_json: bool, options: dict[str, Any]) -> None:
    from geoedit.algebra import compose as composed

    if form not in ("diffusers", "kohya", "peft"):
        raise EditError(f"--format is {form!r}; it is diffusers, kohya or peft.")
    writable(out.parent)
    terms = [_load(file) @ scale for file, scale in map(read_term, sliders)]
    slider = composed(terms, **options)
    slider.save(out, format=form)
    ranks = sorted({change.matrix.rank for _, _, change in slider})
    if as_json:
        _say({"file": str(out), "name": slider.name, "modules": len(slider), "ranks": ranks})
        return
    Console().print(repr(slider), highlight=False, markup=False, soft_wrap=True)
    print(f"file: {out}")


def _evaluate(
    sliders: list[str],
    model: str,
    scales: str,
    keep: bool,
    out: Path,
    as_json: bool,
    device: str,
    dtype: str | None,
    options: dict[str, Any],
) -> None:
    from geoedit.sliders.evaluation.evaluate import evaluate as measured_on

    writable(out)
    files = dict(zip(_labels(known := [_load(file) for file in sliders]), sliders, strict=True))
    pipe, _ = load_base(model, dtype=dtype, device=device)
    labelled = dict(zip(files, known, strict=True))
    found = measured_on(pipe, labelled, scales=read_scales(scales), **options)
    data, page = found.to_json(out / "sliders.json"), found.to_html(out / "sliders.html")
    if keep:
        for label, slider in labelled.items():
            _keep(pipe, slider, Path(files[label]), found, label)
    if as_json:
        _say(found.to_dict())
        print(f"page: {page}", file=sys.stderr)
        return
    Console().print(slider_table(found.table))
    for note in found.notes:
        print(note)
    print(f"data: {data}")
    print(f"page: {page}")


def _card(
    slider: str,
    model: str | None,
    scales: str,
    evaluation: Path | None,
    seed: int,
    device: str,
    dtype: str | None,
) -> None:
    from geoedit.sliders.card import write_card
    from geoedit.sliders.measured import measured

    known, wanted = _load(slider), read_scales(scales)
    if evaluation is not None:
        from geoedit.sliders.evaluation.result import Evaluation

        known = measured(known, Evaluation.load(evaluation))
    row, columns = None, list[float]()
    if model is not None:
        pipe, _ = load_base(model, dtype=dtype, device=device, language=set(known.changes) == {"model"})
        row, columns = _row(pipe, known, wanted, seed)
    print(f"card: {write_card(known, slider, strip=row, scales=columns, base_model=model)}")


def _labels(sliders: list[Any]) -> list[str]:
    """The sliders' names, numbered where two have the same."""
    names = [slider.name for slider in sliders]
    return [
        name if names.count(name) == 1 else f"{name} {names[: index + 1].count(name)}"
        for index, name in enumerate(names)
    ]


def _load(path: str) -> Any:
    from geoedit.sliders.files import load

    return load(path)


def _say(values: Any) -> None:
    from geoedit.sliders.evaluation.result import plain

    print(json.dumps(plain(values), allow_nan=False, ensure_ascii=False, default=str))
