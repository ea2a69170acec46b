"""Which module a kohya file means: it writes 'lora_unet_down_blocks_0_…' where the model has dots."""

import re
from collections import defaultdict
from collections.abc import Iterable

from peft_analysis.updates.weights import Weights

# What stands before the module, and the parts of a pipeline or of a single-file checkpoint that it may mean.
# "" is the base itself. Longer prefixes come first.
PARTS: dict[str, tuple[str, ...]] = {
    "lora_prior_unet": ("prior", "unet", ""),
    "lora_prior_te": ("text_encoder", ""),
    "lora_transformer": ("transformer", ""),
    "lora_unet": ("unet", "transformer", "model.diffusion_model", ""),
    "lora_te1": ("text_encoder", "conditioner.embedders.0.transformer", ""),
    "lora_te2": ("text_encoder_2", "conditioner.embedders.1.model", ""),
    "lora_te3": ("text_encoder_3", ""),
    "lora_te": ("text_encoder", "cond_stage_model.transformer", ""),
    "lycoris": ("unet", "transformer", "model.diffusion_model", ""),
    "lora": ("",),
    "text_encoder_2": ("text_encoder_2", ""),
    "text_encoder": ("text_encoder", ""),
    "unet": ("unet", ""),
    "transformer": ("transformer", ""),
    "diffusion_model": ("unet", "transformer", "model.diffusion_model", ""),
}
ABOVE = (
    "text_model",
    "transformer",
    "model",
    "base_model_model",
)  # levels that one release has and another not

# Names of modules that have an underscore of their own, to put the dots back where there is no base.
WORDS = [
    "add_embedding",
    "add_k_proj",
    "add_q_proj",
    "add_v_proj",
    "attn_merge",
    "cap_embedder",
    "caption_projection",
    "class_embedding",
    "context_embedder",
    "conv_in",
    "conv_norm_out",
    "conv_out",
    "conv_shortcut",
    "cross_attn",
    "diffusion_model",
    "double_blocks",
    "down_blocks",
    "embed_tokens",
    "emb_layers",
    "encoder_attn",
    "encoder_hid_proj",
    "ff_context",
    "final_layer",
    "final_layer_norm",
    "first_stage_model",
    "gate_proj",
    "guidance_in",
    "guidance_embedder",
    "img_attn",
    "img_in",
    "img_mlp",
    "img_mod",
    "in_layers",
    "in_proj",
    "input_blocks",
    "input_layernorm",
    "joint_blocks",
    "k_proj",
    "label_emb",
    "layer_norm",
    "layer_norm1",
    "layer_norm2",
    "linear_1",
    "linear_2",
    "lm_head",
    "mid_block",
    "middle_block",
    "mlp_context",
    "noise_refiner",
    "norm_added_k",
    "norm_added_q",
    "norm_k",
    "norm_out",
    "norm_q",
    "o_proj",
    "out_layers",
    "out_proj",
    "output_blocks",
    "patch_embed",
    "patch_embedding",
    "pos_embed",
    "position_embedding",
    "post_attention_layernorm",
    "proj_in",
    "proj_mlp",
    "proj_out",
    "q_proj",
    "self_attn",
    "single_blocks",
    "single_transformer_blocks",
    "skip_connection",
    "spatial_norm",
    "text_embedder",
    "text_embedding",
    "text_model",
    "text_projection",
    "time_embed",
    "time_emb_proj",
    "time_embedding",
    "time_in",
    "time_projection",
    "time_text_embed",
    "timestep_embedder",
    "to_add_out",
    "to_k",
    "to_out",
    "to_q",
    "to_v",
    "token_embedding",
    "transformer_blocks",
    "txt_attn",
    "txt_in",
    "txt_mlp",
    "txt_mod",
    "up_blocks",
    "up_proj",
    "down_proj",
    "v_proj",
    "vector_in",
    "x_embedder",
]
SPLIT = re.compile("|".join([*sorted(WORDS, key=len, reverse=True), "[^_]+"]))

