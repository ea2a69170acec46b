"""Predicted ranges against closed forms and differences, calibration against the truth that is drawn."""

import math

import numpy as np
import pytest
import torch

from geoedit import EditError
from geoedit.sliders.bases import base_of
from geoedit.sliders.calibrate import calibrate
from geoedit.sliders.calibration import Calibration
from geoedit.sliders.evaluation import prepare
from geoedit.sliders.evaluation.drawing import How, Painter
from geoedit.sliders.evaluation.measures import GenericMeasure, instrument
from geoedit.sliders.evaluation.work import Work
from geoedit.sliders.safe import SafeRange, _path, observed_range, predict, safe_range
from geoedit.testbeds.shapes.pipelines import new_autoencoder, new_pipeline
from tests.geoedit.sliders.drawn import Drawn, hand_made

EDGE = math.atanh(math.sqrt(0.8))
"""Where the slope of a tanh falls to a fifth."""


def work_of(pipe, slider, **how):
    base = base_of(pipe)
    tool = instrument(GenericMeasure(), pipe, lambda: torch.rand(8, 3, 16, 16))
    return Work(Painter(base, {"a": slider}, How(2, 2.0, **how)), tool, None, ("a bar", "an ellipse"), (0,))


@pytest.mark.parametrize("family", ["sdxl", "sd3", "flux"])
def test_derivatives_of_the_sampler_are_those_of_differences(family, fresh_pipe):
    pipe = fresh_pipe(family).to(torch.float64)
    work = work_of(pipe, hand_made(pipe, size=2.0).to(torch.float64))
    scales, h = (-0.5, 0.0, 0.5), 1e-3  # some parts compute in float32 whatever they are given
    _, tangents = _path(work, "a", work.rows, scales)
    assert tangents.dtype == torch.float64
    for scale, found in zip(scales, tangents, strict=True):
        above, below = (work.painter.latents(work.rows, [("a", scale + side * h)]) for side in (1, -1))
        torch.testing.assert_close(found, (above - below) / (2 * h), rtol=1e-3, atol=2e-5)


class Path(Painter):
    """A painter whose path is written down: a flat picture whose brightness is 0.4 + 0.2 tanh(scale)."""

    def __init__(self, pipe, slider):
        self.base, self.sliders, self.how = base_of(pipe), {"a": slider}, How(2, 1.0)

    def latents(self, rows, scaled, *, steps=None):
        light = 0.4 + 0.2 * torch.tanh(scaled[0][1])
        return light.expand(len(rows), 3, 8, 8)


def test_a_tanh_is_predicted(tiny_sd1, monkeypatch):
    painter = Path(tiny_sd1, hand_made(tiny_sd1))
    monkeypatch.setattr(painter.base, "decode", lambda latents: latents)
    measure = lambda images: {"light": images.mean((1, 2, 3))}  # noqa: E731
    measure.natural_sd = {"light": 0.1}
    tool = instrument(measure, tiny_sd1, lambda: None)
    work = Work(painter, tool, None, ("a", "b"), (0, 1))
    from geoedit.sliders.evaluation.claims import Claim

    for own in (Claim("light"), None):
        found = predict(work, "a", own)
        assert found.high == pytest.approx(EDGE, rel=0.05) and found.low == pytest.approx(-EDGE, rel=0.05)
        assert found.interval[1][0] == pytest.approx(found.high) and 1.0 in found and 2.0 not in found
    assert predict(work, "a", Claim("light", -1)).high == 0  # it should fall, and does not


def test_a_range_is_predicted_for_every_family(tiny_pipe):
    found = safe_range(
        tiny_pipe, hand_made(tiny_pipe), prompts=["a bar", "a shape"], seeds=1, steps=2, guidance=2.0
    )
    assert isinstance(found, SafeRange) and found.reason
    assert found.low <= 0 <= found.high or math.isnan(found.low)
    assert found.details["functional_curvature"] > 0
    told = found.to_dict()
    assert all(value is None or math.isfinite(value) for value in (told["low"], told["high"]))


def test_arguments_of_a_range_are_looked_at(tiny_sd1):
    slider = hand_made(tiny_sd1, "unheard of")
    with pytest.raises(EditError, match="reach"):
        safe_range(tiny_sd1, slider, prompts=["a"], reach=0)
    with pytest.raises(EditError, match="attribute="):
        observed_range(tiny_sd1, slider, prompts=["a bar", "b"], seeds=1, steps=1)


@pytest.fixture(scope="module")
def shapes_pipe():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return new_pipeline("unet", new_autoencoder())


@pytest.fixture
def drawn(monkeypatch):
    """Rendered truth: size follows twice a tanh of the scale, in natural standard deviations."""
    monkeypatch.setattr(prepare, "Painter", Drawn)
    monkeypatch.setattr(Drawn, "rule", staticmethod(lambda label, scale: {"size": 1.4 * math.tanh(scale)}))


