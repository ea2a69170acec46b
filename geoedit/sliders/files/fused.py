"""Flux and Stable Diffusion 3 in the names of their first releases, with q, k and v as one matrix.

The tables are facts of the models, as kohya-ss/sd-scripts (convert_flux_lora) and diffusers' loader
state them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from geoedit.errors import EditError
from peft_analysis.updates.files import Stored, TensorFile

QKV, ADDED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
DOUBLE: dict[str, tuple[str, ...]] = {
    "img_attn_qkv": QKV,
    "txt_attn_qkv": ADDED,
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
    "processor_qkv_lora1": QKV,
    "processor_qkv_lora2": ADDED,
    "processor_proj_lora1": ("attn.to_out.0",),
    "processor_proj_lora2": ("attn.to_add_out",),
}
SINGLE: dict[str, tuple[str, ...]] = {
    "linear1": (*QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
    "processor_qkv_lora": QKV,
    "processor_proj_lora": ("proj_out",),
}
JOINT: dict[str, tuple[str, ...]] = {
    "x_block_attn_qkv": QKV,
    "context_block_attn_qkv": ADDED,
    "x_block_attn_proj": ("attn.to_out.0",),
    "context_block_attn_proj": ("attn.to_add_out",),
    "x_block_mlp_fc1": ("ff.net.0.proj",),
    "x_block_mlp_fc2": ("ff.net.2",),
    "context_block_mlp_fc1": ("ff_context.net.0.proj",),
    "context_block_mlp_fc2": ("ff_context.net.2",),
}
BLOCKS = {
    "double_blocks": ("transformer_blocks", DOUBLE),
    "single_blocks": ("single_transformer_blocks", SINGLE),
    "joint_blocks": ("transformer_blocks", JOINT),
}
OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer_linear": "proj_out",
}
PREFIX = re.compile(
    r"^(lora_unet_|lora_transformer_|diffusion_model\.|transformer\.|model\.diffusion_model\.)?"
)
ROLE = re.compile(r"\.(?:lora_)?(?P<role>down|up|A|B)(?:\.default)?\.weight$|\.(?P<alpha>alpha)$")
BLOCK = re.compile(r"(double_blocks|single_blocks|joint_blocks)_(\d+)_(\w+)$")
ROLES = {"A": "lora_A.weight", "down": "lora_A.weight", "B": "lora_B.weight", "up": "lora_B.weight"}


def split_fused(file: TensorFile) -> TensorFile:
    """The same file with the modules of today: each fused matrix in its parts, in factors.

    A part of a fused matrix has its rows of the second factor and all of the first. Other names stay.

    Raises:
        EditError: a block holds a module of no known name, or rows that do not split.
    """
    if not any(_flat(name)[0] is not None for name in file.tensors):
        return file
    found: dict[str, Stored] = {}
    for name, stored in file.tensors.items():
        parts, role = _flat(name)
        if parts is None or role is None:
            found[name] = stored
            continue
        for index, path in enumerate(parts):
            key = f"transformer.{path}.{ROLES.get(role, role)}"
            if key in found:
                raise EditError(f"{file.path}: several names mean {key}")
            rows = _rows(name, file.tensors, index, len(parts)) if ROLES.get(role) == ROLES["B"] else None
            found[key] = stored if rows is None else _sliced(stored, rows)
    return replace(file, tensors=found)


def fused_modules(file: TensorFile) -> set[str]:
    """The modules of today that are parts of fused matrices, whose factors may be wider than their rank."""
    return set(_parts_of_fused(file.tensors))


def _parts_of_fused(tensors: Mapping[str, Stored]) -> Iterator[str]:
    for name in tensors:
        parts, _ = _flat(name)
        if parts is not None and len(parts) > 1:
            yield from (f"transformer.{path}" for path in parts)


def _flat(name: str) -> tuple[tuple[str, ...] | None, str | None]:
    """The modules that a name of the first releases means, and its tensor's role; None for other names."""
    match = ROLE.search(name)
    if match is None:
        return None, None
    flat = PREFIX.sub("", name[: match.start()], count=1).replace(".", "_")
    role = match["role"] or match["alpha"]
    block = BLOCK.match(flat)
    if block is None:
        path = OUTSIDE.get(flat)
        return (None, None) if path is None else ((path,), role)
    blocks, table = BLOCKS[block[1]]
    if block[3] not in table:
        raise EditError(
            f"{name}: {block[1]} have no module {block[3]!r} that is read; known: {', '.join(table)}"
        )
    return tuple(f"{blocks}.{block[2]}.{path}" for path in table[block[3]]), role


def _rows(name: str, tensors: Mapping[str, Stored], index: int, count: int) -> slice | None:
    """The rows of one part: q, k and v are as high as the model is wide, what remains is the rest."""
    if count == 1:
        return None
    total = tensors[name].shape[0]
    height = total // 3
    if count == 4:
        first = re.sub(r"(lora_)?(up|B)((?:\.default)?\.weight)$", _first_factor, name)
        if first not in tensors:
            raise EditError(f"{name}: its first factor {first} is missing")
        height = tensors[first].shape[1]
    rest = total - 3 * height
    if (count == 3 and rest) or (count == 4 and rest <= 0):
        raise EditError(f"{name} has {total} rows, which do not split into {count} parts")
    return slice(index * height, (index + 1) * height) if index < 3 else slice(3 * height, total)


def _first_factor(match: re.Match[str]) -> str:
    return f"{match[1] or ''}{'down' if match[2] == 'up' else 'A'}{match[3]}"


def _sliced(stored: Stored, rows: slice) -> Stored:
    shape = torch.Size((rows.stop - rows.start, *stored.shape[1:]))
    return Stored(shape, stored.dtype, partial(_read_rows, stored, rows))


def _read_rows(stored: Stored, rows: slice) -> Tensor:
    return stored.read()[rows].clone()
