import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel

from geoedit import Concept, Site, Template, collect, diagnose, run_with
from geoedit.activations.inputs import read_inputs
from geoedit.diagnosis import Diagnosis
from geoedit.diagnosis.advice import Facts, advise, site_advice
from geoedit.diagnosis.bends import of_curve, of_samples
from geoedit.diagnosis.geometry import dimension
from geoedit.diagnosis.off_manifold import (
    Departures,
    chord_departure,
    departures,
    expected_distance,
    tangent_departure,
    visible_part,
)
from geoedit.diagnosis.plan import MEAN_DIFFERENCE, REUSED_VECTOR, PlannedEdit, plan_edits
from geoedit.diagnosis.predict import Edits, Rows
from geoedit.diagnosis.result import SiteSummary
from geoedit.diagnosis.safe_scale import GRID, safe_interval, scaled_edits
from geoedit.diagnosis.straightness import functional_curvature, sample_edits
from manifolds.cloud.path_cloud import PathCloud

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "january")
NAN = math.nan


def turned(points, width=24):
    """Points turned at random into a wider space."""
    generator = torch.Generator().manual_seed(0)
    frame = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    return points.double() @ frame[: points.shape[1]]


def circle(count, radius=2.0):
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    return turned(torch.stack([radius * angle.cos(), radius * angle.sin()], 1))


def edits(numbers):
    """(source, target, from, to, scale); a prompt a value, numbered alike."""
    columns = list(zip(*numbers, strict=True))
    return Edits(*(torch.tensor(column) for column in columns[:4]), torch.tensor(columns[4]).float(), None)


def one_prompt_each(count):
    number = torch.arange(count)
    return Rows(number, torch.zeros_like(number), number, count)


# The expansions against true distances


def on_sphere(angle, turn, radius):
    """The point of a sphere at this angle from the pole, in this direction."""
    return radius * torch.tensor(
        [math.sin(angle) * math.cos(turn), math.sin(angle) * math.sin(turn), math.cos(angle)],
        dtype=torch.float64,
    )


def off_sphere(point, radius):
    return abs(float(point.norm()) - radius)


def sphere_form(u, v, at, radius):
    """II of a sphere: -<u, v> n / R, of the tangential parts."""
    normal = at / radius
    inside = (u - (u @ normal) * normal) @ (v - (v @ normal) * normal)
    return -(inside / radius) * normal


@pytest.mark.parametrize("scale", [0.5, 1.5, 2.0])
@pytest.mark.parametrize("bearing", [0.0, 1.0])
def test_chords_leave_a_sphere_as_expected_to_the_next_order(scale, bearing):
    radius, errors, sizes = 2.0, [], []
    for size in (0.1, 0.05):
        c, d = on_sphere(0.0, 0.0, radius), on_sphere(size, 0.3, radius)
        a = on_sphere(1.5 * size, 0.3 + bearing, radius)
        t, v, u = torch.tensor([scale], dtype=torch.float64), d - c, a - c
        bend, cross = (sphere_form(x, v, c, radius)[None] for x in (v, u))
        own = chord_departure(t, bend) - off_sphere(c + scale * v, radius)
        reused = chord_departure(t, bend, cross) - off_sphere(a + scale * v, radius)
        errors.append(max(abs(float(own)), abs(float(reused))))
        sizes.append(off_sphere(a + scale * v, radius))
    # What is expected halves twice with the sizes, what is missed at least three times.
    assert errors[1] < errors[0] / 7 and sizes[1] > sizes[0] / 4.5
    assert errors[0] < 0.1 * sizes[0]


def test_tangent_vectors_leave_an_ellipse_as_expected_to_the_next_order():
    a, b, where = 3.0, 1.5, 0.7
    point = np.array([a * math.cos(where), b * math.sin(where)])
    velocity = np.array([-a * math.sin(where), b * math.cos(where)])
    speed = np.linalg.norm(velocity)
    curvature = a * b / speed**3

    def distance(q):
        angles = np.linspace(where - 1, where + 1, 400_001)
        return np.hypot(a * np.cos(angles) - q[0], b * np.sin(angles) - q[1]).min()

    missed = []
    for size in (0.2, 0.1):
        end = point + 2.0 * size * velocity / speed
        found = tangent_departure(torch.tensor([2.0]), torch.tensor([[curvature * size**2]]))
        missed.append(abs(float(found) - distance(end)) / distance(end))
    assert missed[0] < 0.15 and missed[1] < 0.6 * missed[0]


