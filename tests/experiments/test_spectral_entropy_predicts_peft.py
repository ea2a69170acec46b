import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

import geoedit
from experiments.spectral_entropy_predicts_peft.judge import PREDICTORS, applied, held_out, ridge
from experiments.spectral_entropy_predicts_peft.settings import Settings
from experiments.spectral_entropy_predicts_peft.study import run
from experiments.spectral_entropy_predicts_peft.tasks import task
from experiments.spectral_entropy_predicts_peft.training import gradients, losses, places, runs
from geoedit.errors import EditError
from peft_analysis.predict import FEATURES

SETTINGS = replace(Settings.small(), steps=2, blocks=2)


@pytest.fixture(scope="module")
def almanac():
    return geoedit.testbeds.load("almanac-gpt2")


@pytest.mark.parametrize("name", ["new", "changed", "rule"])
def test_tasks_teach_what_is_not_known_and_ask_otherwise(almanac, name):
    model, tokenizer, world = almanac
    given = task(name, world, tokenizer, Settings(), 0)
    told, asked = ({tuple(row.tolist()) for row in part.ids} for part in (given.taught, given.asked))
    assert not told & asked and len(given.asked.ids) > 50
    found = losses(model, given)
    assert found["kept"] < 0.1 < 2 < min(found["taught"], found["asked"]) and found["right"] < 0.1
    again = task(name, world, tokenizer, Settings(), 0)
    assert torch.equal(given.taught.ids, again.taught.ids)
    assert not torch.equal(
        given.taught.ids, task(name, world, tokenizer, Settings(), 1).taught.ids[: len(told)]
    )


def test_unknown_tasks_are_refused(almanac):
    with pytest.raises(EditError, match="no task is named 'old'"):
        task("old", almanac[2], almanac[1], SETTINGS, 0)


def test_gradients_are_autograds(almanac):
    model, tokenizer, world = almanac
    given = task("new", world, tokenizer, SETTINGS, 0)
    place = places(model, 2)[0]
    found = gradients(model, given.taught, SETTINGS)[place.path]
    weight = model.get_submodule(place.path).weight
    step = 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        weight += step
        above = float(given.taught.loss(model))
        weight -= 2 * step
        below = float(given.taught.loss(model))
        weight += step
    assert abs(above - below) / 2 <= found["gradient"] * float(step.norm()) * 1.01
    assert found["gradient"] < found["gradient_nuclear"] < 2 * found["gradient"]


def test_runs_are_kept_and_taken_up(tmp_path, monkeypatch):
    settings = replace(SETTINGS, models=("almanac-gpt2",), rates=(0.02,), runs=tmp_path)
    module = "experiments.spectral_entropy_predicts_peft.training"
    kept = places(geoedit.testbeds.load("almanac-gpt2")[0], 2)[:2]
    monkeypatch.setattr(f"{module}.places", lambda *_: kept)
    first = list(runs(settings))
    assert len(first) == len(list(tmp_path.glob("*.json"))) == 2
    monkeypatch.setattr(f"{module}.train", None)
    assert list(runs(settings)) == first
    assert all(row["taught"] < row["taught_before"] for row in first)


def test_ridge_is_scikit_learns():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(40, 5)) * [1, 10, 0.1, 3, 1], draw.normal(size=40)
    expected = Ridge(alpha=3.0).fit(StandardScaler().fit_transform(x), y)
    fit = ridge(x, y)
    assert fit["coefficients"] == pytest.approx(expected.coef_)
    assert applied(fit, x) == pytest.approx(expected.predict(StandardScaler().fit_transform(x)))


def test_nothing_of_a_group_is_used_to_judge_it():
    draw = np.random.default_rng(0)
    frame = pd.DataFrame({"a": draw.normal(size=30), "y": draw.normal(size=30), "kind": list("xyz") * 10})
    before, mean = held_out(frame, ["a"], "y", "kind")
    own = (frame["kind"] == "x").to_numpy()
    after, other = held_out(frame.assign(y=frame["y"] + 100.0 * own), ["a"], "y", "kind")
    assert np.array_equal(before[own], after[own]) and np.array_equal(mean[own], other[own])
    assert not np.array_equal(before[~own], after[~own])


def made_up(settings):
    """Runs whose gain follows the entropy of their matrix, from nothing that was trained."""
    from experiments.spectral_entropy_predicts_peft.judge import base_features

    features = base_features(settings).set_index(["model", "path"])
    for name in settings.models:
        for place in places(geoedit.testbeds.load(name)[0], settings.blocks):
            gain = 0.5 + 0.8 * (features.loc[(name, place.path), "entropy"] - 0.7)
            yield {
                "model": name, "task": "new", "seed": 0, **vars(place), "rate": 0.02, "seconds": 0.1,
                "taught": 4 * (1 - gain), "asked": 4 * (1 - gain), "kept": 0.2, "right": 0.1,
                "taught_before": 4.0, "asked_before": 4.0, "kept_before": 0.1,
                "gradient": 1.0, "gradient_nuclear": 1.5,
            }  # fmt: skip


def test_the_study_finds_a_law_that_is_there(tmp_path):
    settings = replace(Settings.small(tmp_path), blocks=3)
    found = run(settings, rows=made_up(settings))
    saved = json.loads((tmp_path / "spectral_entropy_predicts_peft.json").read_text())
    assert saved == json.loads(json.dumps(found))
    skill = {
        (one["predictor"], one["left_out"]): one["skill"] for one in found["scores"] if one["target"] == "all"
    }
    assert skill["entropy alone", "architecture"] > 0.9 > 0.5 > skill["depth", "architecture"]
    assert set(PREDICTORS) == {name for name, _ in skill}
    assert set(saved["fit"]["coefficients"]) == set(FEATURES)
    page = (tmp_path / "spectral_entropy_predicts_peft.md").read_text()
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"spectral_entropy_predicts_peft.png", "spectral_entropy_predicts_peft_entropy.png"}
    assert (
        all(name in page for name in names) and "nan" not in page and str(tmp_path) not in json.dumps(saved)
    )
