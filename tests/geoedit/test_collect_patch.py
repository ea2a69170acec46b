"""Runs with given states against forwards that were written out by hand."""

import copy

import pytest
import torch
from torch import Tensor, nn

from geoedit.activations import collect, run_with
from geoedit.errors import EditError
from geoedit.site import Site

PROMPTS = ["the day after monday is", "may", "the month of may is old", "the paris is"]


def blocks(model: nn.Module) -> nn.ModuleList:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def logits_by_hand(model: nn.Module, tokenizer, text: str, block: int, place: int, state: Tensor) -> Tensor:
    """One prompt alone, with one token's state overwritten after one block by a plain hook."""

    def overwrite(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[0, place] = state
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    hook = blocks(model)[block].register_forward_hook(overwrite)
    try:
        with torch.no_grad():
            return model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
    finally:
        hook.remove()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("token", "places"), [("last", (-1, -1, -1, -1)), (0, (0, 0, 0, 0)), ("value", (3, 0, 3, 1))]
)
def test_given_states_stand_where_they_should(side, token, places, tiny_model, tiny_tokenizer) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.padding_side = side
    states = torch.randn(len(PROMPTS), 32, generator=torch.Generator().manual_seed(3))
    values = ["monday", "may", "may", "paris"]
    found = run_with(
        tiny_model, tokenizer, PROMPTS, {Site(1, token=token): states}, values=values, batch_size=3
    )
    for index, text in enumerate(PROMPTS):
        wanted = logits_by_hand(tiny_model, tiny_tokenizer, text, 1, places[index], states[index])
        torch.testing.assert_close(found[index], wanted, rtol=1e-4, atol=1e-4)


def test_no_states_or_the_models_own_give_the_plain_logits(tiny_model, tiny_tokenizer) -> None:
    plain = run_with(tiny_model, tiny_tokenizer, PROMPTS, {})
    for index, text in enumerate(PROMPTS):
        with torch.no_grad():
            wanted = tiny_model(**tiny_tokenizer(text, return_tensors="pt")).logits[0, -1]
        torch.testing.assert_close(plain[index], wanted, rtol=1e-4, atol=1e-4)
    sites = [Site(0), Site(1, "mlp_out"), Site(2, "heads"), Site(stream="embedding")]
    own = collect(tiny_model, tiny_tokenizer, PROMPTS, sites)
    torch.testing.assert_close(
        run_with(tiny_model, tiny_tokenizer, PROMPTS, own), plain, rtol=1e-4, atol=1e-4
    )


def test_the_state_after_the_last_block_decides_alone(tiny_model, tiny_tokenizer) -> None:
    """Another prompt's state at the last token carries that prompt's whole prediction."""
    site = Site(2)
    states = collect(tiny_model, tiny_tokenizer, PROMPTS, [site])[site]
    order = [2, 3, 0, 1]
    swapped = run_with(tiny_model, tiny_tokenizer, PROMPTS, {site: states[order]})
    plain = run_with(tiny_model, tiny_tokenizer, PROMPTS, {})
    torch.testing.assert_close(swapped, plain[order], rtol=1e-4, atol=1e-4)
    assert (swapped - plain).abs().max() > 0.1


def test_one_state_for_all_prompts_and_a_head_alone(tiny_model, tiny_tokenizer) -> None:
    one = torch.ones(32)
    every = run_with(tiny_model, tiny_tokenizer, PROMPTS, {Site(0): one})
    torch.testing.assert_close(
        every, run_with(tiny_model, tiny_tokenizer, PROMPTS, {Site(0): one.expand(4, 32)})
    )
    heads = collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(1, "heads")])[Site(1, "heads")].clone()
    heads[:, 16:24] = 0.5
    whole = run_with(tiny_model, tiny_tokenizer, PROMPTS, {Site(1, "heads"): heads})
    part = run_with(tiny_model, tiny_tokenizer, PROMPTS, {Site(1, "heads", head=2): torch.full((8,), 0.5)})
    torch.testing.assert_close(whole, part, rtol=1e-4, atol=1e-4)


def test_an_encoder_gives_its_hidden_states(tiny_tokenizer) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=len(tiny_tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    model = transformers.BertModel(config).eval()
    found = run_with(model, tiny_tokenizer, PROMPTS, {}, output="last_hidden_state")
    with torch.no_grad():
        wanted = model(**tiny_tokenizer(PROMPTS[0], return_tensors="pt")).last_hidden_state[0, -1]
    torch.testing.assert_close(found[0], wanted, rtol=1e-4, atol=1e-5)
    assert run_with(model, tiny_tokenizer, PROMPTS, {}, output="pooler_output").shape == (4, 32)
    with pytest.raises(EditError, match=r"gives no output 'logits'; it gives: last_hidden_state"):
        run_with(model, tiny_tokenizer, PROMPTS, {})


@pytest.mark.parametrize(
    ("states", "message"),
    [
        (torch.ones(3, 32), r"shape \(3, 32\); they must be \(32,\) or \(4, 32\)"),
        (torch.ones(4, 31), r"shape \(4, 31\)"),
        (torch.tensor(1.0), r"shape \(\)"),
        (torch.full((32,), float("nan")), "NaN or infinite"),
    ],
)
def test_states_that_do_not_fit_are_refused(states: Tensor, message: str, tiny_model, tiny_tokenizer) -> None:
    with pytest.raises(EditError, match=message):
        run_with(tiny_model, tiny_tokenizer, PROMPTS, {Site(0): states})


def test_the_model_is_left_as_it_was(tiny_model, tiny_tokenizer) -> None:
    tiny_model.train()
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    run_with(tiny_model, tiny_tokenizer, PROMPTS, {Site(0): torch.ones(32)})
    assert tiny_model.training
    assert all(torch.equal(value, before[name]) for name, value in tiny_model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tiny_model.modules())