def test_a_chord_ends_on_the_manifold_and_a_tangent_does_not():
    one, bend = torch.ones(1), torch.tensor([[0.0, 3.0]])
    assert float(chord_departure(one, bend)) == 0.0 and float(tangent_departure(one, bend)) == 1.5


def test_expected_distance_on_a_circle_of_values(device):
    count, radius = 48, 2.0
    means = circle(count, radius).to(device)
    bends = of_curve(means, None, closed=True)
    assert bends.reliable and bends.curvature == pytest.approx(1 / radius, rel=1e-3)
    asked = [
        (0, 2, 0, 2, 0.5),
        (0, 3, 0, 3, 1.5),
        (40, 43, 40, 43, 2.0),
        (3, 5, 1, 3, 1.0),
        (46, 1, 1, 4, 1.0),
    ]
    here = edits(asked)
    parts = (here.source, here.target, here.from_value, here.to_value, here.scale)
    here = Edits(*(part.to(device) for part in parts), None)
    rows = one_prompt_each(count)
    found = expected_distance(bends, here, Rows(rows.value.to(device), rows.template, rows.group, count))
    ends = [means[s] + t * (means[d] - means[c]) for s, _, c, d, t in asked]
    truth = torch.tensor([abs(float(end.norm()) - radius) for end in ends], device=device)
    torch.testing.assert_close(found.float(), truth, rtol=0.12, atol=0)


def test_expected_distance_knows_nothing_where_curvature_does_not():
    bends = of_curve(torch.eye(8, dtype=torch.float64), None, closed=True)
    assert not bends.reliable and "roughness" in bends.reason
    assert bool(expected_distance(bends, edits([(0, 1, 0, 1, 0.5)]), one_prompt_each(8)).isnan())


def test_a_sheet_bends_as_its_sphere_does():
    radius, side = 4.0, torch.linspace(-1, 1, 7, dtype=torch.float64)
    flat = torch.cartesian_prod(side, side)
    cap = turned(torch.cat([flat, (radius**2 - flat.square().sum(1, keepdim=True)).sqrt()], 1))
    bends = of_samples(cap, cap, dim=2)
    assert bends.reliable and bends.curvature == pytest.approx(1 / radius, rel=0.02)
    asked = edits([(24, 26, 24, 26, 0.5), (31, 33, 24, 26, 1.0), (25, 27, 24, 26, 1.0)])
    found = expected_distance(bends, asked, one_prompt_each(49))
    starts = zip(asked.source, asked.from_value, asked.to_value, asked.scale, strict=True)
    ends = [cap[s] + t * (cap[d] - cap[c]) for s, c, d, t in starts]
    truth = torch.tensor([abs(float(end.norm()) - radius) for end in ends], dtype=torch.float64)
    torch.testing.assert_close(found.double(), truth, rtol=0.1, atol=0.004)


def test_departures_are_distances_from_the_learned_circle():
    means = circle(24)
    manifold = PathCloud.fit(means, torch.arange(24), closed=True)
    asked = edits(
        [(0, 12, 0, 12, 0.5), (0, 6, 0, 6, 0.5), (6, 18, 0, 12, 1.0), (0, 6, 0, 6, 1.0), (0, 6, 0, 6, 0.5)]
    )
    found = departures(manifold, means, means, asked, one_prompt_each(24))
    half = 2 - math.sqrt(2)
    expected = [2.0, half, math.sqrt(4 + 16) - 2, 0.0, half]
    assert found.distance.tolist() == pytest.approx(expected, abs=1e-3) and len(found.off) == 4


def test_the_visible_part_by_the_dense_metric():
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    factor = torch.randn(4, 3, 6, generator=generator, dtype=torch.float64)
    asked = edits([(0, 1, 0, 1, 1.0), (2, 3, 2, 3, 1.0)])
    shift = torch.stack([states[1] - states[0], states[3] - states[2]])
    off = Departures(torch.randn(2, 6, generator=generator, dtype=torch.float64), torch.tensor([1, 0]))
    rows = Rows(torch.arange(4), torch.tensor([0, 0, 1, 1]), torch.arange(4), 4)
    found = visible_part(off, factor, states, shift, asked, rows)
    # In each sentence there are the edit's two ends alone, both on its way: their metrics count alike.
    for edit, ends in enumerate(((0, 1), (2, 3))):
        n = off.off[1 - edit]
        metric = sum(factor[end].T @ factor[end] for end in ends) / 2
        assert float(found[edit]) == pytest.approx(float((n @ metric @ n).sqrt()))
    same = visible_part(off, factor[:1].expand(4, -1, -1), states, shift, asked, rows)
    assert float(same[0]) == pytest.approx(float((factor[0] @ off.off[1]).norm()))
    assert bool((visible_part(off, 0 * factor, states, shift, asked, rows) == 0).all())


