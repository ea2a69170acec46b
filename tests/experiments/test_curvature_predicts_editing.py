import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom, spearmanr
from sklearn.metrics import roc_auc_score

import geoedit
from experiments.curvature_predicts_editing.cells import CELL, cells, concept_edits
from experiments.curvature_predicts_editing.judge import BASELINES, calibrated, held_out
from experiments.curvature_predicts_editing.learn import Learning
from experiments.curvature_predicts_editing.settings import Settings
from experiments.curvature_predicts_editing.statistics import (
    Ranks,
    area,
    as_counts,
    ceiling,
    draws,
    interval,
    spearman,
)
from experiments.curvature_predicts_editing.study import run, write_json
from geoedit.diagnosis.features import FEATURES
from geoedit.errors import EditError
from geoedit.site import Site

SETTINGS = replace(Settings.small(), learning=Learning(trees=12, depth=2, smallest_leaf=10, edits=800))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [False, True])
def test_statistics_agree_with_scipy_and_scikit_learn(seed, ties):
    draw = np.random.default_rng(seed)
    x, success = draw.normal(size=120), draw.random(120) < 0.3
    y = x + draw.normal(size=120)
    if ties:
        x, y = np.round(x), np.round(y)
    equal = np.ones(120)
    assert spearman(Ranks(x), Ranks(y), equal) == pytest.approx(spearmanr(x, y)[0], abs=1e-12)
    assert area(Ranks(x), success, equal) == pytest.approx(roc_auc_score(success, x), abs=1e-12)


def test_weights_are_repeated_rows():
    draw = np.random.default_rng(0)
    x, y, success = np.round(draw.normal(size=60)), draw.normal(size=60), draw.random(60) < 0.4
    for weights in draws(np.repeat(np.arange(20), 3).tolist(), 5, 1):
        again = weights.astype(int)
        expected = spearmanr(np.repeat(x, again), np.repeat(y, again))[0]
        assert spearman(Ranks(x), Ranks(y), weights) == pytest.approx(expected, abs=1e-12)
        expected = roc_auc_score(np.repeat(success, again), np.repeat(x, again))
        assert area(Ranks(x), success, weights) == pytest.approx(expected, abs=1e-12)


def test_what_cannot_be_ranked_is_unknown():
    equal = np.ones(5)
    assert np.isnan(spearman(Ranks(np.ones(5)), Ranks(np.arange(5.0)), equal))
    assert np.isnan(area(Ranks(np.arange(5.0)), np.ones(5, dtype=bool), equal))
    with pytest.raises(EditError, match="1 of 2 numbers are NaN"):
        Ranks(np.array([0.0, np.nan]))
    assert np.isnan(interval(0.5, [np.nan, np.nan, 0.4]).low)
    assert interval(0.5, [0.4, 0.5, 0.6]).high == pytest.approx(0.595)


@pytest.mark.parametrize("outcomes", [[0, 0, 0, 1], [0, 0, 1, 1, 0.5, 0.5], [1, 2, 3, 4]])
def test_no_order_without_ties_beats_the_ceiling(outcomes):
    from itertools import permutations

    best = max(spearmanr(order, outcomes)[0] for order in permutations(range(len(outcomes))))
    assert ceiling(np.array(outcomes)) == pytest.approx(best)


def test_ceiling_of_single_edits_in_closed_form():
    outcomes = np.arange(10_000) < 2_000
    assert ceiling(outcomes) == pytest.approx(np.sqrt(3 * 0.2 * 0.8), abs=1e-6)


def test_counts_are_the_likeliest_ones():
    probability = np.linspace(0.003, 0.997, 60)
    for edits in (1, 5, 6):
        expected = [binom.pmf(np.arange(edits + 1), edits, p).argmax() / edits for p in probability]
        assert as_counts(probability, np.full(60, edits)).tolist() == pytest.approx(expected)
    assert as_counts(np.array([0.0, 1.0]), np.array([4, 4])).tolist() == [0.0, 1.0]


