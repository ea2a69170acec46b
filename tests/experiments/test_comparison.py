import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import entropy

import geoedit
from experiments.curvature_predicts_editing import comparison
from experiments.curvature_predicts_editing.control import disturbance, run_with_states, unedited
from experiments.curvature_predicts_editing.equal_success import (
    Cell,
    Draws,
    Sweep,
    at_scale,
    costs_at_equal_success,
    first_scale,
    ratio_at_equal_success,
)
from experiments.curvature_predicts_editing.ground import separation, survey
from experiments.curvature_predicts_editing.laboratory import Laboratory
from experiments.curvature_predicts_editing.measure import FLIPS, KL, NEAR, OFF, Gate, gated, only, sweep
from experiments.curvature_predicts_editing.moves import METHODS, Task, carry
from experiments.curvature_predicts_editing.reference import SentenceManifold, left_out_distances
from experiments.curvature_predicts_editing.sentences import Sentences, learned_templates
from geoedit.edits import GeodesicSteer, LinearSteer, TangentSteer
from geoedit.errors import EditError
from geoedit.site import Site
from manifolds.cloud.path_cloud import PathCloud

EVERY = Draws.of(4, 0, 0)


def a_sweep(rate, cost, pairs=4, scales=(0.0, 1.0, 2.0)):
    """Successes of the first pairs, in number as the rate says; every pair has the same cost."""
    success = np.array([[float(row < share * pairs) for share in rate] for row in range(pairs)])
    return Sweep(np.array(scales), success, {"cost": np.tile(np.array(cost, dtype=float), (pairs, 1))})


def test_the_first_scale_that_reaches_a_level_lies_on_the_straight_line_between_two_scales():
    scales, success = np.array([0.0, 1.0, 2.0, 4.0]), np.array([[0.0, 0.25, 0.75, 0.5]])
    for level, wanted in ((0.25, 1.0), (0.5, 1.5), (0.75, 2.0), (0.0, 0.0)):
        assert first_scale(scales, success, np.array([level])) == pytest.approx(wanted)
    assert np.isnan(first_scale(scales, success, np.array([0.8])))
    drawn = np.random.default_rng(0).random((20, 4))
    for row in drawn:
        fine = np.linspace(0, 4, 40001)
        line = np.interp(fine, scales, row)
        level = 0.9 * row.max()
        found = first_scale(scales, row[None], np.array([level]))[0]
        assert found == pytest.approx(fine[np.argmax(line >= level)], abs=2e-4)
        assert at_scale(scales, row[None], np.array([found])) == pytest.approx(np.interp(found, scales, row))


def test_costs_are_read_where_both_edits_succeed_equally_often():
    # The straight edit reaches 0.75 at scale 1, the other tops out at 0.5, at scale 2.
    straight, other = a_sweep((0, 0.75, 1), (0, 6, 10)), a_sweep((0, 0.25, 0.5), (0, 1, 2))
    judged, against = costs_at_equal_success(Cell("a", other, straight), "cost", EVERY)
    assert judged == pytest.approx([2.0]) and against == pytest.approx([4.0])  # 0.5 of the straight one: 2/3
    found = ratio_at_equal_success([Cell("a", other, straight)], "cost", resamples=20)
    assert found.value == pytest.approx(0.5) and (found.cells, found.of) == (1, 1)
    fixed = costs_at_equal_success(Cell("a", other, straight), "cost", EVERY, level=0.25)
    assert fixed[0] == pytest.approx([1.0]) and fixed[1] == pytest.approx([2.0])
    never = costs_at_equal_success(Cell("a", other, straight), "cost", EVERY, level=0.9)
    assert np.isnan(never[0]) and np.isnan(never[1])


def test_the_least_cost_looks_beyond_the_first_scale():
    falls = a_sweep((0, 0.5, 0.75), (0, 8, 3))
    level = a_sweep((0, 0.5, 0.5), (0, 4, 4))
    first = costs_at_equal_success(Cell("a", level, falls), "cost", EVERY)
    least = costs_at_equal_success(Cell("a", level, falls), "cost", EVERY, rule="least")
    assert first[1] == pytest.approx([8.0]) and least[1] == pytest.approx([3.0])
    assert first[0] == pytest.approx([4.0]) and least[0] == pytest.approx([4.0])


