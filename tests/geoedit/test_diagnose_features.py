import math

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import shortest_path

from geoedit.diagnosis.features import FEATURES, LENGTHS, MARGINS, edit_features
from geoedit.diagnosis.landing import interpolated_outputs, output_margin, pulled_back_distances
from geoedit.diagnosis.paths import Paths, Sentence, shortest_ways, weights
from geoedit.diagnosis.predict import Edits, Gradients, Rows
from geoedit.errors import EditError

VALUES, WIDTH = 5, 6


def quadratic(seed=0, curved=1.0, dtype=torch.float64, device="cpu"):
    """States of one sentence, and outputs f(x) = b + B x + curved x^T A x / 2 with their exact Jacobians."""
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(VALUES, WIDTH, generator=draw, dtype=torch.float64)
    linear = torch.randn(VALUES + 1, WIDTH, generator=draw, dtype=torch.float64)
    second = torch.randn(VALUES + 1, WIDTH, WIDTH, generator=draw, dtype=torch.float64)
    second = curved * (second + second.mT) / 4
    offset = torch.randn(VALUES + 1, generator=draw, dtype=torch.float64)

    def outputs(x):
        return offset + x @ linear.T + torch.einsum("nd,kde,ne->nk", x, second, x) / 2

    jacobians = linear + torch.einsum("kde,ne->nkd", second, states)
    return states.to(device, dtype), jacobians.to(device, dtype), outputs, outputs(states).to(device, dtype)


def edits_of(pairs, scale, device="cpu"):
    source, target = torch.tensor(pairs, device=device).T
    scales = torch.full((len(pairs),), float(scale), device=device)
    return Edits(source, target, source, target, scales, target)


def rows_of(outputs=None, device="cpu", count=VALUES):
    number = torch.arange(count, device=device)
    return Rows(number, torch.zeros_like(number), number, count, outputs)


PAIRS = [(0, 1), (0, 3), (2, 1), (4, 0), (3, 2)]


def features(states, jacobians, outputs, scale=1.0, pairs=PAIRS):
    device = states.device
    return edit_features(
        states, states, Gradients(answers=jacobians), rows_of(outputs, device), edits_of(pairs, scale, device)
    )


def true_margin(outputs, states, scale):
    source, target = torch.tensor(PAIRS).T
    landed = outputs(states[source] + scale * (states[target] - states[source]))
    return output_margin(landed, target)[0]


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_what_a_linear_network_says_is_foreseen_by_every_margin(scale, device):
    states, jacobians, outputs, seen = quadratic(curved=0.0)
    expected = true_margin(outputs, states, scale).to(device)
    found = features(states.to(device), jacobians.to(device), seen.to(device), scale)
    for name in ("landing", "landing_free", "landing_rows", "landing_sharp", "along_path", "first_order",
                 "two_ends", "second_order", "from_target"):  # fmt: skip
        assert torch.allclose(found[name], expected, atol=1e-9), name
    assert torch.allclose(found["share"], torch.ones_like(expected))
    assert torch.allclose(found["pair_share"], torch.ones_like(expected))
    for name in ("bend_fisher", "wander_fisher", "closure", "doubt"):
        assert float(found[name].abs().max()) < 1e-9, name
    assert all(column.device.type == device.type for column in found.values())


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_a_quadratic_network_is_foreseen_by_the_change_of_its_gradient(scale):
    states, jacobians, outputs, seen = quadratic()
    found = features(states, jacobians, seen, scale)
    expected = true_margin(outputs, states, scale)
    assert torch.allclose(found["second_order"], expected, atol=1e-9)
    assert torch.allclose(found["two_ends"], expected, atol=1e-9) == (scale == 1.0)
    assert not torch.allclose(found["first_order"], expected, atol=1e-3)
    # The trapezoid between two prompts is exact, so that nothing is left unexplained.
    assert float(found["closure"].abs().max()) < 1e-9
    assert torch.allclose(found["pair_share"], torch.ones_like(expected), atol=1e-9)