# Safe scales and advice


def test_the_safe_stretch_by_hand():
    scales = np.array([0.5, 1.0, 2.0])
    chances = np.array(
        [[0.25, 0.75, 0.25], [0.75, 0.9, 0.6], [0.1, 0.2, 0.3], [0.0, 0.0, 1.0], [0.9, 0.1, 0.9]]
    )
    low, high = safe_interval(scales, chances)
    np.testing.assert_allclose(low, [0.75, 1 / 3, np.nan, 1.5, 0.5 * 5 / 9])
    np.testing.assert_allclose(high, [1.5, 2.0, 0.0, 2.0, 0.75])


def test_each_pair_is_followed_over_the_grid_once():
    concept = Concept("c", WORDS[:6], [Template("a {value}"), Template("the {value}")], "cycle")
    prompts = concept.prompts()
    groups = [WORDS.index(prompt.value) for prompt in prompts]
    plan = plan_edits(concept, prompts, groups, scales=[1.0, -0.5], max_edits=10_000, seed=0)
    found = scaled_edits(plan, prompts, seed=0)
    assert len(found.edits) == len(GRID) * 2 * 2 * 30 and (found.which >= 0).all()
    for edit, number in zip(plan.edits, found.which, strict=True):
        followed = found.edits[number * len(GRID) : (number + 1) * len(GRID)]
        assert [abs(entry.scale) for entry in followed] == list(GRID)
        assert all(entry.scale * edit.scale > 0 and entry.kind == edit.kind for entry in followed)
        assert prompts[followed[0].source].value == prompts[edit.source].value
        assert prompts[followed[0].target].value == prompts[edit.target].value


@pytest.mark.parametrize(
    ("facts", "advice"),
    [
        (Facts(0.9, off_relative=0.5), "linear"),
        (Facts(0.9), "linear"),
        (Facts(0.9, off_relative=3.0, turn=0.4), "tangent"),
        (Facts(0.9, off_relative=3.0, turn=2.0), "geodesic"),
        (Facts(0.9, off_relative=3.0), "geodesic"),
        (Facts(0.1, off_relative=3.0, turn=0.4, own_means=True), "tangent"),
        (Facts(0.1, off_relative=0.5, safe_low=0.2, safe_high=0.6), "linear"),
        (Facts(0.1, off_relative=0.5, safe_high=0.0, own_means=True), "linear"),
        (Facts(0.1, off_relative=9.0, safe_high=0.0, elsewhere=("there", 0.8)), "another site: there"),
        (Facts(0.1, safe_high=0.0), "another site"),
        (Facts(NAN), "another site"),
    ],
)
def test_the_rules_of_the_advice(facts, advice):
    found, reason = advise(facts)
    assert found == advice and reason


@pytest.mark.parametrize(("scales", "expected"), [((-1.0, 0.5), (0.2, 0.8)), ((-1.0, -2.0), (2.0, 3.0))])
def test_the_safe_scales_of_a_site_are_those_of_one_direction(scales, expected):
    rows = [
        {"site": "here", "edit": MEAN_DIFFERENCE, "scale": scale, "probability": 0.6, "norm": 1.0}
        | dict(zip(("safe_low", "safe_scale"), (0.2, 0.8) if scale > 0 else (2.0, 3.0), strict=True))
        for scale in scales
    ]
    site = SiteSummary("here", {}, "here", "last", 0, [], [], 0.0, 0.0, 0.0)
    found = site_advice([site], pd.DataFrame(rows))[0].geometry
    assert (found["safe_low"][MEAN_DIFFERENCE], found["safe_scale"][MEAN_DIFFERENCE]) == expected


# Dimension


