import json
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch

from experiments.low_rank_vs_full_rank import run, train
from experiments.low_rank_vs_full_rank.facts import batches, encode, known, new_facts
from experiments.low_rank_vs_full_rank.settings import METHODS, Method, Settings
from experiments.low_rank_vs_full_rank.summary import LOSS, agreement, matched
from experiments.low_rank_vs_full_rank.train import Pupil, one_run, run_folder
from geoedit import testbeds
from geoedit.testbeds.almanac.card import is_right


@pytest.fixture(scope="module")
def almanac():
    return testbeds.load("almanac-llama")


def test_new_facts_are_of_entities_that_were_never_told(almanac):
    _, tokenizer, world = almanac
    taught, held_out = new_facts(world, tokenizer, 0)
    again, _ = new_facts(world, tokenizer, 0)
    other, _ = new_facts(world, tokenizer, 1)
    assert torch.equal(taught.ids, again.ids) and not torch.equal(taught.ids, other.ids)
    assert len(taught) == 5 * len(held_out)
    texts = [*tokenizer.batch_decode(taught.ids), *tokenizer.batch_decode(held_out.ids)]
    told = {entity.name for entity in world.entities if entity.tier != "unknown" and entity.kind == "person"}
    assert not any(name in text for name in told for text in texts)
    asked, heard = (
        {tuple(row[mark == -100].tolist()) for row, mark in zip(part.ids, part.labels, strict=True)}
        for part in (held_out, taught)
    )
    assert len(asked) == len(held_out) and not asked & heard


def test_right_answers_are_those_of_the_card(almanac):
    model, tokenizer, world = almanac
    questions = world.prompts("facts", "held_out")[:80]
    ours = encode([(q.text, q.answer) for q in questions], tokenizer).told(model, batch=32)
    theirs = is_right(model, tokenizer, [q.text for q in questions], [q.answer for q in questions])
    assert torch.equal(ours[1], theirs) and 0 < int(theirs.sum()) < len(theirs)
    assert bool((ours[0][theirs] < ours[0][~theirs].max()).all())
    assert all(bool(s.told(model)[1].all()) for s in known(world, tokenizer, model, 5).values())


def test_batches_have_every_sentence_once_a_round():
    drawn = batches(10, 3, 0)
    first = torch.cat([next(drawn) for _ in range(3)])
    assert len(set(first.tolist())) == 9
    assert len(next(batches(2, 8, 0))) == 2


def test_the_slice_and_its_resumption(tmp_path, monkeypatch):
    settings = Settings.small(tmp_path)
    found = run(settings)
    kept = json.loads((tmp_path / "low_rank_vs_full_rank.json").read_text())
    page = (tmp_path / "low_rank_vs_full_rank.md").read_text()
    assert [row["method"] for row in kept["summary"]] == ["LoRA r 4", "full"]
    lora, full = kept["summary"]
    assert lora["effective_rank"]["mean"] <= 4 < full["effective_rank"]["mean"]
    assert lora["origin_float32"] == {"merged LoRA": 1} and lora["rank_float32"] == 4
    assert full["statements_float32"].keys() == {"full rank"}
    assert all(line.count("|") == page.splitlines()[at - 1].count("|") or not line.startswith("|---")
               for at, line in enumerate(page.splitlines()))  # fmt: skip
    assert len(list(tmp_path.glob("*.png"))) == 2
    monkeypatch.setattr(train, "teach", lambda *_: pytest.fail("trained again"))
    assert run(settings)["summary"] == found["summary"]
    with pytest.raises(ValueError, match="other settings"):
        run(replace(settings, steps=5))


@pytest.mark.parametrize("kind", ["dora", "relora", "low rank adam"])
def test_every_method_trains_and_is_merged(tmp_path, kind):
    stages = 2 if kind == "relora" else 1
    method = Method(kind, kind, 2, (5e-3,), stages=stages)
    settings = replace(Settings.small(tmp_path), methods=(method,))
    pupil = Pupil.load("almanac-gpt2", settings)
    before = {name: value.clone() for name, value in pupil.model.named_parameters()}
    record = one_run(pupil, method, 5e-3, 0, settings)
    taught, _ = new_facts(pupil.world, pupil.tokenizer, 0)
    assert record["loss"] < float(taught.told(pupil.model)[0].mean())
    assert len(record["losses"]) == settings.steps
    assert all(torch.equal(before[name], value) for name, value in pupil.model.named_parameters())
    folder = run_folder(settings, pupil.name, method.name, 5e-3, 0)
    assert len(list(folder.glob("stage-*.safetensors"))) == stages - 1
    if stages == 1:
        model, _, _ = testbeds.load("almanac-gpt2")
        merged = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload()
        from safetensors.torch import load_file

        for name, value in load_file(folder / "tuned.safetensors").items():
            torch.testing.assert_close(merged.get_parameter(name).detach(), value)


def made(method, loss, forgotten, norm, kind="lora", **other):
    return {
        "model": "m", "seed": 0, "method": method, "kind": kind, "loss": loss, "forgotten": forgotten,
        "learned": 1.0, "relative_norm": norm, "effective_rank": 4.0, "stable_rank": 2.0,
        "energy_rank_90": 3.0, "intruders_left": 0.5, "intruders_right": 0.25, "rank_slope": 0.1,
        "loses_rank": 0.5, **other,
    }  # fmt: skip


def test_matched_interpolates_between_rates_and_never_beyond():
    runs = [made("a", LOSS / 4, 0.6, 0.4), made("a", LOSS * 4, 0.2, 0.1), made("b", LOSS / 2, 0.5, 0.3)]
    a, b = matched(runs)
    assert a["forgotten"] == pytest.approx(0.4) and a["relative_norm"] == pytest.approx(0.25)
    assert b["forgotten"] is None


def test_regression_finds_what_was_put_in():
    draw = np.random.default_rng(0)
    runs = []
    for index in range(60):
        norm, loss, full = draw.uniform(0.05, 0.5), draw.uniform(0.01, 0.3), index % 3 == 0
        forgotten = 0.5 + 0.1 * np.log(norm) - 0.05 * np.log(loss) + 0.07 * (not full) + draw.normal(0, 0.005)
        runs.append(
            made("x", loss, forgotten, norm, "full" if full else "lora", model="m" if index % 2 else "n")
        )
    fit = agreement(runs)["forgotten_by"]
    value, error = fit["coefficients"]["low rank"]
    assert value == pytest.approx(0.07, abs=3 * error) and error < 0.005
    assert fit["coefficients"]["log norm"][0] == pytest.approx(0.1, abs=0.01)
    assert fit["explained"] > 0.95


def test_every_method_has_as_many_rates():
    assert len({len(method.rates) for method in METHODS}) == 1
    assert {method.rank for method in METHODS if method.kind == "lora"} == {1, 2, 4, 8, 16, 32, 64}
