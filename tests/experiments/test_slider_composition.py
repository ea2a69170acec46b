"""The study of sliders together: its parts agree with each other, and its page says what its numbers say."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import geoedit
from experiments.slider_composition import Settings
from experiments.slider_composition.commuting import commutations, foretold
from experiments.slider_composition.composing import NAMES, alone, composed, first_order, groups
from experiments.slider_composition.crossing import crossings
from experiments.slider_composition.figures import draw
from experiments.slider_composition.lab import Lab
from experiments.slider_composition.page import page
from geoedit.algebra import compose
from geoedit.sliders import ModuleChange, Slider
from manifolds import LowRank


def slider(pipe: Any, name: str, seed: int) -> Slider:
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for path, module in pipe.unet.named_modules():
        if path.endswith("attn2.to_v"):
            left, right = (
                torch.randn(*s, generator=generator) for s in ((64, 2), (2, module.weight.shape[1]))
            )
            changes[path] = ModuleChange(LowRank(0.2 * left, right / 8))
    return Slider(name, {"unet": changes})


@pytest.fixture(scope="module")
def lab() -> Lab:
    pipe = geoedit.testbeds.load("shapes-unet")
    attributes = (("size", 0), ("hue", 1))
    settings = replace(Settings(), attributes=attributes, prompts=("a bar",), seeds=(0, 1), sampling_steps=2)
    sliders = {name: slider(pipe, name, seed) for seed, name in enumerate(("size", "hue", "twin"))}
    return Lab(pipe, sliders, settings)


def test_two_halves_of_one_slider_are_the_slider_and_a_sum_is_both(lab: Lab) -> None:
    one, other = lab.sliders["size"], lab.sliders["hue"]
    whole, _ = lab.effects({"a": one}, [{"a": 1.0}])
    assert np.allclose(lab.in_order([(one, one)], 1.0)[0], whole, atol=0.02, equal_nan=True)
    together, _ = lab.effects({"a": one, "b": other}, [{"a": 1.0, "b": -0.5}])
    exact, _ = lab.effects({"c": compose([one @ 1, other @ -0.5])}, [{"c": 1.0}])
    assert np.allclose(exact, together, atol=0.02, equal_nan=True)  # 8 bits


def test_groups_are_all_pairs_in_both_signs_triples_and_all(lab: Lab) -> None:
    five = replace(lab, settings=Settings())
    assert [sum(len(group) == size for group in groups(five)) for size in (2, 3, 5)] == [20, 10, 2]


def test_the_parts_of_the_study_hold_together(lab: Lab, tmp_path: Any) -> None:
    effects = first_order(lab)
    joined = composed(lab, effects)
    ordered = commutations(lab, joined)
    family = {
        "alone": alone(lab),
        "interference": {"matrix": effects.matrix.to_dict("index"), "error": {}, "step": effects.step},
        "composed": joined,
        "crossed": crossings(lab),
        "commuting": ordered,
        "foretold": foretold(ordered),
        "seconds": {"training": 1, "measuring": 2},
    }
    assert {row["attribute"] for row in family["alone"]} == {"size", "hue"}
    assert set(effects.matrix.columns) == set(NAMES)
    assert {row["method"] for row in joined} >= {"exact", "truncate", "orthogonalise"}
    assert len(family["crossed"]) == 3 * (2 + 2) and len(ordered) == 1
    assert all(row["spearman"] is None for row in family["foretold"])  # one pair tells nothing
    about = {"date": "today", "machine": "here", "torch": "2", "diffusers": "0", "seconds": 3}
    found = {"settings": lab.settings.to_dict(), "families": {"shapes-unet": family}, "about": about}
    told = page(json.loads(json.dumps(found)))
    exact = [row["additivity"] for row in joined if row["method"] == "exact" and row["size"] == 2]
    assert f"| 2 (×2) | exact | {np.mean(exact):.2f} |" in told
    draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
