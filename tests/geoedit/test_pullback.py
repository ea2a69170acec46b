import pytest
import torch

from geoedit import EditError, Site, collect, run_with
from geoedit.concept import Concept, Template
from geoedit.pullback import from_site, sampled_metric

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


MONTHS = Concept(
    name="months",
    values=("april", "may", "june"),
    templates=(
        Template("the month after {value} is", answers=("may", "june", "july")),
        Template("a day in {value} comes before a day in", answers=("may", "june", "july")),
    ),
)


def test_the_sampled_metric_of_answers_is_the_dense_one(shared_model, tiny_tokenizer):
    """Σ ∇q_k ∇q_kᵀ / q_k over the answers' probabilities and that of all else, by central differences."""
    site, prompts = Site(1, "residual_out", "last"), MONTHS.prompts(templates=[0])
    metric = sampled_metric(shared_model, tiny_tokenizer, prompts, site, output="answers", damping=0.0)
    states = collect(shared_model, tiny_tokenizer, prompts, [site])[site]
    torch.testing.assert_close(metric.anchors, states)
    ids = tiny_tokenizer.convert_tokens_to_ids(["may", "june", "july"])

    def shares(row, states):
        logits = run_with(shared_model, tiny_tokenizer, [prompts[row]] * len(states), {site: states})
        found = torch.softmax(logits.double(), -1)[:, ids]
        return torch.cat([found, 1 - found.sum(1, keepdim=True)], 1)

    for row, state in enumerate(states):
        q = shares(row, state[None])[0]
        slopes = (
            shares(row, state + 1e-2 * torch.eye(32)) - shares(row, state - 1e-2 * torch.eye(32))
        ).T / 2e-2
        expected = slopes.T @ (slopes / q[:, None])
        factor = metric.factors[row].double()
        atol = 5e-3 * float(expected.abs().max())
        torch.testing.assert_close(factor.T @ factor, expected, rtol=2e-2, atol=atol)


def test_the_sampled_metric_of_the_next_token_is_unbiased(shared_gpt2, tiny_tokenizer):
    site = Site(1, "residual_out", "last")
    metric = sampled_metric(shared_gpt2, tiny_tokenizer, [PROMPT], site, samples=400)
    state = collect(shared_gpt2, tiny_tokenizer, [PROMPT], site)[site][0]
    pull = from_site(shared_gpt2, tiny_tokenizer, PROMPT, site)
    state.requires_grad_()
    logs = pull.f(state[None])[0].log_softmax(-1)
    every = torch.stack([torch.autograd.grad(one, state, retain_graph=True)[0] for one in logs])
    exact = every.T @ (logs.detach().exp()[:, None] * every)
    fourth = float((logs.detach().exp() * every.square().sum(1).square()).sum())
    expected_error = ((fourth - float(exact.square().sum())) / 400) ** 0.5
    factor = metric.factors[0]
    assert float((factor.T @ factor - exact).norm()) < 2 * expected_error < float(exact.norm())
    torch.testing.assert_close(metric.damping, float(factor.square().sum()) / 3200)
    again = sampled_metric(shared_gpt2, tiny_tokenizer, [PROMPT], site, samples=400)
    assert torch.equal(again.factors[0], factor)
    most = sampled_metric(shared_gpt2, tiny_tokenizer, [PROMPT], site, samples=400, rank=3).factors[0]
    kept = torch.linalg.eigvalsh(most.T @ most).flip(0)
    torch.testing.assert_close(kept[:3], torch.linalg.eigvalsh(factor.T @ factor).flip(0)[:3])
    assert most.shape == (3, 32)


def test_a_temperature_keeps_sight_where_the_model_is_sure(shared_gpt2, tiny_tokenizer):
    site, prompts = Site(1, "residual_out", "last"), MONTHS.prompts()
    sizes = [
        sampled_metric(
            shared_gpt2, tiny_tokenizer, prompts, site, output="answers", temperature=temperature
        ).factors.norm()
        for temperature in (0.05, 1.0, 20.0)
    ]
    assert sizes[0] < sizes[1] < sizes[2]


def test_refusals_of_the_sampled_metric(shared_gpt2, tiny_tokenizer):
    def make(**options):
        return sampled_metric(shared_gpt2, tiny_tokenizer, [PROMPT], **{"site": Site(1), **options})

    with pytest.raises(EditError, match="0 different answers"):
        make(output="answers")
    with pytest.raises(EditError, match="'words'; give 'next token' or 'answers'"):
        make(output="words")
    with pytest.raises(EditError, match="one state a"):
        make(site=Site(1, token="all"))
    with pytest.raises(EditError, match=r"does not reach the output|zero at every prompt"):
        make(site=Site(2, token=0))
    with pytest.raises(EditError, match="samples is 0"):
        make(samples=0)