def test_an_edit_that_never_succeeds_is_counted_and_not_compared():
    good, bad = a_sweep((0, 1, 1), (0, 1, 1)), a_sweep((0, 0, 0), (0, 9, 9))
    found = ratio_at_equal_success([Cell("a", bad, good), Cell("b", good, good)], "cost", resamples=40)
    assert (found.cells, found.of, found.value) == (1, 2, 1.0)
    nothing = ratio_at_equal_success([Cell("a", bad, good)], "cost", resamples=40)
    assert math.isnan(nothing.value) and math.isnan(nothing.low) and nothing.cells == 0
    free = ratio_at_equal_success([Cell("a", good, a_sweep((0, 1, 1), (0, 0, 0)))], "cost", resamples=40)
    assert free.value == math.inf


def test_the_bootstrap_interval_holds_the_truth_about_as_often_as_it_says():
    rng, hits = np.random.default_rng(3), 0
    for trial in range(20):
        cells = []
        for group in range(12):
            ratio = math.exp(rng.normal(math.log(0.5), 0.3))
            cells.append(Cell(str(group), a_sweep((0, 1, 1), (0, ratio, 1)), a_sweep((0, 1, 1), (0, 1, 1))))
        found = ratio_at_equal_success(cells, "cost", resamples=100, seed=trial)
        hits += found.low <= 0.5 <= found.high
    assert hits >= 16


def test_scales_that_do_not_rise_from_zero_are_refused():
    with pytest.raises(EditError, match="rise from 0"):
        a_sweep((0, 1, 1), (0, 1, 1), scales=(0.5, 1.0, 2.0))


def test_disturbance_is_the_relative_entropy(device):
    logits = torch.randn(2, 6, 30, generator=torch.Generator().manual_seed(0)).double().to(device)
    before, after = logits.log_softmax(-1)
    wanted = entropy(before.exp().cpu().numpy(), after.exp().cpu().numpy(), axis=1)
    found = disturbance(before, after)
    assert found.device.type == device.type
    np.testing.assert_allclose(found.cpu().numpy(), wanted, rtol=1e-10)
    other = torch.nn.functional.kl_div(after, before, reduction="none", log_target=True).sum(1)
    torch.testing.assert_close(found, other)
    assert not disturbance(before, before).any()


@pytest.mark.parametrize("bend", [False, True])
def test_distance_from_a_sentences_curve_is_that_from_a_circle(bend):
    turn = torch.eye(5, dtype=torch.float64)
    if bend:
        turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()).Q
    angle = torch.arange(24, dtype=torch.float64) * (2 * math.pi / 24)
    ring = torch.stack([3 * angle.cos(), 3 * angle.sin(), *3 * [torch.zeros(24).double()]], 1) @ turn
    curve = SentenceManifold.through(ring, np.arange(24.0)[:, None], closed=True)
    points = torch.randn(200, 5, generator=torch.Generator().manual_seed(2)).double() * 3
    radial = (points[:, :2].norm(dim=1) - 3).square() + points[:, 2:].square().sum(1)
    torch.testing.assert_close(curve.distance(points @ turn), radial.sqrt(), atol=2e-3, rtol=0)
    assert curve.distance(ring).max() < 1e-9
    # Without one of 24 points the spline is off by less than the sagitta of a double step.
    assert (
        0
        < left_out_distances(ring, np.arange(24.0)[:, None], closed=True).max()
        < 3 * (1 - math.cos(math.pi / 12))
    )


def test_distance_from_a_sentences_sheet_is_that_from_a_plane():
    grid = np.array([(east, north) for north in range(5) for east in range(4)], dtype=float)
    states = torch.zeros(20, 6, dtype=torch.float64)
    states[:, :2] = torch.tensor(grid)
    sheet = SentenceManifold.through(states, grid)
    inner = torch.rand(100, 6, generator=torch.Generator().manual_seed(0)).double() * 2 + 0.5
    torch.testing.assert_close(sheet.distance(inner), inner[:, 2:].norm(dim=1), atol=1e-9, rtol=0)
    outside = torch.tensor([[-2.0, 1.0, 0, 0, 0, 0]]).double()
    torch.testing.assert_close(sheet.distance(outside), torch.tensor([2.0]).double(), atol=0.07, rtol=0)
    assert left_out_distances(states, grid).max() < 1e-9


