"""The shipped pipelines: what their cards say, seen again in images that the cards did not count."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from geoedit import testbeds
from geoedit.errors import EditError
from geoedit.testbeds.shapes import CLASSES, digits, render, sample
from geoedit.testbeds.shapes.card import ENDS, phrase
from geoedit.testbeds.shapes.encoder import FeatureDistance
from geoedit.testbeds.shapes.files import world_fingerprint
from geoedit.testbeds.shapes.measure import measure, shapes_measure

FOLLOWED = ("size", "thickness", "brightness", "hue", "rotation")


@pytest.fixture(scope="module", params=testbeds.PIPELINES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    return testbeds.load(name)


def drawn(pipe, prompts, seeds):
    """By the pipeline's own call in twelve steps."""
    options = {"max_sequence_length": 1} if hasattr(pipe, "transformer") else {}
    noise = [torch.Generator().manual_seed(seed) for seed in seeds]
    called = pipe(
        prompts, num_inference_steps=12, guidance_scale=3.0, output_type="pt", generator=noise, **options
    )
    return called.images


def test_a_small_folder_that_diffusers_reads(name):
    path = testbeds.folder(name)
    assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) <= 6 * 2**20
    assert not [file for file in path.rglob("*") if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    if name == "shapes-unet":
        plain = StableDiffusionPipeline.from_pretrained(path)
        assert isinstance(plain, DiffusionPipeline) and plain.unet.dtype == plain.text_encoder.dtype


def test_words_move_their_attributes_as_on_the_card(pipe, name):
    told = testbeds.card(name)["held_out"]["attributes"]
    for attribute in FOLLOWED:
        assert told[attribute]["right_way"] >= 0.9
        prompts = [phrase({attribute: end}, noun) for end in ENDS[attribute] for noun in CLASSES]
        low, high = shapes_measure(drawn(pipe, prompts, [1, 2, 3] * 2))[attribute].chunk(2)
        assert float((high - low).nanmean()) / shapes_measure.natural_sd[attribute] > 1.0


def test_what_is_drawn_is_one_shape_and_of_the_class_as_often_as_on_the_card(pipe, name):
    seen = measure(drawn(pipe, [f"a large {noun}" for noun in CLASSES for _ in range(6)], range(18)))
    card = testbeds.card(name)["held_out"]
    assert card["one_shape_found"] > 0.9 and float(seen.found.float().mean()) > 0.8
    asked = torch.arange(3).repeat_interleave(6)
    right = float((seen.kinds == asked).float().mean())
    accuracy, images = card["class_accuracy"], card["images"]
    spread = (accuracy * (1 - accuracy)) ** 0.5
    assert accuracy > 1 / 3 + 4 * spread / images**0.5  # better than guessing by far; no more is claimed
    assert abs(right - accuracy) < 4 * spread / 18**0.5
    assert float(seen.residual.nanmedian()) < 2 * card["residual"]["95 %"]


def test_the_autoencoder_keeps_attributes_and_sees_differences(pipe, name):
    parameters, kinds = sample(16, generator=torch.Generator().manual_seed(9))
    images = render(parameters, kinds)
    with torch.no_grad():
        again = pipe.vae.decode(pipe.vae.encode(images * 2 - 1).latent_dist.mean).sample / 2 + 0.5
        again = again.clamp(0, 1)
        assert float((again - images).square().mean().sqrt()) < 0.02
        found = measure(again)
        assert torch.equal(found.kinds, kinds)
        for attribute, sd in shapes_measure.natural_sd.items():
            column = list(shapes_measure.natural_sd).index(attribute)
            assert float((found.values[attribute] - parameters[:, column]).abs().median()) < 0.25 * sd
        distance = FeatureDistance(pipe.vae)
        far = distance(images, digits()[0][:16])
        assert (distance(images, again) < 0.2 * far).all()
        assert (distance(images, images.roll(1, 0)) < far).all()


def test_load_on_devices_and_in_half_precision(name, device):
    pipe = testbeds.load(name, dtype=torch.bfloat16, device=device)
    assert pipe.device.type == device.type
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            assert {p.dtype for p in part.parameters()} == {torch.bfloat16} and not part.training
    assert drawn(pipe, ["a red bar"], [0]).isfinite().all()


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(EditError, match=r"shapes-dit.*almanac-gpt2.*shapes-unet, shapes-flow"):
        testbeds.load("shapes-dit")
    monkeypatch.setattr(testbeds, "WEIGHTS", tmp_path)
    with pytest.raises(EditError, match=r"python -m geoedit\.testbeds\.shapes --family flow"):
        testbeds.load("shapes-flow")
    folder = tmp_path / "shapes-unet"
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    (folder / "card.json").write_text(json.dumps({"world": "another"}))
    with pytest.raises(EditError, match=f"on world another, and this code draws {world_fingerprint()}"):
        testbeds.load("shapes-unet")
