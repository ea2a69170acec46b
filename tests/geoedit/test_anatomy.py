"""Anatomy of any module: what it leaves behind, odd models, sites that exist and sites that do not."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from torch import Tensor, nn
from torch.nn import functional

from geoedit.anatomy import Location, anatomy
from geoedit.errors import EditError
from geoedit.site import Site

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    **IDS,
}


def llama(**more: Any) -> tf.LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(tf.LlamaConfig(**(SIZES | {"num_key_value_heads": 2} | more))).eval()


def gpt2(**more: Any) -> tf.GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=99, **IDS, **more)
        return tf.GPT2LMHeadModel(config).eval()


def mamba() -> tf.MambaForCausalLM:
    return tf.MambaForCausalLM(
        tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=99, state_size=8, **IDS)
    ).eval()


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.mixed, self.out, self.n_head = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        parts = self.mixed(x).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(*parts, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block whose norms are functions, not modules."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(functional.rms_norm(x, x.shape[-1:]))
        return x + self.down(functional.relu(self.up(functional.rms_norm(x, x.shape[-1:]))) ** 2)


class NanoGPT(nn.Module):
    """A language model written by hand: it takes token ids, has no configuration and returns logits."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.wpe, self.wte = nn.Embedding(16, 24), nn.Embedding(40, 24)
        self.h = nn.ModuleList(Block(24, 3) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(24), nn.Linear(24, 40, bias=False)

    def forward(self, idx: Tensor) -> Tensor:
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1], device=idx.device))
        for block in self.h:
            x = block(x)
        return self.head(self.norm(x))


def _hooks(model: nn.Module) -> list[int]:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [len(getattr(m, name)) for m in model.modules() for name in names]


