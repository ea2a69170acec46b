"""Checkpoints, sheets of samples and cards: what comes back, and what damaged or foreign files say."""

import io
import json
import logging
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from huggingface_hub import metadata_load
from PIL import Image
from safetensors.torch import save_file

from geoedit.errors import EditError
from geoedit.sliders import ModuleChange, Slider
from geoedit.sliders.card import card, model_name, write_card
from geoedit.sliders.training.checkpoint import Checkpoint, generator_states, set_generator_states
from geoedit.sliders.training.progress import Progress, png, tile
from geoedit.sliders.training.state_tree import from_bytes, to_bytes
from manifolds import LowRank


def checkpoint(step: int, **fields) -> Checkpoint:
    plain = {
        "adapter": {"a": torch.arange(3.0)},
        "optimizer": {},
        "generators": {},
        "task": {},
        "history": [],
    }
    return Checkpoint(step=step, settings={"rank": 4}, **(plain | fields))


def test_an_optimizer_goes_on_with_the_same_bits(tmp_path, device) -> None:
    def begin():
        layer = torch.nn.Linear(3, 2, bias=False, device=device, dtype=torch.float64)
        layer.weight.data = torch.linspace(-1, 1, 6, device=device, dtype=torch.float64).view(2, 3)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, amsgrad=True, betas=(0.8, 0.99))
        return layer, optimizer, torch.Generator().manual_seed(5)

    def go(layer, optimizer, generator, steps):
        for _ in range(steps):
            x = torch.randn(4, 3, dtype=torch.float64, generator=generator).to(device)
            optimizer.zero_grad()
            layer(x).square().sum().backward()
            optimizer.step()

    whole = begin()
    go(*whole, 6)
    layer, optimizer, generator = begin()
    go(layer, optimizer, generator, 2)
    kept = Checkpoint(
        2, layer.state_dict(), optimizer.state_dict(), generator_states({"g": generator}), {}, [], {}
    )
    kept.save(tmp_path)
    layer, optimizer, generator = begin()
    found = Checkpoint.load(tmp_path)
    layer.load_state_dict(dict(found.adapter))
    optimizer.load_state_dict(dict(found.optimizer))
    set_generator_states({"g": generator}, found.generators)
    go(layer, optimizer, generator, 4)
    assert torch.equal(layer.weight, whole[0].weight)
    assert optimizer.state_dict()["param_groups"] == whole[1].state_dict()["param_groups"]


def test_states_of_every_kind_come_back_as_they_were() -> None:
    state = {
        "numbers": [0.1, 2**60 + 1, float("inf"), -float("inf"), True, None, "text", ""],
        "tuple": (1, ("a", 2.5)),
        3: {(1, 2): "keys of any kind"},
        "$tensor": "a key that looks like a mark",
        "$map": {"$tuple": [1]},
        "tensors": [torch.tensor(3), torch.zeros(0, 2), torch.randn(2, 3).bfloat16().T, torch.tensor([True])],
    }
    found = from_bytes(to_bytes(state, "kind"), "kind")
    tensors = zip(found.pop("tensors"), state.pop("tensors"), strict=True)
    assert found == state
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in tensors)
    nan = from_bytes(to_bytes([float("nan")], "kind"), "kind")[0]
    assert nan != nan
    shared = torch.ones(3)
    first, second = from_bytes(to_bytes([shared, shared[:2]], "kind"), "kind")
    assert first.shape == (3,) and second.shape == (2,)


def test_what_a_file_cannot_hold_is_named_by_its_place() -> None:
    with pytest.raises(EditError, match=r"state\.optimizer\.0\.hook is a function"):
        to_bytes({"optimizer": [{"hook": lambda: None}]}, "kind")


