import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import geoedit
from experiments.curvature_predicts_editing.learn import RISING, Learning, draw_alike, learn, probabilities
from geoedit.diagnosis.features import FEATURES, LENGTHS
from geoedit.diagnosis.odds import ANSWERS, BUILT_IN, Odds, Tree, Trees
from geoedit.errors import EditError


def tree(*asks, above, missing, leaves):
    return Tree(asks, tuple(map(float, above)), tuple(missing), tuple(map(float, leaves)))


TWO = Trees(
    "by hand",
    "a",
    0.5,
    (
        tree("a", "b", "b", above=(0, 1, math.inf), missing=(True, False, True), leaves=(1, 2, 4, 8)),
        tree("b", "a", "a", above=(2, -1, 5), missing=(False, True, False), leaves=(10, 20, 40, 80)),
    ),
)


def by_hand(a, b):
    total = 0.5
    for asks, above, missing, leaves in (
        ("abb", (0, 1, math.inf), (True, False, True), (1, 2, 4, 8)),
        ("baa", (2, -1, 5), (False, True, False), (10, 20, 40, 80)),
    ):
        place = 0
        while place < 3:
            value = a if asks[place] == "a" else b
            yes = missing[place] if math.isnan(value) else value > above[place]
            place = 2 * place + (2 if yes else 1)
        total += leaves[place - 3]
    return total


def test_trees_are_asked_as_by_hand(device):
    values = [-2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 6.0, math.nan]
    pairs = [(a, b) for a in values for b in values]
    a, b = (torch.tensor(column, device=device, dtype=torch.float64) for column in zip(*pairs, strict=True))
    found = TWO.logit({"a": a, "b": b})
    assert found.tolist() == [by_hand(*pair) for pair in pairs]
    assert found.device.type == device.type
    absent = TWO.logit({"a": a})
    assert absent.tolist() == [by_hand(first, math.nan) for first, _ in pairs]


def sample(count=3000, seed=0):
    draw = np.random.default_rng(seed)
    columns = {name: draw.normal(size=count) for name in ("landing", "norm", "bend", "share")}
    columns["bend"][draw.random(count) < 0.3] = np.nan
    logit = 2 * columns["landing"] - np.nan_to_num(columns["bend"]) - columns["norm"] ** 2 + 0.5
    return columns, draw.random(count) < 1 / (1 + np.exp(-logit))


def test_trees_say_what_scikit_learn_says():
    from sklearn.ensemble import HistGradientBoostingClassifier

    columns, success = sample()
    learning = Learning(trees=30, depth=3, hidden=0.0)
    found = probabilities(learn(columns, success, name="x", needs="landing", learning=learning), columns)
    table = np.stack(list(columns.values()), 1)
    expected = HistGradientBoostingClassifier(
        max_iter=30, max_depth=3, max_leaf_nodes=None, learning_rate=learning.rate, max_bins=128,
        min_samples_leaf=learning.smallest_leaf, l2_regularization=learning.shrinkage, random_state=0,
        early_stopping=False, monotonic_cst=[int(name in RISING) for name in columns],
    ).fit(table, success).predict_proba(table)[:, 1]  # fmt: skip
    assert np.allclose(found, expected, atol=1e-6)


def test_learning_is_calibrated_on_new_edits_and_rises_where_it_must():
    columns, success = sample()
    learning = Learning(trees=300, depth=2, hidden=0.0)
    trees = learn(columns, success, name="x", needs="landing", learning=learning)
    fresh, seen = sample(20_000, seed=1)
    predicted = probabilities(trees, fresh)
    for low in np.arange(0, 1, 0.2):
        inside = (predicted >= low) & (predicted < low + 0.2)
        assert abs(predicted[inside].mean() - seen[inside].mean()) < 0.04
    for step in (0.3, 1.0, 3.0):
        higher = probabilities(trees, {**fresh, "landing": fresh["landing"] + step})
        assert (higher >= predicted).all() and (higher > predicted).any()


def test_learning_is_the_same_every_time_and_counts_groups_alike():
    columns, success = sample(1500)
    learning = Learning(trees=10, depth=2, edits=800)
    again = [learn(columns, success, name="x", needs="landing", learning=learning, seed=3) for _ in range(2)]
    assert again[0] == again[1]
    # A group of one outcome that is repeated weighs no more than before.
    rare = {name: np.concatenate([column, np.tile(column[:1], 9000)]) for name, column in columns.items()}
    outcome = np.concatenate([success, np.zeros(9000, dtype=bool)])
    groups = ["many"] * 1500 + ["one"] * 9000
    learning = Learning(trees=1, depth=1, hidden=0.0)
    even = learn(rare, outcome, name="x", needs="landing", groups=groups, learning=learning)
    assert 1 / (1 + math.exp(-even.base)) == pytest.approx(success.mean() / 2, rel=1e-6)
    drawn = draw_alike(groups, 300, 0)
    assert len(set(drawn.tolist())) == 300 and (drawn < 1500).sum() == 150


