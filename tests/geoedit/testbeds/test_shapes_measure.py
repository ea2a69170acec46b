"""Attributes read from pixels: against what was drawn, scipy's least squares, and where nothing is."""

import math

import pytest
import scipy.optimize
import torch

from geoedit.errors import EditError
from geoedit.testbeds.shapes import ATTRIBUTES, digits, render, sample
from geoedit.testbeds.shapes.digit_measure import digit_measure
from geoedit.testbeds.shapes.measure import measure, shapes_measure

SD = torch.tensor([attribute.natural_sd for attribute in ATTRIBUTES.values()], dtype=torch.float64)


def drawn(count, seed, device="cpu", dtype=torch.float32, **changes):
    parameters, kinds = sample(count, generator=torch.Generator().manual_seed(seed), device=device)
    for name, change in changes.items():
        column = list(ATTRIBUTES).index(name)
        parameters[:, column] = change(parameters[:, column])
    return parameters.to(dtype), kinds


def error(measured, parameters):
    """The largest error of each attribute in natural standard deviations."""
    return ((measured.parameters - parameters).double() / SD.to(parameters.device)).abs().amax(0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 32), (torch.float64, 32), (torch.float32, 20)])
def test_what_was_drawn_is_read_again(dtype, size, device):
    parameters, kinds = drawn(40, 7, device, dtype)
    images = render(parameters, kinds, size=size)
    found = measure(images)
    assert found.found.all() and torch.equal(found.kinds, kinds)
    assert error(found, parameters).max() < 1e-3
    assert found.residual.max() < 1e-4 and found.relative.max() < 1e-3
    assert found.parameters.dtype == found.residual.dtype == dtype
    assert found.parameters.device.type == device.type


def test_outside_of_the_natural_ranges():
    for changes in (
        {"size": lambda value: 1.5 * value, "x": lambda value: value * 1.5},
        {"thickness": lambda value: 1.3 * value, "brightness": lambda value: value * 0.1},
        {"hue": lambda value: value * 1.4 - 50, "size": lambda value: 0.8 * value},
    ):
        parameters, kinds = drawn(10, 3, **changes)
        found = measure(render(parameters, kinds))
        assert torch.equal(found.kinds, kinds) and error(found, parameters).max() < 1e-3


def test_ways_to_write_one_shape():
    """A bar thicker than long is a longer bar turned by 90°; rotations go round at 90°, hues at 300°."""
    thick = torch.tensor([[0.3, 0.5, 0.8, 100.0, 20.0, 0.0, 0.1], [0.5, 0.2, 0.8, 350.0, 89.5, 0.0, 0.1]])
    over = torch.tensor([[0.5, 0.2, 0.8, 100.0, 95.0, 0.0, 0.1]])
    found = measure(render(torch.cat([thick, over]), torch.tensor([1, 0, 2])))
    assert found.parameters[0].tolist() == pytest.approx([0.5, 0.3, 0.8, 100, -70, 0, 0.1], abs=1e-2)
    assert found.parameters[1].tolist() == pytest.approx([0.5, 0.2, 0.8, -10, 89.5, 0, 0.1], abs=1e-2)
    assert found.parameters[2].tolist() == pytest.approx([0.5, 0.2, 0.8, 100, -85, 0, 0.1], abs=1e-2)


def test_the_residual_is_the_distance_to_the_nearest_drawing():
    """scipy's solver, over all seven parameters at once, by finite differences."""
    parameters, kinds = drawn(6, 11, dtype=torch.float64)
    noise = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    images = torch.nn.functional.avg_pool2d(render(parameters, kinds), 3, 1, 1) + 0.01 * noise
    images = images.clamp(0, 1)
    found = measure(images)
    low = torch.tensor([0.02, 0.02, 0.0, -60.0, -180.0, -1.0, -1.0]).double()
    high = torch.tensor([2.0, 2.0, 2.0, 300.0, 180.0, 1.0, 1.0]).double()
    for image, row, kind, residual in zip(images, parameters, found.kinds, found.residual, strict=True):

        def rest(x, image=image, kind=kind):
            return (render(torch.from_numpy(x), kind) - image).flatten().numpy()

        solved = scipy.optimize.least_squares(rest, row.numpy(), bounds=(low.numpy(), high.numpy()))
        nearest = math.sqrt(2 * solved.cost / image.numel())
        assert float(residual) <= nearest * 1.0001
        assert float(residual) == pytest.approx(nearest, rel=1e-2)
    own = images.square().mean((1, 2, 3)).sqrt()
    assert torch.allclose(found.relative * own, found.residual)


