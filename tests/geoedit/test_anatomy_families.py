"""Anatomy of many architectures: the places stand here by hand, read from each architecture's source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from geoedit.anatomy import Stack, anatomy
from geoedit.anatomy.inputs import attempts

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
S: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 99,
    **IDS,
}
K = S | {"num_key_value_heads": 2}
H = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, **IDS}
V: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
}
E = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": 99,
    **IDS,
}
OPT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "vocab_size": 99,
    **IDS,
}
T = {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 48, "vocab_size": 99}
F = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99, **IDS}


@dataclass(frozen=True)
class Family:
    """What is true of one architecture; paths of places are relative to the block.

    `norms` are the two norms after the sums of a post-norm block; `also` is what else is added.
    """

    build: Callable[[], nn.Module]
    path: str
    attention: str | None
    mlp: str | None
    attention_out: str | None = None
    mlp_out: str | None = None
    embedding: str | None = None
    final_norm: str | None = None
    unembedding: str | None = "lm_head"
    heads: int = 4
    head_dim: int = 8
    stack: str | None = None
    block: int = 0
    causal: bool = True
    norms: tuple[str, str] | None = None
    also: tuple[str, ...] = ()
    gain: float = 1.0
    experts: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def lm(
    name: str,
    config: dict[str, Any],
    path: str = "model.layers",
    attention: str | None = "self_attn.o_proj",
    mlp: str | None = "mlp.down_proj",
    *,
    embedding: str = "model.embed_tokens",
    final_norm: str | None = "model.norm",
    model: str | None = None,
    **more: Any,
) -> Family:
    """Describe a decoder-only language model; what is not said is as in Llama."""

    def build() -> nn.Module:
        config_class = getattr(tf, more.get("extra", {}).get("config", f"{name}Config"))
        return getattr(tf, model or f"{name}ForCausalLM")(config_class(**config))

    return Family(build, path, attention, mlp, embedding=embedding, final_norm=final_norm, **more)


def gpt(name: str, config: dict[str, Any], attention: str, mlp: str, **more: Any) -> Family:
    settings = {
        "path": "transformer.h",
        "embedding": "transformer.wte",
        "final_norm": "transformer.ln_f",
    } | more
    return lm(name, config, attention=attention, mlp=mlp, **settings)


def bert(name: str, model: str, root: str, config: dict[str, Any] | None = None, **more: Any) -> Family:
    """Describe an encoder with BERT's post-norm blocks."""
    settings: dict[str, Any] = {
        "embedding": f"{root}embeddings.word_embeddings",
        "final_norm": None,
        "causal": False,
        "norms": ("attention.output.LayerNorm", "output.LayerNorm"),
        "unembedding": None,
        "path": f"{root}encoder.layer",
        "attention": "attention.output.dense",
        "mlp": "output.dense",
    } | more
    return lm(name, config or S, model=model, **settings)


def vision(
    name: str, model: str, config: dict[str, Any], path: str, attention: str, mlp: str, **more: Any
) -> Family:
    settings: dict[str, Any] = {"causal": False, "unembedding": None, "embedding": None} | more
    return lm(name, config, path, attention, mlp, model=model, **settings)


def seq2seq(name: str, model: str, config: dict[str, Any], stack: str, **more: Any) -> Family:
    """Describe one stack of BART or its kin."""
    cross = ("encoder_attn.out_proj",) if stack == "decoder" else ()
    settings: dict[str, Any] = {
        "path": f"model.{stack}.layers",
        "embedding": f"model.{stack}.embed_tokens",
        "stack": stack,
        "causal": stack == "decoder",
        "final_norm": f"model.{stack}.layer_norm",
        "also": cross,
    } | more
    return lm(name, config, attention="self_attn.out_proj", mlp="fc2", model=model, **settings)


MOE: dict[str, Any] = {"mlp": None, "mlp_out": "mlp", "experts": True}
SANDWICH = {"attention_out": "post_attention_layernorm", "mlp_out": "post_feedforward_layernorm"}
POST_BART = ("self_attn_layer_norm", "final_layer_norm")
CLIP_TEXT = {
    k: v for k, v in S.items() if k in {"hidden_size", "num_hidden_layers", "num_attention_heads"}
} | {
    "intermediate_size": 48,
    "vocab_size": 99,
    **IDS,
}
CLIP = {"text_config": CLIP_TEXT, "vision_config": V, "projection_dim": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK = S | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}
JAMBA = K | {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}
WHISPER = E | {"max_source_positions": 12, "num_mel_bins": 8, "decoder_start_token_id": 1}