def test_a_sentence_with_too_few_values_or_places_out_of_order_is_refused():
    with pytest.raises(EditError, match="give 3 or more"):
        SentenceManifold.through(torch.eye(2), np.arange(2.0)[:, None])
    with pytest.raises(EditError, match="rise"):
        SentenceManifold.through(torch.eye(3), np.array([[0.0], [2.0], [1.0]]))
    with pytest.raises(EditError, match="same state"):
        SentenceManifold.through(torch.zeros(4, 3), np.arange(4.0)[:, None])


def test_templates_that_begin_alike_are_in_one_half():
    texts = ["{value} is", "{value} was", "after {value}", "before {value}", "two before {value}"]
    for seed in range(20):
        learned = learned_templates(texts, seed)
        assert (0 in learned) == (1 in learned) and 0 < len(learned) < len(texts)
    assert len({tuple(learned_templates(texts, seed)) for seed in range(20)}) > 1
    with pytest.raises(EditError, match="begin alike"):
        learned_templates(["{value} is", "{value} was"], 0)


def test_separation_is_one_for_states_that_the_label_decides():
    label, template = np.repeat(np.arange(4), 3), np.tile(np.arange(3), 4)
    generator = torch.Generator().manual_seed(0)
    value, sentence = torch.randn(4, 8, generator=generator), torch.randn(3, 8, generator=generator)
    states = value[label] + sentence[template]
    chosen = np.ones(12, dtype=bool)
    assert separation(states, label, template, chosen) == pytest.approx(1.0)
    assert separation(states, np.zeros(12, dtype=int), template, chosen) == pytest.approx(0.0)


@pytest.fixture(scope="module")
def laboratory():
    model, tokenizer, world = geoedit.testbeds.load("almanac-gpt2")
    concepts = [world.concepts["weekdays"]]
    others = [world.concepts[name] for name in ("sizes", "temperatures")]
    found = Laboratory.of("almanac-gpt2", model, tokenizer, concepts, others, each=8, seed=0)
    return found, tokenizer, concepts[0]


@pytest.fixture(scope="module")
def ground(laboratory):
    lab, _, concept = laboratory
    sentences = Sentences.of(lab, concept, 0)
    pairs = sentences.draw_pairs(6, comparison.control_prompts(lab, concept.name, 0), 0)
    return survey(lab, sentences, pairs, Site(1, "residual_out", "value"), metric=False)


def test_pairs_are_held_out_answered_right_and_parallel(ground):
    sentences, pairs = ground.sentences, ground.pairs
    assert not sentences.learned[pairs.source].any() and sentences.right[pairs.source].all()
    assert (sentences.template[pairs.source] == sentences.template[pairs.target]).all()
    assert (sentences.token[pairs.source] != sentences.token[pairs.target]).all()
    step = (sentences.value[pairs.target] - sentences.value[pairs.source]) % 7
    assert ((sentences.value[pairs.end] - sentences.value[pairs.start]) % 7 == step).all()
    assert (pairs.start != pairs.source).all()
    own = set(ground.laboratory.rows["weekdays"])
    assert not own & set(pairs.controls.tolist())


def test_states_that_are_put_in_are_what_the_edits_leave_there(laboratory, ground):
    """Each edit through hooks gives the next token that the runner gives with the state put in."""
    lab, tokenizer, _ = laboratory
    scale, task = 0.7, ground.task(False, False)
    makers = {
        "linear": lambda row: LinearSteer(ground.site, task.vector[row], **options(row)),
        "tangent": lambda row: TangentSteer(ground.site, ground.manifold, task.vector[row], **options(row)),
        "geodesic": lambda row: GeodesicSteer(ground.site, ground.manifold, task.end[row], **options(row)),
    }

    def options(row):
        value = lab.prompts[ground.sentences.rows[ground.pairs.source[row]]].value
        return {"scale": scale, "value_ids": geoedit.tokens.spellings(tokenizer, [value])}

    for method in METHODS:
        if method.name not in makers:
            continue
        new = method.move(task, torch.tensor([scale]))[0]
        rows = ground.sentences.rows[ground.pairs.source].tolist()
        found = torch.zeros(len(rows), lab.before.shape[1], dtype=torch.float64)

        def use(chosen, after, found=found):
            found[torch.tensor(chosen)] = after

        lab.run(ground.site, rows, new, use)
        for row in range(3):
            inputs = tokenizer(lab.prompts[rows[row]].text, return_tensors="pt")
            with makers[method.name](row).on(lab.model), torch.no_grad():
                logits = lab.model(input_ids=inputs.input_ids).logits[0, -1]
            wanted = logits.double().log_softmax(-1)
            torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)


