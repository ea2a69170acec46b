"""The two shapes pipelines before training: every part small, every class a stock one of diffusers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from geoedit.testbeds.shapes.render import SIZE
from geoedit.testbeds.shapes.tokens import LENGTH, build_tokenizer

Family = Literal["unet", "flow"]
CHANNELS = 8
"""Channels of a latent."""
SHRINK = 4
"""Pixels along a side of a latent's cell."""


def new_autoencoder() -> AutoencoderKL:
    """An autoencoder of random weights: 32 × 32 pixels to 8 × 8 cells of 8 channels."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def new_pipeline(family: Family, autoencoder: AutoencoderKL) -> Any:
    """A pipeline of random weights around a trained autoencoder: Stable Diffusion 1's parts, or 3's.

    Both know the same words. ``"unet"`` predicts the noise (ε) under cross-attention; ``"flow"`` predicts the
    velocity ε − x in a transformer that attends to pixels and words jointly.
    """
    tokenizer = build_tokenizer()
    if family == "unet":
        return StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=CLIPTextModel(_text_config(tokenizer, 64)),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=SIZE // SHRINK,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                block_out_channels=(64, 64),
                layers_per_block=1,
                down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=64,
                attention_head_dim=4,
                norm_num_groups=8,
            ),
            scheduler=DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                clip_sample=False,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return StableDiffusion3Pipeline(
        vae=autoencoder,
        text_encoder=CLIPTextModelWithProjection(_text_config(tokenizer, 48)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(_text_config(tokenizer, 48)),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=SD3Transformer2DModel(
            sample_size=SIZE // SHRINK,
            patch_size=1,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=4,
            attention_head_dim=24,
            num_attention_heads=4,
            joint_attention_dim=96,
            caption_projection_dim=96,
            pooled_projection_dim=96,
            pos_embed_max_size=SIZE // SHRINK,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )


def _text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def trained_parts(pipe: Any) -> list[torch.nn.Module]:
    """The modules that the second stage trains: the denoiser and the text encoders."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return [part for name in names if (part := getattr(pipe, name, None)) is not None]