def made_up(count=1600, seed=0):
    """Edits whose success depends on the landing alone."""
    draw = np.random.default_rng(seed)
    landing = 3 * draw.normal(size=count)
    table = pd.DataFrame({name: draw.normal(size=count) for name in FEATURES})
    table["landing"], table["share"], table["length_plain"] = landing, 0.5, 1.0
    for name in ("landing", "fisher", "euclidean", "norm", "cosine", "dimension"):
        table[f"alone_{name}"] = landing if name == "landing" else draw.normal(size=count)
    table["alone_off_manifold"] = np.where(draw.random(count) < 0.5, np.nan, draw.normal(size=count))
    table["alone_off_relative"] = table["alone_off_visible"] = draw.normal(size=count)
    number = np.arange(count)
    table["model"] = np.where(number % 2, "almanac-gpt2", "almanac-llama")
    table["concept"] = np.array(["weekdays", "sizes", "country-capital"])[number // 2 % 3]
    table["shape"] = table["concept"].map(
        {"weekdays": "cycle", "sizes": "line", "country-capital": "categorical"}
    )
    table["site"], table["kind"] = "block 1 residual_out @ value", "mean difference"
    table["depth"], table["template"] = 1, 0
    table["scale"] = np.array([0.5, 1.0])[number // 6 % 2]
    table["source"], table["target"] = (number // 12 % 33).astype(str), (number // 12 % 32).astype(str)
    table["success"] = draw.random(count) < 1 / (1 + np.exp(-landing))
    return table


def test_nothing_of_a_group_is_used_to_judge_it():
    edits, learning = made_up(), Learning(trees=5, depth=2, smallest_leaf=5)
    before = held_out(edits, ["landing", "share"], "concept", learning, 0)
    own = edits["concept"] == "sizes"
    turned = edits.assign(success=edits["success"] ^ own)
    after = held_out(turned, ["landing", "share"], "concept", learning, 0)
    assert np.array_equal(before[own], after[own]) and not np.array_equal(before[~own], after[~own])
    first = calibrated(edits, edits["landing"].to_numpy(), "concept")
    second = calibrated(turned, edits["landing"].to_numpy(), "concept")
    assert np.array_equal(first[own], second[own]) and not np.array_equal(first[~own], second[~own])
    alone = held_out(edits.assign(model="one"), ["landing"], "model", learning, 0)
    assert np.isnan(alone).all()


def test_cells_are_rates_over_sentences():
    edits = made_up(200)
    found = cells(edits, ["landing"])
    entry = found.iloc[7]
    inside = (edits[CELL] == entry[CELL]).all(axis=1)
    assert entry["edits"] == inside.sum() and entry["rate"] == edits["success"][inside].mean()
    assert entry["landing"] == pytest.approx(edits["landing"][inside].mean())
    assert found["edits"].sum() == 200


def test_the_study_writes_what_it_judged(tmp_path):
    settings = replace(SETTINGS, models=("almanac-gpt2", "almanac-llama"), folder=tmp_path)
    edits = made_up()
    found = run(settings, collect=lambda _: edits)
    saved = json.loads((tmp_path / "curvature_predicts_editing.json").read_text())
    assert saved == json.loads(json.dumps(found))
    scores = {score["name"]: score for score in saved["scores"]}
    assert set(BASELINES) < set(scores)
    expected = roc_auc_score(edits["success"], edits["landing"])
    assert scores["landing"]["auroc"][0] == pytest.approx(expected, abs=1e-4)
    low, value, high = (scores["odds"]["auroc"][place] for place in (1, 0, 2))
    assert low < value < high and value == pytest.approx(expected, abs=0.04)
    assert scores["curvature_plain"]["known"] == pytest.approx(
        edits["alone_off_manifold"].notna().mean(), abs=1e-3
    )
    page = (tmp_path / "curvature_predicts_editing.md").read_text()
    assert f"{scores['odds']['auroc'][0]:.3f}" in page and "None" not in page and "nan" not in page
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {
        f"curvature_predicts_editing_{name}.png" for name in ("predictors", "calibration", "scales", "sites")
    }
    assert all(name in page for name in names) and str(tmp_path) not in json.dumps(saved)


def test_edits_are_those_of_the_diagnosis():
    model, tokenizer, world = geoedit.testbeds.load("almanac-gpt2")
    concept = world.concepts["sizes"]
    settings = replace(Settings.small(), pairs=3, sentences=2, max_prompts=1000)
    edits = concept_edits(model, tokenizer, concept, settings)
    assert edits.groupby(["site", "kind", "scale", "source", "target"]).size().max() <= 2
    assert edits.groupby(["source", "target"]).ngroups == 3
    site = Site(1, "residual_out", "value")
    edits = edits[edits["site"] == str(site)]
    diagnosis = geoedit.diagnose(
        model,
        tokenizer,
        concept,
        [site],
        apply=True,
        scale=settings.scales,
        max_edits=10**6,
        max_prompts=1000,
    )
    keys = ["site", "edit", "template", "source", "target", "scale"]
    mine = edits[edits["kind"] == "mean difference"].rename(columns={"kind": "edit"})
    both = mine.merge(diagnosis.table, on=keys, suffixes=("", "_seen"))
    assert len(both) == len(mine)
    assert (both["success"] == both["success_seen"].astype(bool)).all()
    assert np.allclose(both["alone_landing"], both["landing_seen"], atol=1e-4)
    assert np.allclose(both["landing"], both["landing_seen"], atol=1e-2)


def test_what_is_not_known_is_null_in_the_results(tmp_path):
    values = {"a": [1.0, float("nan"), (float("inf"), "b")], "c": {"d": None, "e": 2}}
    write_json(Settings.small(tmp_path), "x", values)
    assert json.loads((tmp_path / "x.json").read_text()) == {
        "a": [1.0, None, [None, "b"]],
        "c": {"d": None, "e": 2},
    }
