import numpy as np
import pytest
from sklearn.metrics import roc_auc_score
from sklearn.metrics import roc_curve as sklearn_roc_curve

from geoedit.diagnosis.scores import auroc, bootstrap_auroc, calibration, roc_curve
from geoedit.errors import EditError


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ties", [False, True])
def test_auroc_agrees_with_scikit_learn(seed, ties):
    draw = np.random.default_rng(seed)
    success = draw.random(200) < 0.3
    scores = draw.normal(size=200) + success
    if ties:
        scores = np.round(scores)
    assert auroc(scores, success) == pytest.approx(roc_auc_score(success, scores), abs=1e-12)


def test_auroc_of_one_outcome_is_unknown_and_of_nan_scores_an_error():
    scores = np.arange(4.0)
    assert np.isnan(auroc(scores, np.ones(4, dtype=bool)))
    assert np.isnan(auroc(np.zeros(0), np.zeros(0, dtype=bool)))
    with pytest.raises(EditError, match="1 of 4 scores are NaN"):
        auroc(np.array([1.0, np.nan, 2.0, 3.0]), np.array([True, False, True, False]))


def test_bootstrap_resamples_match_scikit_learn_on_repeated_rows():
    draw = np.random.default_rng(0)
    success = draw.random(60) < 0.4
    scores = draw.normal(size=60) + success
    clusters = np.repeat(np.arange(20), 3)
    weights = np.random.default_rng(7).multinomial(20, np.full(20, 1 / 20), 50)
    expected = [
        roc_auc_score(np.repeat(success, w[clusters]), np.repeat(scores, w[clusters])) for w in weights
    ]
    found = bootstrap_auroc(scores, success, clusters.tolist(), resamples=50, seed=7)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(expected, [0.025, 0.975])), abs=1e-12)
    assert found.auroc == pytest.approx(roc_auc_score(success, scores))
    assert (found.count, found.successes) == (60, int(success.sum()))


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    # Normal scores one deviation apart: the true AUROC is Phi(1 / sqrt 2).
    truth, covered = 0.7602499389, 0
    for seed in range(100):
        draw = np.random.default_rng(seed)
        success = np.arange(120) % 2 == 0
        found = bootstrap_auroc(draw.normal(size=120) + success, success, resamples=200, seed=seed)
        covered += found.low <= truth <= found.high
    assert 86 <= covered <= 100


def test_whole_clusters_are_drawn():
    draw = np.random.default_rng(3)
    success = np.repeat(draw.random(15) < 0.5, 40)
    scores = np.repeat(draw.normal(size=15), 40) + success
    each = bootstrap_auroc(scores, success)
    together = bootstrap_auroc(scores, success, np.repeat(np.arange(15), 40).tolist())
    assert together.high - together.low > 3 * (each.high - each.low)
    with pytest.raises(EditError, match="2 clusters"):
        bootstrap_auroc(scores, success, [0, 1])


def test_calibration_by_hand():
    probability = np.array([0.1, 0.2, 0.9, 0.8, 1.0])
    success = np.array([False, True, True, True, False])
    found = calibration(probability, success, bins=2)
    assert [(b.count, b.predicted, b.observed) for b in found.bins] == [
        (2, pytest.approx(0.15), 0.5),
        (3, pytest.approx(0.9), pytest.approx(2 / 3)),
    ]
    assert found.expected_error == pytest.approx(0.4 * 0.35 + 0.6 * (0.9 - 2 / 3))
    assert found.brier == pytest.approx(np.mean([0.01, 0.64, 0.01, 0.04, 1.0]))
    with pytest.raises(EditError, match="outside"):
        calibration(np.array([1.2]), np.array([True]))
    with pytest.raises(EditError, match="apply=True"):
        calibration(np.zeros(0), np.zeros(0, dtype=bool))


def test_roc_curve_agrees_with_scikit_learn():
    draw = np.random.default_rng(1)
    success = draw.random(80) < 0.5
    scores = np.round(draw.normal(size=80) + success, 1)
    false, true, _ = sklearn_roc_curve(success, scores, drop_intermediate=False)
    found_false, found_true = roc_curve(scores, success)
    assert found_false == pytest.approx(false)
    assert found_true == pytest.approx(true)


def test_counting_wins_by_clusters_changes_no_resample():
    generator = np.random.default_rng(3)
    scores, clusters = generator.integers(0, 9, 200).astype(float), generator.integers(0, 12, 200)
    success = generator.random(200) < scores / 9
    found = bootstrap_auroc(scores, success, clusters.tolist(), resamples=60, seed=5)
    order = list(dict.fromkeys(clusters.tolist()))
    member = np.array([order.index(cluster) for cluster in clusters])
    values = []
    for draw in np.random.default_rng(5).multinomial(len(order), np.full(len(order), 1 / len(order)), 60):
        rows = np.repeat(np.arange(200), draw[member])
        values.append(roc_auc_score(success[rows], scores[rows]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(values, [0.025, 0.975])), abs=1e-12)