RESNET = {
    "in_layers_0": "norm1", "in_layers_2": "conv1", "emb_layers_1": "time_emb_proj", "out_layers_0": "norm2",
    "out_layers_3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
FIXED = {
    "input_blocks_0_0": "conv_in", "time_embed_0": "time_embedding_linear_1", "out_0": "conv_norm_out",
    "time_embed_2": "time_embedding_linear_2", "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2", "out_2": "conv_out",
    "middle_block_1": "mid_block_attentions_0",
}  # fmt: skip
BLOCK = re.compile(r"(input|output|middle)_(?:blocks|block)_(\d+)(?:_(\d+))?(?:_(.+))?$")


class ModuleNames:
    """Finds the modules of a base by names in which dots became underscores."""

    def __init__(self, base: Weights) -> None:
        self._paths: dict[str, list[str]] = defaultdict(list)
        for name in dict.fromkeys(name.rpartition(".")[0] for name in (*base, *base.tied)):
            self._paths[name.replace(".", "_")].append(name)
        self._layers = _layers_per_block(self._paths)

    def find(self, key: str) -> list[str]:
        """The modules that a name in a file may mean: one where all is well, none or several where not."""
        part, rest = split_part(key)
        rests = list(dict.fromkeys([rest, diffusers_name(rest, self._layers)]))
        rests += [
            short for name in rests for above in ABOVE if (short := name.removeprefix(f"{above}_")) != name
        ]
        for component in PARTS.get(part, ("",)):
            front = f"{component.replace('.', '_')}_" if component else ""
            for name in rests:
                if front + name in self._paths:
                    return self._paths[front + name]
        for name in rests:
            found = [
                path for flat, paths in self._paths.items() for path in paths if flat.endswith(f"_{name}")
            ]
            if found:
                return found
        return []


def split_part(key: str) -> tuple[str, str]:
    """A name in a file as the part of the pipeline and the module in it, all dots as underscores."""
    flat = key.replace(".", "_")
    for part in PARTS:
        if flat.startswith(f"{part}_"):
            return part, flat.removeprefix(f"{part}_")
    return "", flat


def diffusers_name(rest: str, layers: int) -> str:
    """A module of a U-Net in the order of the original Stable Diffusion code, as diffusers calls it.

    The original counts blocks through: input block 1 + (layers + 1) b + l is layer l of down block b, the
    last of each the downsampler; output block (layers + 1) b + l is layer l of up block b.

    Args:
        rest: the module, dots as underscores.
        layers: residual blocks in a down block, two in all Stable Diffusion models.
    """
    for old, new in FIXED.items():
        if rest == old or rest.startswith(f"{old}_"):
            return new + rest.removeprefix(old)
    match = BLOCK.match(rest)
    if match is None:
        return rest
    side, number, inner, tail = match[1], int(match[2]), match[3], match[4] or ""
    if side == "middle":
        return f"mid_block_resnets_{number // 2}_{_resnet(f'{inner}_{tail}' if inner else tail)}"
    block, layer = divmod(number - 1 if side == "input" else number, layers + 1)
    if side == "input" and layer == layers:
        return f"down_blocks_{block}_downsamplers_0_conv"
    if side == "output" and (inner == "2" or tail == "conv"):
        return f"up_blocks_{block}_upsamplers_0_conv"
    place = f"{'down' if side == 'input' else 'up'}_blocks_{block}"
    return (
        f"{place}_attentions_{layer}_{tail}" if inner == "1" else f"{place}_resnets_{layer}_{_resnet(tail)}"
    )


def guessed_path(key: str) -> str:
    """A module's path with the dots where they most likely were, the part of the pipeline in front."""
    if "." in key:
        return key
    part, rest = split_part(key)
    front = next((name for name in PARTS.get(part, ()) if name), "")
    return ".".join([*([front] if front else []), *SPLIT.findall(rest)])


def _layers_per_block(flat: Iterable[str]) -> int:
    numbers = [int(match[1]) for name in flat if (match := re.search(r"down_blocks_0_resnets_(\d+)_", name))]
    return max(numbers, default=1) + 1


def _resnet(tail: str) -> str:
    return next((tail.replace(old, new, 1) for old, new in RESNET.items() if tail.startswith(old)), tail)