def test_what_is_hidden_at_times_is_missed_less():
    columns, success = sample(4000)
    fresh, seen = sample(4000, seed=1)
    alone = {"landing": fresh["landing"]}

    def loss(hidden):
        learning = Learning(trees=100, depth=3, hidden=hidden)
        found = probabilities(learn(columns, success, name="x", needs="landing", learning=learning), alone)
        return -np.log(np.where(seen, found, 1 - found)).mean()

    assert loss(0.3) < loss(0.0) - 0.02


def test_unusable_features_are_not_asked_about():
    columns, success = sample(500)
    unknown = np.full(500, np.nan)
    trees = learn({**columns, "dim": unknown}, success, name="x", needs="landing", learning=Learning(trees=3))
    assert "dim" not in trees.features
    alone = learn({"dim": unknown}, success, name="x", needs="dim")
    assert probabilities(alone, {"dim": unknown}) == pytest.approx((success.sum() + 0.5) / 501)
    with pytest.raises(EditError, match="500 of 500 edits succeeded"):
        learn(columns, np.ones(500, dtype=bool), name="x", needs="landing")


def test_the_best_informed_set_speaks(device):
    lengths = Trees("lengths", "c", -1.0, ())
    odds = Odds((TWO, lengths))
    nan = math.nan
    features = {
        "a": torch.tensor([1.0, nan, nan], device=device),
        "c": torch.tensor([1.0, 1.0, nan], device=device),
    }
    assert odds.which(features).tolist() == [0, 1, -1]
    found = odds.probability(features)
    assert found.dtype == torch.float32 and found.device.type == device.type
    assert found[1].item() == pytest.approx(1 / (1 + math.e)) and math.isnan(found[2])
    assert found[0].item() == pytest.approx(1 / (1 + math.exp(-by_hand(1.0, nan))))
    with pytest.raises(EditError, match="no features"):
        odds.probability({})


def test_files(tmp_path):
    path = tmp_path / "odds.json"
    odds = Odds((TWO, Trees("none", "c", 0.25, ())), {"seed": 3})
    assert Odds.load(odds.save(path)) == odds
    whole = path.read_text()
    for text, message in (
        (whole[: len(whole) // 2], "is not JSON"),
        ("[1]", "holds no odds"),
        (whole.replace('"version": 1', '"version": 9'), "version 9"),
        (whole.replace('"leaves"', '"twigs"'), "lacks a part"),
        (whole.replace("[1.0, 2.0, 4.0, 8.0]", "[1.0, 2.0, 4.0]"), "power of two"),
        (whole.replace("[1.0, 2.0, 4.0, 8.0]", "[1.0, 2.0, 4.0, NaN]"), "not finite"),
    ):
        path.write_text(text)
        with pytest.raises(EditError, match=message):
            Odds.load(path)
    with pytest.raises(EditError, match="there is no file"):
        Odds.load(tmp_path / "nowhere.json")


def test_the_odds_that_ship_say_what_they_are_from():
    odds = Odds.load()
    record = odds.record
    world = geoedit.testbeds.world()
    assert set(record["models"]) == set(geoedit.testbeds.TESTBEDS)
    assert set(record["models"].values()) == {world.fingerprint}
    assert set(record["concepts"]) <= set(world.concepts)
    assert record["edits"] > record["successes"] > 1000
    held_out = record["held_out"]["one concept at a time"]
    assert held_out["auroc"] > 0.95 and held_out["calibration_error"] < 0.05
    answers, lengths = odds.sets
    assert answers.name == ANSWERS and set(answers.features) <= set(FEATURES)
    assert set(lengths.features) <= set(LENGTHS)
    learning = Learning(**record["learning"])
    assert len(answers.trees) == learning.trees
    assert {len(tree.leaves) for tree in answers.trees} == {2**learning.depth}
    assert BUILT_IN.stat().st_size < 400_000
    assert "NaN" not in BUILT_IN.read_text() and json.loads(BUILT_IN.read_text())["version"] == 1


def test_nothing_known_is_no_number_and_a_landing_alone_is_enough():
    odds = Odds.load()
    unknown = torch.full((3,), torch.nan)
    assert bool(odds.probability(dict.fromkeys(FEATURES, unknown)).isnan().all())
    nats = torch.tensor([-8.0, 8.0])
    margins = dict.fromkeys(["landing", "landing_sphere", "along_path"], nats)
    low, high = odds.probability({**margins, "share": torch.tensor([0.9, 0.9])}).tolist()
    assert low < 0.3 < 0.7 < high
    found = odds.probability({"landing": torch.tensor([-20.0, 0.0, 20.0])})
    assert bool((found[1:] >= found[:-1]).all()) and 0 < float(found[0]) < float(found[2]) < 1


@pytest.mark.parametrize("name, seen", [("weekdays", True), ("other days", False)])
def test_a_diagnosis_says_where_the_odds_have_seen_the_concept(name, seen):
    model, tokenizer, world = geoedit.testbeds.load("almanac-gpt2")
    concept = replace(world.concepts["weekdays"], name=name)
    site = geoedit.Site(0, token="value")
    found = geoedit.diagnose(model, tokenizer, concept, [site], max_edits=20, progress=False)
    assert any("this very concept" in note for note in found.notes) == seen