def test_no_shape_no_values():
    parameters, kinds = drawn(1, 5, x=lambda value: value - 0.4, size=lambda value: 0 * value + 0.35)
    other = parameters.clone()
    other[:, 5] += 1.0
    one = render(parameters, kinds)
    broken = one.clone()
    broken[0, 1, 3, 4] = math.nan
    grain = torch.rand(one.shape, generator=torch.Generator().manual_seed(0))
    nothing = torch.cat(
        [torch.zeros_like(one), torch.full_like(one, 0.5), torch.ones_like(one), grain, broken, broken / 0]
    )
    found = measure(torch.cat([nothing, one + render(other, kinds), one]))
    assert found.found.tolist() == [False] * 7 + [True]
    assert found.parameters[:7].isnan().all() and found.kinds[:7].eq(-1).all()
    assert found.residual.isnan().tolist() == [False] * 4 + [True] * 2 + [False] * 2
    assert found.residual[0] == 0 and found.relative[0] == 1 and found.relative[6] > 0.5
    assert error(measure(one), parameters).max() < 1e-3  # its neighbours did not touch it
    assert torch.allclose(found.parameters[7:], measure(one).parameters, atol=1e-4)


def test_of_any_batch_precision_and_mode():
    parameters, kinds = drawn(130, 13)  # more than are fitted at once
    images = render(parameters, kinds)
    found = measure(images)
    assert error(found, parameters).max() < 1e-3
    assert torch.allclose(measure(images[128:]).parameters, found.parameters[128:], rtol=1e-3, atol=1e-4)
    half = measure(images[:4].bfloat16())
    assert half.residual.dtype == torch.bfloat16 and error(half, parameters[:4]).max() < 0.1
    with torch.inference_mode():
        inside = measure(images[:4] * 1)
    assert torch.equal(inside.parameters, measure(images[:4].clone().requires_grad_()).parameters)
    empty = measure(images[:0])
    assert empty.parameters.shape == (0, 7) and empty.found.shape == (0,)


def test_as_an_evaluation_asks():
    parameters, kinds = drawn(3, 17)
    values = shapes_measure(render(parameters, kinds))
    assert list(values) == list(shapes_measure.natural_sd) == list(ATTRIBUTES)
    assert torch.allclose(values["hue"], parameters[:, 3], atol=0.01)
    assert shapes_measure.natural_sd["rotation"] == pytest.approx(120 / math.sqrt(12))


@pytest.mark.parametrize("read", [measure, shapes_measure, digit_measure])
def test_bad_input(read):
    image = torch.zeros(1, 3, 32, 32)
    for bad, message in (
        (image[0, 0], r"\(32, 32\)"),
        (image[:, :1], r"\(1, 1, 32, 32\)"),
        (image[:, :, :20], r"\(1, 3, 20, 32\)"),
        (image[..., :4, :4], "size of 8 or more"),
        (image - 1, "become these by x / 2"),
        (image + 255, "from 0 to 1"),
    ):
        with pytest.raises((EditError, TypeError)) as caught:  # shapes are checked before they arrive
            read(bad)
        if isinstance(caught.value, EditError):
            assert caught.match(message)


def test_digits_are_read_by_moments(device):
    parameters = torch.tensor([[0.8, 0.2, 1.0, 0.0, 70.0, 0.0, 0.0]] * 2, device=device)
    parameters[1, 2], parameters[1, 4] = 0.5, 90.0
    bars = render(parameters, torch.tensor([1, 1], device=device), size=128)
    seen = digit_measure(bars)
    assert seen["slant"].device.type == device.type
    # second moments of a bar along and across itself are 0.8² / 3 and 0.2² / 3; then turned by 70°
    lean, along, across = math.radians(70), 0.8**2 / 3, 0.2**2 / 3
    shear = (along - across) * math.sin(lean) * math.cos(lean)
    upright = along * math.sin(lean) ** 2 + across * math.cos(lean) ** 2
    told = math.degrees(math.atan(shear / upright))
    assert seen["slant"].tolist() == pytest.approx([told, 0], abs=0.2)
    area, outline, mean_colour = 1.6 * 0.4, 2 * (1.6 + 0.4), (1 + 0.25 + 0.25) / 3
    assert seen["stroke"].tolist() == pytest.approx([2 * area / outline] * 2, rel=0.05)
    assert seen["ink"].tolist() == pytest.approx([area / 4 * mean_colour, area / 8 * mean_colour], rel=0.02)
    dark = digit_measure(torch.zeros(1, 3, 32, 32, device=device))
    assert dark["ink"] == 0 and dark["slant"].isnan() and dark["stroke"].isnan()


def test_natural_spread_of_digits():
    seen = digit_measure(digits()[0].double())
    assert all(values.isfinite().all() for values in seen.values())
    for name, sd in digit_measure.natural_sd.items():
        assert sd == pytest.approx(float(seen[name].std()), rel=1e-3)
    blank = digit_measure(torch.full((1, 3, 32, 32), math.nan))
    assert all(values.isnan().all() for values in blank.values())
