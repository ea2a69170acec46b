"""Derivatives from a site to the output of a network, against differences in float64 and dense Hessians."""

import copy

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel

from geoedit import EditError, Site, collect, run_with
from geoedit.functional import functional_curvature
from geoedit.pullback import from_site

V = torch.linspace(-1, 1, 32)
PROMPTS = ["the month after april is", "the city in paris before", "may is after"]


@pytest.fixture
def bert_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.mask_token = "zero"
    return tokenizer


def bert(kind, vocabulary):
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(config).eval().requires_grad_(False)


@pytest.fixture(params=["gpt2", "llama", "masked"])
def known(request, tiny_tokenizer, bert_tokenizer, device):
    """A model in float64, its tokenizer, prompts for it, and where each answer is read."""
    if request.param == "masked":
        model = bert(BertForMaskedLM, len(tiny_tokenizer))
        prompts = ["after april comes zero", "zero comes after june .", "zero is may"]
        return model.double().to(device), bert_tokenizer, prompts, [3, 0, 0]
    model = request.getfixturevalue(f"tiny_{request.param}")
    return model.double().to(device), tiny_tokenizer, PROMPTS, [-1, -1, -1]


def logits_at(model, tokenizer, prompt, place, site, state):
    """The logits with one state replaced, by a hook of our own on the block."""
    ids = tokenizer([prompt], return_tensors="pt")["input_ids"].to(state.device)
    blocks = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))

    def put(module, inputs, output):
        whole = output[0] if isinstance(output, tuple) else output
        changed = whole.clone()
        changed[0, site.token] = state
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = blocks[site.block].register_forward_hook(put)
    try:
        with torch.no_grad():
            return model(input_ids=ids).logits[0, place]
    finally:
        handle.remove()


@pytest.mark.parametrize("norm", ["fisher", "euclidean"])
def test_derivatives_are_the_differences_of_the_network(known, norm):
    model, tokenizer, prompts, places = known
    site = Site(0, "residual_out", 1)
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(len(prompts), 32, dtype=torch.float64, generator=generator).to(model.device)
    found = functional_curvature(model, tokenizer, prompts, site, v, norm=norm)
    states = collect(model, tokenizer, prompts, site)[site].double().to(v.device)
    step = 1e-3
    for row, (prompt, place) in enumerate(zip(prompts, places, strict=True)):
        here, ahead, behind = (
            logits_at(model, tokenizer, prompt, place, site, states[row] + t * v[row])
            for t in (0, step, -step)
        )
        # Llama normalises in single precision whatever its weights are: its differences are coarse.
        first, second = (ahead - behind) / (2 * step), (ahead + behind - 2 * here) / step**2
        loose = 0.05 if type(model).__name__.startswith("Llama") else 1e-4
        torch.testing.assert_close(found.value[row], here, rtol=1e-5, atol=1e-5)
        assert float((found.first[row] - first).norm() / first.norm()) < loose
        if loose < 0.01:
            assert float((found.second[row] - second).norm() / second.norm()) < loose
        change = found.first[row]
        if norm == "euclidean":
            wanted = change.norm()
        else:
            p = here.softmax(0)
            wanted = (p @ change.square() - (p @ change).square()).sqrt()
        torch.testing.assert_close(found.first_norm[row], wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.radius(0.1), 0.2 * found.first_norm / found.second_norm)


def test_second_derivatives_are_those_of_the_dense_hessian(known):
    model, tokenizer, prompts, _ = known
    site = Site(0, "residual_out", 1)
    v = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(model.device)
    found = functional_curvature(model, tokenizer, prompts[:1], site, v, norm="euclidean")
    state = collect(model, tokenizer, prompts[:1], site)[site].double().to(v.device)
    rest = from_site(model, tokenizer, prompts[0], site)
    for output in (3,):
        hessian = torch.func.hessian(lambda x, output=output: rest.f(x[None])[0, output])(state[0])
        tolerance = 1e-3 * float(found.second.abs().max())
        torch.testing.assert_close(v @ hessian @ v, found.second[0, output], rtol=1e-3, atol=tolerance)


def test_an_encoder_gives_its_last_state(tiny_tokenizer):
    model = bert(BertModel, len(tiny_tokenizer)).double()
    site, v = Site(0, "residual_out", 0), torch.linspace(-1, 1, 32, dtype=torch.float64)
    found = functional_curvature(model, tiny_tokenizer, PROMPTS, site, v, norm="euclidean")
    assert found.value.shape == (3, 32) and found.ratio.isfinite().all()
    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            whole = model(**tiny_tokenizer([prompt], return_tensors="pt")).last_hidden_state
        torch.testing.assert_close(found.value[row], whole[0, -1])
    with pytest.raises(EditError, match=r"no logits.*euclidean"):
        functional_curvature(model, tiny_tokenizer, PROMPTS, site, v)