FAMILIES: dict[str, Family] = {
    "gpt2": gpt("GPT2", H, "attn.c_proj", "mlp.c_proj", model="GPT2LMHeadModel"),
    "gpt_neox": lm(
        "GPTNeoX", S, "gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h",
        embedding="gpt_neox.embed_in", final_norm="gpt_neox.final_layer_norm",
    ),
    "gpt_neox sequential": lm(
        "GPTNeoX", S | {"use_parallel_residual": False}, "gpt_neox.layers", "attention.dense",
        "mlp.dense_4h_to_h",
        embedding="gpt_neox.embed_in", final_norm="gpt_neox.final_layer_norm",
    ),
    "gptj": gpt("GPTJ", H | {"rotary_dim": 4}, "attn.out_proj", "mlp.fc_out"),
    "codegen": gpt("CodeGen", H | {"rotary_dim": 4}, "attn.out_proj", "mlp.fc_out"),
    "gpt_bigcode": gpt("GPTBigCode", H, "attn.c_proj", "mlp.c_proj"),
    "gpt_neo": gpt(
        "GPTNeo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 99, **IDS}
        | {"attention_types": [[["global", "local"], 1]]},
        "attn.attention.out_proj", "mlp.c_proj", block=1,
    ),
    "opt": lm(
        "OPT", OPT | {"word_embed_proj_dim": 32}, "model.decoder.layers", "self_attn.out_proj", "fc2",
        embedding="model.decoder.embed_tokens", final_norm="model.decoder.final_layer_norm",
    ),
    "opt post-norm": lm(
        "OPT", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}, "model.decoder.layers",
        "self_attn.out_proj", "fc2", embedding="model.decoder.embed_tokens", final_norm=None, norms=POST_BART,
    ),
    "bloom": gpt(
        "Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 99, **IDS},
        "self_attention.dense", "mlp.dense_4h_to_h", embedding="transformer.word_embeddings",
    ),
    "falcon new": gpt(
        "Falcon", F | {"new_decoder_architecture": True, "num_kv_heads": 2}, "self_attention.dense",
        "mlp.dense_4h_to_h", embedding="transformer.word_embeddings",
    ),
    "falcon old": gpt(
        "Falcon", F, "self_attention.dense", "mlp.dense_4h_to_h", embedding="transformer.word_embeddings"
    ),
    "falcon alibi": gpt(
        "Falcon", F | {"parallel_attn": False, "alibi": True, "multi_query": False}, "self_attention.dense",
        "mlp.dense_4h_to_h", embedding="transformer.word_embeddings",
    ),
    "mpt": gpt(
        "Mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 99, **IDS}, "attn.out_proj",
        "ffn.down_proj", path="transformer.blocks", final_norm="transformer.norm_f",
    ),
    "llama": lm("Llama", K),
    "mistral": lm("Mistral", K),
    "qwen2": lm("Qwen2", K),
    "qwen3": lm("Qwen3", K | {"head_dim": 16}, head_dim=16),
    "phi3": lm("Phi3", K),
    "phi": lm("Phi", S, attention="self_attn.dense", mlp="mlp.fc2", final_norm="model.final_layernorm"),
    "gemma2": lm("Gemma2", K | {"head_dim": 8}, **SANDWICH),
    "gemma3": lm("Gemma3", K | {"head_dim": 8}, **SANDWICH, extra={"config": "Gemma3TextConfig"}),
    "olmo2": lm("Olmo2", K, **SANDWICH),
    "glm": lm("Glm", K | {"head_dim": 8}),
    "glm4": lm(
        "Glm4", K | {"head_dim": 8}, attention_out="post_self_attn_layernorm", mlp_out="post_mlp_layernorm"
    ),
    "starcoder2": lm("Starcoder2", K, mlp="mlp.c_proj"),
    "stablelm": lm("StableLm", K | {"use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": lm("Cohere", K),
    "cohere2": lm("Cohere2", K),
    "granite": lm("Granite", K | {"residual_multiplier": 0.22}, gain=0.22),
    "xglm": lm(
        "XGLM",
        {"d_model": 32, "attention_heads": 4, "num_layers": 2, "ffn_dim": 48, "vocab_size": 99, **IDS},
        attention="self_attn.out_proj", mlp="fc2", final_norm="model.layer_norm",
    ),
    "mixtral": lm("Mixtral", K | {"num_local_experts": 4}, **MOE),
    "qwen2_moe": lm("Qwen2Moe", K | EXPERTS | {"shared_expert_intermediate_size": 24}, **MOE),
    "qwen3_moe": lm("Qwen3Moe", K | EXPERTS | {"head_dim": 8}, **MOE),
    "olmoe": lm("Olmoe", K | {"num_experts": 4, "num_experts_per_tok": 2}, **MOE),
    "gpt_oss": lm("GptOss", K | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}, **MOE),
    "deepseek_v3 dense": lm("DeepseekV3", DEEPSEEK, head_dim=12),
    "deepseek_v3": lm("DeepseekV3", DEEPSEEK, head_dim=12, block=1, **MOE),
    "jamba": lm(
        "Jamba", JAMBA, mlp=None, mlp_out="feed_forward", experts=True, block=1,
        final_norm="model.final_layernorm",
    ),
    "falcon_h1": lm(
        "FalconH1",
        K | {"head_dim": 8, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
        mlp="feed_forward.down_proj", final_norm="model.final_layernorm", also=("mamba.out_proj",),
    ),
    "bert": bert("Bert", "BertForMaskedLM", "bert.", unembedding="cls.predictions.decoder"),
    "bert without a head": bert("Bert", "BertModel", ""),
    "roberta": bert("Roberta", "RobertaForMaskedLM", "roberta.", unembedding="lm_head.decoder"),
    "xlm-roberta": bert("XLMRoberta", "XLMRobertaModel", ""),
    "electra": bert("Electra", "ElectraModel", "", S | {"embedding_size": 16}),
    "deberta-v2": bert(
        "DebertaV2", "DebertaV2Model", "", S | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
    ),
    "albert": bert(
        "Albert", "AlbertModel", "", S | {"embedding_size": 16}, path="encoder.albert_layer_groups",
        attention="albert_layers.0.attention.dense", mlp="albert_layers.0.ffn_output",
        norms=("albert_layers.0.attention.LayerNorm", "albert_layers.0.full_layer_layer_norm"),
    ),
    "distilbert": bert(
        "DistilBert", "DistilBertForMaskedLM", "distilbert.",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 99},
        path="distilbert.transformer.layer", attention="attention.out_lin", mlp="ffn.lin2",
        norms=("sa_layer_norm", "output_layer_norm"), unembedding="vocab_projector",
    ),
    "modernbert": bert(
        "ModernBert", "ModernBertModel", "", path="layers", attention="attn.Wo", mlp="mlp.Wo", norms=None,
        embedding="embeddings.tok_embeddings", final_norm="final_norm", block=1,
    ),
    "vit": vision(
        "ViT", "ViTForImageClassification", V, "vit.layers", "attention.o_proj", "mlp.fc2",
        final_norm="vit.layernorm",
    ),
    "dinov2": vision(
        "Dinov2", "Dinov2Model", {k: v for k, v in V.items() if k != "intermediate_size"} | {"mlp_ratio": 2},
        "encoder.layer", "attention.o_proj", "mlp.fc2", attention_out="layer_scale1", mlp_out="layer_scale2",
        final_norm="layernorm",
    ),
    "clip text": vision(
        "CLIPText", "CLIPTextModel", CLIP_TEXT, "encoder.layers", "self_attn.out_proj", "mlp.fc2",
        final_norm="final_layer_norm", causal=True, embedding="embeddings.token_embedding",
    ),
    "clip, its text": vision(
        "CLIP", "CLIPModel", CLIP, "text_model.encoder.layers", "self_attn.out_proj", "mlp.fc2", stack="text",
        final_norm="text_model.final_layer_norm", causal=True,
        embedding="text_model.embeddings.token_embedding",
    ),
    "clip, its vision": vision(
        "CLIP", "CLIPModel", CLIP, "vision_model.encoder.layers", "self_attn.out_proj", "mlp.fc2",
        stack="vision", final_norm="vision_model.post_layernorm",
    ),
    "siglip, its vision": vision(
        "Siglip", "SiglipModel", CLIP, "vision_model.encoder.layers", "self_attn.out_proj", "mlp.fc2",
        stack="vision", final_norm="vision_model.post_layernorm",
    ),
    "t5 encoder": lm(
        "T5", T, "encoder.block", "layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo", stack="encoder",
        model="T5ForConditionalGeneration", causal=False, embedding="encoder.embed_tokens",
        final_norm="encoder.final_layer_norm",
    ),
    "t5 decoder": lm(
        "T5", T | {"feed_forward_proj": "gated-gelu"}, "decoder.block", "layer.0.SelfAttention.o",
        "layer.2.DenseReluDense.wo", model="T5ForConditionalGeneration", embedding="decoder.embed_tokens",
        final_norm="decoder.final_layer_norm", also=("layer.1.EncDecAttention.o",), stack="decoder", block=1,
    ),
    "bart encoder": seq2seq(
        "Bart", "BartForConditionalGeneration", E, "encoder", final_norm=None, norms=POST_BART
    ),
    "bart decoder": seq2seq(
        "Bart", "BartForConditionalGeneration", E, "decoder", final_norm=None,
        norms=("", ""),  # three norms: the sums are not checked
    ),
    "mbart decoder": seq2seq("MBart", "MBartForConditionalGeneration", E, "decoder"),
    "whisper encoder": seq2seq(
        "Whisper", "WhisperForConditionalGeneration", WHISPER, "encoder", embedding=None,
        unembedding="proj_out",
    ),
    "whisper decoder": seq2seq(
        "Whisper", "WhisperForConditionalGeneration", WHISPER, "decoder", unembedding="proj_out"
    ),
}  # fmt: skip


