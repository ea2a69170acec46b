"""The study of concept sliders: what it asks for, what it concludes, and that what is kept is used again."""

import json
from dataclasses import replace

import pytest

from experiments.concept_sliders import study
from experiments.concept_sliders.page import verdicts, write
from experiments.concept_sliders.specs import ENDS, held_out, plain_spec, spec
from experiments.concept_sliders.study import SMALL, run


@pytest.mark.parametrize("attribute", list(ENDS))
def test_prompts_for_scoring_are_not_taught_and_leave_the_attribute_unsaid(attribute):
    taught = {text for p in spec(attribute).contexts() for text in (p.target, p.positive, p.negative)}
    words = {word for end in ENDS[attribute] for word in end.split()}
    assert taught & set(held_out(attribute)) == (
        {"a cyan diamond rising"} if attribute == "brightness" else set()
    )
    assert not any(words & set(prompt.split()) for prompt in held_out(attribute))
    assert plain_spec(attribute).positive != plain_spec(attribute).negative


def row(trainer, **values):
    usual = {"spearman": 1.0, "spearman_safe": 1.0, "both_ends_right": True, "ends_right_share": 1.0}
    usual |= {"range_sd": 3.0, "interference": 0.1, "interference_worst": 0.2, "interference_signed": 0.1}
    usual |= {"safe_low": -1.0, "safe_high": 1.0, "observed_low": -1.0, "observed_high": 1.1}
    return {"family": "unet", "slider": "size", "trainer": trainer, "training_seed": 0, **usual, **values}


def test_an_aim_is_met_by_all_or_missed():
    import pandas as pd

    rows = [row("ours"), row("ours", interference=0.3, safe_low=-2.0), row("prompting", range_sd=3.5)]
    found = {aim: (count, met) for aim, _, count, met in verdicts(pd.DataFrame.from_records(rows))}
    assert found["absolute interference ≤ 0.25 of the range"] == ("1 of 2", False)
    assert found["range at least that of prompting"] == ("0 of 2", False)
    assert found["signed interference ≤ 0.25"] == ("2 of 2", True)
    assert found["predicted end of the safe range within 20 % of the observed"] == ("3 of 4", False)
    assert "**missed**" in write(rows, {"prompts": 2, "noises": 1, "sampling_steps": 5, "guidance": 3.0,
                                        "seeds": 1, "flow_seeds": 1})  # fmt: skip


def test_what_is_kept_is_not_done_again(tmp_path, monkeypatch):
    settings = replace(SMALL, steps=2, prompts=1, noises=1, sampling_steps=2, scales=(-1.0, 0.0, 1.0))
    first = run(settings, tmp_path)
    assert {one["trainer"] for one in first} == {"ours", "prompting"}
    monkeypatch.setattr(study.sliders, "train", None)
    monkeypatch.setattr(study.sliders, "evaluate", None)
    assert json.dumps(run(settings, tmp_path)) == json.dumps(first)
