"""Directional derivatives against differences and Hessians, the Fisher norm against divergences."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from manifolds.curvature import functional
from manifolds.errors import ManifoldError


def generator(seed):
    return torch.Generator().manual_seed(seed)


def network(x):
    """Each item by itself: two layers, of three inputs and four outputs."""
    one = torch.linspace(-1, 1, 15, dtype=x.dtype, device=x.device).view(3, 5)
    two = torch.linspace(2, -1, 20, dtype=x.dtype, device=x.device).view(5, 4)
    return (x @ one).tanh() @ two


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_jacobian_and_hessian(batch, device):
    x = torch.randn(*batch, 3, dtype=torch.float64, generator=generator(0)).to(device)
    v = torch.randn(*batch, 3, dtype=torch.float64, generator=generator(1)).to(device)
    found = functional(network, x, v)
    for index in torch.ones(batch).nonzero().tolist():
        place = tuple(index)
        jacobian = torch.autograd.functional.jacobian(network, x[place])
        torch.testing.assert_close(found.first[place], jacobian @ v[place])
        for row in range(4):
            hessian = torch.autograd.functional.hessian(lambda y, row=row: network(y)[row], x[place])
            torch.testing.assert_close(found.second[place][row], v[place] @ hessian @ v[place])
    assert found.ratio.shape == batch and found.radius(0.1).shape == batch
    torch.testing.assert_close(found.ratio, found.second.norm(dim=-1) / found.first.norm(dim=-1))


def test_the_radius_is_where_the_second_term_reaches_its_share():
    x = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64)
    found = functional(network, x, torch.ones_like(x))
    for eps in (0.05, 0.5):
        t = found.radius(eps)
        torch.testing.assert_close((t**2 / 2 * found.second).norm(), eps * (t * found.first).norm())
    t = float(found.radius(0.001))
    straight = found.value + t * found.first
    bent = network(x + t * torch.ones_like(x)) - straight
    assert abs(float(bent.norm() / (t * found.first).norm()) - 0.001) < 1e-4


def test_straight_still_and_turning_maps():
    x, v = torch.randn(4, 3), torch.ones(3)
    straight = functional(lambda y: 2 * y + 1, x, v)
    assert straight.radius(0.1).isinf().all() and (straight.ratio == 0).all()
    turning = functional(lambda y: (y * y).sum(-1), torch.zeros(4, 3), v)
    assert (turning.radius(0.1) == 0).all() and turning.ratio.isinf().all()
    still = functional(lambda y: 0 * y, x, v)
    assert (still.ratio == 0).all() and still.radius(0.1).isinf().all()


def test_the_fisher_norm_is_that_of_the_divergence():
    x = torch.randn(5, 3, dtype=torch.float64, generator=generator(2))
    v = torch.randn(5, 3, dtype=torch.float64, generator=generator(3))
    found = functional(network, x, v, norm="fisher")
    for row in range(5):
        here = network(x[row]).log_softmax(-1)

        def divergence(t, row=row, here=here):
            there = network(x[row] + t * v[row]).log_softmax(-1)
            return (here.exp() * (here - there)).sum()

        wanted = torch.autograd.functional.hessian(divergence, torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(found.first_norm[row] ** 2, wanted)
    shifted = functional(lambda y: network(y) + 7 * y.square().sum(-1, keepdim=True), x, v, norm="fisher")
    torch.testing.assert_close(shifted.second_norm, found.second_norm)


@pytest.mark.parametrize("norm", ["euclidean", "fisher"])
def test_through_a_whole_network_to_its_logits(tiny_model, norm):
    model = tiny_model.double()
    tokens = torch.randint(3, 60, (2, 5), generator=generator(4))
    states = model.get_input_embeddings()(tokens)
    v = torch.randn(states.shape, dtype=torch.float64, generator=generator(5))

    def logits(last):
        changed = torch.cat([states[:, :-1], last[:, None]], 1)
        return model(inputs_embeds=changed).logits[:, -1]

    found = functional(logits, states[:, -1], v[:, -1], norm=norm)
    weights = torch.randn(found.first.shape, dtype=torch.float64, generator=generator(8))

    def backwards(last):
        with sdpa_kernel(SDPBackend.MATH):
            return (weights * logits(last)).sum()

    gradient = torch.autograd.functional.jacobian(backwards, states[:, -1])
    _, product = torch.autograd.functional.vhp(backwards, states[:, -1], v[:, -1])
    # Llama normalises in single precision whatever its weights are.
    for ours, theirs in ((found.first, gradient), (found.second, product)):
        one, other = (weights * ours).sum(), (theirs * v[:, -1]).sum()
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(ours.norm()))
    assert found.radius(0.1).shape == (2,) and (found.radius(0.1) > 0).all()


def test_second_derivatives_of_layers_that_are_wrong_in_nested_forward_mode():
    norm = torch.nn.LayerNorm(6).double()
    torch.nn.init.normal_(norm.weight, generator=generator(6))
    x, v = torch.randn(2, 4, 6, dtype=torch.float64, generator=generator(7))
    for f in (norm, lambda y: torch.nn.functional.layer_norm(y, (6,), eps=0.25)):
        found = functional(f, x, v)
        for row in range(4):
            _, wanted = torch.autograd.functional.vhp(lambda y, f=f: f(y).sin().sum(), x[row], v[row])
            outputs = f(x[row])
            with_sine = (outputs.cos() * found.second[row] - outputs.sin() * found.first[row] ** 2).sum()
            torch.testing.assert_close((wanted * v[row]).sum(), with_sine)
    with pytest.raises(ManifoldError, match="eval"):
        functional(torch.nn.BatchNorm1d(6, track_running_stats=False).double(), x, v)
    still = functional(torch.nn.BatchNorm1d(6).double().eval(), x, v)
    assert still.radius(0.1).isinf().all()


def test_outputs_of_many_dimensions():
    x = torch.randn(2, 3, dtype=torch.float64)
    found = functional(lambda y: network(y)[:, None].expand(2, 7, 4), x, x)
    assert found.first.shape == (2, 7, 4) and found.first_norm.shape == (2,)
    one = functional(network, x, x)
    torch.testing.assert_close(found.first_norm, math.sqrt(7) * one.first_norm)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((network, torch.randn(3), torch.randn(3).double()), {}, "make them alike"),
        ((lambda x: x.sum(0), torch.randn(2, 3), torch.randn(3)), {}, "keep the batch"),
        ((lambda x: x.sum(-1), torch.randn(2, 3), torch.randn(3)), {"norm": "fisher"}, "logits"),
        ((network, torch.full((3,), torch.nan), torch.randn(3)), {}, "NaN"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ManifoldError, match=message):
        functional(*arguments, **options)


def test_eps_above_zero():
    with pytest.raises(ManifoldError, match="above 0"):
        functional(network, torch.randn(3), torch.randn(3)).radius(0.0)
