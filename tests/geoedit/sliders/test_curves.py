"""What curves tell, against scipy and curves whose truth is written down."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from geoedit import EditError
from geoedit.sliders.evaluation import curves as of
from geoedit.sliders.evaluation.edges import OFF, edges, edges_of_slopes

SCALES = np.linspace(-2, 2, 9)


def test_spearman_is_scipys():
    values = np.random.default_rng(0).normal(size=(6, 9)).round(1)  # with ties
    expected = [spearmanr(SCALES, row).statistic for row in values]
    np.testing.assert_allclose(of.spearman(SCALES, values), expected, atol=1e-12)


def test_spearman_looks_at_what_is_known():
    curve = np.array([0.0, 1, math.nan, 3, 4, 5, 6, math.nan, 8])
    assert of.spearman(SCALES, curve[None]) == pytest.approx(1)
    assert of.spearman(SCALES, np.zeros((1, 9))) == 0  # no order is no virtue
    assert math.isnan(of.spearman(SCALES, np.full((1, 9), math.nan))[0])


def test_steps_that_fall_stand_or_are_unknown_are_violations():
    curve = np.array([[0.0, 1, 1, 0.5, 2, math.nan, 4, 5, 6]])
    # 1 rises, 2 stands, 3 falls, 4 rises, 5 and 6 are unknown, 7 and 8 rise
    assert of.violations(curve)[0] == pytest.approx(4 / 8)


def test_foldback_is_the_share_of_the_way_that_goes_back():
    up_and_half_down = np.array([0.0, 2, 1])
    back_home = np.array([0.0, 3, 0])
    found = of.foldback(np.stack([up_and_half_down, back_home, np.array([0.0, 0, 0])]))
    assert found[:2].tolist() == pytest.approx([1 / 3, 1 / 2]) and math.isnan(found[2])


def test_a_negative_end_that_grows_is_seen():
    """The published trainer's fault: the attribute grows at both ends."""
    wrong, right = SCALES**2, SCALES
    assert of.ends_right(SCALES, np.stack([wrong, right])).tolist() == [False, True]
    assert of.foldback(wrong[None])[0] == pytest.approx(0.5)
    assert of.saturation(SCALES, wrong) == (0.0, 0.0)


def test_angles_are_followed_both_ways_round():
    truth = np.linspace(-250, 250, 9) + 20
    wrapped = (truth + 90) % 180 - 90
    found = of.unwrap(wrapped[None], 180.0, 4)[0]
    np.testing.assert_allclose(found, truth - 0, atol=1e-9)
    gap = wrapped.copy()
    gap[6] = math.nan
    assert math.isnan(of.unwrap(gap[None], 180.0, 4)[0, 6])


def test_saturation_of_a_tanh():
    scales = np.linspace(-3, 3, 61)
    low, high = of.saturation(scales, np.tanh(scales))
    # tanh' = 1 - tanh² falls to a fifth at artanh √0.8
    assert high == pytest.approx(math.atanh(math.sqrt(0.8)), abs=0.1)
    assert low == pytest.approx(-high, abs=0.11)
    assert all(map(math.isnan, of.saturation(scales, scales)))


def test_at_effect_is_linear_between_points():
    assert of.at_effect(np.array([0.0, 0.5, 1.5]), np.array([0.0, 1.0, 3.0]), 1.0) == pytest.approx(2)
    assert math.isnan(of.at_effect(np.array([0.0, 0.5]), np.array([0.0, 1.0]), 1.0))


@pytest.mark.parametrize("scales", [[0.0], [1.0, 2.0], [-1.0, 1.0, 0.0], [0.0, math.nan, 1.0]])
def test_scales_that_make_no_curve_are_refused(scales):
    with pytest.raises(EditError, match="scales"):
        of.check_scales(np.array(scales))


def test_the_observed_edge_of_a_tanh_is_in_closed_form():
    scales = np.linspace(-3, 3, 61)
    found = edges(scales, np.tanh(scales)[None], None)
    edge = math.atanh(math.sqrt(0.8))
    assert found.high == pytest.approx(edge, abs=0.01) and found.low == pytest.approx(-edge, abs=0.01)
    assert "stops rising" in found.reason


def test_the_residual_ends_the_range_where_it_doubles():
    scales = np.linspace(-3, 3, 25)
    residual = 0.02 * (1 + np.maximum(scales, 0))  # twice as much at 1, never below 0
    found = edges(scales, scales[None], residual[None])
    assert OFF == 2 and found.high == pytest.approx(1) and found.low == -math.inf
    assert "leave" in found.high_reason and "no end" in found.low_reason


def test_what_cannot_be_measured_is_outside():
    moved = np.where(SCALES > 1, math.nan, SCALES)
    found = edges(SCALES, moved[None], None)
    assert found.high == 1 and "measured" in found.high_reason
    assert math.isnan(edges(SCALES, np.full((2, 9), math.nan), None).low)
    assert edges(SCALES, -SCALES[None], None).high == 0


NODES = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])


@pytest.mark.parametrize("offset", [0.0, 0.4, -0.3])
def test_the_predicted_edge_of_a_sigmoid_is_exact(offset):
    """Slopes of tanh(k s + c) near 0 tell where a fifth is left far from 0."""
    steep = 0.8
    slopes = 1.7 * np.cosh(steep * NODES + offset) ** -2
    found = edges_of_slopes(NODES, np.stack([slopes, slopes], 1), None)
    at_zero = slopes[1:4] @ [0.25, 0.5, 0.25]
    for edge in (found.low, found.high):
        assert 1.7 * np.cosh(steep * edge + offset) ** -2 == pytest.approx(0.2 * at_zero, rel=1e-4)
    assert found.low < -1 and found.high > 1


def test_an_edge_between_the_scales_is_read_off():
    slopes = np.array([1, 1, 1, 1, -1.0])  # a fifth is left two fifths of the way from 0.5 to 1
    found = edges_of_slopes(NODES, slopes[:, None], None)
    assert found.high == pytest.approx(0.5 + 0.5 * 0.4) and found.low < -1


def test_a_straight_path_has_no_predicted_edge():
    assert edges_of_slopes(NODES, np.ones((5, 4)), None).high == math.inf
    residual = np.sqrt(1 + 3 * NODES**2 / 4)[:, None]  # r² is four at s = 2
    found = edges_of_slopes(NODES, np.ones((5, 1)), residual)
    assert (found.low, found.high) == (pytest.approx(-2), pytest.approx(2)) and "leave" in found.reason
    soon = np.array([2.5, 1, 1, 1, 1])[:, None]  # 6.25 at −1, 1 at −0.5: four is met between
    assert edges_of_slopes(NODES, np.ones((5, 1)), soon).low == pytest.approx(-0.5 - 0.5 * 3 / 5.25)


def test_slopes_that_are_unknown_or_fall():
    assert math.isnan(edges_of_slopes(NODES, np.full((5, 2), math.nan), None).high)
    assert edges_of_slopes(NODES, -np.ones((5, 2)), None).high == 0


def test_an_image_that_drops_out_leaves_the_mean_where_it_was():
    curves = np.stack([SCALES + 10, SCALES, SCALES - 4])
    whole = of.mean_curve(curves)
    np.testing.assert_allclose(whole, curves.mean(0))
    curves[0, 6:] = math.nan
    curves[1, :2] = math.nan
    np.testing.assert_allclose(of.mean_curve(curves), whole)
    assert edges(SCALES, curves, None).high == 0.5  # a third of the images is lost from scale 1 on
    assert edges(SCALES, curves, None).low == -1.0
    assert np.isnan(of.mean_curve(np.full((2, 9), math.nan))).all()