def test_landing_is_that_of_the_diagnosis():
    states, jacobians, _, seen = quadratic(3)
    source, target = torch.tensor(PAIRS).T
    shift = 1.7 * (states[target] - states[source])
    answers = jacobians[:, :-1]
    factor = (answers - answers.mean(1, keepdim=True)) / VALUES**0.5
    distances = pulled_back_distances(factor, states, source, target, shift)
    found = features(states, jacobians, seen, 1.7)
    landed = interpolated_outputs(seen, jacobians, states, distances, found["share"][0], source, shift)
    assert torch.allclose(found["landing"], output_margin(landed, target)[0], atol=1e-9)


def test_bend_by_hand():
    # Outputs (x^2 / 2, 0, 0): the response to a step at x is x times it, so that the bend from 1 to 3 is 2/4.
    states = torch.tensor([[1.0], [3.0], [7.0]], dtype=torch.float64)
    jacobians = torch.stack([states, 0 * states, 0 * states], 1)
    seen = torch.cat([states**2 / 2, 0 * states, 0 * states], 1)
    found = edit_features(
        states, states, Gradients(answers=torch.cat([jacobians, 0 * jacobians[:, :1]], 1)),
        rows_of(torch.cat([seen, 0 * seen[:, :1]], 1), count=3), edits_of([(0, 1), (0, 2)], 0.5),
    )  # fmt: skip
    assert found["bend_fisher"].tolist() == pytest.approx([2 / 4, 6 / 8])
    assert found["length_plain"].tolist() == pytest.approx([0.5, 0.5])
    assert found["missed_plain"].tolist() == pytest.approx([0.5, 0.5])
    # At 2 the nearest row is 1 away, at 4 too; the rows themselves are 2, 2 and 4 from their nearest.
    assert found["off_plain"].tolist() == pytest.approx([1 / 2, 2 / 4])
    assert found["growth"].tolist() == pytest.approx([2 / 2, 4 / 4])


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_lengths_on_a_circle(scale):
    count, steps = 12, 4
    angle = 2 * math.pi * torch.arange(count, dtype=torch.float64) / count
    states = torch.stack([angle.cos(), angle.sin()], 1)
    # The network reads the two coordinates: its metric is the plain one, up to a factor.
    read = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    jacobians = read.expand(count, -1, -1)
    rows = Rows(torch.arange(count), torch.zeros(count, dtype=torch.long), torch.arange(count) % 4, count,
                states @ read.T)  # fmt: skip
    edits = Edits(*(torch.tensor([number]) for number in (0, steps - 1, 0, steps - 1)),
                  torch.tensor([scale]), torch.tensor([steps - 1]))  # fmt: skip
    found = edit_features(states, states, Gradients(answers=jacobians), rows, edits)
    chord = 2 * math.sin(math.pi * (steps - 1) / count)
    near = 2 * math.sin(math.pi / count)
    for kind in ("plain", "fisher"):
        assert float(found[f"length_{kind}"]) == pytest.approx(scale)
        assert float(found[f"cosine_{kind}"]) == pytest.approx(1.0)
        assert float(found[f"missed_{kind}"]) == pytest.approx(abs(1 - scale))
        assert float(found[f"reach_{kind}"]) == pytest.approx(scale * chord / near)
        assert float(found[f"detour_{kind}"]) == pytest.approx((steps - 1) * near / chord)
    landed = 1 + scale * (states[steps - 1] - states[0])[0], scale * states[steps - 1, 1]
    assert float(found["growth"]) == pytest.approx(math.hypot(*landed))


def test_shortest_ways_agree_with_scipy():
    draw = np.random.default_rng(0)
    points = torch.from_numpy(draw.normal(size=(30, 2)))
    distances = (points[:, None] - points[None]).norm(dim=2)
    found = shortest_ways(distances).numpy()
    # By hand: the longest edge that is needed is found by trying them all.
    plain = distances.numpy()
    for limit in np.sort(plain, axis=None):
        graph = np.where(plain <= limit * (1 + 1e-5), plain, 0)
        ways = shortest_path(graph, directed=False)
        if np.isfinite(ways).all():
            break
    assert np.allclose(found, ways)


