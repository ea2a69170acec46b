"""The world of shapes: its ranges, its words, and its drawings against known areas, moments and colours."""

import colorsys
import math

import pytest
import torch
from transformers import AutoTokenizer

from geoedit.errors import EditError
from geoedit.testbeds.shapes import ATTRIBUTES, CLASSES, caption, digits, render, sample
from geoedit.testbeds.shapes.card import ENDS, contexts, phrase
from geoedit.testbeds.shapes.digits import digit_caption
from geoedit.testbeds.shapes.render import colour, coverage
from geoedit.testbeds.shapes.tokens import LENGTH, build_tokenizer
from geoedit.testbeds.shapes.world import shares, values, vocabulary


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_attributes_are_uniform_and_independent(device):
    parameters, kinds = sample(20_000, generator=seeded(), device=device)
    assert parameters.device.type == kinds.device.type == device.type
    for column, attribute in zip(parameters.T.double(), ATTRIBUTES.values(), strict=True):
        assert attribute.low <= column.min() and column.max() <= attribute.high
        assert float(column.std()) == pytest.approx(attribute.natural_sd, rel=0.02)
    assert (torch.corrcoef(parameters.T) - torch.eye(7, device=device)).abs().max() < 0.03
    assert torch.bincount(kinds).tolist() == pytest.approx([20_000 / 3] * 3, rel=0.05)
    assert torch.allclose(values(shares(parameters)), parameters, atol=1e-5)
    again, _ = sample(20_000, generator=seeded(), device=device)
    assert torch.equal(again, parameters)


def test_captions_say_what_is_so():
    generator = seeded(1)
    parameters, kinds = sample(200, generator=generator)
    said = dict.fromkeys(ATTRIBUTES, 0)
    for row, kind in zip(shares(parameters).tolist(), kinds.tolist(), strict=True):
        text = " " + caption(row, kind, said=0.8, generator=generator) + " "
        assert f" {CLASSES[kind]} " in text or " shape " in text
        assert set(text.split()) <= set(vocabulary())
        for attribute, share in zip(ATTRIBUTES.values(), row, strict=True):
            for phrase_, (low, high) in attribute.words.items():
                if f" {phrase_} " in text:
                    assert low <= share <= high
                    said[attribute.name] += 1
    assert min(said.values()) > 50


def test_every_word_of_the_world_is_one_token_and_stays_it_in_a_folder(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for word in vocabulary():
        assert len(tokenizer(word, add_special_tokens=False).input_ids) == 1
    longest = "a very small very thick bright orange diamond level on the right at the bottom"
    ids = loaded(longest).input_ids
    assert ids == tokenizer(longest).input_ids and len(ids) == len(longest.split()) + 2 <= LENGTH
    assert loaded.decode(ids, skip_special_tokens=True).strip() == longest
    assert loaded("an unheard-of word, très étrange").input_ids  # goes by bytes


@pytest.mark.parametrize(("kind", "area"), [(0, math.pi), (1, 4.0), (2, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_area_and_moments_of_each_class(kind, area, dtype, device):
    """Against the areas and second moments of an ellipse, a rectangle and a rhombus."""
    length, width, x, y, angle = 0.6, 0.25, 0.1, -0.15, 30.0
    row = torch.tensor([length, width, 1.0, 0.0, angle, x, y], dtype=dtype, device=device)
    size = 128
    cover = coverage(row, torch.tensor(kind, device=device), size=size)
    assert cover.dtype == dtype and cover.device.type == device.type
    middles = (torch.arange(size, dtype=dtype, device=device) + 0.5) * 2 / size - 1
    across, up = middles.expand(size, size), -middles[:, None].expand(size, size)
    mass = cover.sum()
    assert float(mass) * (2 / size) ** 2 == pytest.approx(area * length * width, rel=0.02)
    assert float((cover * across).sum() / mass) == pytest.approx(x, abs=1e-3)
    assert float((cover * up).sum() / mass) == pytest.approx(y, abs=1e-3)
    turn = math.radians(angle)
    u = (across - x) * math.cos(turn) + (up - y) * math.sin(turn)
    v = (up - y) * math.cos(turn) - (across - x) * math.sin(turn)
    share = {0: 1 / 4, 1: 1 / 3, 2: 1 / 6}[kind]
    assert float((cover * u**2).sum() / mass) == pytest.approx(share * length**2, rel=0.03)
    assert float((cover * v**2).sum() / mass) == pytest.approx(share * width**2, rel=0.06)
    assert abs(float((cover * u * v).sum() / mass)) < 1e-3


def test_colours_are_hsv():
    for hue in range(0, 360, 7):
        told = colour(torch.tensor(0.8, dtype=torch.float64), torch.tensor(float(hue), dtype=torch.float64))
        assert told.tolist() == pytest.approx(colorsys.hsv_to_rgb(hue / 360, 0.75, 0.8), abs=1e-12)


@pytest.mark.parametrize("kind", range(3))
def test_drawings_are_smooth_and_their_own_image_under_a_half_turn(kind):
    parameters = sample(3, generator=seeded(2))[0].double()
    kinds = torch.full((3,), kind)
    turned = parameters.clone()
    turned[:, 4] += 180
    assert torch.allclose(render(parameters, kinds), render(turned, kinds), atol=1e-9)
    assert render(parameters[0], kinds[0]).shape == (3, 32, 32)
    assert torch.autograd.gradcheck(
        lambda rows: render(rows, kinds, size=8),
        parameters.requires_grad_(),
        rtol=1e-3,
        atol=1e-5,
        fast_mode=True,
    )


def test_a_class_that_there_is_not():
    with pytest.raises(EditError, match=r"classes 0 to 2 \(ellipse, bar, diamond\), not \[3\]"):
        render(torch.zeros(1, 7), torch.tensor([3]))


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    images, names = digits()
    assert images.shape == (1797, 3, 32, 32) and names.tolist() == load_digits().target.tolist()
    assert images.min() >= 0 and images.max() <= 1
    small = torch.nn.functional.avg_pool2d(images[:, :1], 4)[:, 0]
    original = torch.from_numpy(load_digits().images).float() / 16
    assert torch.corrcoef(torch.stack([small.flatten(), original.flatten()]))[0, 1] > 0.95
    assert digit_caption(3) == "the digit three"


def test_phrases_have_the_order_of_captions_and_words_that_are_far_apart():
    assert phrase({"y": "at the top", "hue": "orange"}, "bar") == "an orange bar at the top"
    assert phrase({}, "ellipse") == "an ellipse"
    for words, noun in contexts(40, generator=seeded(3)):
        text = phrase(words, noun)
        assert set(text.split()) <= set(vocabulary()) and noun in text
    for name, (low, high) in ENDS.items():
        told = ATTRIBUTES[name].words
        assert told[low][1] < told[high][0]
    with pytest.raises(EditError, match=r"no attribute 'colour'; they have size, thickness"):
        phrase({"colour": "red"}, "bar")