def test_what_is_not_edited_is_not_disturbed(laboratory, ground):
    lab, _, _ = laboratory
    for site in (ground.site, Site(4, "residual_out", "last")):
        rows = list(range(20))
        seen = []

        def use(chosen, after, seen=seen):
            seen.append(float(disturbance(lab.before[chosen], after).max()))

        run_with_states(lab.model, lab.source, site, lab.places[site], rows, lab.states[site][:20], use)
        assert seen and max(seen) < 1e-6
    torch.testing.assert_close(unedited(lab.model, lab.source), lab.before)
    with pytest.raises(EditError, match="one for each"):
        run_with_states(lab.model, lab.source, site, lab.places[site], [0], lab.states[site][:2], print)


def test_a_sweep_starts_unedited_and_a_gate_leaves_alone(ground):
    linear = METHODS[0]
    tasks = ground.task(False, False), ground.task(False, True)
    found, broken = sweep(ground, linear, tasks, (0.5, 1.0))
    again, _ = sweep(ground, linear, tasks, (0.5, 1.0))
    assert all((found.costs[name] == again.costs[name]).all() for name in found.costs)
    assert broken == 0 and found.scales.tolist() == [0.0, 0.5, 1.0]
    assert not found.success[:, 0].any() and found.success[:, 2].mean() >= 0.5
    for cost in (KL, FLIPS, OFF):
        assert np.abs(found.costs[cost][:, 0]).max() < 1e-9
    assert (found.costs[OFF][:, 1] > 0).all() and (found.costs[NEAR][:, 0] > 0).all()
    shut = Gate("shut", np.zeros(6, dtype=bool), np.zeros(6, dtype=bool))
    closed = gated(found, shut)
    assert not closed.success.any() and not closed.costs[KL].any()
    assert (closed.costs[NEAR] == found.costs[NEAR][:, :1]).all()
    half = gated(found, replace(shut, sources=np.arange(6) < 3))
    assert (half.success[:3] == found.success[:3]).all() and not half.success[3:].any()
    assert len(only(found, np.arange(6) < 2).success) == 2


def test_a_step_is_carried_around_a_circle_with_its_length_and_sense():
    angle = torch.arange(48, dtype=torch.float64) * (2 * math.pi / 48)
    ring = torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
    manifold = PathCloud.fit(ring, torch.arange(48), closed=True)
    start, end, states = ring[[0, 10]], ring[[4, 6]], 1.3 * ring[[15, 40]]
    velocity = carry(manifold, start, end, states)
    ahead = torch.stack([-angle.sin(), angle.cos(), 0 * angle], 1)
    size = 4 * 2 * math.pi / 48
    wanted = torch.stack([size * ahead[15], -size * ahead[40]])
    torch.testing.assert_close(velocity, wanted, atol=2e-3, rtol=0)
    task = Task(states, start, end, Site(0), manifold)
    (moved,) = (m for m in METHODS if m.name == "geodesic, carried step")
    new = moved.move(task, torch.tensor([1.0]))[0]
    torch.testing.assert_close(new, ring[[19, 36]] + 0.3 * ring[[15, 40]], atol=4e-3, rtol=0)


def test_a_slice_is_run_told_and_drawn(tmp_path):
    settings = replace(comparison.Settings.small(), scales=(0.5, 1.0), sites=1, pairs=6, resamples=4)
    result = comparison.run(settings)
    (cell,) = result.cells
    assert cell.carried >= 0.5 and not cell.impossible and not result.left
    told = result.to_dict()
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    rates = told["cells"][0]["curves"]["linear"]["success"]
    assert rates == pytest.approx(cell.sweeps["linear"].success.mean(0).tolist(), abs=1e-6)
    judged = [line for line in told["lines"] if line["where"] == "all" and line["judged"] == "geodesic"]
    assert {line["cost"] for line in judged} == {OFF, NEAR, KL, FLIPS}
    text = comparison.section(result)
    assert "| geodesic |" in text and "nan" not in text.lower()
    paths = comparison.figures(result, tmp_path, dpi=50)
    assert paths and all(path.stat().st_size > 5000 for path in paths)
