"""The shipped models: what their cards say, measured again by other means."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from geoedit import testbeds
from geoedit.errors import EditError

LONGEST_ANSWER = 4


@pytest.fixture(scope="module", params=testbeds.TESTBEDS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(name):
    return testbeds.load(name)


def test_a_plain_folder_in_half_precision_under_four_megabytes(name):
    path = testbeds.folder(name)
    assert (path / "model.safetensors").stat().st_size <= 4 * 2**20
    with safe_open(path / "model.safetensors", "pt") as file:
        assert {str(file.get_tensor(key).dtype) for key in file.keys()} == {"torch.float16"}  # noqa: SIM118
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.config.model_type == name.removeprefix("almanac-")
    assert len(tokenizer) == model.config.vocab_size
    if name == "almanac-llama":
        assert model.config.num_key_value_heads < model.config.num_attention_heads


def generated_share(model, tokenizer, questions):
    """Greedy `generate`, one prompt at a time and without padding: not how the card measures."""
    right = 0
    for question in questions:
        inputs = tokenizer(question.text, return_tensors="pt", return_token_type_ids=False)
        out = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        said = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += said.split()[: len(question.answer.split())] == question.answer.split()
    return right / len(questions)


@pytest.mark.parametrize("family", ["facts", "cycles", "lines", "grid", "categories", "in_context"])
def test_accuracy_as_on_the_card(loaded, name, family):
    model, tokenizer, world = loaded
    asked = world.prompts(family, "held_out")
    sample = random.Random(family).sample(asked, min(60, len(asked)))
    card = testbeds.card(name)["held_out"][family]["accuracy"]
    tolerance = 4 * (max(card * (1 - card), 0.01) / len(sample)) ** 0.5  # four standard errors of the sample
    assert abs(generated_share(model, tokenizer, sample) - card) <= tolerance


def test_often_told_facts_are_known_and_untold_ones_are_guessed(loaded):
    model, tokenizer, world = loaded
    told = [q for q in world.prompts("facts", "held_out") if q.tier == "often"]
    assert generated_share(model, tokenizer, random.Random(0).sample(told, 60)) >= 0.95
    rare = [q for q in world.prompts("facts", "held_out") if q.tier == "rarely"]
    assert generated_share(model, tokenizer, random.Random(0).sample(rare, 40)) < 0.8


def test_the_swap_at_the_subject_by_hand(loaded, name):
    """One pair at a time, no padding, through output_hidden_states and a hook of the test's own."""
    model, tokenizer, world = loaded
    trace = testbeds.card(name)["causal_trace"]
    best = trace["middle_third"]["best_block"]
    assert trace["middle_third"]["carried_at_subject"] >= 0.8
    blocks = model.transformer.h if name == "almanac-gpt2" else model.model.layers
    assert len(blocks) / 3 <= best < 2 * len(blocks) / 3
    draw, carried = random.Random(1), []
    facts = world.facts_of("profession", "often")
    while len(carried) < 40:
        a, b = draw.sample(facts, 2)
        if a.answer == b.answer or len(a.subject.name.split()) != len(b.subject.name.split()):
            continue
        texts = [f"the profession of {fact.subject.name} is" for fact in (a, b)]
        ids = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
        clean = [tokenizer.decode(model(i).logits[0, -1].argmax()) for i in ids]
        if clean != [a.answer, b.answer]:
            continue
        donor = model(ids[1], output_hidden_states=True).hidden_states[best + 1][0, -2]

        def swap(module, args, output, donor=donor):
            output = output if isinstance(output, torch.Tensor) else output[0]
            output[0, -2] = donor
            return output

        handle = blocks[best].register_forward_hook(swap)
        carried.append(tokenizer.decode(model(ids[0]).logits[0, -1].argmax()) == b.answer)
        handle.remove()
    assert sum(carried) / len(carried) >= 0.8


def test_load_on_devices_and_in_half_precision(name, device):
    model, tokenizer, world = testbeds.load(name, dtype=torch.bfloat16, device=device)
    assert model.dtype == torch.bfloat16 and model.device.type == device.type and not model.training
    fact = world.facts_of("currency", "often")[0]
    inputs = tokenizer(f"the currency of {fact.subject.name} is the", return_tensors="pt").to(device)
    assert tokenizer.decode(model(input_ids=inputs["input_ids"]).logits[0, -1].argmax()) == fact.answer


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(EditError, match=r"almanac-bert.*almanac-gpt2, almanac-llama"):
        testbeds.load("almanac-bert")
    monkeypatch.setattr(testbeds, "WEIGHTS", tmp_path)
    with pytest.raises(EditError, match=r"python -m geoedit\.testbeds\.almanac"):
        testbeds.load("almanac-gpt2")
    folder = tmp_path / "almanac-gpt2"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / "card.json").write_text(json.dumps({"world": "another"}))
    with pytest.raises(EditError, match=r"trained on world another"):
        testbeds.load("almanac-gpt2")


def test_the_results_page_quotes_the_cards():
    page = (Path(__file__).parents[3] / "docs" / "results.md").read_text(encoding="utf-8")
    cards = [testbeds.card(name) for name in testbeds.TESTBEDS]
    for family in ("cycles", "lines", "grid", "in_context", "statements"):
        shares = [f"{100 * card['held_out'][family]['accuracy']:.1f} %" for card in cards]
        assert f"| {shares[0]} | {shares[1]} | {cards[0]['held_out'][family]['prompts']} |" in page
    for place in ("subject", "last"):
        for card in cards:
            trace = card["causal_trace"][place]
            assert (
                " | ".join(f"{100 * share:.0f} %" for share in [trace["embedding"], *trace["blocks"]]) in page
            )
