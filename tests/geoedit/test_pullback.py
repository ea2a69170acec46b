import pytest
import torch

from geoedit import EditError, Site, collect, run_with
from geoedit.pullback import from_site

PROMPT = "the month after april is"


def fisher(logits):
    p = torch.softmax(logits, -1)
    return torch.diag(p) - torch.outer(p, p)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_metric_of_a_site_is_the_dense_one(shared_model, tiny_tokenizer, mode):
    site = Site(1, "residual_out", 3)
    pull = from_site(shared_model, tiny_tokenizer, PROMPT, site, derivatives=mode)
    state = collect(shared_model, tiny_tokenizer, [PROMPT], [site])[site][0].clone()
    torch.testing.assert_close(pull.f(state[None]), run_with(shared_model, tiny_tokenizer, [PROMPT], {}))
    moved = state + 0.3
    torch.testing.assert_close(
        pull.f(moved[None]), run_with(shared_model, tiny_tokenizer, [PROMPT], {site: moved})
    )
    rows = [
        (pull.f((state + 1e-2 * e)[None]) - pull.f((state - 1e-2 * e)[None]))[0] / 2e-2 for e in torch.eye(32)
    ]
    jacobian = torch.stack(rows, 1).double()
    expected = jacobian.T @ fisher(pull.f(state[None])[0].double()) @ jacobian
    torch.testing.assert_close(
        pull.metric(state).double(), expected, rtol=2e-2, atol=2e-3 * expected.abs().max()
    )
    found = pull.singular_directions(state, 3)
    torch.testing.assert_close(
        found.values.detach().double(), torch.linalg.eigvalsh(expected).flip(0)[:3].sqrt(), rtol=1e-2, atol=0
    )
    assert found.images.shape == (3, len(tiny_tokenizer))


def test_geodesic_between_the_states_of_two_prompts(shared_model, tiny_tokenizer):
    site = Site(0, "residual_out", "last")
    prompts = ["the month after april is", "the month after june is"]
    states = collect(shared_model, tiny_tokenizer, prompts, [site])[site]
    pull = from_site(shared_model, tiny_tokenizer, prompts[0], site, damping=1e-3)
    line = torch.stack([states[0] + t * (states[1] - states[0]) for t in torch.linspace(0, 1, 9)])
    found = pull.geodesic(states[0], states[1], steps=8, max_iterations=30)
    assert found.energy < pull.energy(line)
    assert torch.isfinite(found.path).all()


def test_each_prompt_of_several_keeps_its_own_states(shared_model, tiny_tokenizer):
    site = Site(1, "residual_out", "last")
    prompts = ["the month after april is", "the city in paris before"]
    states = collect(shared_model, tiny_tokenizer, prompts, [site])[site]
    both = from_site(shared_model, tiny_tokenizer, prompts, site)
    v = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    for row, prompt in enumerate(prompts):
        alone = from_site(shared_model, tiny_tokenizer, prompt, site)
        torch.testing.assert_close(both.inner(states, v)[row], alone.inner(states[row], v[row]))
    with pytest.raises(EditError, match="do not divide"):
        both.f(states[:1])


def test_the_model_is_left_as_it_was(shared_model, tiny_tokenizer):
    kernel = shared_model.config._attn_implementation
    before = {name: part.clone() for name, part in shared_model.state_dict().items()}
    hooks = [dict(module._forward_hooks) for module in shared_model.modules()]
    pull = from_site(shared_model, tiny_tokenizer, PROMPT, Site(1))
    pull.singular_directions(torch.zeros(32), 2)
    assert shared_model.config._attn_implementation == kernel
    assert all(torch.equal(part, before[name]) for name, part in shared_model.state_dict().items())
    assert [dict(module._forward_hooks) for module in shared_model.modules()] == hooks


def test_refusals(shared_model, tiny_tokenizer):
    with pytest.raises(EditError, match="tokens"):
        from_site(shared_model, tiny_tokenizer, ["the month", "the month after"], Site(1))
    with pytest.raises(EditError, match="one state a"):
        from_site(shared_model, tiny_tokenizer, PROMPT, Site(1, token="all")).f(torch.zeros(1, 32))
    with pytest.raises(EditError, match="shape"):
        from_site(shared_model, tiny_tokenizer, PROMPT, Site(1)).f(torch.zeros(1, 31))
