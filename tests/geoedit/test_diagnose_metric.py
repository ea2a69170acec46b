import pytest
import torch
from torch.func import jacrev

from geoedit.diagnosis.landing import (
    carried_share,
    chord_cosines,
    euclidean_distances,
    interpolated_outputs,
    linear_outputs,
    margins,
    output_margin,
    pulled_back_distances,
)
from geoedit.diagnosis.metric import categorical_factor, sampled_factor, whitening_factor
from geoedit.diagnosis.observe import log_odds
from geoedit.errors import EditError

WIDTH, ANSWERS = 6, 4


@pytest.fixture
def network(device):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(10, WIDTH, generator=generator, dtype=torch.float64).to(device)
    second = torch.randn(ANSWERS, 10, generator=generator, dtype=torch.float64).to(device)
    return lambda state: second @ torch.tanh(first @ state)


@pytest.fixture
def states(device):
    return torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)


def exact_fisher(network, state, temperature=1.0):
    jacobian = jacrev(network)(state)
    q = torch.softmax(network(state) / temperature, 0)
    return jacobian.T @ (torch.diag(q) - torch.outer(q, q)) @ jacobian


@pytest.mark.parametrize("temperature", [1.0, 3.0, 50.0])
def test_categorical_factor_is_the_exact_pulled_back_fisher_metric(network, states, temperature):
    logits = torch.stack([network(state) for state in states])
    gradients = torch.stack([jacrev(network)(state) for state in states])
    factor = categorical_factor(gradients, logits, temperature)
    for row, state in enumerate(states):
        expected = exact_fisher(network, state, temperature)
        torch.testing.assert_close(factor[row].T @ factor[row], expected, rtol=1e-11, atol=1e-12)


def test_the_categorical_factor_takes_log_probability_gradients_as_well(network, states):
    logits = torch.stack([network(state) for state in states])
    of_logits = torch.stack([jacrev(network)(state) for state in states])
    of_log = torch.stack([jacrev(lambda h: network(h).log_softmax(0))(state) for state in states])
    a, b = categorical_factor(of_logits, logits, 2.0), categorical_factor(of_log, logits.log_softmax(1), 2.0)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_infinite_temperature_is_the_metric_of_the_centred_logits(network, states):
    gradients = torch.stack([jacrev(network)(state) for state in states])
    logits = torch.stack([network(state) for state in states])
    factor = categorical_factor(gradients, logits, float("inf"))
    for row, state in enumerate(states):
        jacobian = jacrev(lambda h: network(h) - network(h).mean())(state)
        torch.testing.assert_close(factor[row].T @ factor[row], jacobian.T @ jacobian / ANSWERS)
    with pytest.raises(EditError, match="positive"):
        categorical_factor(gradients, logits, 0.0)


def test_sampled_factor_converges_to_the_fisher_metric(network, states):
    gradients = jacrev(lambda h: network(h).log_softmax(0))(states[0])
    labels = torch.multinomial(
        torch.softmax(network(states[0]), 0).cpu(),
        200_000,
        replacement=True,
        generator=torch.Generator().manual_seed(2),
    )
    expected = exact_fisher(network, states[0])
    few, many = (
        sampled_factor(gradients[labels[:count].to(gradients.device)][None])[0] for count in (50, 200_000)
    )

    def error(factor):
        return ((factor.T @ factor - expected).norm() / expected.norm()).item()

    assert error(many) < 0.02
    assert error(many) < error(few) / 3


