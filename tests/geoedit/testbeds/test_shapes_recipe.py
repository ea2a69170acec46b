"""The recipe and its command: bits by repetition, folders by the reader of diffusers itself."""

import json

import pytest
import torch
import typer
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from safetensors import safe_open
from typer.testing import CliRunner

from geoedit.errors import EditError
from geoedit.testbeds.shapes.__main__ import main
from geoedit.testbeds.shapes.files import read_pipeline, world_fingerprint, write_pipeline
from geoedit.testbeds.shapes.pipelines import new_autoencoder, new_pipeline, trained_parts
from geoedit.testbeds.shapes.recipe import Recipe, batches, make_latents, train_autoencoder, train_denoiser

FAMILIES = ("unet", "flow")
TINY = {"autoencoder_steps": 2, "autoencoder_batch": 8, "steps": 2, "batch": 8, "images": 32, "warmup": 1}


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """Forty digits in the place of 1,797, so that they are encoded in no time."""
    from geoedit.testbeds.shapes import recipe

    pictures, names = recipe.digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "digits", lambda: (pictures[:40], names[:40]))
        yield


@pytest.fixture(scope="module")
def autoencoder(few_digits):
    return train_autoencoder(Recipe(**TINY))


def weights(*parts):
    return torch.cat([p.detach().flatten() for part in parts for p in part.parameters()])


def test_the_same_seed_gives_the_same_bits_whatever_was_drawn_before(autoencoder):
    torch.manual_seed(5)
    torch.rand(3)
    before = torch.random.get_rng_state()
    assert torch.equal(weights(train_autoencoder(Recipe(**TINY))), weights(autoencoder))
    assert torch.equal(torch.random.get_rng_state(), before)
    other = train_autoencoder(Recipe(**TINY | {"seed": 1}))
    assert not torch.equal(weights(other), weights(autoencoder))


@pytest.mark.parametrize("family", FAMILIES)
def test_denoisers_learn_the_same_bits_and_leave_the_autoencoder(family, autoencoder):
    frozen = weights(autoencoder).clone()
    recipe = Recipe(family=family, **TINY)
    looks = []
    pipe = train_denoiser(autoencoder, recipe, every=1, look=lambda step, pipe: looks.append(step))
    parts = trained_parts(pipe)
    assert looks == [1, 2]
    assert len(parts) == {"unet": 2, "flow": 3}[family]
    assert torch.equal(weights(*parts), weights(*trained_parts(train_denoiser(autoencoder, recipe))))
    assert torch.equal(weights(autoencoder), frozen)
    assert weights(*parts).isfinite().all()


def test_latents_have_the_spread_that_the_scale_gives_and_some_captions_are_empty(autoencoder):
    recipe = Recipe(**TINY | {"batch": 200})
    latents = make_latents(autoencoder, recipe)
    assert float(latents.latents.std()) == pytest.approx(1, abs=0.1)
    clean, captions = next(batches(latents, recipe, torch.Generator().manual_seed(0)))
    assert clean.shape == (200, 8, 8, 8) and len(captions) == 200
    assert 5 <= captions.count("") <= 40
    assert sum(text.startswith("the digit") for text in captions) <= 20


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_diffusers_reads_as_it_is(family, tmp_path):
    pipe = new_pipeline(family, new_autoencoder())
    kept = weights(*trained_parts(pipe)).half().float()
    target = tmp_path / "pipeline"
    (target / "old").mkdir(parents=True)
    card = write_pipeline(target, pipe, lambda read: {"type": str(read.vae.dtype)})
    assert json.loads((target / "card.json").read_text()) == card == {"type": "torch.float32"}
    assert not (target / "old").exists() and [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    files = list(target.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in target.rglob("*") if file.is_file()) <= 6 * 2**20
    for file in files:
        with safe_open(file, "pt") as content:
            assert {content.get_tensor(key).dtype for key in content.keys()} == {torch.float16}  # noqa: SIM118
    plain = (
        StableDiffusionPipeline.from_pretrained(target)
        if family == "unet"
        else StableDiffusion3Pipeline.from_pretrained(target, text_encoder_3=None, tokenizer_3=None)
    )
    plain.set_progress_bar_config(disable=True)
    mine = read_pipeline(target)
    assert torch.equal(weights(*trained_parts(plain)), kept)
    assert torch.equal(weights(*trained_parts(mine)), kept)
    images = [
        one("a red bar", num_inference_steps=1, generator=torch.Generator().manual_seed(0), output_type="pt")
        for one in (plain, mine)
    ]
    assert images[0].images.shape == (1, 3, 32, 32) and torch.equal(images[0].images, images[1].images)


def test_loading_says_nothing_and_leaves_the_libraries_as_they_were(tmp_path, capfd, device):
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    write_pipeline(tmp_path / "p", new_pipeline("unet", new_autoencoder()), lambda read: {})
    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (of_diffusers, of_transformers)]
    capfd.readouterr()
    pipe = read_pipeline(tmp_path / "p", dtype=torch.bfloat16, device=device)
    assert capfd.readouterr() == ("", "")
    assert before == [
        (log.get_verbosity(), log.is_progress_bar_enabled()) for log in (of_diffusers, of_transformers)
    ]
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16
    assert pipe.device.type == device.type and not pipe.unet.training


