"""Kinds of adapters on small models: what the tests of reading go through."""

from typing import Any, NamedTuple

import peft


class Case(NamedTuple):
    """An adapter of some kind for one of the small models."""

    model: str
    kind: str
    options: dict[str, Any]

    def config(self) -> peft.PeftConfig:
        return getattr(peft, f"{self.kind}Config")(**self.options)


def case(model: str, kind: str, **options: Any) -> Case:
    """A case, with the options of peft's configuration."""
    return Case(model, kind, options)


LINES = ["line", "back"]
CONVOLVED = [*LINES, "wave", "image", "point"]
EVERY = [*CONVOLVED, "table", "volume", "attention"]
LLAMA = ["q_proj", "down_proj"]
STACKED = {"target_modules": ["line"], "target_parameters": ["gate_up", "down", "router"]}
BLOCKS = peft.BdLoraConfig(target_modules_bd_a=["q_proj"], target_modules_bd_b=["o_proj"], nblocks=2)

CASES = {
    # LoRA: layers, ranks, what is kept beside it
    "lora": case("net", "Lora", r=3, lora_alpha=5, target_modules=EVERY),
    "lora in gpt2": case(
        "gpt2", "Lora", r=3, lora_alpha=5, target_modules=["c_attn", "c_proj", "wte"], use_rslora=True,
        rank_pattern={"h.0.attn.c_attn": 5, r"h\.\d+\.mlp\.c_proj": 2},
        alpha_pattern={"^transformer.h.1.*c_proj": 11},
    ),
    "lora in bert": case("bert", "Lora", r=2, target_modules="all-linear", modules_to_save=["pooler"]),
    "lora in llama": case("llama", "Lora", r=2, target_modules=LLAMA, layers_to_transform=[1]),
    "lora with biases": case("net", "Lora", r=3, target_modules=[*LINES, "image"], lora_bias=True),
    "lora beside biases": case("net", "Lora", r=3, target_modules=[*LINES, "image"], bias="lora_only"),
    "lora and all biases": case("net", "Lora", r=3, target_modules=["line"], bias="all"),
    "lora of the head": case("gpt2", "Lora", r=2, target_modules=["lm_head"]),
    "lora, head saved": case("gpt2", "Lora", r=2, target_modules=["c_attn"], modules_to_save=["lm_head"]),
    "lora, batch norm saved": case("net", "Lora", target_modules=["line"], modules_to_save=["batch"]),
    "lora and tokens": case("gpt2", "Lora", target_modules=["c_attn"], trainable_token_indices=[3, 7]),
    "lora and tokens of a name": case(
        "llama", "Lora", target_modules=LLAMA, trainable_token_indices={"embed_tokens": [3, 7]}
    ),
    # LoRA: starts
    "pissa": case("llama", "Lora", r=4, target_modules=LLAMA, init_lora_weights="pissa"),
    "pissa in gpt2": case("gpt2", "Lora", r=4, target_modules=["c_attn"], init_lora_weights="pissa"),
    "pissa dora": case("llama", "Lora", r=4, target_modules=LLAMA, init_lora_weights="pissa", use_dora=True),
    "olora": case("llama", "Lora", r=4, target_modules=LLAMA, init_lora_weights="olora"),
    "eva": case("llama", "Lora", r=4, target_modules=LLAMA, init_lora_weights="eva"),
    "mica": case("llama", "Lora", r=4, target_modules=LLAMA, init_lora_weights="mica"),
    "orthogonal": case("llama", "Lora", r=4, target_modules=LLAMA, init_lora_weights="orthogonal"),
    # LoRA: variants
    "dora": case("net", "Lora", r=3, target_modules=[*CONVOLVED, "table", "volume"], use_dora=True),
    "dora in gpt2": case("gpt2", "Lora", target_modules=["c_attn", "c_proj", "wte"], use_dora=True),
    "block-diagonal lora": case("llama", "Lora", r=4, target_modules=["q_proj", "o_proj"], use_bdlora=BLOCKS),
    "kasa": case("llama", "Lora", r=4, target_modules=LLAMA, kasa_config=peft.KasaConfig()),
    "velora": case("llama", "Lora", r=4, target_modules=LLAMA, velora_config=peft.VeloraConfig()),
    "monteclora": case("llama", "Lora", r=4, target_modules=LLAMA, monteclora_config=peft.MontecloraConfig()),
    "experts, in first": case("experts_in_out", "Lora", r=2, **STACKED),
    "experts, out first": case("experts_out_in", "Lora", r=2, rank_pattern={"experts.down": 3}, **STACKED),
    # kinds with a formula
    "adalora": case("net", "AdaLora", init_r=4, target_r=2, total_step=9, target_modules=[*LINES, "image"]),
    "adalora, alpha 0": case(
        "gpt2", "AdaLora", init_r=4, target_r=2, total_step=9, lora_alpha=0, target_modules=["c_attn"]
    ),
    "vera": case("net", "Vera", r=3, target_modules=LINES),
    "vera, drawn anew": case("gpt2", "Vera", r=3, target_modules=["c_attn", "c_fc"], save_projection=False),
    "loha": case("net", "LoHa", r=2, alpha=3, target_modules=CONVOLVED, alpha_pattern={"image": 7}),
    "loha, kernels apart": case(
        "net", "LoHa", r=2, alpha=3, target_modules=CONVOLVED, use_effective_conv2d=True
    ),
    "lokr": case("net", "LoKr", r=1, alpha=3, target_modules=CONVOLVED, rank_pattern={"back": 2}),
    "lokr, whole": case("net", "LoKr", r=8, alpha=3, target_modules=CONVOLVED, decompose_both=True),
    "lokr, in factors": case("llama", "LoKr", r=1, alpha=3, target_modules=LLAMA, decompose_both=True),
    "ia3": case("net", "IA3", target_modules=[*LINES, "image", "volume"], feedforward_modules=["back"]),
    "ia3 in gpt2": case(
        "gpt2", "IA3", target_modules=["c_attn", "mlp.c_fc"], feedforward_modules=["mlp.c_fc"]
    ),
    "layer norms": case("net", "LNTuning", target_modules=["norm"]),
    "trainable tokens": case("gpt2", "TrainableTokens", target_modules=["wte"], token_indices=[3, 7]),
    "many trainable tokens": case(
        "gpt2", "TrainableTokens", target_modules=["wte"], token_indices=list(range(2, 22))
    ),
    # kinds that peft's own layers work out
    "oft": case(
        "net", "OFT", r=0, oft_block_size=4, target_modules=[*LINES, "image"], use_cayley_neumann=False
    ),
    "oft, constrained": case("net", "OFT", r=0, oft_block_size=4, coft=True, target_modules=LINES),
    "oft, shared": case(
        "net", "OFT", r=0, oft_block_size=4, block_share=True, bias="all", target_modules=LINES
    ),
    "boft": case("net", "BOFT", boft_block_size=2, boft_n_butterfly_factor=2, target_modules=LINES),
    "fourierft": case("gpt2", "FourierFT", n_frequency=20, target_modules=["c_fc"]),
    "hra": case("net", "HRA", r=2, apply_GS=True, target_modules=[*LINES, "image"]),
    "miss": case("net", "Miss", r=2, target_modules=LINES),
    "bat": case("net", "Miss", r=2, init_weights="bat", target_modules=LINES),
    "shira": case("net", "Shira", r=2, target_modules=LINES),
    "c3a": case("llama", "C3A", block_size=4, target_modules=LLAMA),
    "road": case("net", "Road", variant="road_4", group_size=4, target_modules=LINES),
    "waveft": case("llama", "WaveFT", n_frequency=20, target_modules=LLAMA),
    "osf": case("llama", "OSF", target_modules=LLAMA),
    "delora": case("net", "Delora", r=2, target_modules=LINES),
    "gralora": case("llama", "Gralora", r=4, gralora_k=2, target_modules=LLAMA),
    "adamss": case("llama", "Adamss", r=3, num_subspaces=2, target_modules=LLAMA),
    "deft": case("net", "Deft", r=2, target_modules=LINES),
    "hira": case("net", "Hira", r=2, target_modules=[*LINES, "image", "table"]),
    "psoft": case("llama", "Psoft", r=4, target_modules=LLAMA),
    "glora": case("net", "Glora", target_modules=LINES),
    "beft": case("net", "Beft", target_modules=LINES),
    "peanut": case("net", "Peanut", target_modules=LINES),
    "supertuning": case("net", "Supertuning", target_modules=LINES, sparsity=0.5),
    "randlora": case("net", "RandLora", r=2, target_modules=LINES),
    "randlora, drawn anew": case("net", "RandLora", r=2, target_modules=LINES, save_projection=False),
    "pvera": case("net", "Pvera", r=2, target_modules=LINES),
    "vblora": case(
        "net", "VBLoRA", r=2, num_vectors=6, vector_length=4, topk=2, target_modules=LINES,
        save_only_topk_weights=True,
    ),
    "unilora": case("net", "UniLora", r=2, target_modules=LINES),
    "tinylora": case("llama", "TinyLora", r=2, target_modules=LLAMA),
    "frod": case("llama", "Frod", target_modules=LLAMA, progressbar=False),
}  # fmt: skip
