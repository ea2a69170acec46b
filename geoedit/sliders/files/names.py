"""What a module is called in files of others: prefixes of components, underscores in place of dots."""

from __future__ import annotations

import re
from collections.abc import Mapping

from geoedit.sliders.fit import COMPONENTS, MODEL, TEXT
from peft_analysis.updates.kohya_names import diffusers_name, guessed_path, split_part

LAYERS = 2
"""Residual blocks in a down block of every released Stable Diffusion U-Net."""
EMBEDDING = {"add_embedding_linear_1": "label_emb_0_0", "add_embedding_linear_2": "label_emb_0_2"}
"""Two modules of SDXL that diffusers reads under the names of the original code only."""
TRANSFORMERS = re.compile(r"(single_)?transformer_blocks[._]|context_embedder|time_text_embed|x_embedder")


def text_path(path: str) -> str:
    """A module's path in a CLIP text encoder with the level that files have."""
    return f"{TEXT}{path}" if path.startswith(("encoder.", "embeddings.")) else path


def peft_key(component: str, path: str) -> str:
    """The name of a module in a file of diffusers."""
    return f"{component}.{text_path(path) if component.startswith('text_encoder') else path}"


def kohya_key(component: str, path: str, components: Mapping[str, object]) -> str:
    """The name of a module in a file of kohya's scripts."""
    prefix = {
        "unet": "lora_unet",
        "transformer": "lora_transformer",
        "prior": "lora_prior_unet",
        "text_encoder": "lora_te1"
        if "text_encoder_2" in components or "transformer" in components
        else "lora_te",
        "text_encoder_2": "lora_te2",
        "text_encoder_3": "lora_te3",
        MODEL: "lora",
    }[component]
    flat = (text_path(path) if component.startswith("text_encoder") else path).replace(".", "_")
    return f"{prefix}_{EMBEDDING.get(flat, flat)}"


def place_of(name: str) -> tuple[str, str]:
    """The component and the path of a module by its name in a `WeightUpdate`.

    Names begin with the component where a pipeline was the base, or where a file says so.
    """
    part, _, path = name.partition(".")
    if part == "unet" and TRANSFORMERS.match(path):
        return "transformer", path  # published Flux sliders say unet and mean the transformer
    return (part, path) if part in COMPONENTS else (MODEL, name)


def unflattened(key: str) -> str:
    """A module's name with its dots back, as well as can be guessed without a base."""
    if "." in key:
        return key
    part, rest = split_part(key)
    return guessed_path(f"{part}_{diffusers_name(rest, LAYERS)}" if part else key)