def test_prompts_of_any_length_keep_their_order_and_batches_change_nothing(shared_model, tiny_tokenizer):
    site, v = Site(1, "residual_out", "last"), torch.linspace(-1, 1, 32)
    prompts = [*PROMPTS, PROMPTS[0]]
    found = functional_curvature(shared_model, tiny_tokenizer, prompts, site, v)
    alone = [functional_curvature(shared_model, tiny_tokenizer, prompt, site, v) for prompt in prompts]
    torch.testing.assert_close(found.second, torch.cat([one.second for one in alone]), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.value, run_with(shared_model, tiny_tokenizer, prompts, {}))
    small = functional_curvature(shared_model, tiny_tokenizer, prompts, site, v, batch_size=1)
    torch.testing.assert_close(found.second_norm, small.second_norm, rtol=1e-3, atol=1e-3)
    assert found.radius(0.5).shape == (4,)


def test_a_value_token_and_other_states(shared_gpt2, tiny_tokenizer):
    site, v = Site(0, "residual_out", "value"), torch.linspace(-1, 1, 32)
    values = ["april", "paris", "may"]
    found = functional_curvature(shared_gpt2, tiny_tokenizer, PROMPTS, site, v, values=values)
    states = collect(shared_gpt2, tiny_tokenizer, PROMPTS, site, values=values)[site]
    ahead = functional_curvature(
        shared_gpt2, tiny_tokenizer, PROMPTS, site, v, values=values, states=states + 1e-2 * v
    )
    taylor = found.value + 1e-2 * found.first + 0.5e-4 * found.second
    assert float((ahead.value - taylor).norm() / (ahead.value - found.value).norm()) < 1e-2


def test_a_model_in_half_precision_is_derived_in_its_own_and_measured_in_float32(tiny_gpt2, tiny_tokenizer):
    site, v = Site(1, "residual_out", "last"), torch.linspace(-1, 1, 32)
    wanted = functional_curvature(tiny_gpt2, tiny_tokenizer, PROMPTS, site, v)
    found = functional_curvature(tiny_gpt2.bfloat16(), tiny_tokenizer, PROMPTS, site, v)
    assert found.first.dtype == torch.float32
    assert float((found.first - wanted.first).norm() / wanted.first.norm()) < 0.05


def test_the_model_is_left_as_it_was(tiny_model, tiny_tokenizer):
    tiny_model.train()
    kernel = tiny_model.config._attn_implementation
    before = {name: part.clone() for name, part in tiny_model.state_dict().items()}
    functional_curvature(tiny_model, tiny_tokenizer, PROMPTS, Site(1, "residual_out", "last"), V)
    assert tiny_model.training and tiny_model.config._attn_implementation == kernel
    assert all(torch.equal(part, before[name]) for name, part in tiny_model.state_dict().items())
    assert not any(part._forward_hooks for part in tiny_model.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": torch.ones(31)}, r"direction has shape \(31,\); give \(32,\)"),
        ({"direction": torch.ones(2, 32)}, r"\(2, 32\)"),
        ({"direction": torch.full((32,), torch.nan)}, "direction holds NaN"),
        ({"direction": torch.zeros(32)}, "changes nothing"),
        ({"states": torch.ones(2, 32)}, "states has shape"),
        ({"norm": "taxi"}, "taxi"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"site": Site(1, "residual_out", "all")}, "one state a prompt"),
        ({"site": Site(9, "residual_out", "last")}, "9"),
        ({"prompts": []}, "at least one"),
    ],
)
def test_refusals(shared_gpt2, tiny_tokenizer, change, message):
    arguments = {
        "prompts": PROMPTS,
        "site": Site(1, "residual_out", "last"),
        "direction": V,
    } | change
    if change.get("norm"):
        with pytest.raises(Exception, match="taxi"):
            functional_curvature(shared_gpt2, tiny_tokenizer, **arguments)
        return
    with pytest.raises(EditError, match=message):
        functional_curvature(shared_gpt2, tiny_tokenizer, **arguments)


def test_a_masked_model_needs_a_mask(tiny_tokenizer):
    model = bert(BertForMaskedLM, len(tiny_tokenizer))
    with pytest.raises(EditError, match="mask"):
        functional_curvature(model, tiny_tokenizer, PROMPTS, Site(0, "residual_out", 0), torch.ones(32))
