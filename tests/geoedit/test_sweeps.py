"""Edits followed over scales, held against edits that are really made and a diagnosis at one scale."""

import json

import numpy as np
import pytest
import torch

from geoedit import Concept, LinearSteer, Site, Template, collect, diagnose
from geoedit.concept import Prompt
from geoedit.diagnosis.plan import MEAN_DIFFERENCE, REUSED_VECTOR, Plan, PlannedEdit
from geoedit.diagnosis.sweeps import FRACTIONS, RUN_AT, choose_sweeps, follow, mean_axes, sweep_runs
from geoedit.shapes import concept_manifold, without_sentences

MONTHS = ("january", "february", "march", "april", "may", "june")
SITE = Site(1)


@pytest.fixture(scope="module")
def cycle():
    after = [*MONTHS[1:], MONTHS[0]]
    templates = [Template("after {value} comes", after), Template("the month after {value} is", after)]
    return Concept("months", MONTHS, templates, "cycle")


_kept = {}


@pytest.fixture
def found(shared_gpt2, tiny_tokenizer, cycle):
    """One diagnosis for all: nobody changes it."""
    if not _kept:
        options = {"apply": True, "max_edits": 60, "progress": False}
        _kept["found"] = diagnose(shared_gpt2, tiny_tokenizer, cycle, [SITE], **options)
    return _kept["found"]


@pytest.fixture
def samples(shared_gpt2, tiny_tokenizer, cycle):
    """States, number of value, number of sentence."""
    prompts = cycle.prompts()
    states = collect(shared_gpt2, tiny_tokenizer, prompts, [SITE], progress=False)[SITE]
    value = torch.tensor([cycle.index(prompt.value) for prompt in prompts])
    return states, value, torch.tensor([prompt.template_index for prompt in prompts])


def answer_to(model, tokenizer, text, vector, scale=1.0):
    ids = tokenizer(text, return_tensors="pt")
    if not bool(vector.any()) or scale == 0:
        return tokenizer.decode([int(model(**ids).logits[0, -1].argmax())]).strip()
    with LinearSteer(SITE, vector, scale=scale).on(model):
        return tokenizer.decode([int(model(**ids).logits[0, -1].argmax())]).strip()


def test_straight_answers_are_those_of_the_edit(found, samples, shared_gpt2, tiny_tokenizer, cycle):
    states, value, _ = samples
    means = torch.stack([states[value == number].mean(0) for number in range(6)])
    assert len(found.sweeps) == 8
    for sweep in found.sweeps:
        vector = means[cycle.index(sweep["to_value"])] - means[cycle.index(sweep["from_value"])]
        assert [entry["scale"] for entry in sweep["recorded"]] == sorted(RUN_AT)
        for entry in sweep["recorded"]:
            heard = answer_to(shared_gpt2, tiny_tokenizer, sweep["text"], vector, entry["scale"])
            assert entry["answer"] == heard
            assert entry["success"] == (heard == sweep["wanted"])


def test_geodesic_answers_are_those_of_moving_along_the_manifold(
    found, samples, shared_gpt2, tiny_tokenizer, cycle
):
    states, value, sentence = samples
    clean = without_sentences(states, value, sentence)
    manifold = concept_manifold(states, value, cycle, sentences=sentence).manifold
    texts = [prompt.text for prompt in cycle.prompts()]
    ran = [sweep for sweep in found.sweeps if sweep["geodesic"]]
    assert ran
    for sweep in ran:
        start = manifold.projx(clean[texts.index(sweep["text"])])
        end = manifold.projx(states[value == cycle.index(sweep["target"])].mean(0))
        way = manifold.geodesic(start, end, points=17)
        for entry, fraction in zip(sweep["geodesic"]["recorded"], FRACTIONS, strict=True):
            vector = way[round(16 * fraction)] - way[0]
            assert entry["scale"] == fraction
            assert entry["answer"] == answer_to(shared_gpt2, tiny_tokenizer, sweep["text"], vector)
            assert entry["success"] == (entry["answer"] == sweep["wanted"])


def test_a_sweep_predicts_what_the_diagnosis_predicts_at_that_scale(
    found, shared_gpt2, tiny_tokenizer, cycle
):
    every = {"max_edits": 1000, "progress": False}
    half = diagnose(shared_gpt2, tiny_tokenizer, cycle, [SITE], scale=0.5, **every).table
    keys = ("edit", "template", "source", "target", "from_value", "to_value")
    compared = 0
    for sweep in found.sweeps:
        same = half[np.logical_and.reduce([half[key] == sweep[key] for key in keys])]
        for expected in same["probability"]:
            at = sweep["scales"].index(0.5)
            assert sweep["probability"][at] == pytest.approx(expected, abs=2e-6)
            compared += 1
    assert compared >= 4


