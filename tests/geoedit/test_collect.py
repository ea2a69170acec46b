"""Collected states against transformers' own hidden states and against hand-run forwards."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import transformers as hf
from tokenizers import pre_tokenizers
from torch import Tensor, nn

from geoedit.activations import Activations, collect
from geoedit.anatomy import anatomy
from geoedit.concept import Concept, Prompt, Template
from geoedit.errors import EditError
from geoedit.site import Site

PROMPTS = [
    "the day after monday is",
    "may",
    "the month of may is the month after april and before june",
    "the city of new york is large",
    "paris is old",
]
CONCEPT = Concept(
    "cities", ["new york", "paris", "rome"], [Template("the {value} is old"), Template("in {value}")]
)


def gpt2(size: int) -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=size, n_positions=32, n_embd=32, n_layer=3, n_head=4, initializer_range=0.2
    )
    return hf.GPT2LMHeadModel(config)


def llama(size: int) -> nn.Module:
    config = hf.LlamaConfig(
        vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, max_position_embeddings=32,
    )  # fmt: skip
    return hf.LlamaForCausalLM(config)


def bert(size: int) -> nn.Module:
    config = hf.BertConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    return hf.BertModel(config)


def roberta(size: int) -> nn.Module:
    config = hf.RobertaConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=32, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    return hf.RobertaModel(config)


def opt(size: int) -> nn.Module:
    config = hf.OPTConfig(
        vocab_size=size, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, ffn_dim=48,
        max_position_embeddings=32, word_embed_proj_dim=32, init_std=0.2,
    )  # fmt: skip
    return hf.OPTForCausalLM(config)


def bloom(size: int) -> nn.Module:
    return hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=size, hidden_size=32, n_layer=3, n_head=4, initializer_range=0.2)
    )


def mamba(size: int) -> nn.Module:
    return hf.MambaForCausalLM(
        hf.MambaConfig(
            vocab_size=size, hidden_size=32, num_hidden_layers=3, state_size=8, initializer_range=0.2
        )
    )


def t5(size: int) -> nn.Module:
    config = hf.T5Config(
        vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
        decoder_start_token_id=0, initializer_factor=1.0,
    )  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


FAMILIES: list[Callable[[int], nn.Module]] = [gpt2, llama, bert, roberta, opt, bloom, mamba, t5]


@functools.cache
def build(
    family: Callable[[int], nn.Module], tokenizer: hf.PreTrainedTokenizerFast, device: torch.device
) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return family(len(tokenizer)).eval().to(device)


def left(tokenizer: hf.PreTrainedTokenizerFast) -> hf.PreTrainedTokenizerFast:
    other = copy.deepcopy(tokenizer)
    other.padding_side = "left"
    return other


def alone(model: nn.Module, tokenizer: Callable, text: str) -> tuple[Tensor, ...]:
    """Hidden states of one prompt run alone: (tokens, width) after the embedding and after each block."""
    inputs = tokenizer(text, return_tensors="pt").to(next(model.parameters()).device)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            hidden = model.get_encoder()(**inputs, output_hidden_states=True).hidden_states
        else:
            hidden = model(**inputs, output_hidden_states=True).hidden_states
            if model.config.model_type == "mamba":  # which leaves the embedding out
                hidden = (model.get_input_embeddings()(inputs["input_ids"]), *hidden)
    return tuple(state[0].cpu() for state in hidden)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_the_models_own_whatever_the_batch(family, side, tiny_tokenizer, device) -> None:
    model = build(family, tiny_tokenizer, device)
    tokenizer = left(tiny_tokenizer) if side == "left" else tiny_tokenizer
    stack = "encoder" if model.config.is_encoder_decoder else None
    tokens = ("last", 0, -1, "all")
    sites = [Site(block, token=token, stack=stack) for block in (0, 1) for token in tokens]
    sites += [Site(1, "residual_in", stack=stack)]
    found = collect(model, tokenizer, PROMPTS, sites, batch_size=4)
    for index, text in enumerate(PROMPTS):
        hidden = alone(model, tiny_tokenizer, text)
        for site in sites:
            after = hidden[site.block + (site.stream == "residual_out")]
            wanted = after if site.token == "all" else after[[0 if site.token == 0 else -1]]
            got = found[site][found.rows(site) == index]
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_left_padding_would_go_wrong_without_positions(tiny_tokenizer) -> None:
    """GPT-2 numbers padding too: the test above can fail, and does when no positions are given."""
    model = build(gpt2, tiny_tokenizer, torch.device("cpu"))
    inputs = left(tiny_tokenizer)(PROMPTS[:2], padding=True, return_tensors="pt")
    with torch.no_grad():
        naive = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], output_hidden_states=True
        ).hidden_states[2][1, -1]
    assert (naive - alone(model, tiny_tokenizer, PROMPTS[1])[2][-1]).abs().max() > 0.1


@pytest.mark.parametrize("family", [gpt2, llama])
def test_streams_against_hooks_set_by_hand(family, tiny_tokenizer) -> None:
    model = build(family, tiny_tokenizer, torch.device("cpu"))
    block = (model.transformer.h if family is gpt2 else model.model.layers)[1]
    named = {
        Site(1, "attention_out"): (block.attn.c_proj if family is gpt2 else block.self_attn.o_proj, "out"),
        Site(1, "heads"): (block.attn.c_proj if family is gpt2 else block.self_attn.o_proj, "in"),
        Site(1, "mlp_hidden"): (block.mlp.c_proj if family is gpt2 else block.mlp.down_proj, "in"),
        Site(1, "mlp_out"): (block.mlp, "out"),
        Site(stream="embedding"): (model.get_input_embeddings(), "out"),
    }
    found = collect(model, tiny_tokenizer, PROMPTS, named)
    for site, (module, side) in named.items():
        caught: list[Tensor] = []
        hook = module.register_forward_hook(
            lambda _, args, out, caught=caught, side=side: caught.append(args[0] if side == "in" else out)
        )
        for text in PROMPTS:
            alone(model, tiny_tokenizer, text)
        hook.remove()
        assert len(caught) == len(PROMPTS)
        torch.testing.assert_close(
            found[site], torch.stack([one[0, -1] for one in caught]), atol=1e-5, rtol=1e-5
        )


def test_t5_decoder_sees_the_start_token(tiny_tokenizer, device) -> None:
    model = build(t5, tiny_tokenizer, device)
    sites = [Site(0, stack="decoder"), Site(2, stack="encoder"), Site(1, "residual_out", 0, stack="decoder")]
    found = collect(model, tiny_tokenizer, PROMPTS, sites, batch_size=3)
    for index, text in enumerate(PROMPTS):
        inputs = tiny_tokenizer(text, return_tensors="pt").to(device)
        start = torch.zeros(1, 1, dtype=torch.long, device=device)
        caught: list[Tensor] = []
        hook = model.decoder.block[1].register_forward_hook(lambda _, __, out, c=caught: c.append(out[0]))
        with torch.no_grad():
            out = model(
                input_ids=inputs["input_ids"],
                decoder_input_ids=start,
                output_hidden_states=True,
                use_cache=False,
            )
        hook.remove()
        torch.testing.assert_close(
            found[sites[0]][index], out.decoder_hidden_states[1][0, 0].cpu(), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(found[sites[2]][index], caught[0][0, 0].cpu(), atol=1e-5, rtol=1e-5)


def counting(modules: list[nn.Module]) -> list[int]:
    counts = [0] * len(modules)
    for place, module in enumerate(modules):

        def count(*_: object, place: int = place) -> None:
            counts[place] += 1

        module.register_forward_pre_hook(count)
    return counts


def test_the_forward_stops_after_the_last_site(tiny_tokenizer) -> None:
    model = build(gpt2, tiny_tokenizer, torch.device("cpu"))
    collect(model, tiny_tokenizer, PROMPTS[:1], [Site(0)])
    counts = counting([*model.transformer.h, model.transformer.h[1].mlp, model.lm_head])
    collect(model, tiny_tokenizer, PROMPTS[:1], [Site(1, "attention_out"), Site(0)])
    assert counts == [1, 1, 0, 0, 0]


def test_t5_stops_in_the_encoder_or_in_the_decoder(tiny_tokenizer) -> None:
    model = build(t5, tiny_tokenizer, torch.device("cpu"))
    collect(model, tiny_tokenizer, PROMPTS[:1], [Site(0, stack="encoder")])
    counts = counting([*model.encoder.block, *model.decoder.block])
    collect(model, tiny_tokenizer, PROMPTS[:1], [Site(1, stack="encoder")])
    assert counts == [1, 1, 0, 0, 0]
    collect(model, tiny_tokenizer, PROMPTS[:1], [Site(1, stack="encoder"), Site(0, stack="decoder")])
    assert counts == [2, 2, 1, 1, 0]


def test_one_forward_a_batch_for_all_sites(tiny_model, tiny_tokenizer) -> None:
    collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(0)])
    counts = counting([tiny_model])
    sites = [Site(b, s, t) for b in range(3) for s in ("residual_in", "mlp_out") for t in ("last", "all")]
    collect(tiny_model, tiny_tokenizer, PROMPTS, sites, batch_size=2)
    assert counts == [3]


def test_the_value_is_read_at_its_last_token(tiny_model, tiny_tokenizer) -> None:
    site = Site(1, token="value")
    prompts = CONCEPT.prompts()
    for tokenizer in (tiny_tokenizer, left(tiny_tokenizer)):
        found = collect(tiny_model, tokenizer, prompts, [site], batch_size=4)
        assert found.labels == ("new york", "new york", "paris", "paris", "rome", "rome")
        for index, place in enumerate([2, 2, 1, 1, 1, 1]):
            wanted = alone(tiny_model, tiny_tokenizer, prompts[index].text)[2][place]
            torch.testing.assert_close(found[site][index], wanted, atol=1e-5, rtol=1e-5)


def test_a_repeated_value_counts_where_it_stands_last_as_a_whole_word(tiny_model, tiny_tokenizer) -> None:
    site = Site(0, token="value")
    found = collect(tiny_model, tiny_tokenizer, ["may is may before maybe"], [site], values=["may"])
    torch.testing.assert_close(
        found[site][0], alone(tiny_model, tiny_tokenizer, "may is may before maybe")[1][2]
    )
    spanned = Prompt("may is may", "may", span=(0, 3))
    found = collect(tiny_model, tiny_tokenizer, [spanned], [site])
    torch.testing.assert_close(found[site][0], alone(tiny_model, tiny_tokenizer, "may is may")[1][0])


@pytest.mark.parametrize(
    "scheme",
    [pre_tokenizers.ByteLevel(add_prefix_space=True, trim_offsets=False), pre_tokenizers.Metaspace()],
)
def test_the_value_is_found_where_tokens_carry_the_space(scheme, tiny_tokenizer) -> None:
    """Tokens that begin with the space before them must not be taken for the word before."""
    from tokenizers import Tokenizer, models

    mark = "Ġ" if isinstance(scheme, pre_tokenizers.ByteLevel) else "▁"
    words = ["the", "new", "york", "city", "paris", "is"]
    backend = Tokenizer(
        models.WordLevel({f"{mark}{word}": i for i, word in enumerate(words)} | {"<u>": 6}, "<u>")
    )
    backend.pre_tokenizer = scheme
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<u>")
    model = build(gpt2, tiny_tokenizer, torch.device("cpu"))
    site = Site(stream="embedding", token="value")
    found = collect(
        model, tokenizer, ["the new york city", "paris is paris city"], [site], values=["new york", "paris"]
    )
    assert torch.equal(found[site], model.transformer.wte.weight[[2, 4]])


def test_callable_tokens(tiny_model, tiny_tokenizer) -> None:
    the = tiny_tokenizer.convert_tokens_to_ids("the")

    def after_the(ids: Tensor, real: Tensor) -> Tensor:
        return torch.roll(ids == the, 1, 1) & real

    site = Site(0, token=after_the)
    found = collect(tiny_model, tiny_tokenizer, PROMPTS[2:4], [site])
    assert found.rows(site).tolist() == [0, 0, 1]
    states = [alone(tiny_model, tiny_tokenizer, text)[1] for text in PROMPTS[2:4]]
    torch.testing.assert_close(found[site], torch.stack([states[0][1], states[0][6], states[1][1]]))


def test_dtype_device_and_grad_of_the_result(tiny_model, tiny_tokenizer, device) -> None:
    site = Site(1)
    full = collect(tiny_model, tiny_tokenizer, PROMPTS, [site])[site]
    model = tiny_model.to(device, torch.bfloat16).requires_grad_(True)
    half = collect(model, tiny_tokenizer, PROMPTS, [site])[site]
    wide = collect(model, tiny_tokenizer, PROMPTS, [site], dtype=torch.float64)[site]
    assert (half.dtype, wide.dtype, half.device.type) == (torch.bfloat16, torch.float64, "cpu")
    assert not half.requires_grad
    assert torch.equal(half.double(), wide)
    assert (half.float() - full).norm() / full.norm() < 0.05


def test_model_and_tokenizer_stay_as_they_were(tiny_model, tiny_tokenizer) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.pad_token = None
    tokenizer.padding_side = "left"
    tokenizer.backend_tokenizer.enable_truncation(2)
    tiny_model.train()
    inner = next(iter(tiny_model.children()))
    inner.eval()
    modes = [module.training for module in tiny_model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_model.modules())
    found = collect(tiny_model, tokenizer, PROMPTS, [Site(0), Site(1)])
    assert [module.training for module in tiny_model.modules()] == modes
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny_model.modules())
    assert tokenizer.pad_token is None
    torch.testing.assert_close(found[Site(0)][2], alone(tiny_model.eval(), tiny_tokenizer, PROMPTS[2])[1][-1])


def test_dropout_is_off_while_reading(tiny_tokenizer) -> None:
    model = build(gpt2, tiny_tokenizer, torch.device("cpu")).train()
    one, two = (collect(model, tiny_tokenizer, PROMPTS, [Site(2)])[Site(2)] for _ in range(2))
    model.eval()
    assert torch.equal(one, two)


def test_ready_tensors_of_a_vision_model(device) -> None:
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=8,
        patch_size=4,
    )
    model = hf.ViTModel(config).eval().to(device)
    pixels = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sites = [Site(0, token=0), Site(1, token="all")]
    found = collect(model, None, {"pixel_values": pixels}, sites, batch_size=2)
    with torch.no_grad():
        hidden = model(pixels.to(device), output_hidden_states=True).hidden_states
    torch.testing.assert_close(found[sites[0]], hidden[1][:, 0].cpu(), atol=1e-5, rtol=1e-5)
    assert found.rows(sites[1]).tolist() == [i for i in range(5) for _ in range(5)]
    torch.testing.assert_close(found[sites[1]], hidden[2].flatten(0, 1).cpu(), atol=1e-5, rtol=1e-5)


def test_ready_ids_are_the_same_as_prompts(tiny_model, tiny_tokenizer) -> None:
    inputs = tiny_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    ready = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    one = collect(tiny_model, None, ready, [Site(1)])
    two = collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(1)])
    torch.testing.assert_close(one[Site(1)], two[Site(1)], atol=1e-5, rtol=1e-5)


def test_the_result_is_a_mapping_with_a_clear_error(tiny_model, tiny_tokenizer) -> None:
    found = collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(0), Site(0), Site(-1)])
    assert isinstance(found, Activations)
    assert list(found) == [Site(0), Site(-1)]
    assert found.prompts == tuple(PROMPTS)
    assert Site(1) not in found
    assert found.get(Site(1)) is None
    with pytest.raises(EditError, match=r"block 1 .* was not collected; there are: block 0"):
        found[Site(1)]


def refuse_to_run(model: nn.Module) -> None:
    """From here on a forward is a failure: the errors below must come before any work is done."""

    def fail(*_: object) -> None:
        raise AssertionError("the model ran")

    model.register_forward_pre_hook(fail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "at least one"),
        ({"prompts": "the day"}, "give a list"),
        ({"prompts": ["the", " "]}, "prompt 1 .* empty"),
        ({"prompts": ["the"], "values": ["may", "june"]}, "2 values for 1 prompts"),
        ({"prompts": ["the may"], "values": ["june"]}, "does not hold its value 'june'"),
        ({"prompts": [Prompt("the", "may", span=(2, 9))]}, r"characters \(2, 9\)"),
        ({"prompts": [Prompt("the may", "may")], "values": ["may"]}, "goes with plain texts"),
        ({"sites": []}, "sites is empty"),
        ({"sites": [Site(9)]}, "No block 9"),
        ({"sites": [Site(0, token="value")]}, "do not say which value"),
        ({"sites": [Site(0, token=4)]}, "'may'.* has 1 tokens"),
        ({"sites": [Site(0, token=-2)]}, "'may'.* has 1 tokens"),
        ({"prompts": ["may " * 70]}, "70 tokens, more than the 64"),
        ({"tokenizer": None}, "need a tokenizer"),
        ({"batch_size": 0}, "batch_size is 0"),
        (
            {"prompts": {"input_ids": torch.ones(2, 3), "attention_mask": torch.ones(1, 3)}},
            "same number of rows",
        ),
        (
            {"prompts": {"input_ids": torch.ones(2, 3).long()}, "sites": [Site(0, token="value")]},
            "have no text",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(change, message, tiny_gpt2, tiny_tokenizer) -> None:
    anatomy(tiny_gpt2)  # which runs the model itself
    refuse_to_run(tiny_gpt2)
    arguments = {"tokenizer": tiny_tokenizer, "prompts": PROMPTS, "sites": [Site(0)], **change}
    with pytest.raises(EditError, match=message):
        collect(tiny_gpt2, **arguments)


def test_a_tokenizer_without_offsets_can_do_all_but_values(tiny_model, tiny_tokenizer) -> None:
    class Slow:
        is_fast = False
        padding_side = "right"
        pad_token_id = 0

        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": tiny_tokenizer(text)["input_ids"]}

    found = collect(tiny_model, Slow(), PROMPTS, [Site(0)])
    assert torch.equal(found[Site(0)], collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(0)])[Site(0)])
    with pytest.raises(EditError, match=r"does not say which characters"):
        collect(tiny_model, Slow(), CONCEPT.prompts(), [Site(0, token="value")])


def test_a_value_that_tokenises_to_nothing_is_named(tiny_model, tiny_tokenizer) -> None:
    from tokenizers import normalizers

    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    with pytest.raises(EditError, match=r"prompt 0 .*'x' has no token"):
        collect(tiny_model, tokenizer, ["the x is"], [Site(0, token="value")], values=["x"])


def test_states_that_are_not_finite_name_prompt_and_site(tiny_model, tiny_tokenizer) -> None:
    weight = tiny_model.get_input_embeddings().weight
    weight[tiny_tokenizer.convert_tokens_to_ids("paris")] = float("nan")
    with pytest.raises(EditError, match=r"prompt 4 \('paris is old'\) gives NaN .* block 1 residual_out"):
        collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(1)])


def test_a_dtype_too_narrow_for_the_states_is_refused(tiny_model, tiny_tokenizer) -> None:
    tiny_model.get_input_embeddings().weight.mul_(1e6)
    with pytest.raises(EditError, match=r"do not fit into torch.float16"):
        collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(stream="embedding")], dtype=torch.float16)


def test_a_module_that_never_runs_is_named(tiny_model, tiny_tokenizer) -> None:
    tiny_model.spare = nn.Linear(32, 32)
    with pytest.raises(EditError, match=r"without running the module at: spare @ last"):
        collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(module="spare")])


def test_the_bar_shows_only_when_asked(tiny_model, tiny_tokenizer, capfd) -> None:
    collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(0)])
    collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(0)], progress=False)
    assert capfd.readouterr().err == ""
    collect(tiny_model, tiny_tokenizer, PROMPTS, [Site(0)], progress=True)
    assert "reading" in capfd.readouterr().err
