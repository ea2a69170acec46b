"""`geoedit slider …` as a user types it, on a tiny pipeline in a folder: what it prints and refuses."""

import json

import pytest
import torch
import yaml
from huggingface_hub import metadata_load
from PIL import Image
from typer.testing import CliRunner

from geoedit.cli import app
from geoedit.errors import EditError
from geoedit.slider_inputs import file_name, load_base, read_scales, read_settings, read_term
from geoedit.sliders.evaluation.result import Evaluation
from geoedit.sliders.files import load
from geoedit.sliders.measured import measured

SPEC = {
    "name": "size",
    "target": "a red circle",
    "positive": "a large red circle",
    "negative": "a small red circle",
}
QUICK = ["--set", "cache=2", "--set", "trajectory_steps=2", "--set", "rank=2", "--set", "targets=cross-attn"]


def call(*arguments):
    return CliRunner().invoke(app, ["slider", *(str(argument) for argument in arguments)])


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_sd1):
    """A folder with the pipeline, a spec and a slider that the command has trained."""
    folder = tmp_path_factory.mktemp("sliders")
    tiny_sd1.save_pretrained(folder / "pipe")
    (folder / "size.yaml").write_text(yaml.safe_dump(SPEC))
    found = call(
        "train", folder / "size.yaml", "--model", folder / "pipe", "--out", folder / "run", "--steps", 2,
        "--batch-size", 2, *QUICK, "--set", "sample_scales=[-1, 0, 1]", "--quiet",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert found.stdout.splitlines()[-2:] == [
        f"file: {folder / 'run' / 'size.safetensors'}",
        f"card: {folder / 'run' / 'README.md'}",
    ]
    return folder


def test_train_writes_a_slider_a_card_and_checkpoints_and_goes_on(place) -> None:
    slider = load(place / "run" / "size.safetensors")
    assert {change.matrix.rank for _, _, change in slider} == {2} and set(slider.changes) == {"unet"}
    assert slider.details["spec"]["positive"] == SPEC["positive"]
    header = metadata_load(place / "run" / "README.md")
    assert header["base_model"] == "pipe" and header["library_name"] == "diffusers"
    assert Image.open(place / "run" / "strip.png").size == (3 * 16 + 4, 16)
    again = call(
        "train", place / "size.yaml", "--model", place / "pipe", "--out", place / "run", "--steps", 2,
        "--batch-size", 2, *QUICK, "--json", "--quiet",
    )  # fmt: skip
    told = json.loads(again.stdout)
    assert told["modules"] == len(slider) and told["details"]["settings"]["rank"] == 2
    other = load(told["file"])
    for (_, _, one), (_, _, two) in zip(slider, other, strict=True):
        assert torch.equal(one.matrix.left, two.matrix.left) and torch.equal(
            one.matrix.right, two.matrix.right
        )


def test_strip_compose_and_card(place, tmp_path) -> None:
    file = place / "run" / "size.safetensors"
    found = call(
        "strip",
        file,
        "--model",
        place / "pipe",
        "--scales",
        "-1,1",
        "--steps",
        2,
        "--out",
        tmp_path / "a.png",
    )
    assert found.exit_code == 0 and found.stdout == f"image: {tmp_path / 'a.png'}\n", found.output
    assert Image.open(tmp_path / "a.png").size[0] > 2 * 16
    found = call("compose", f"{file}@1.5", f"{file}@-0.5", "--out", tmp_path / "both.safetensors", "--json")
    assert found.exit_code == 0, found.output
    one, both = load(file), load(tmp_path / "both.safetensors")
    for component, path, change in one:
        wanted = change.matrix.dense()
        torch.testing.assert_close(both.changes[component][path].matrix.dense(), wanted, rtol=1e-5, atol=1e-7)
    found = call("card", tmp_path / "both.safetensors")
    assert found.stdout == f"card: {tmp_path / 'README.md'}\n"
    assert "base_model" not in metadata_load(tmp_path / "README.md")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "nothing.yaml"), "nothing.yaml"),
        (("strip", "nothing.safetensors"), "nothing.safetensors"),
        (("strip", "FILE", "--scales", "one"), "--scales is 'one'"),
        (("compose", "FILE@much"), "'much' is no number"),
        (("compose", "FILE", "--format", "zip"), "--format is 'zip'"),
        (("compose", "FILE", "--method", "magic"), "magic"),
        (("strip", "FILE", "--model", "shapes-unit"), "did you mean 'shapes-unet'"),
        (("strip", "FILE", "--model", "EMPTY"), "no model_index.json"),
        (("train", "SPEC", "--model", "PIPE", "--set", "rank"), "write name=value"),
        (("train", "SPEC", "--model", "PIPE", "--set", "tempo=3"), "'tempo' is unknown"),
        (("train", "SPEC", "--model", "PIPE", "--device", "moon"), "device 'moon' is not there"),
    ],
)
def test_mistakes_end_with_one_message(place, tmp_path, monkeypatch, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"FILE": place / "run" / "size.safetensors", "SPEC": place / "size.yaml", "PIPE": place / "pipe"}
    names |= {"EMPTY": tmp_path}
    given = []
    for argument in arguments:
        for name, path in names.items():
            argument = argument.replace(name, str(path))
        given.append(argument)
    found = call(*given)
    assert found.exit_code == 1 and "error: " in found.output and words in found.output, found.output
    assert "Traceback" not in found.output


def test_what_is_typed_is_read() -> None:
    assert read_term("a@b/c.safetensors") == ("a@b/c.safetensors", 1.0)
    assert read_scales("-2, 0,1e1") == [-2.0, 0.0, 10.0]
    assert read_settings(["rank-pattern={a: 2}", "decay=cosine", "refresh=0"]) == {
        "rank_pattern": {"a": 2}, "decay": "cosine", "refresh": 0,
    }  # fmt: skip
    assert file_name("very old / young") == "very-old---young" and file_name("...") == "slider"
    with pytest.raises(EditError, match="is no YAML"):
        read_settings(["rank=[1"])


def test_a_language_model_is_told_by_its_folder() -> None:
    model, tokenizer = load_base("almanac-gpt2")
    assert tokenizer("the capital").input_ids and model.config.model_type == "gpt2"


def test_evaluate_writes_a_page_and_tells_the_sliders_file_and_card(place, tmp_path) -> None:
    file = tmp_path / "size.safetensors"
    file.write_bytes((place / "run" / "size.safetensors").read_bytes())
    found = call(
        "evaluate", file, "--model", place / "pipe", "--prompt", "a red circle", "--seeds", 1,
        "--scales", "-1,0,1", "--steps", 2, "--no-safe-range", "--keep", "--out", tmp_path / "out",
        "--json", "--quiet",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    assert (tmp_path / "out" / "sliders.html").is_file() and (tmp_path / "out" / "sliders.json").is_file()
    row = Evaluation.load(tmp_path / "out" / "sliders.json").table.query(
        "seed == 'all' and method == 'slider'"
    )
    kept = load(file).details["measured"]
    assert kept["range_sd"] == pytest.approx(float(row["range_sd"].iloc[0])) and told["claims"]
    assert "## Measured" in (tmp_path / "README.md").read_text()
    with pytest.raises(EditError, match="knows nothing of 'other'"):
        measured(load(file), Evaluation.load(tmp_path / "out" / "sliders.json"), "other")