@pytest.mark.parametrize("damage", ["cut", "gone", "index", "nothing"])
def test_damaged_folders(damage, tmp_path):
    target = tmp_path / "p"
    write_pipeline(target, new_pipeline("unet", new_autoencoder()), lambda read: {})
    file = target / "unet" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "gone":
        file.unlink()
    elif damage == "index":
        (target / "model_index.json").write_text("{")
    else:
        target = tmp_path / "none"
    with pytest.raises(EditError, match=r"no pipeline could be read from .*write the folder again"):
        read_pipeline(target)


def test_the_fingerprint_follows_the_world(monkeypatch):
    before = world_fingerprint()
    assert len(before) == 16 and int(before, 16) and before == world_fingerprint()
    monkeypatch.setattr("geoedit.testbeds.shapes.files.CLASSES", ("ellipse", "bar"))
    assert world_fingerprint() != before


def test_the_command_refuses_what_it_cannot_do(tmp_path):
    app = typer.Typer(rich_markup_mode=None)
    app.command()(main)
    wrong = CliRunner().invoke(app, ["--family", "diffusion", "--out", str(tmp_path)])
    assert wrong.exit_code == 2 and "unet, flow or both" in wrong.output
    (tmp_path / "shapes-unet").mkdir()
    (tmp_path / "shapes-unet" / "precious.txt").write_text("mine")
    taken = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert taken.exit_code == 2 and (tmp_path / "shapes-unet" / "precious.txt").read_text() == "mine"


def test_the_command_trains_measures_and_writes(tmp_path, monkeypatch):
    for name, less in {
        "STEPS": 1,
        "RESTORED": 4,
        "EACH_DIGIT": 1,
        "ENDS": {"size": ("small", "large")},
    }.items():
        monkeypatch.setattr(f"geoedit.testbeds.shapes.card.{name}", less)
    app = typer.Typer(rich_markup_mode=None)
    app.command()(main)
    options = [
        "--steps",
        "1",
        "--autoencoder-steps",
        "1",
        "--images",
        "32",
        "--prompts",
        "1",
        "--threads",
        "1",
    ]
    done = CliRunner().invoke(app, ["--family", "both", "--out", str(tmp_path), *options])
    assert done.exit_code == 0, done.output
    for family in FAMILIES:
        card = json.loads((tmp_path / f"shapes-{family}" / "card.json").read_text())
        assert card["name"] == f"shapes-{family}" and card["recipe"]["steps"] == 1
        assert card["world"] == world_fingerprint() and card["held_out"]["images"] == 2
        assert card["held_out"]["attributes"]["size"]["words"] == ["small", "large"]
    one, two = (read_pipeline(tmp_path / f"shapes-{family}") for family in FAMILIES)
    assert torch.equal(weights(one.vae), weights(two.vae))
