import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from geoedit import Concept, EditError, Site, Template
from geoedit.cli import app, find_concept, read_site
from geoedit.loading import dtype_of, load_model

MONTHS = ["january", "february", "march", "april"]


@pytest.fixture
def folder(tiny_gpt2, tiny_tokenizer, tmp_path):
    tiny_gpt2.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def concept_file(tmp_path):
    after = [*MONTHS[1:], MONTHS[0]]
    templates = [Template("after {value} comes", after), Template("the month after {value} is", after)]
    Concept("little-months", MONTHS, templates, "cycle").to_yaml(tmp_path / "c.yaml")
    return tmp_path / "c.yaml"


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_diagnose_a_local_folder(folder, concept_file, tmp_path):
    out = tmp_path / "out"
    found = call(
        "diagnose", folder, "--concept", concept_file, "--out", out, "--sites", "1:value,2", "--apply"
    )
    assert found.exit_code == 0, found.output
    lines = found.stdout.strip().splitlines()
    assert lines[-1] == f"page: {out / 'model-little-months.html'}"
    assert (out / "model-little-months.html").stat().st_size > 1e6
    assert "block 1 residual_out @ value" in found.stdout
    assert json.loads((out / "model-little-months.json").read_text())["model"] == "model"


def test_json_is_all_there_is_on_standard_output(folder, concept_file, tmp_path):
    found = call(
        "diagnose", folder, "--concept", concept_file, "--out", tmp_path / "o", "--sites", "1", "--json"
    )
    data = json.loads(found.stdout)
    assert found.exit_code == 0 and data["format"] == "geoedit.diagnosis"
    assert found.stderr.strip().endswith(f"page: {tmp_path / 'o' / 'model-little-months.html'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diagnose", "/nowhere/model"], "there is no folder '/nowhere/model'"),
        (["diagnose", "almanac-gpt3"], "did you mean 'almanac-gpt2'?"),
        (["diagnose", "--concept", "mnths"], "did you mean 'months'"),
        (["diagnose", "--concept", "none.yaml"], "none.yaml"),
        (["diagnose", "--sites", "3:attn"], "'attn' is neither a stream"),
        (["diagnose", "--dtype", "int8"], "dtype is 'int8'"),
        (["sites", "--device", "cuda:77"], "cuda:77"),
    ],
)
def test_errors_end_with_one_and_a_sentence(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = call(*arguments)
    assert found.exit_code == 1
    assert message in found.stderr.replace("\n", " ") and "Traceback" not in found.output
    assert not found.stdout


def test_wrong_usage_ends_with_two():
    assert call("diagnose", "--no-such-option").exit_code == 2
    assert call("diagnose", "--seed", "many").exit_code == 2


def test_a_folder_that_cannot_be_written_fails_before_the_work(folder, concept_file, tmp_path):
    (tmp_path / "file").write_text("")
    found = call("diagnose", folder, "--concept", concept_file, "--out", tmp_path / "file" / "out")
    assert found.exit_code == 1 and "can't write" in found.stderr


def test_interrupted_ends_with_130(monkeypatch, folder, concept_file, tmp_path):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("geoedit.diagnosis.diagnose", interrupted)
    found = call("diagnose", folder, "--concept", concept_file, "--out", tmp_path / "out")
    assert found.exit_code == 130 and "Traceback" not in found.stderr


def test_lists(folder):
    found = json.loads(call("concepts", "--json").stdout)
    assert {"months", "weekdays", "numbers"} <= {
        entry["name"] for entry in found if entry["for"] == "almanac"
    }
    assert any(entry["for"] == "English" for entry in found)
    listed = json.loads(call("sites", folder, "--json").stdout)
    (stack,) = listed["stacks"].values()
    assert len(stack["blocks"]) == 3 and "residual_out" in stack["blocks"][0]["streams"]
    assert call("sites", folder).exit_code == 0 and "months" in call("concepts").stdout


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("3", Site(3)),
        ("-1:value", Site(-1, token="value")),
        ("2:mlp_out", Site(2, "mlp_out")),
        ("2:mlp_out:-2", Site(2, "mlp_out", -2)),
        ("embedding:value", Site(stream="embedding", token="value")),
        ("lm_head:input:last", Site(module="lm_head:input")),
        ("transformer.h.0:value", Site(module="transformer.h.0", token="value")),
    ],
)
def test_sites_are_read(text, site):
    assert read_site(text) == site


@pytest.mark.parametrize("text", ["", "3:nonsense", "3:mlp_out:first", "lm_head:sideways"])
def test_what_is_no_site_is_refused(text):
    with pytest.raises(EditError, match="site"):
        read_site(text)


def test_built_in_models_get_the_almanacs_concepts_and_others_the_english_ones():
    assert find_concept("months", "almanac-gpt2").templates != find_concept("months", "other/model").templates
    with pytest.raises(EditError, match="no built-in concept"):
        find_concept("places", "other/model")


# Loading


def test_load_model_gives_what_was_saved(folder):
    model, tokenizer = load_model(folder, dtype=dtype_of("bfloat16"))
    assert type(model).__name__ == "GPT2LMHeadModel" and not model.training
    assert str(model.dtype) == "torch.bfloat16"
    assert tokenizer("after january")["input_ids"]


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no safetensors weights"),
        ("tokenizer.json", "no tokenizer"),
    ],
)
def test_folders_that_lack_a_part(folder, missing, message):
    (folder / missing).unlink()
    if missing == "tokenizer.json":
        (folder / "tokenizer_config.json").unlink()
    with pytest.raises(EditError, match=message):
        load_model(folder)


def test_pickled_weights_and_broken_files_are_refused(folder):
    shutil.copytree(folder, folder.parent / "whole")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(EditError, match="unpickling"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(EditError, match="can't load"):
        load_model(folder)
    tensors = load_file(folder.parent / "whole" / "model.safetensors")
    tensors.pop("transformer.h.1.mlp.c_fc.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EditError, match=r"lacks the weights transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_model(folder)
    with pytest.raises(EditError, match="is a file"):
        load_model(folder / "config.json")