def _tiny(family: Family) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return family.build().eval()


@pytest.fixture(scope="module", params=list(FAMILIES))
def case(request: pytest.FixtureRequest) -> tuple[Family, nn.Module, Stack]:
    """Each family, a random-weight model of it, and the stack that anatomy found."""
    family = FAMILIES[request.param]
    model = _tiny(family)
    return family, model, anatomy(model).stack(family.stack)


def _inside(family: Family, place: str | None) -> str | None:
    return None if place is None else f"{family.path}.{family.block}.{place}"


def _shown(place: object) -> str | None:
    return None if place is None else str(place)


def test_places_are_where_the_source_has_them(case: tuple[Family, nn.Module, Stack]) -> None:
    family, model, stack = case
    known = anatomy(model)
    block = stack.blocks[family.block]
    heads, hidden = _inside(family, family.attention), _inside(family, family.mlp)
    assert {
        "path": stack.path,
        "block": block.path,
        "attention_out": _shown(block.attention_out),
        "heads": _shown(block.heads),
        "mlp_hidden": _shown(block.mlp_hidden),
        "mlp_out": _shown(block.mlp_out),
        "num_heads": block.num_heads,
        "head_dim": block.head_dim,
        "final_norm": stack.final_norm_path,
        "unembedding": known.unembedding_path,
        "causal": stack.causal,
        "width": stack.width,
    } == {
        "path": family.path,
        "block": f"{family.path}.{family.block}",
        "attention_out": _inside(family, family.attention_out or family.attention),
        "heads": f"{heads}:input",
        "mlp_hidden": None if hidden is None else f"{hidden}:input",
        "mlp_out": _inside(family, family.mlp_out or family.mlp),
        "num_heads": family.heads,
        "head_dim": family.head_dim,
        "final_norm": family.final_norm,
        "unembedding": family.unembedding,
        "causal": family.causal,
        "width": 32,
    }
    assert stack.embedding_path == family.embedding
    assert len(stack.blocks) == (1 if "albert" in family.path else 2)
    assert model.get_submodule(block.path) is block.module
    if family.experts:
        assert "mixture of experts" in block.why["mlp_hidden"]


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else _first(next(iter(value)))