def test_the_observed_range_of_a_drawn_tanh(shapes_pipe, drawn):
    found = observed_range(shapes_pipe, hand_made(shapes_pipe), prompts=["a bar", "an ellipse"], seeds=2)
    assert found.high == pytest.approx(EDGE, abs=0.15) and found.low == pytest.approx(-EDGE, abs=0.15)
    assert found.interval[1][0] <= found.high <= found.interval[1][1] and found.known


def test_calibration_makes_equal_steps(shapes_pipe, drawn):
    slider = hand_made(shapes_pipe, measured={"safe_range": [-1.0, 1.0]})
    options = {"prompts": ["a bar", "an ellipse"], "seeds": 2, "factors": np.linspace(-2, 2, 17).tolist()}
    found = calibrate(shapes_pipe, slider, **options)
    unit = math.atanh(1 / 1.4)  # 1.4 tanh(unit) = 1
    assert found.factor(1.0) == 1 and found.factor(0.0) == 0
    change = found.changes["unet"]
    for path, old in slider.changes["unet"].items():
        torch.testing.assert_close(
            change[path].matrix.dense(), unit * old.matrix.dense(), rtol=0.02, atol=1e-3
        )
    for scale in (-0.9, -0.5, 0.5, 0.9):
        assert 1.4 * math.tanh(unit * found.factor(scale)) == pytest.approx(scale, abs=0.03)
    assert found.safe_range[1] == pytest.approx(1.4 * math.tanh(1.0), abs=0.03)  # the same factor, new units
    assert found.calibration.attribute == "size" and found.calibration.error < 0.05


def test_what_cannot_be_calibrated_is_refused(shapes_pipe, drawn, monkeypatch):
    options = {"prompts": ["a bar"], "seeds": 2}
    slider = hand_made(shapes_pipe)
    with pytest.raises(EditError, match="does not rise"):
        calibrate(shapes_pipe, slider, attribute="-size", **options)
    monkeypatch.setattr(Drawn, "rule", staticmethod(lambda label, scale: {"size": 0.4 * math.tanh(scale)}))
    with pytest.raises(EditError, match="never by 1"):
        calibrate(shapes_pipe, slider, **options)
    with pytest.raises(EditError, match="give attribute="):
        calibrate(shapes_pipe, hand_made(shapes_pipe, "unheard of"), **options)


def test_factors_are_widened_until_one_deviation(shapes_pipe, drawn, monkeypatch):
    monkeypatch.setattr(Drawn, "rule", staticmethod(lambda label, scale: {"size": 0.3 * scale}))
    found = calibrate(shapes_pipe, hand_made(shapes_pipe), prompts=["a bar"], seeds=1, factors=(-1, 0, 1))
    assert found.calibration.details["factor"] == pytest.approx(1 / 0.3, rel=0.02)
    assert math.isnan(found.calibration.error)


def test_a_calibration_is_a_map_there_and_back(device):
    curve = Calibration("size", (-1.5, -0.5, 0.0, 1.0, 2.0), (-3.0, -0.4, 0.0, 1.0, 4.0))
    scales = torch.linspace(-3, 4, 29, device=device, dtype=torch.float64, requires_grad=True)
    factors = curve.factor(scales)
    torch.testing.assert_close(curve.scale(factors), scales)
    inside = np.interp(scales.detach().cpu(), curve.scales, curve.factors)
    known = (scales >= -1.5) & (scales <= 2)
    torch.testing.assert_close(factors[known].detach().cpu(), torch.tensor(inside)[known.cpu()])
    assert float(factors[-1].detach()) == pytest.approx(4 + 2 * 3)  # the last piece goes on
    factors.sum().backward()
    assert (scales.grad > 0).all()
    again = Calibration.from_dict(curve.to_dict())
    assert again.factors == curve.factors and math.isnan(again.error)


@pytest.mark.parametrize(
    ("scales", "factors", "message"),
    [
        ((0.0, 1.0), (0.0, 2.0), "must be factor"),
        ((0.0, 1.0, 2.0), (0.0, 1.0, 1.0), "do not rise"),
        ((0.0, 1.0, math.nan), (0.0, 1.0, 2.0), "finite"),
        ((0.0,), (0.0,), "two or more"),
    ],
)
def test_maps_that_cannot_be_undone_are_refused(scales, factors, message):
    with pytest.raises(EditError, match=message):
        Calibration("size", scales, factors)


def test_damaged_calibrations_are_refused():
    with pytest.raises(EditError, match="no calibration"):
        Calibration.from_dict({"attribute": "size", "scales": [0, 1]})