def test_where_the_model_is_sure_samples_are_blind_and_answers_are_not(states):
    weight = torch.randn(ANSWERS, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    sure = torch.tensor([60.0, 0, 0, 0], dtype=torch.float64)
    gradients = jacrev(lambda h: (weight @ h + sure).log_softmax(0))(torch.zeros(WIDTH, dtype=torch.float64))
    label = torch.multinomial(
        torch.softmax(sure, 0), 8, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    assert sampled_factor(gradients[label][None]).norm() < 1e-20
    assert categorical_factor(gradients[None], sure[None]).norm() < 1e-10
    factor = categorical_factor(gradients[None], sure[None], float("inf"))[0]
    centred = weight - weight.mean(0)
    torch.testing.assert_close(factor.T @ factor, centred.T @ centred / ANSWERS)


def test_pulled_back_distances_by_the_dense_metric(network, states):
    generator = torch.Generator().manual_seed(3)
    factor = torch.randn(5, 3, WIDTH, generator=generator, dtype=torch.float64).to(states.device)
    source, target = torch.tensor([0, 1, 4, 2]), torch.tensor([2, 0, 3, 2])
    shift = torch.randn(4, WIDTH, generator=generator, dtype=torch.float64).to(states.device)
    found = pulled_back_distances(factor, states, source, target, shift)
    for e in range(4):
        g = (factor[source[e]].T @ factor[source[e]] + factor[target[e]].T @ factor[target[e]]) / 2
        for w in range(5):
            d = states[source[e]] + shift[e] - states[w]
            assert found[e, w].item() == pytest.approx((d @ g @ d).sqrt().item(), rel=1e-9)


def test_euclidean_distances_and_cosines_by_hand(device):
    states = torch.tensor([[0.0, 0], [3, 4], [6, 0]], device=device)
    source, target = torch.tensor([0, 1]), torch.tensor([1, 2])
    shift = torch.tensor([[3.0, 0], [3, -4]], device=device)
    found = euclidean_distances(states, source, shift)
    torch.testing.assert_close(found.cpu(), torch.tensor([[3.0, 4, 3], [6, 5, 0]]))
    torch.testing.assert_close(chord_cosines(states, source, target, shift).cpu(), torch.tensor([0.6, 1.0]))


def test_margins_by_hand(device):
    distances = torch.tensor([[3.0, 1, 2, 9], [1, 5, 7, 5]], device=device)
    groups = torch.tensor([0, 1, 2, 1], device=device)
    found = margins(distances, groups, torch.tensor([1, 3], device=device))
    assert found.gap.tolist() == [1.0, -4.0]
    assert found.relative.tolist() == pytest.approx([1 / 3, -4 / 6])
    assert found.rival.tolist() == [2, 0]
    # Rows 1 and 3 give one answer, so that landing on row 1 is as good as landing on row 3.
    same = margins(distances[:1], groups, torch.tensor([3], device=device))
    assert same.gap.tolist() == [1.0]


def test_margin_without_a_rival_and_at_no_distance(device):
    alone = margins(torch.tensor([[2.0]], device=device), torch.tensor([0]), torch.tensor([0]))
    assert alone.relative.tolist() == [1.0]
    blind = margins(torch.zeros(1, 3, device=device), torch.arange(3), torch.tensor([0]))
    assert (blind.gap.tolist(), blind.relative.tolist()) == ([0.0], [0.0])


def test_linear_outputs_are_exact_for_a_quadratic_network_that_arrives(device):
    generator = torch.Generator().manual_seed(4)
    forms = torch.randn(ANSWERS, WIDTH, WIDTH, generator=generator, dtype=torch.float64).to(device)
    states = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64).to(device)

    def network(h):
        return torch.einsum("kij,i,j->k", forms, h, h)

    outputs = torch.stack([network(h) for h in states])
    gradients = torch.stack([jacrev(network)(h) for h in states])
    source, target = torch.tensor([0, 2]), torch.tensor([1, 0])
    found = linear_outputs(outputs, gradients, source, target, states[target] - states[source])
    torch.testing.assert_close(found, outputs[target])
    one_sided = outputs[source] + torch.einsum(
        "ekd,ed->ek", gradients[source], states[target] - states[source]
    )
    assert (one_sided - outputs[target]).abs().max() > 0.1


def test_output_margin_and_log_odds_by_hand():
    outputs = torch.tensor([[1.0, 4, 2], [5, 0, 3]])
    gap, rival = output_margin(outputs, torch.tensor([1, 2]))
    assert (gap.tolist(), rival.tolist()) == ([2.0, -2.0], [2, 0])
    p = torch.softmax(outputs, 1)[:, 1]
    torch.testing.assert_close(log_odds(outputs, torch.tensor([1, 1])), (p / (1 - p)).log())


def test_log_odds_survive_certainty():
    assert log_odds(torch.tensor([[80.0, 0.0]]), torch.tensor([0])).tolist() == [80.0]


@pytest.mark.parametrize("rows", [4, 30])
def test_whitening_factor_is_the_inverse_of_the_shrunk_covariance(rows):
    residuals = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    shrinkage = 0.2
    covariance = residuals.T @ residuals / rows
    identity = torch.eye(WIDTH, dtype=torch.float64)
    shrunk = (1 - shrinkage) * covariance + shrinkage * covariance.trace() / WIDTH * identity
    factor, ceiling = whitening_factor(residuals, shrinkage)
    torch.testing.assert_close(ceiling * identity - factor.T @ factor, torch.linalg.inv(shrunk))
    with pytest.raises(EditError, match="all zero"):
        whitening_factor(torch.zeros(3, 2), 0.5)
    with pytest.raises(EditError, match="shrinkage"):
        whitening_factor(residuals, 0.0)


def affine(states, share=1.0):
    """A network that is affine in the site's state, and that reads `share` of its output change there."""
    weight = torch.randn(ANSWERS, WIDTH, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    weight = (weight - weight.mean(0)).to(states.device)
    outputs = states @ weight.T
    return outputs, share * weight[None].expand(len(states), -1, -1)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_carried_share_of_an_affine_network(states, share):
    outputs, gradients = affine(states, share)
    found = carried_share(outputs, gradients / ANSWERS**0.5, states, torch.arange(5, device=states.device))
    assert found.item() == pytest.approx(share, abs=1e-9)
    same = torch.zeros(5, dtype=torch.long, device=states.device)
    assert carried_share(outputs, gradients, states, same).item() == 0.0


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_interpolation_is_exact_for_an_affine_network(states, share):
    outputs, gradients = affine(states, share)
    source, target = torch.tensor([0, 3, 1]), torch.tensor([1, 2, 4])
    generator = torch.Generator().manual_seed(9)
    shift = torch.randn(3, WIDTH, generator=generator, dtype=torch.float64).to(states.device)
    distances = pulled_back_distances(gradients, states, source, target, shift)
    part = torch.tensor(share).to(states)
    found = interpolated_outputs(outputs, gradients, states, distances, part, source, shift)
    # In the source's prompt only the site moves: f_a + share W v, wherever the state lands.
    expected = outputs[source] + torch.einsum("ekd,ed->ek", gradients[source], shift)
    torch.testing.assert_close(found, expected)


def test_interpolation_passes_through_the_values_themselves(network, states):
    outputs = torch.stack([network(state) for state in states])
    gradients = torch.stack([jacrev(network)(state) for state in states])
    source, target = torch.tensor([0, 3]), torch.tensor([1, 2])
    shift = states[target] - states[source]
    distances = pulled_back_distances(gradients, states, source, target, shift)
    one = torch.ones((), dtype=torch.float64, device=states.device)
    found = interpolated_outputs(outputs, gradients, states, distances, one, source, shift)
    torch.testing.assert_close(found, outputs[target], rtol=0, atol=2e-4)
    straight = linear_outputs(outputs, gradients, source, target, shift)
    assert (straight - outputs[target]).abs().max() > 0.1