def test_positions_and_distances_off_the_curve(found, samples, cycle):
    states, value, sentence = samples
    clean = without_sentences(states, value, sentence).double()
    means = torch.stack([states[value == number].mean(0) for number in range(6)]).double()
    centre = means.mean(0)
    axes = np.linalg.svd((means - centre).numpy())[2][:3]
    signs = np.sign(((means - centre).numpy() @ axes.T * np.array(found.sites[0].coordinates)).sum(0))
    manifold = concept_manifold(states, value, cycle, sentences=sentence).manifold
    reach = manifold.period if manifold.closed else 5.0
    curve = manifold.at(torch.linspace(0, float(reach), 20_001)[:, None]).double()
    texts = [prompt.text for prompt in cycle.prompts()]
    for sweep in found.sweeps:
        vector = means[cycle.index(sweep["to_value"])] - means[cycle.index(sweep["from_value"])]
        moved = clean[texts.index(sweep["text"])] + torch.tensor(sweep["scales"]).double()[:, None] * vector
        expected = (moved - centre).numpy() @ axes.T * signs
        assert np.abs(np.array(sweep["position"]) - expected).max() < 1e-4
        nearest = torch.cdist(moved, curve).min(1)
        assert sweep["off"] == pytest.approx((nearest.values / manifold.noise).tolist(), rel=2e-3)
        foot = (curve[nearest.indices] - centre).numpy() @ axes.T * signs
        assert np.abs(np.array(sweep["foot"]) - foot).max() < 0.01 * np.abs(foot).max()


def test_sweeps_go_through_json(found, tmp_path):
    again = type(found).from_json(found.to_json(tmp_path / "found.json"))
    assert list(again.sweeps) == json.loads(json.dumps(found.sweeps))


def test_no_edit_is_run_unless_asked(shared_gpt2, tiny_tokenizer, cycle):
    found = diagnose(shared_gpt2, tiny_tokenizer, cycle, [SITE], max_edits=20, progress=False)
    assert found.sweeps and not any(sweep["recorded"] for sweep in found.sweeps)
    assert not any(sweep["geodesic"]["recorded"] for sweep in found.sweeps if sweep["geodesic"])


def planned(count):
    prompts = [Prompt(f"{n}", f"value {n}") for n in range(count)]
    edits = [
        PlannedEdit(kind, a, b, a, b, 1.0)
        for kind in (MEAN_DIFFERENCE, REUSED_VECTOR)
        for a in range(count)
        for b in range(count)
        if a != b
    ]
    return prompts, Plan(tuple(edits), len(edits))


@pytest.mark.parametrize(("sites", "expected"), [(1, 8), (13, 1), (100, 1)])
def test_sweeps_stay_a_small_part_of_the_work(sites, expected):
    prompts, plan = planned(4)
    sweeps = choose_sweeps(plan, prompts, scales=[1.0], sites=sites, seed=0)
    assert len(sweeps) == expected
    runs = sites * sum(len(sweep.ran) + len(FRACTIONS) for sweep in sweeps)
    assert runs <= max(200, 0.1 * sites * len(plan.edits)) or len(sweeps) == 1
    pairs = [(sweep.edits[0].kind, sweep.edits[0].source, sweep.edits[0].target) for sweep in sweeps]
    assert len(set(pairs)) == len(pairs)
    assert sweeps == choose_sweeps(plan, prompts, scales=[1.0], sites=sites, seed=0)


def test_the_scales_that_were_asked_for_are_among_those_that_are_run():
    prompts, plan = planned(3)
    sweep = choose_sweeps(plan, prompts, scales=[-1.0, 0.3, 4.0], sites=1, seed=0)[0]
    assert {-1.0, 0.3, 4.0} <= {edit.scale for edit in sweep.ran} and sweep.scales == sorted(sweep.scales)
    assert sweep.scales[0] == -1.0 and sweep.scales[-1] == 4.0 and len(sweep.scales) >= 33


def test_without_a_manifold_the_way_is_unknown_and_says_why():
    prompts, plan = planned(3)
    sweeps = choose_sweeps(plan, prompts, scales=[1.0], sites=1, seed=0)
    states = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    routes = follow(sweeps, torch.arange(3), states, states, None, "three values are too few")
    assert all(len(route.geodesic) == 0 and route.reason == "three values are too few" for route in routes)
    assert all(bool(route.off.isnan().all()) and route.foot is None for route in routes)
    edits, shift = sweep_runs(sweeps, routes)
    assert len(edits) == len(shift) == len(sweeps) * len(RUN_AT)


def test_axes_of_means_that_do_not_differ_are_zero():
    axes, centre = mean_axes(torch.ones(4, 6), [[0.0, 0.0, 0.0]] * 4)
    assert axes.shape == (3, 6) and not bool(axes.any()) and bool((centre == 1).all())
