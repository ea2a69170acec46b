"""Hooks against forward passes that are run by hand, block by block, in every family."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from geoedit.errors import EditError
from geoedit.hooks import intercept
from geoedit.passes import Pass
from geoedit.site import Site

WIDTH = 32
VOCABULARY = 60
IDS = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24, 25, 0, 0], [31, 32, 33, 0, 0, 0, 0]])
REAL = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])


def left(rows: Tensor) -> Tensor:
    """The same rows, padded on the left."""
    return torch.stack([row.roll(int((mask == 0).sum())) for row, mask in zip(rows, REAL, strict=True)])


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


@functools.cache
def neox() -> PreTrainedModel:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    return seeded(lambda: GPTNeoXForCausalLM(config))


@functools.cache
def opt() -> PreTrainedModel:
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=64, word_embed_proj_dim=WIDTH, init_std=0.2, pad_token_id=0, bos_token_id=2,
    )  # fmt: skip
    return seeded(lambda: OPTForCausalLM(config))


@functools.cache
def bert() -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=48, initializer_range=0.2,
    )  # fmt: skip
    return seeded(lambda: BertModel(config))


@functools.cache
def mamba() -> PreTrainedModel:
    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, state_size=4, initializer_range=0.2
    )
    return seeded(lambda: MambaForCausalLM(config))


@functools.cache
def t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return seeded(lambda: T5ForConditionalGeneration(config))


@functools.cache
def vit() -> PreTrainedModel:
    config = ViTConfig(
        hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16,
        patch_size=4, initializer_range=0.2,
    )  # fmt: skip
    return seeded(lambda: ViTModel(config))


@functools.cache
def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=3, n_head=4, initializer_range=0.2
    )
    return seeded(lambda: GPT2LMHeadModel(config))


@functools.cache
def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=64, hidden_size=WIDTH, intermediate_size=48,
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
    )  # fmt: skip
    return seeded(lambda: LlamaForCausalLM(config))


BLOCKS = {
    "gpt2": (gpt2, "transformer.h"),
    "llama": (llama, "model.layers"),
    "gpt_neox": (neox, "gpt_neox.layers"),
    "opt": (opt, "model.decoder.layers"),
    "bert": (bert, "encoder.layer"),
    "mamba": (mamba, "backbone.layers"),
}


def at(states: Tensor, row: int, position: int, vector: Tensor) -> Tensor:
    """States with a vector added at one place, made without any mask."""
    new = states.clone()
    new[row, position] = new[row, position] + vector
    return new


def by_hand(model: nn.Module, path: str, block: int, change: Callable, **inputs: Tensor) -> Tensor:
    """The last states when the output of a block is changed, by putting a function in the block's place."""
    blocks = model.get_submodule(path)
    original = blocks[block]

    class Changed(nn.Module):
        def __getattr__(self, name: str):
            return getattr(original, name)

        def forward(self, *args, **kwargs):
            output = original.forward(*args, **kwargs)
            return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    blocks[block] = Changed()
    try:
        return final_states(model, **inputs)
    finally:
        blocks[block] = original