@torch.no_grad()
def test_the_block_is_the_sum_of_what_it_adds(case: tuple[Family, nn.Module, Stack]) -> None:
    """The paths above, read with plain hooks, add up: in + gain (attention + mlp) = out."""
    family, model, stack = case
    if family.norms == ("", ""):
        pytest.skip("a post-norm block with three sums")
    seen: dict[str, Tensor] = {}
    wanted = [
        family.attention_out or family.attention,
        family.mlp_out or family.mlp,
        *family.also,
        *(family.norms or ()),
    ]
    block = model.get_submodule(f"{family.path}.{family.block}")

    def keep(name: str, value: Any) -> None:
        seen.setdefault(name, _first(value).clone())

    handles = [
        block.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: keep(name, out))
        for name in wanted
        if name is not None
    ]
    handles += [
        block.register_forward_pre_hook(
            lambda _m, args, kwargs: keep("in", args or list(kwargs.values())), with_kwargs=True
        ),
        block.register_forward_hook(lambda _m, _a, out: keep("out", out)),
    ]
    (args, kwargs) = attempts(model)[0][1]
    model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    shape = seen["in"].shape
    attention, mlp, *also = [
        seen[name].reshape(shape) for name in wanted[: 2 + len(family.also)] if name is not None
    ]
    if family.norms is None:
        total = seen["in"] + family.gain * (attention + mlp + sum(also))
    else:
        first, last = (block.get_submodule(name) for name in family.norms)
        total = last(first(seen["in"] + attention) + mlp)
    torch.testing.assert_close(total, seen["out"], rtol=1e-4, atol=1e-5)
    assert float((mlp.abs() + attention.abs()).max()) > 0
    found = stack.blocks[family.block]
    assert found.attention_out is not None and abs(found.attention_out.gain - family.gain) < 1e-3
    assert found.mlp_out is not None and abs(found.mlp_out.gain - family.gain) < 1e-3