@pytest.mark.parametrize("change", ["turned", "other units", "shifted outputs"])
def test_features_do_not_depend_on_the_frame(change):
    states, jacobians, _, seen = quadratic(5)
    before = features(states, jacobians, seen, 1.5)
    if change == "turned":
        turn, _ = torch.linalg.qr(
            torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)).double()
        )
        states, jacobians = states @ turn, jacobians @ turn
    elif change == "other units":
        states, jacobians = 250 * states, jacobians / 250
    else:
        seen = seen + 7
    after = features(states, jacobians, seen, 1.5)
    for name in FEATURES:
        assert torch.allclose(before[name], after[name], atol=1e-8, equal_nan=True), name


def test_an_edit_does_not_depend_on_the_others():
    states, jacobians, _, seen = quadratic(2, dtype=torch.float32)
    together = features(states, jacobians, seen, 2.0, PAIRS * 40)
    alone = features(states, jacobians, seen, 2.0, PAIRS[1:2])
    for name in FEATURES:
        column = together[name].reshape(40, -1)
        assert torch.allclose(column, column[:1].expand_as(column), rtol=1e-4, atol=1e-4, equal_nan=True)
        assert torch.allclose(column[0, 1], alone[name][0], rtol=1e-4, atol=1e-4, equal_nan=True), name
        assert together[name].dtype == torch.float32


def test_without_answers_only_lengths_are_known():
    states, jacobians, _, _ = quadratic()
    for gradients in (Gradients(sampled=jacobians), Gradients(output=jacobians)):
        edits = edits_of(PAIRS, 1.0)
        found = edit_features(states, states, gradients, rows_of(), edits)
        assert all(bool(found[name].isnan().all()) for name in MARGINS)
        assert all(bool(found[name].isfinite().all()) for name in LENGTHS if name != "missed_spread")
    assert set(found) == set(FEATURES) == {*MARGINS, *LENGTHS}


def test_nothing_to_measure_is_unknown_not_infinite():
    states, jacobians, _, seen = quadratic()
    found = features(torch.ones_like(states), 0 * jacobians, seen)
    assert not any(bool(column.isinf().any()) for column in found.values())
    for name in (
        "length_plain",
        "length_fisher",
        "cosine_fisher",
        "bend_fisher",
        "detour_plain",
        "off_plain",
    ):
        assert bool(found[name].isnan().all()), name
    assert torch.allclose(found["landing"], found["start"])


def test_the_sphere_is_reached_with_the_response_that_goes_with_it():
    states, jacobians, _, seen = quadratic(7)
    sentence = Sentence(states, jacobians, torch.arange(VALUES), seen)
    source, target = torch.tensor(PAIRS).T
    found = Paths.of(sentence, source, target, 3 * (states[target] - states[source])).on_sphere(sentence)
    landed = states[source] + found.shift
    expected = (states[source].norm(dim=1) + states[target].norm(dim=1)) / 2
    assert torch.allclose(landed.norm(dim=1), expected)
    assert torch.allclose(found.response, torch.einsum("vkd,ed->evk", jacobians, found.shift))
    direct = Paths.of(sentence, source, target, found.shift)
    assert torch.allclose(found.distances(0.7), direct.distances(0.7))


def test_weights_sum_to_one_and_go_to_the_row_that_is_met():
    distances = torch.tensor([[0.0, 1.0, 2.0], [1.0, 1.0, 2.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    found = weights(distances)
    assert torch.allclose(found.sum(1), torch.ones(3, dtype=torch.float64))
    assert float(found[0, 0]) > 0.99999 and found[1].tolist() == pytest.approx(
        [4 / 9, 4 / 9, 1 / 9], abs=1e-5
    )
    assert found[2].tolist() == pytest.approx([1 / 3] * 3)


def test_refusals():
    states, jacobians, _, _ = quadratic()
    with pytest.raises(EditError, match="no gradients"):
        edit_features(states, states, Gradients(), rows_of(), edits_of(PAIRS, 1.0))
    with pytest.raises(EditError, match=r"rows\.answers"):
        edit_features(states, states, Gradients(answers=jacobians), rows_of(), edits_of(PAIRS, 1.0))
