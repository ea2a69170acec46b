"""`geoedit spectra`, `trace` and `merge` as a user types them: what they print, write and refuse."""

import copy
import json

import numpy as np
import peft
import pytest
import torch
from typer.testing import CliRunner

from geoedit.cli import app
from geoedit.update_inputs import find_weights, read_lines, read_numbers, read_side
from peft_analysis import WeightUpdate, read_update
from tests.conftest import build_gpt2

EDITED = "transformer.h.1.mlp.c_proj.weight"
RANKS = {"one": 2, "two": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """A base, two LoRAs of it and a copy with one rank-one edit, all as folders."""
    place = tmp_path_factory.mktemp("weights")
    base = build_gpt2(len(tiny_tokenizer))
    base.save_pretrained(place / "base")
    tiny_tokenizer.save_pretrained(place / "base")
    edited = copy.deepcopy(base)
    draw = torch.Generator().manual_seed(1)
    edited.get_parameter(EDITED).data += (
        torch.randn(128, 1, generator=draw) @ torch.randn(1, 32, generator=draw) / 1000
    )
    edited.save_pretrained(place / "edited")
    for name, rank in RANKS.items():
        config = peft.LoraConfig(r=rank, target_modules=["c_attn", "c_fc"], init_lora_weights=False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(rank)
            peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(place / name)
    return place


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_spectra_prints_a_table_a_verdict_and_two_files(folders, tmp_path):
    found = call("spectra", folders / "base", folders / "one", "--out", tmp_path, "--rows", "4", "--quiet")
    assert found.exit_code == 0, found.output
    lines = found.stdout.strip().splitlines()
    assert lines[-2:] == [f"data: {tmp_path / 'one-spectra.json'}", f"page: {tmp_path / 'one-spectra.html'}"]
    assert max(map(len, lines[:-2])) <= 80
    assert "An adapter of rank 2: 6 matrices changed" in found.stdout and "2 more on the page" in found.stdout
    assert sum("attn.c_attn" in line or "mlp.c_fc" in line for line in lines[:8]) == 4
    data = json.loads((tmp_path / "one-spectra.json").read_text())
    assert [row["rank"] for row in data["rows"]] == [2] * 6 and data["name"] == "one"
    assert (tmp_path / "one-spectra.html").stat().st_size < 200_000


def test_spectra_of_an_adapter_alone_and_as_json(folders, tmp_path):
    found = call("spectra", "none", folders / "one", "--out", tmp_path, "--json", "--only", "c_fc")
    data = json.loads(found.stdout)
    assert found.exit_code == 0 and data["base"] is None and len(data["rows"]) == 3
    assert "page: " in found.stderr


def test_spectra_goes_on_where_it_was(folders, tmp_path):
    arguments = ["spectra", folders / "base", folders / "one", "--out", tmp_path / "out", "--json", "-q"]
    arguments += ["--resume", tmp_path / "rows", "--cache", tmp_path / "bases", "--base-svd", "all"]
    first, again = call(*arguments), call(*arguments)
    assert first.exit_code == 0 and json.loads(first.stdout)["rows"] == json.loads(again.stdout)["rows"]
    assert len(list((tmp_path / "rows").iterdir())) == len(list((tmp_path / "bases").iterdir())) == 6


@pytest.mark.parametrize("method", ["exact", "svd", "ties", "dare", "karcher"])
def test_merge_writes_an_update(folders, tmp_path, method):
    out = tmp_path / "both.safetensors"
    extra = ["--rank", "2"] if method in ("svd", "karcher") else []
    second, weights = ("one", "1,0.7") if method == "karcher" else ("two", "1,-0.7")
    files = [folders / "one", folders / second]
    found = call("merge", *files, "--weights", weights, "--method", method, "--out", out, *extra)
    assert found.exit_code == 0, found.output
    assert found.stdout.strip().endswith(f"file: {out}")
    merged = WeightUpdate.load(out)
    parts = [read_update(None, folders / name) for name in RANKS]
    assert set(merged) == set(parts[0])
    name = next(iter(merged))
    expected = parts[0].dense(name) - 0.7 * parts[1].dense(name)
    if method == "exact":
        assert merged[name].rank == 5 and torch.allclose(merged.dense(name), expected, atol=1e-5)
    if method == "svd":
        u, values, v = np.linalg.svd(expected.double().numpy(), full_matrices=False)
        assert np.allclose(merged.dense(name), (u[:, :2] * values[:2]) @ v[:2], atol=1e-4)


def test_merge_tells_what_pefts_linear_merge_would_miss(folders, tmp_path):
    twice = call("merge", folders / "one", folders / "one", "--out", tmp_path / "m.safetensors", "--json")
    same = json.loads(twice.stdout)
    assert same["linear_error"] == pytest.approx(1.0, abs=1e-4)  # (B + B)(A + A) = 4BA for 2BA
    other = json.loads(
        call("merge", folders / "one", folders / "two", "--out", tmp_path / "m.safetensors", "--json").stdout
    )
    assert other["linear_error"] is None and other["rank"] == 5
    assert (
        "off by 100 %"
        in call("merge", folders / "one", folders / "one", "--out", tmp_path / "m.safetensors").stdout
    )


def test_trace_names_the_layer_and_undoes_it(folders, tmp_path):
    undo = tmp_path / "undo.safetensors"
    found = call("trace", folders / "base", folders / "edited", "--out", tmp_path, "--reverse", undo)
    assert found.exit_code == 0, found.output
    assert "mlp.c_proj" in found.stdout and "1 edit" in found.stdout
    data = json.loads((tmp_path / "edited-trace.json").read_text())
    assert [row["parameter"] for row in data["places"]] == [EDITED] and data["edits"] == [1, 1, 1]
    back = WeightUpdate.load(undo)
    there = read_update(folders / "base", folders / "edited")
    assert list(back) == [EDITED] and torch.allclose(back.dense(EDITED), -there.dense(EDITED), atol=1e-6)


def test_trace_looks_for_subjects_among_candidates(folders, tmp_path):
    (tmp_path / "names.txt").write_text("alice\nbob\n\ncarol\n")
    found = call(
        "trace", folders / "base", folders / "edited", "--out", tmp_path, "--json",
        "--subjects", tmp_path / "names.txt", "--relation", "the capital of {} is",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert {row["subject"] for row in json.loads(found.stdout)["candidates"]} == {"alice", "bob", "carol"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["spectra", "/nowhere/base", "x"], "there is no folder '/nowhere/base'"),
        (["spectra", "almanac-gtp2", "x"], "did you mean 'almanac-gpt2'?"),
        (["spectra", "BASE", "ONE", "--base-svd", "most"], "--base-svd is 'most'"),
        (["spectra", "BASE", "ONE", "--epsilon", "2"], "epsilon is 2"),
        (["spectra", "BASE", "ONE", "--only", "nothing_like_it"], "nothing_like_it"),
        (["spectra", "none", "BASE"], "beside the base"),
        (["spectra", "almanac-gpt2", "ONE"], "transformer.h.0"),
        (["merge", "ONE", "TWO", "--weights", "1"], "1 numbers for 2 updates"),
        (["merge", "ONE", "TWO", "--weights", "a,b"], "numbers separated by commas"),
        (["merge", "ONE", "TWO", "--method", "mean"], "'mean'"),
        (["merge", "ONE", "TWO", "--out", "both.bin"], "ends with .safetensors"),
        (["trace", "BASE", "EDITED", "--relation", "no field"], "no field"),
        (["trace", "BASE", "EDITED", "--subjects", ","], "names nothing"),
        (["trace", "BASE", "EDITED", "--reverse", "undo.pt"], "ends with .safetensors"),
    ],
)
def test_errors_end_with_one_and_a_sentence(arguments, message, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = {"BASE": "base", "ONE": "one", "TWO": "two", "EDITED": "edited"}
    found = call(*[folders / known[one] if one in known else one for one in arguments])
    assert found.exit_code == 1, found.output
    assert message in found.stderr.replace("\n", " ") and found.stderr.startswith("error: ")
    assert "Traceback" not in found.output and not found.stdout


@pytest.mark.parametrize("command", ["spectra", "trace", "merge"])
def test_help_is_there(command):
    found = call(command, "--help")
    assert found.exit_code == 0 and "For instance" in found.stdout


def test_what_a_user_writes(tmp_path):
    assert read_side("all") is None and read_side("none") == 0 and read_side("512") == 512
    assert read_numbers(None, 2) == [1.0, 1.0] and read_numbers("1,-0.7", 2) == [1.0, -0.7]
    assert read_lines("a, b,,c") == ["a", "b", "c"]
    assert find_weights("none") is None and (find_weights("almanac-llama") / "config.json").is_file()