def final_states(model: nn.Module, **inputs: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(**inputs)
    return output.logits if hasattr(output, "logits") else output.last_hidden_state


def add(vector: Tensor) -> Callable[[Tensor, Tensor, Pass], Tensor]:
    return lambda states, selected, this_pass: states + selected[..., None] * vector


def edited(model: nn.Module, site: Site, vector: Tensor, **inputs: Tensor) -> Tensor:
    with intercept(model, site, add(vector)):
        return final_states(model, **inputs)


def vector(device: torch.device, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(WIDTH, generator=torch.Generator().manual_seed(1)).to(device)


# Expected positions, row by row, written out by hand: right padding, then left padding.
RIGHT = {"last": [6, 4, 2], 0: [0, 0, 0], 1: [1, 1, 1], -1: [6, 4, 2], -3: [4, 2, 0]}
LEFT = {"last": [6, 6, 6], 0: [0, 2, 4], 1: [1, 3, 5], -1: [6, 6, 6], -3: [4, 4, 4]}


@pytest.mark.parametrize("family", BLOCKS)
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("token", ["last", 1, -3])
def test_the_vector_lands_where_a_hand_run_forward_puts_it(family, side, token, device) -> None:
    build, path = BLOCKS[family]
    model = build().to(device)
    ids, real = (IDS, REAL) if side == "right" else (left(IDS), left(REAL))
    ids, real, push = ids.to(device), real.to(device), vector(device)
    places = (RIGHT if side == "right" else LEFT)[token]

    def change(states: Tensor) -> Tensor:
        for row, place in enumerate(places):
            states = at(states, row, place, push)
        return states

    expected = by_hand(model, path, 1, change, input_ids=ids, attention_mask=real)
    plain = final_states(model, input_ids=ids, attention_mask=real)
    found = edited(model, Site(1, token=token), push, input_ids=ids, attention_mask=real)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (expected - plain).abs().max() > 0.01


@pytest.mark.parametrize("token", ["last", 0, -2, "all"])
def test_without_a_mask_every_token_is_real(token, shared_gpt2) -> None:
    places = {"last": [6], 0: [0], -2: [5], "all": range(7)}[token]
    seen: list[Tensor] = []
    with intercept(shared_gpt2, Site(0, token=token), lambda s, chosen, p: seen.append(chosen)):
        shared_gpt2(IDS)
    expected = torch.zeros(3, 7, dtype=torch.bool)
    expected[:, list(places)] = True
    assert torch.equal(seen[0], expected)


def chosen_by(model: nn.Module, site: Site, *args, path: str | None = None, **kwargs) -> Tensor:
    """The mask of selected tokens in a call."""
    seen: list[Tensor] = []
    extra = {name: kwargs.pop(name) for name in ("value_ids", "positions") if name in kwargs}
    with torch.no_grad(), intercept(model, site, lambda s, chosen, p: seen.append(chosen), **extra):
        model(*args, **kwargs)
    assert len(seen) == 1
    return seen[0]


def test_positional_arguments_and_embeddings_are_understood(shared_model) -> None:
    ids, real = left(IDS), left(REAL)
    expected = torch.zeros(3, 7, dtype=torch.bool)
    expected[range(3), LEFT[1]] = True
    site = Site(1, token=1)
    named = {"input_ids": ids, "attention_mask": real}
    assert torch.equal(chosen_by(shared_model, site, **named), expected)
    by_place = (ids, real) if type(shared_model).__name__.startswith("Llama") else (ids, None, real)
    assert torch.equal(chosen_by(shared_model, site, *by_place), expected)
    embeddings = shared_model.get_input_embeddings()(ids)
    assert torch.equal(chosen_by(shared_model, site, inputs_embeds=embeddings, attention_mask=real), expected)


def test_a_four_dimensional_mask_tells_real_tokens(shared_llama) -> None:
    ids, real = left(IDS), left(REAL).bool()
    causal = torch.ones(7, 7, dtype=torch.bool).tril()
    mask = (causal & real[:, None, None, :]) | torch.zeros(3, 1, 7, 7, dtype=torch.bool)
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for each in (mask, additive):
        assert torch.equal(chosen_by(shared_llama, Site(1, token="all"), ids, attention_mask=each), real)


def test_values_are_found_in_the_ids(shared_model) -> None:
    ids, real = IDS.clone(), REAL
    ids[1, :2] = torch.tensor([13, 14])
    ids[0] = torch.tensor([13, 14, 5, 13, 14, 5, 13])  # the pair twice, and its first half at the end
    ids[2, :3] = torch.tensor([9, 40, 9])
    expected = torch.zeros(3, 7, dtype=torch.bool)
    expected[range(3), [4, 1, 1]] = True
    site = Site(0, token="value")
    found = chosen_by(shared_model, site, ids, attention_mask=real, value_ids=((13, 14), (40,)))
    assert torch.equal(found, expected)
    with pytest.raises(EditError, match="Row 2 of the batch holds none"):
        chosen_by(shared_model, site, ids, attention_mask=real, value_ids=((13, 14),))
    with pytest.raises(EditError, match="value_ids"):
        intercept(shared_model, site, lambda s, c, p: None)


def test_callables_and_positions_select(shared_gpt2) -> None:
    def first_even(ids: Tensor, real: Tensor) -> Tensor:
        return ((ids % 2 == 0) & real.bool()).int().argmax(1)

    expected = torch.zeros(3, 7, dtype=torch.bool)
    expected[range(3), [1, 1, 1]] = True
    assert torch.equal(chosen_by(shared_gpt2, Site(0, token=first_even), IDS, attention_mask=REAL), expected)
    even = chosen_by(shared_gpt2, Site(0, token=lambda ids, real: ids % 2 == 0), IDS, attention_mask=REAL)
    assert torch.equal(even, IDS % 2 == 0)
    given = chosen_by(shared_gpt2, Site(0), IDS, attention_mask=REAL, positions=torch.tensor([3, 1, 0]))
    assert given.nonzero().tolist() == [[0, 3], [1, 1], [2, 0]]
    with pytest.raises(EditError, match="leave the row"):
        chosen_by(shared_gpt2, Site(0), IDS, positions=torch.tensor([3, 7, 0]))


def test_an_index_that_a_row_does_not_have_is_named(shared_gpt2) -> None:
    with pytest.raises(EditError, match=r"token=4 does not exist in row 2.*\s*3 real tokens"):
        chosen_by(shared_gpt2, Site(0, token=4), IDS, attention_mask=REAL)


def test_t5_stacks_have_their_own_tokens() -> None:
    model = t5()
    decoder_ids = torch.tensor([[0, 5, 6, 7], [0, 5, 0, 0], [0, 9, 9, 0]])
    decoder_real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
    inputs = {
        "input_ids": IDS, "attention_mask": REAL, "decoder_input_ids": decoder_ids,
        "decoder_attention_mask": decoder_real,
    }  # fmt: skip
    encoder = chosen_by(model, Site(1, stack="encoder"), **inputs)
    assert encoder.nonzero().tolist() == [[0, 6], [1, 4], [2, 2]]
    decoder = chosen_by(model, Site(1, stack="decoder"), **inputs)
    assert decoder.nonzero().tolist() == [[0, 3], [1, 1], [2, 2]]
    head = chosen_by(model, Site(module="lm_head:input", token=-2), **inputs)
    assert head.nonzero().tolist() == [[0, 2], [1, 0], [2, 1]]


def test_t5_edits_match_a_hand_run_stack(device) -> None:
    model = t5().to(device)
    push, ids, real = vector(device), IDS.to(device), REAL.to(device)
    decoder_ids = torch.tensor([[0, 5, 6], [0, 5, 7], [0, 9, 9]], device=device)

    def change(states: Tensor) -> Tensor:
        for row, place in enumerate([6, 4, 2]):
            states = at(states, row, place, push)
        return states

    inputs = {"input_ids": ids, "attention_mask": real, "decoder_input_ids": decoder_ids}
    expected = by_hand(model, "encoder.block", 0, change, **inputs)
    found = edited(model, Site(0, stack="encoder"), push, **inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)

    def change_last(states: Tensor) -> Tensor:
        return at(at(at(states, 0, 2, push), 1, 2, push), 2, 2, push)

    expected = by_hand(model, "decoder.block", 0, change_last, **inputs)
    found = edited(model, Site(0, stack="decoder"), push, **inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_patches_of_an_image_are_tokens(device) -> None:
    model = vit().to(device)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)).to(device)
    push = vector(device)
    path = "encoder.layer" if hasattr(model, "encoder") else "layers"
    expected = by_hand(model, path, 1, lambda s: at(at(s, 0, 5, push), 1, 5, push), pixel_values=pixels)
    found = edited(model, Site(1, token=5), push, pixel_values=pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    every = chosen_by(model, Site(1, token="all"), pixel_values=pixels)
    assert every.shape == (2, 17) and bool(every.all())


def test_streams_of_gpt2_against_its_own_arithmetic(shared_gpt2, device) -> None:
    """Recompute one block from its weights, with a change at each stream."""
    model = shared_gpt2.to(device)
    block, push, ids = model.transformer.h[1], vector(device), IDS[:1].to(device)
    wide = 3.0 * torch.randn(128, generator=torch.Generator().manual_seed(3)).to(device)
    positions = torch.arange(7, device=device)
    entering = model.transformer.wte(ids) + model.transformer.wpe(positions)
    causal = torch.ones(7, 7, dtype=torch.bool, device=device).tril()

    def add_last(states: Tensor, by: Tensor | None) -> Tensor:
        return states if by is None else at(states, 0, 6, by)

    def run(stream: str | None = None, by: Tensor | None = None) -> Tensor:
        x = entering
        for index, one in enumerate(model.transformer.h):
            here = {stream: by} if index == 1 else {}
            x = add_last(x, here.get("residual_in"))
            q, k, v = (one.ln_1(x) @ one.attn.c_attn.weight + one.attn.c_attn.bias).split(WIDTH, -1)
            q, k, v = (each.view(1, 7, 4, 8).transpose(1, 2) for each in (q, k, v))
            weights = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~causal, -torch.inf).softmax(-1)
            heads = add_last((weights @ v).transpose(1, 2).reshape(1, 7, WIDTH), here.get("heads"))
            attention = heads @ one.attn.c_proj.weight + one.attn.c_proj.bias
            x = x + add_last(attention, here.get("attention_out"))
            hidden = one.ln_2(x) @ one.mlp.c_fc.weight + one.mlp.c_fc.bias
            hidden = add_last(torch.nn.functional.gelu(hidden, approximate="tanh"), here.get("mlp_hidden"))
            mlp = hidden @ one.mlp.c_proj.weight + one.mlp.c_proj.bias
            x = add_last(x + add_last(mlp, here.get("mlp_out")), here.get("residual_out"))
        return model.lm_head(model.transformer.ln_f(x))

    torch.testing.assert_close(final_states(model, input_ids=ids), run(), rtol=0, atol=1e-4)
    assert block is model.transformer.h[1]
    for stream in ("residual_in", "heads", "attention_out", "mlp_hidden", "mlp_out", "residual_out"):
        by = wide if stream == "mlp_hidden" else push
        found = edited(model, Site(1, stream), by, input_ids=ids)
        torch.testing.assert_close(found, run(stream, by), rtol=0, atol=1e-4)
    one_head = torch.zeros(WIDTH, device=device)
    one_head[16:24] = push[:8]
    found = edited(model, Site(1, "heads", head=2), push[:8], input_ids=ids)
    torch.testing.assert_close(found, run("heads", one_head), rtol=0, atol=1e-4)
    embedded = edited(model, Site(stream="embedding"), push, input_ids=ids)
    entering = add_last(entering, push)
    torch.testing.assert_close(embedded, run(), rtol=0, atol=1e-4)


def test_the_input_of_the_head_sees_only_the_kept_tokens(shared_llama) -> None:
    site = Site(module="lm_head:input")
    kept = chosen_by(shared_llama, site, IDS[:1], logits_to_keep=1)
    assert kept.tolist() == [[True]]
    kept = chosen_by(shared_llama, Site(module="lm_head:input", token=-2), IDS[:1], logits_to_keep=3)
    assert kept.tolist() == [[False, True, False]]


def test_flattened_states_are_given_back_their_rows() -> None:
    """OPT's MLP sees (batch x tokens, width)."""
    model = opt()
    found = chosen_by(model, Site(module="model.decoder.layers.1.fc1:input"), IDS, attention_mask=REAL)
    assert found.nonzero().tolist() == [[0, 6], [1, 4], [2, 2]]


def test_a_tuple_output_keeps_its_other_members(shared_gpt2) -> None:
    site = Site(module="transformer.h.1.attn")
    vectors = vector(torch.device("cpu"))
    expected = edited(shared_gpt2, Site(1, "attention_out"), vectors, input_ids=IDS)
    assert torch.equal(edited(shared_gpt2, site, vectors, input_ids=IDS), expected)


def test_a_model_output_keeps_its_type(shared_gpt2) -> None:
    with intercept(shared_gpt2, Site(module="transformer", token="all"), lambda s, c, p: s * 0):
        output = shared_gpt2(IDS, output_hidden_states=True)
    assert torch.equal(output.logits, torch.zeros_like(output.logits))
    assert len(output.hidden_states) == 4


def test_a_pass_that_continues_a_cache_is_new_tokens(shared_model) -> None:
    passes: list[tuple[Pass, Tensor]] = []
    with (
        torch.no_grad(),
        intercept(shared_model, Site(0, token="all"), lambda s, c, p: passes.append((p, c))),
    ):
        start = shared_model(IDS[:, :4], use_cache=True)
        shared_model(IDS[:, 4:6], past_key_values=start.past_key_values, use_cache=True)
    (first, _), (second, chosen) = passes
    assert (first.past_length, first.prompt_length, second.past_length, second.prompt_length) == (0, 4, 4, 4)
    assert not second.generating and bool(chosen.all())


def test_functions_must_keep_the_shape(shared_gpt2) -> None:
    with (
        intercept(shared_gpt2, Site(0), lambda s, c, p: s[:, :1]),
        pytest.raises(EditError, match="must keep the shape"),
    ):
        shared_gpt2(IDS)


def test_packed_rows_are_refused(shared_llama) -> None:
    with intercept(shared_llama, Site(0), lambda s, c, p: None), pytest.raises(EditError, match="packed"):
        shared_llama(IDS[:1], cu_seq_lens_q=torch.tensor([0, 3, 7]))


def hook_counts(model: nn.Module) -> list[int]:
    names = [
        name for name in nn.Module().__dict__ if name.endswith(("hooks", "hooks_with_kwargs", "_called"))
    ]
    return [len(getattr(module, name)) for module in model.modules() for name in names]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_removal_in_any_order_leaves_nothing_behind(order, shared_model) -> None:
    before, keys = hook_counts(shared_model), [set(module.__dict__) for module in shared_model.modules()]
    sites = [Site(0), Site(1, "attention_out"), Site(1)]
    handles = [intercept(shared_model, site, lambda s, c, p: s + 1) for site in sites]
    assert hook_counts(shared_model) != before
    assert "generate" in shared_model.__dict__
    for index in order:
        handles[index].remove()
        handles[index].remove()
    assert hook_counts(shared_model) == before
    assert [set(module.__dict__) for module in shared_model.modules()] == keys


def test_a_forward_that_fails_leaves_no_frame_behind(shared_gpt2) -> None:
    seen: list[Tensor] = []
    with intercept(shared_gpt2, Site(0), lambda s, c, p: seen.append(c)):
        with pytest.raises(IndexError):
            shared_gpt2(torch.tensor([[10_000, 1]]))
        shared_gpt2(IDS, attention_mask=REAL)
    assert seen[-1].nonzero().tolist() == [[0, 6], [1, 4], [2, 2]]


def test_a_block_called_by_itself_takes_all_its_tokens_for_real(shared_gpt2) -> None:
    seen: list[Tensor] = []
    with intercept(shared_gpt2, Site(1), lambda s, c, p: seen.append(c)):
        shared_gpt2.transformer.h[1](torch.randn(2, 5, WIDTH))
    assert seen[0].nonzero().tolist() == [[0, 4], [1, 4]]