def test_dimension_of_few_values():
    found = dimension(circle(40))
    assert found["value"] == 1.0 and found["low"] <= 1 <= found["high"] and found["reason"] == ""
    unknown = dimension(torch.eye(9))
    assert unknown["value"] is None and "fill" in unknown["reason"]
    assert "too few" in dimension(torch.eye(4))["reason"]
    assert "do not differ" in dimension(torch.ones(9, 3))["reason"]


# Functional curvature through a model


def ordered(kind="cycle", values=WORDS, answers=True):
    after = [*values[1:], values[0]] if answers else None
    return Concept(
        "words", values, [Template(text, after) for text in ("after {value} comes", "the {value} is")], kind
    )


def test_functional_curvature_by_differences(tiny_model, tiny_tokenizer):
    model, concept, site = tiny_model.double(), ordered(), Site(1, token="value")
    prompts = concept.prompts()
    lengths = [len(ids) for ids in read_inputs(model, tiny_tokenizer, prompts).ids]
    states = collect(model, tiny_tokenizer, prompts, site, progress=False)[site].double()
    means = torch.randn(12, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = [PlannedEdit(MEAN_DIFFERENCE, 3, 5, 3, 5, 1.0)]
    ids = [7, 9, 11]
    found = functional_curvature(model, tiny_tokenizer, site, prompts, lengths, chosen, states, means, ids)

    def read(step):
        moved = states[3:4] + step * (means[5] - means[3])
        logits = run_with(model, tiny_tokenizer, [prompts[3]], {site: moved}, progress=False)[0, ids]
        return logits - logits.mean()

    h = 1e-2
    first = (read(h) - read(-h)) / (2 * h)
    second = (read(h) - 2 * read(0.0) + read(-h)) / h**2
    assert found["first"] == pytest.approx(float(first.norm()), rel=1e-2)
    assert found["ratio"] == pytest.approx(float(second.norm() / first.norm()), rel=3e-2)
    assert found["radius"] == pytest.approx(1 / found["ratio"]) and found["edits"] == 1


def test_edits_are_drawn_from_every_pair_before_one_comes_twice():
    some = [PlannedEdit(MEAN_DIFFERENCE, row, 0, row % 5, 5, 1.0) for row in range(40)]
    some += [PlannedEdit(REUSED_VECTOR, 0, 1, 2, 3, 1.0)] * 9
    found = sample_edits(some, [4] * 40, seed=0, count=7)
    assert len(found) == 7 and len({edit.from_value for edit in found[:5]}) == 5
    assert (
        found
        == sample_edits(some, [4] * 40, seed=0, count=7)
        != sample_edits(some, [4] * 40, seed=1, count=7)
    )
    assert all(edit.kind == MEAN_DIFFERENCE for edit in found)


# A whole diagnosis where the shape is known


@pytest.fixture(scope="module")
def looped(tiny_tokenizer):
    """Twelve words whose embeddings go round a circle of radius 3, read by a linear head."""
    from tests.conftest import build_gpt2
    from tests.geoedit.test_diagnose import set_by_hand

    angle = np.arange(12) * (2 * np.pi / 12)
    places = 3 * np.stack([np.cos(angle), np.sin(angle)], 1)
    model = set_by_hand(
        build_gpt2(len(tiny_tokenizer)), tiny_tokenizer, WORDS, places, 5 * places, np.zeros(12)
    )
    templates = [Template(f"{word} {{value}}", WORDS) for word in ("the", "a")]
    site = Site(1, token="last")
    return diagnose(
        model,
        tiny_tokenizer,
        Concept("loop", WORDS, templates, "cycle"),
        [site],
        scale=[1.0, 0.5],
        progress=False,
    )


def test_the_shape_of_a_loop_is_found(looped):
    found = looped.sites[0].geometry
    assert found["closed"] is True and found["reliable"] and found["kind"] == "path-cloud"
    assert found["radius"] == pytest.approx(3.0, rel=0.02)
    assert found["curvature"] == pytest.approx(1 / 3, rel=0.02)
    assert found["noise"] < 1e-3 and found["reach"] == pytest.approx(3.0, rel=0.1)
    assert found["functional"]["ratio"] < 1e-3 and found["functional"]["edits"] == 24
    path = np.array(found["path"])
    assert path.shape == (120, 3) and found["path_shape"] == [120]
    np.testing.assert_allclose(np.linalg.norm(path, axis=1), 3.0, rtol=0.01)
    drawn = np.array(looped.sites[0].coordinates)
    assert np.linalg.norm(drawn[:, None] - path[None], axis=2).min(1).max() < 0.1


def test_how_far_off_a_loop_edits_end(looped):
    table, angle = looped.table, dict(zip(WORDS, np.arange(12) * np.pi / 6, strict=True))

    def place(name):
        return 3 * np.array([math.cos(angle[name]), math.sin(angle[name])])

    ends = [
        place(row.source) + row.scale * (place(row.to_value) - place(row.from_value))
        for row in table.itertuples()
    ]
    truth = np.abs(np.linalg.norm(ends, axis=1) - 3)
    np.testing.assert_allclose(table["off_distance"], truth, atol=0.02)
    own = (table["edit"] == MEAN_DIFFERENCE) & (truth > 0.01) & (truth < 0.5)
    ratio = table["off_manifold"][own] / truth[own]
    assert own.any() and ratio.between(0.85, 1.05).all()
    # The readout is linear: what it sees of the departure is 5 times 3 times its length, over the root of 12.
    visible = table["off_visible"] / table["off_distance"]
    assert visible[table["off_distance"] > 0.1].std() < 1e-3 * visible.mean()


def test_safe_scales_and_advice_of_a_loop(looped):
    site = looped.sites[0].geometry
    assert 0.4 < site["safe_low"][MEAN_DIFFERENCE] < 1 <= site["safe_scale"][MEAN_DIFFERENCE]
    own = looped.table[(looped.table["edit"] == MEAN_DIFFERENCE) & (looped.table["scale"] == 1.0)]
    assert (own["safe_low"] < 1).all() and (own["safe_scale"] >= 1).all()
    assert site["advice"] == "linear" and "reused vector" in site["advice_reason"]
    said = {(entry.edit, entry.scale): entry for entry in looped.predict("zero", "three")}
    assert said[MEAN_DIFFERENCE, 1.0].advice == "linear"
    assert said[MEAN_DIFFERENCE, 0.5].advice in ("tangent", "geodesic")
    assert said[MEAN_DIFFERENCE, 1.0].safe_scale >= 1 and said[MEAN_DIFFERENCE, 1.0].advice_reason


def test_geometry_is_a_table_and_goes_to_json_and_back(looped, tmp_path):
    assert isinstance(looped.geometry, pd.DataFrame) and len(looped.geometry) == 1
    assert looped.geometry["radius"][0] == pytest.approx(3.0, rel=0.02)
    again = Diagnosis.from_json(looped.to_json(tmp_path / "d.json"))
    assert again.sites == looped.sites and again.geometry.equals(looped.geometry)
    pd.testing.assert_frame_equal(again.table, looped.table, check_exact=True)
    # What the probabilities are made of stays in memory: it would be half of the file.
    assert looped.features.index.equals(looped.table.index) and again.features is None
    assert not any(name.startswith("feature_") for name in looped.to_dict()["table"])
    assert again.predict("zero", "three") == looped.predict("zero", "three")


def test_files_of_version_1_are_read(looped, tmp_path):
    data = looped.to_dict()
    data["version"] = 1
    data["table"] = {
        name: column for name, column in data["table"].items() if not name.startswith(("off_", "safe_"))
    }
    for site in data["sites"]:
        del site["geometry"]
    del data["sweeps"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    old = Diagnosis.from_json(path)
    assert old.sites[0].geometry == {} and old.table["safe_scale"].isna().all()
    entry = old.predict("zero", "three")[0]
    assert entry.safe_scale is None and entry.advice and math.isnan(old.geometry["curvature"][0])


@pytest.mark.parametrize("kind", ["cycle", "categorical"])
def test_an_encoder_without_answers_has_a_shape_too(tiny_tokenizer, kind):
    config = BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config).eval()
    concept = ordered(kind, answers=False)
    found = diagnose(model, tiny_tokenizer, concept, [Site(0, token="value")], max_edits=20, progress=False)
    geometry = found.sites[0].geometry
    assert geometry["functional"]["norm"] == "last state" and geometry["functional"]["ratio"] > 0
    json.dumps(geometry, allow_nan=False)
    assert geometry["advice"] and (geometry["reliable"] or geometry["reason"])
    known = geometry["kind"] is not None
    assert found.table["off_distance"].notna().all() == known
