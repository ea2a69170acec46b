"""What must be refused with words: each case was once silent, or ended in another library's traceback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors

from geoedit import (
    Concept,
    LinearSteer,
    Site,
    Template,
    collect,
    diagnose,
    load_edit,
    load_model,
    testbeds,
)
from geoedit.cli import read_site
from geoedit.errors import EditError

SITE = Site(1)


@pytest.fixture(scope="module")
def almanac():
    return testbeds.load("almanac-gpt2")


UNTYPED = """
import numpy as np, torch
from geoedit import EditError, LinearSteer, Patch, Site, collect, diagnose, load_edit, testbeds
site = Site(1)
model, tokenizer, world = testbeds.load("almanac-gpt2")
cases = {
    "direction is a ndarray; give a tensor": lambda: LinearSteer(site, np.ones(128)),
    "states is a list; give a tensor": lambda: Patch(site, [1.0]),
    "site is '3'; give a geoedit.Site": lambda: LinearSteer("3", torch.ones(8)),
    "scale='much'": lambda: LinearSteer(site, torch.ones(8), scale="much"),
    "concept is 'months'; give a geoedit.Concept": lambda: diagnose(model, tokenizer, "months"),
}
for words, make in cases.items():
    try:
        make()
    except EditError as error:
        assert words in str(error), error
    else:
        raise AssertionError(words)
LinearSteer(site, torch.ones(8), scale=np.float32(2)).save("edit.safetensors")
assert load_edit("edit.safetensors").scale == 2.0
assert collect(model, tokenizer, (text for text in ["May is"]), site)[site].shape == (1, 128)
"""


def test_wrong_types_are_named_where_no_type_checker_runs(tmp_path):
    """In a process of its own: here the import hook would speak first."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", UNTYPED],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_edit_used_and_saved_belongs_to_its_model(almanac, tmp_path):
    model, tokenizer, _ = almanac
    edit = LinearSteer(SITE, torch.ones(128))
    with edit.on(model):
        model(**tokenizer("May plus", return_tensors="pt"))
    edit.save(tmp_path / "edit.safetensors")
    other, _, _ = testbeds.load("almanac-llama")  # of the same width
    with pytest.raises(EditError, match="another model"), load_edit(tmp_path / "edit.safetensors").on(other):
        pass
    with load_edit(tmp_path / "edit.safetensors").on(model):
        model(**tokenizer("May plus", return_tensors="pt"))


def test_removing_an_edit_that_did_nothing_warns(tiny_gpt2):
    handle = LinearSteer(SITE, torch.ones(32)).attach(tiny_gpt2)
    with pytest.warns(UserWarning, match="was not called"):
        handle.remove()


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_an_edit_of_states_that_are_no_numbers_raises(tiny_gpt2, scale):
    with torch.no_grad():
        tiny_gpt2.transformer.h[0].mlp.c_fc.bias[0] = torch.nan
    edit = LinearSteer(SITE, torch.ones(32), scale=scale)
    with pytest.raises(EditError, match="own states there are NaN"), edit.on(tiny_gpt2):
        tiny_gpt2(torch.tensor([[3, 4, 5]]))


def test_a_folder_of_states_knows_the_weights_it_came_from(tiny_gpt2, tiny_tokenizer, tmp_path):
    collect(tiny_gpt2, tiny_tokenizer, ["monday is"], [SITE], out=tmp_path / "states")
    again = collect(tiny_gpt2, tiny_tokenizer, ["monday is"], [SITE], out=tmp_path / "states")
    assert torch.equal(again[SITE], collect(tiny_gpt2, tiny_tokenizer, ["monday is"], [SITE])[SITE])
    with torch.no_grad():
        weight = tiny_gpt2.transformer.h[1].mlp.c_fc.weight
        weight += torch.outer(torch.ones(weight.shape[0]), torch.linspace(0, 0.1, weight.shape[1]))
    with pytest.raises(EditError, match="another collection"):
        collect(tiny_gpt2, tiny_tokenizer, ["monday is"], [SITE], out=tmp_path / "states")


def test_edited_states_do_not_go_into_a_folder(tiny_gpt2, tiny_tokenizer, tmp_path):
    with LinearSteer(Site(0), torch.ones(32)).on(tiny_gpt2, must_change=False):
        with pytest.raises(EditError, match="while an edit is attached"):
            collect(tiny_gpt2, tiny_tokenizer, ["monday is"], [SITE], out=tmp_path / "states")
        assert collect(tiny_gpt2, tiny_tokenizer, ["monday is"], [SITE])[SITE].shape == (
            1,
            32,
        )


def test_an_answer_is_not_read_after_an_end_token(almanac):
    model, _, world = almanac
    _, tokenizer, _ = testbeds.load("almanac-gpt2")
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    with pytest.raises(EditError, match="special token"):
        diagnose(model, tokenizer, world.concepts["weekdays"], [Site(2, token="value")])


def test_every_pair_is_drawn_before_any_twice(almanac):
    model, tokenizer, world = almanac
    hours = world.concepts["hours"]
    found = diagnose(model, tokenizer, hours, [Site(2, token="value")])
    assert all(found.predict("03:00", hour) for hour in hours.values if hour != "03:00")


def test_weights_that_are_not_in_the_file_are_missed(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(testbeds.folder("almanac-gpt2"), folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("transformer.h.3.mlp.c_fc.bias")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EditError, match=r"h\.3\.mlp\.c_fc\.bias"):
        load_model(folder)
    (folder / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(EditError, match="can't load a model"):
        load_model(folder)


@pytest.mark.parametrize("text", ["3:--2", "3:²"])
def test_mistyped_sites_are_named(text):
    with pytest.raises(EditError):
        read_site(text)


def test_one_sample_a_class(almanac):
    model, tokenizer, _ = almanac
    once = Concept("days", ["Monday", "Friday"], [Template("the day is {value}")])
    with pytest.raises(EditError, match="one sample"):
        diagnose(model, tokenizer, once)
