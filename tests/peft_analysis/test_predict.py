import json
import math

import pytest
import torch
import weightwatcher

import geoedit
from peft_analysis.errors import UpdateError
from peft_analysis.predict import FEATURES, coefficients, intruder_threshold, predict, spectral_features


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_features_are_weightwatchers(device):
    matrix = drawn(0, 60, 90) @ torch.diag(torch.linspace(0.1, 2, 90))
    found = spectral_features(matrix.to(device))
    values = torch.linalg.svdvals(matrix.double()).numpy()
    eigenvalues = values**2
    assert found["stable_rank"] == pytest.approx(eigenvalues.sum() / eigenvalues.max() / 60, rel=1e-5)
    entropy = weightwatcher.RMT_Util.matrix_entropy(values, N=len(values))
    assert found["entropy"] == pytest.approx(entropy, rel=1e-3)


@pytest.mark.parametrize("shape", [(300, 300), (200, 400)])
def test_the_threshold_of_independent_entries_is_the_known_one(shape):
    m, n = shape
    values = torch.linalg.svdvals(drawn(0, m, n).double() / math.sqrt(n))
    # Benaych-Georges and Nadakuditi (2012), section 3.1: (m / n)^(1/4)
    assert intruder_threshold(values, shape, top=1) == pytest.approx((m / n) ** 0.25, rel=0.15)


def test_updates_below_the_threshold_do_not_come_among_the_leading_ones():
    matrix = (drawn(0, 200, 200) / 200**0.5).double()
    values = torch.linalg.svdvals(matrix)
    threshold = intruder_threshold(values, (200, 200))
    left, right = (torch.nn.functional.normalize(drawn(seed, 200).double(), dim=0) for seed in (1, 2))
    leading = []
    for factor in (0.5, 1.8):
        found = torch.linalg.svd(matrix + factor * threshold * torch.outer(left, right))[0]
        leading.append(float((found[:, :10].mT @ left).square().sum()))
    assert leading[0] < 0.35 < 0.6 < leading[1]


def test_scale_and_transposition_do_not_matter():
    matrix = drawn(0, 40, 70)
    one, two = spectral_features(matrix), spectral_features(7 * matrix.mT)
    assert one == pytest.approx(two, rel=1e-4)


def test_every_matrix_of_a_model_is_predicted_with_its_record():
    model = geoedit.testbeds.load("almanac-llama")[0]
    found = predict(model)
    assert len(found) >= 42 and not any("embed" in name for name in found)
    record = coefficients()["record"]
    for name, one in found.items():
        assert one.parameter == name and one.low <= one.gain <= one.high
        assert (
            one.skill == record["skill"]["architecture"]
            and one.baseline == record["best_baseline"]["architecture"]
        )
        assert one.reliable == (one.skill > max(one.baseline, 0) and not one.reason)
        assert one.reliable or one.reason
    json.dumps([one.to_dict() for one in found.values()], allow_nan=False)
    only = predict(model, only=["model.layers.0.mlp.up_proj.weight"])
    assert only == {name: found[name] for name in only}


def test_spectra_that_the_fit_has_not_seen_are_said_so():
    low = drawn(0, 64, 1) @ drawn(1, 1, 64) + 1e-4 * drawn(2, 64, 64)
    assert "outside of what the fit has seen" in predict(low)[""].reason


def test_the_shipped_fit_is_whole():
    fit = coefficients()
    for part in ("coefficients", "mean", "scale", "range"):
        assert set(fit[part]) == set(FEATURES)
    assert set(fit["record"]["skill"]) == {"architecture", "kind"} and fit["record"]["matrices"] == 66


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (torch.zeros(20, 20), "is zero"),
        (torch.full((20, 20), math.nan), "finite"),
        (torch.ones(3, 50), "sides of 10"),
        (torch.ones(50), "50"),
    ],
)
def test_bad_matrices_are_refused(matrix, message):
    with pytest.raises(UpdateError, match=message):
        predict(matrix)


def test_missing_names_are_told(tiny_gpt2):
    with pytest.raises(UpdateError, match="no parameter nowhere"):
        predict(tiny_gpt2, only=["nowhere"])
    found = predict(tiny_gpt2)
    assert len(found) == 12 and "transformer.wte.weight" not in found
