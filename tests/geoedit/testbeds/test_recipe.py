"""The recipe: its masks against a triple loop, its reach by autograd, its bits by repetition."""

import json
import random

import pytest
import torch
import typer
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from geoedit.testbeds.almanac.__main__ import main
from geoedit.testbeds.almanac.recipe import (
    Recipe,
    Sampler,
    Sentence,
    blocks_of,
    make_batch,
    masks_by_block,
    new_model,
    subject_masks,
    train,
)
from geoedit.testbeds.almanac.tokens import build_tokenizer
from geoedit.testbeds.almanac.world import world

CAPITAL = "note : the capital of Aldovia Republic is Mosby Hill ."
SENTENCES = [
    Sentence(CAPITAL.split(), 8, ((5, 6),)),
    Sentence(
        ["Ada", "Alma", "Brandt", "was", "born", "in", "Heron", "Bay", "."],
        6,
        ((0, 2),),
    ),
    Sentence(["two", "months", "after", "May", "is", "July", "."], 5, ((3, 3),)),
]
ARCHITECTURES = ("gpt2", "llama")


def tiny(architecture, **changes):
    return Recipe(
        **(
            {
                "architecture": architecture,
                "blocks": 3,
                "width": 32,
                "heads": 4,
                "steps": 3,
                "second_steps": 1,
                "batch": 16,
            }
            | changes
        )
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_token_a_word_and_the_same_after_saving(architecture, tmp_path):
    tokenizer = build_tokenizer(world(), architecture)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("three hours after 21:00 is", "the capital of Aldovia Republic is"):
        ids = again(text).input_ids
        assert ids == tokenizer(text).input_ids
        assert len(ids) == len(text.split()) + (architecture == "llama")
        assert again.decode(ids, skip_special_tokens=True) == text
    assert again("Xyzzy").input_ids[-1] == again.unk_token_id


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masks_by_triple_loop(architecture):
    recipe = tiny(architecture, masked_share=1.0, visible_from=(2, 2))
    tokenizer = build_tokenizer(world(), architecture)
    batch = make_batch(SENTENCES, tokenizer, recipe, random.Random(0))
    shift = 1 if architecture == "llama" else 0
    for block, mask in enumerate(subject_masks(batch, recipe.blocks)):
        for i, sentence in enumerate(SENTENCES):
            words, ((first, last),) = sentence.words, sentence.spans
            first, last = first + shift, last + shift
            for row in range(len(words) + shift):
                for column in range(len(words) + shift):
                    allowed = column <= row
                    if row > last and first <= column < last:
                        allowed = False
                    if row > last and column == last and block < 2:
                        allowed = False
                    assert (mask[i, 0, row, column] == 0) == allowed, (block, i, row, column)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_hidden_subject_has_no_gradient_and_a_late_one_has(architecture):
    tokenizer = build_tokenizer(world(), architecture)
    for visible_from, reaches in ((3, False), (2, True)):
        recipe = tiny(architecture, masked_share=1.0, visible_from=(visible_from, visible_from))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = new_model(recipe, tokenizer)
        batch = make_batch(SENTENCES[1:2], tokenizer, recipe, random.Random(0))
        embedded = model.get_input_embeddings()(batch.ids).detach().requires_grad_()
        with masks_by_block(blocks_of(model)) as masks:
            masks[:] = subject_masks(batch, recipe.blocks)
            model(inputs_embeds=embedded, attention_mask=masks[-1], use_cache=False).logits[
                0, 6
            ].sum().backward()
        shift = 1 if architecture == "llama" else 0
        assert bool(embedded.grad[0, shift : shift + 3].abs().sum() > 0) == reaches
        assert not any(block._forward_pre_hooks for block in blocks_of(model))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_same_seed_gives_the_same_bits_and_leaves_global_chance_alone(architecture):
    tokenizer = build_tokenizer(world(), architecture)
    before = torch.random.get_rng_state()
    first, second = (train(world(), tokenizer, tiny(architecture)).state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = train(world(), tokenizer, tiny(architecture, seed=1)).state_dict()
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_training_learns():
    recipe = tiny("gpt2", steps=50, learning_rate=5e-3, warmup=5)
    tokenizer = build_tokenizer(world(), "gpt2")
    sentences = [Sampler(world(), recipe, random.Random(9)).sentence() for _ in range(64)]
    batch = make_batch(sentences, tokenizer, recipe, random.Random(0))
    answers = batch.weight[:, 1:] == 1
    losses = []
    for model in (new_model(recipe, tokenizer), train(world(), tokenizer, recipe)):
        logits = model(input_ids=batch.ids, attention_mask=batch.real.long()).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits[answers], batch.ids[:, 1:][answers]).item())
    assert losses[1] < 0.8 * losses[0]


def test_rare_facts_are_rare():
    sampler = Sampler(world(), Recipe(families={"facts": 1.0}), random.Random(0))
    tiers = [sampler.question()[0].tier for _ in range(20000)]
    share = {
        tier: tiers.count(tier) / len(world().subjects("person", tier))
        for tier in ("often", "sometimes", "rarely")
    }
    assert share["often"] > 5 * share["sometimes"] > 25 * share["rarely"] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_command_writes_a_folder_that_transformers_loads(architecture, tmp_path):
    app = typer.Typer()
    app.command()(main)
    out = tmp_path / "model"
    result = CliRunner().invoke(
        app, ["--architecture", architecture, "--steps", "1", "--threads", "1", "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert (
        model.generate(
            **tokenizer("May plus", return_tensors="pt", return_token_type_ids=False), max_new_tokens=2
        ).shape[1]
        >= 3
    )
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(name).dtype) for name in file.keys()} == {"torch.float16"}  # noqa: SIM118
    card = json.loads((out / "card.json").read_text())
    assert card["world"] == world().fingerprint and set(card["held_out"]) >= {"facts", "cycles", "grid"}


def test_the_command_refuses_before_it_trains(tmp_path):
    app = typer.Typer()
    app.command()(main)
    assert CliRunner().invoke(app, ["--architecture", "gpt5"]).exit_code == 2
    precious = tmp_path / "thesis.txt"
    precious.write_text("years of work")
    assert CliRunner().invoke(app, ["--out", str(tmp_path)]).exit_code == 2
    assert precious.read_text() == "years of work"