def test_the_newest_two_stay_and_later_ones_of_a_replaced_run_go(tmp_path) -> None:
    for step in (10, 20, 30):
        checkpoint(step).save(tmp_path)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000020.safetensors", "step-00000030.safetensors"]
    checkpoint(5).save(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005.safetensors"]
    assert Checkpoint.load(tmp_path / "nothing here") is None
    with pytest.raises(EditError, match="keep is 0"):
        checkpoint(1).save(tmp_path, keep=0)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_file_cut_off_is_passed_over_for_the_one_before(tmp_path, caplog, share: float) -> None:
    checkpoint(1).save(tmp_path)
    newest = checkpoint(2).save(tmp_path)
    newest.write_bytes(newest.read_bytes()[: int(share * newest.stat().st_size)])
    with caplog.at_level(logging.WARNING):
        assert Checkpoint.load(tmp_path).step == 1
    assert "step-00000002.safetensors is no whole checkpoint" in caplog.text
    (tmp_path / "checkpoints" / "step-00000001.safetensors").write_bytes(b"")
    with pytest.raises(EditError, match=r"no checkpoint in .* can be read"):
        Checkpoint.load(tmp_path)


def test_foreign_files_and_newer_versions_are_refused(tmp_path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    save_file({"a": torch.ones(1)}, folder / "step-00000001.safetensors")
    with pytest.raises(EditError, match=r"without 'geoedit.checkpoint' in its metadata"):
        Checkpoint.load(tmp_path)
    (folder / "step-00000001.safetensors").write_bytes(to_bytes({"version": 99}, "geoedit.checkpoint"))
    with pytest.raises(EditError, match="version 99"):
        Checkpoint.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(EditError, match=r"can't write .*file"):
        checkpoint(1).save(tmp_path / "file")


def test_other_settings_are_named_with_both_values(tmp_path) -> None:
    checkpoint(3).save(tmp_path)
    assert Checkpoint.load(tmp_path, settings={"rank": 4}).step == 3
    with pytest.raises(
        EditError, match=r"a run of 3 steps .*rank was 4 and is now 8; rate was not there and is"
    ):
        Checkpoint.load(tmp_path, settings={"rank": 8, "rate": (1, 2)})


def test_generators_without_a_fitting_state_are_refused() -> None:
    with pytest.raises(EditError, match="no state of the generator 'g'"):
        set_generator_states({"g": torch.Generator()}, {})
    with pytest.raises(EditError, match="does not fit"):
        set_generator_states({"g": torch.Generator()}, {"g": torch.zeros(3, dtype=torch.uint8)})


def test_sheets_are_drawn_at_their_steps_by_the_first_process_alone(tmp_path) -> None:
    images = torch.rand(2, 3, 3, 4, 5)
    for first in (True, False):
        draw = Mock(return_value=images)
        options = {"sheet": draw, "every": 3, "show": False, "first": first}
        with Progress(7, start=2, output=tmp_path / str(first), **options) as progress:
            for step in range(2, 7):
                progress.step(step, {"loss": 0.1})
        assert draw.call_count == 3
    found = sorted(path.name for path in (tmp_path / "True" / "samples").iterdir())
    assert found == ["step-000003.png", "step-000006.png", "step-000007.png"]
    assert not (tmp_path / "False").exists()
    pixels = torch.tensor(np.array(Image.open(tmp_path / "True" / "samples" / found[0]))).permute(2, 0, 1)
    assert pixels.shape == (3, 2 * 4 + 2, 3 * 5 + 2 * 2)
    assert (pixels[:, 6:10, 7:12] - images[1, 1] * 255).abs().max() <= 0.51
    assert (pixels[:, 4:6] == 255).all() and (pixels[:, :, 5:7] == 255).all()


def test_pixels_beyond_the_range_or_nan_are_drawn() -> None:
    image = torch.tensor([-1.0, 0.5, 2.0, float("nan")]).view(1, 1, 4).expand(3, 1, 4)
    assert np.array(Image.open(io.BytesIO(png(image))))[0, :, 0].tolist() == [0, 128, 255, 0]
    with pytest.raises(EditError, match="nothing to draw"):
        tile(torch.zeros(0, 3, 3, 4, 4))


def test_progress_says_what_is_missing(tmp_path) -> None:
    with pytest.raises(EditError, match="output"):
        Progress(3, sheet=lambda: torch.zeros(1, 1, 3, 2, 2), every=1)
    with pytest.raises(EditError, match="every -1"):
        Progress(3, every=-1)


def make_slider(**details) -> Slider:
    changes = {"unet": {"mid.to_q": ModuleChange(LowRank(torch.ones(4, 2), torch.ones(2, 3)))}}
    return Slider("young or old", changes, details=details)


def test_a_card_is_read_by_the_hub_and_tells_everything(tmp_path) -> None:
    details = {
        "spec": {"target": "a person", "positive": "old | very\nold", "negative": "young: a child"},
        "settings": {"rank": 4, "learning_rate": 2e-3, "alpha": None, "bipolar": True},
        "measured": {"range_sd": 2.34567, "spearman": float("nan"), "safe_range": [-1.5, 1.25]},
    }  # fmt: skip
    slider, strip = make_slider(**details), torch.rand(1, 3, 3, 8, 8)
    path = write_card(
        slider, tmp_path / "old.safetensors", strip=strip, scales=(-1, 0, 1), base_model="me/model: 2"
    )
    header, text = metadata_load(path), path.read_text()
    assert header["base_model"] == "me/model: 2" and header["library_name"] == "diffusers"
    assert header["pipeline_tag"] == "text-to-image" and "lora" in header["tags"]
    for words in (
        "| positive | old \\| very old |", "| learning_rate | 0.002 |", "| alpha | – |",
        "| range_sd | 2.346 |",
        "| spearman | not known |", "| safe_range | -1.5, 1.25 |", "| unet | 1 | 2 | 14 |",
        "![What it does](strip.png)", "weight_name='old.safetensors'", "**young: a child**",
        "Scales from left to right: -1, 0, 1.",
    ):  # fmt: skip
        assert words in text, words
    assert Image.open(tmp_path / "strip.png").size == (3 * 8 + 4, 8)
    compile(text.split("```python")[1].split("```")[0], "card", "exec")


def test_a_card_of_little_is_still_a_card(tmp_path) -> None:
    text = card(make_slider(), "a.safetensors")
    assert "base_model" not in text and "strip.png" not in text and "## What it changes" in text
    language = Slider("up", {"model": make_slider().changes["unet"]}, details={"model": "almanac-gpt2"})
    text = card(language, "up.safetensors")
    assert "pipeline_tag: text-generation" in text and "base_model: almanac-gpt2" in text
    compile(text.split("```python")[1].split("```")[0], "card", "exec")
    with pytest.raises(EditError, match="3 columns for the scales"):
        write_card(make_slider(), tmp_path / "a.safetensors", strip=torch.rand(1, 3, 3, 8, 8), scales=[1, 2])


def test_a_models_name_is_its_hub_id_or_its_folder(tmp_path, tiny_gpt2) -> None:
    assert model_name(tiny_gpt2) is None and model_name(torch.nn.Linear(1, 1)) is None
    tiny_gpt2.config._name_or_path = "owner/model"
    assert model_name(tiny_gpt2) == "owner/model"
    (tmp_path / "mine").mkdir()
    tiny_gpt2.config._name_or_path = str(tmp_path / "mine")
    assert model_name(tiny_gpt2) == "mine"
    assert json.dumps(card(make_slider(model="mine"), "a.safetensors")).count("base_model: mine") == 1