def test_model_is_left_as_it_was(device: torch.device) -> None:
    model = llama(attention_dropout=0.5).to(device).train()
    model.model.layers[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags, hooks = [m.training for m in model.modules()], _hooks(model)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    anatomy(model)
    assert torch.equal(torch.get_rng_state(), state)
    if on_device is not None:
        assert torch.equal(torch.cuda.get_rng_state(device), on_device)
    assert [m.training for m in model.modules()] == flags and _hooks(model) == hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_hooks_come_off_when_the_forward_pass_breaks() -> None:
    model = NanoGPT().train()
    hooks = _hooks(model)
    with pytest.raises(EditError, match=r"the given inputs: IndexError.*\n.*anatomy\(model, inputs="):
        anatomy(model, inputs=torch.full((1, 5), 1000))
    assert _hooks(model) == hooks and all(m.training for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_precision_does_not_change_the_places(dtype: torch.dtype, build: Any, device: torch.device) -> None:
    assert str(anatomy(build().to(device, dtype))) == str(anatomy(build()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_that_add_far_more_than_they_were_given(dtype: torch.dtype, device: torch.device) -> None:
    """In wide models the first block adds hundreds of times the embedding, which rounding then swallows."""
    model = llama(initializer_range=0.5)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(0.01)
    assert str(anatomy(model.to(device, dtype))) == str(anatomy(llama()))


def test_one_head_is_its_slice_of_the_heads(device: torch.device) -> None:
    """Zeroing what feeds one key-value head silences exactly the two query heads that share it."""
    model = llama().to(device)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[8:] = 0  # the second of two key-value heads
    places = [anatomy(model).locate(Site(block=1, stream="heads", head=head)) for head in range(4)]
    assert [place.features for place in places] == [slice(8 * h, 8 * h + 8) for h in range(4)]
    seen: list[Tensor] = []
    handle = places[0].module.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with handle, torch.no_grad():
        model(torch.arange(5, 11, device=device)[None])
    silent = [bool((seen[0][..., place.features] == 0).all()) for place in places]
    assert silent == [False, False, True, True]
    assert all(place.width == 8 and place.path == "model.layers.1.self_attn.o_proj" for place in places)


def test_lora_counts_as_the_projection_it_wraps() -> None:
    plain = anatomy(gpt2())
    config = peft.LoraConfig(
        r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    model = peft.get_peft_model(gpt2(), config)
    block, known = plain.stack().blocks[1], anatomy(model)
    wrapped = known.stack().blocks[1]
    for stream in ("attention_out", "heads", "mlp_hidden", "mlp_out", "residual_out"):
        assert str(wrapped.location(stream)) == f"base_model.model.{block.location(stream)}"
    assert isinstance(wrapped.location("mlp_out").module, peft.tuners.lora.LoraLayer)
    assert known.unembedding_path == "base_model.model.lm_head"
    assert known.embedding_path == "base_model.model.transformer.wte"


def test_result_is_remembered_until_modules_change() -> None:
    model = llama()
    first = anatomy(model)
    assert anatomy(model) is first
    model.model.layers[0].mlp.down_proj = nn.Linear(48, 32, bias=False)
    second = anatomy(model)
    assert second is not first
    place = second.locate(Site(block=0, stream="mlp_out"))
    assert place.module is model.model.layers[0].mlp.down_proj
    alive = weakref.ref(model)
    del model, first, second, place
    gc.collect()
    assert alive() is None


def test_placed_by_accelerate(device: torch.device) -> None:
    model = llama()
    expected = str(anatomy(model))
    where = device if device.type == "cpu" else 0
    placed = {"model.embed_tokens": where, "model.layers": where, "model.norm": where}
    placed |= {"model.rotary_emb": where, "lm_head": where}
    dispatched = dispatch_model(llama(), device_map=placed, main_device=where, force_hooks=True)
    assert str(anatomy(dispatched)) == expected
    remove_hook_from_submodules(dispatched)


def test_state_space_blocks_have_no_attention() -> None:
    model = mamba()
    block = anatomy(model).stack().blocks[0]
    assert block.streams == ("residual_in", "residual_out")
    assert anatomy(model).stack().final_norm_path == "backbone.norm_f"
    for stream in ("attention_out", "heads"):
        with pytest.raises(
            EditError, match=r"convolution or state space \(mixer.conv1d\).*mixer.out_proj.*Site"
        ):
            anatomy(model).locate(Site(block=0, stream=stream))
    with pytest.raises(EditError, match=r"has no mlp_out.*It has residual_in, residual_out"):
        anatomy(model).locate(Site(block=0, stream="mlp_out"))


def test_model_written_by_hand_with_functional_norms() -> None:
    known = anatomy(NanoGPT())
    stack = known.stack()
    places = [stack.blocks[-1].location(s) for s in ("attention_out", "heads", "mlp_hidden", "mlp_out")]
    assert [str(place) for place in places] == [
        "h.2.attention.out",
        "h.2.attention.out:input",
        "h.2.down:input",
        "h.2.down",
    ]
    assert [place.width for place in places] == [24, 24, 96, 24]
    assert (stack.blocks[0].num_heads, stack.causal, stack.final_norm_path) == (3, True, "norm")
    assert (known.embedding_path, known.unembedding_path) == ("wte", "head")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_transformer_encoder(norm_first: bool, batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 24, norm_first=norm_first, batch_first=batch_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    inputs = torch.randn(
        (1, 5, 16) if batch_first else (5, 1, 16), generator=torch.Generator().manual_seed(0)
    )
    stack = anatomy(model, inputs=inputs).stack()
    block = stack.blocks[1]
    assert (stack.path, stack.causal, stack.token_axis) == ("layers", False, 1 if batch_first else 0)
    assert str(block.attention_out).startswith("layers.1.")
    assert (str(block.mlp_hidden), str(block.mlp_out)) == ("layers.1.linear2:input", "layers.1.linear2")
    with pytest.raises(EditError, match="no projection was seen to run inside"):
        block.location("heads")


def test_zero_initialised_projections_are_found() -> None:
    """Many recipes start each block's output projections at zero, so that nothing is added at first."""
    model = gpt2()
    with torch.no_grad():
        for block in model.transformer.h:
            for projection in (block.attn.c_proj, block.mlp.c_proj):
                projection.weight.zero_()
    assert str(anatomy(model)) == str(anatomy(gpt2()))


def test_example_inputs_of_the_user() -> None:
    model = tf.T5ForConditionalGeneration(
        tf.T5Config(
            d_model=32, d_kv=8, num_heads=4, num_layers=2, d_ff=48, vocab_size=99, decoder_start_token_id=0
        )
    )
    known = anatomy(
        model, inputs={"input_ids": torch.tensor([[3, 4, 5]]), "labels": torch.tensor([[6, 7, 1]])}
    )
    assert list(known.stacks) == ["encoder", "decoder"] and known.main == "decoder"
    assert anatomy(model).main == "decoder"


def test_negative_blocks_and_named_modules() -> None:
    known = anatomy(llama())
    assert known.locate(Site(block=-1)).path == known.locate(Site(block=2)).path == "model.layers.2"
    assert known.locate(Site(stream="embedding")).path == "model.embed_tokens"
    assert known.locate(Site(stream="embedding")).width == 32
    named = known.locate(Site(module="model.layers.1.mlp.up_proj:input"))
    assert (named.path, named.side, named.order) == ("model.layers.1.mlp.up_proj", "input", 1)
    assert known.locate(Site(module="model.layers.1.mlp")).side == "output"


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (Site(block=3), r"No block 3: stack 'decoder' \(model.layers\) has 3, 0 to 2.*Site\(module="),
        (Site(block=0, stream="heads", head=4), "No head 4 in block 0: it has 4, 0 to 3"),
        (Site(block=0, stack="vision"), r"No stack 'vision'; this model has 'decoder' \(3 blocks\)"),
        (Site(module="model.layers.0.mlp.down"), "No module .*Near it: model.layers.0.mlp.down_proj"),
        (Site(module="nonsense"), "No module 'nonsense'.*named_modules"),
    ],
)
def test_sites_that_do_not_exist(site: Site, words: str) -> None:
    with pytest.raises(EditError, match=words):
        anatomy(llama()).locate(site)


def test_ambiguous_stack() -> None:
    text = {k: v for k, v in SIZES.items() if not k.endswith("token_id")}
    vision = {k: v for k, v in text.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    known = anatomy(model)
    assert known.main is None
    with pytest.raises(EditError, match=r"several stacks.*'text' \(3 blocks\), 'vision' \(3 blocks\)"):
        known.locate(Site(block=0))
    assert known.locate(Site(block=0, stack="vision")).path == "vision_model.encoder.layers.0"
    assert {site.stack for site in known.sites()} == {"text", "vision"}


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)), r"No residual blocks.*3 x Linear, ReLU"),
        (nn.Linear(4, 4), "No residual blocks found in Linear"),
        (nn.Identity(), "No forward pass of Identity worked"),
    ],
)
def test_models_without_blocks(model: nn.Module, words: str) -> None:
    with pytest.raises(EditError, match=f"(?s){words}"):
        anatomy(model)


def test_model_without_weights() -> None:
    with pytest.raises(EditError, match="meta device"), torch.device("meta"):
        anatomy(NanoGPT())


def test_sites_and_table() -> None:
    known = anatomy(llama())
    sites = known.sites(("residual_out", "mlp_out", "embedding"))
    assert sites[0] == Site(stream="embedding") and len(sites) == 7
    assert [str(known.locate(site)) for site in sites[1:3]] == [
        "model.layers.0.mlp.down_proj",
        "model.layers.0",
    ]
    assert all(isinstance(known.locate(site), Location) for site in sites)
    text = str(known)
    for words in (
        "blocks 0-2  LlamaDecoderLayer",
        "self_attn.o_proj:input  (4 x 8)",
        "final norm  model.norm",
    ):
        assert words in text
    with pytest.raises(EditError, match="No stream 'banana'"):
        known.sites(("banana",))


def test_layers_that_share_their_weights() -> None:
    model = tf.AlbertModel(tf.AlbertConfig(**SIZES, embedding_size=16))
    (block,) = anatomy(model).stack().blocks
    assert block.calls == 3
