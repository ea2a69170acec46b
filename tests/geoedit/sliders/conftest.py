"""Tiny diffusion pipelines of every family, of random weights: 16 × 16 pixels, latents 4 × 8 × 8.

The session's pipelines are shared: a test leaves weights, adapters and schedulers as it found them, or asks
`fresh_pipe` for one of its own. Words are those of the shapes; other text goes by bytes.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from geoedit.testbeds.shapes.tokens import LENGTH, build_tokenizer

FAMILIES = ["sd1", "sd2_v", "sdxl", "sd3", "flux"]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def autoencoder(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
    )


def text_config(tokenizer: CLIPTokenizer, width: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, projection_dim=width,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=LENGTH, initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def unet(width: int, **options: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
        "layers_per_block": 1, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": width,
        "attention_head_dim": 2, "norm_num_groups": 8,
    }  # fmt: skip
    return UNet2DConditionModel(**{**settings, **options})


def sd(tokenizer: CLIPTokenizer, scheduler: Any, width: int, **options: Any) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=autoencoder(),
        text_encoder=CLIPTextModel(text_config(tokenizer, width)),
        tokenizer=tokenizer,
        unet=unet(width, **options),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_sd1(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return sd(tokenizer, scheduler, 16)


def build_sd2_v(tokenizer: CLIPTokenizer) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(
        **BETAS, clip_sample=False, prediction_type="v_prediction", rescale_betas_zero_snr=True,
        steps_offset=1, timestep_spacing="trailing",
    )  # fmt: skip
    return sd(tokenizer, scheduler, 24, use_linear_projection=True, attention_head_dim=(2, 4))


def build_sdxl(tokenizer: CLIPTokenizer) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025),
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 24)),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(
            40,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 24,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            attention_head_dim=(2, 4),
        ),
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip


def build_sd3(tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer, 8)),
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer, 16)),
        text_encoder_3=None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=None,
        transformer=SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16,
            pooled_projection_dim=24, pos_embed_max_size=8,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def build_flux(tokenizer: CLIPTokenizer) -> FluxPipeline:
    words = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    pipe = FluxPipeline(
        vae=autoencoder(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=CLIPTextModel(text_config(tokenizer, 16)),
        text_encoder_2=T5EncoderModel(words),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        transformer=FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
    )  # fmt: skip
    pipe.default_sample_size = 8
    return pipe


def build_unconditional(tokenizer: CLIPTokenizer) -> DDIMPipeline:
    model = UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )  # fmt: skip
    return DDIMPipeline(unet=model, scheduler=DDIMScheduler(clip_sample=True))


BUILDERS: dict[str, Callable[[CLIPTokenizer], Any]] = {
    "sd1": build_sd1,
    "sd2_v": build_sd2_v,
    "sdxl": build_sdxl,
    "sd3": build_sd3,
    "flux": build_flux,
    "unconditional": build_unconditional,
}


@pytest.fixture(scope="session")
def shapes_tokenizer() -> CLIPTokenizer:
    """The tokenizer of the shapes pipelines, 20 tokens a prompt."""
    return build_tokenizer()


@pytest.fixture(scope="session")
def fresh_pipe(shapes_tokenizer: CLIPTokenizer) -> Callable[..., Any]:
    """``fresh_pipe("sd1", seed=0)``: a new pipeline, the test's own; the same seed, the same weights."""

    def build(family: str, seed: int = 0) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = BUILDERS[family](shapes_tokenizer)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return build


@pytest.fixture(scope="session")
def tiny_sd1(fresh_pipe: Callable[..., Any]) -> StableDiffusionPipeline:
    """Stable Diffusion 1: predicts ε, DDIM."""
    return fresh_pipe("sd1")


@pytest.fixture(scope="session")
def tiny_sd2_v(fresh_pipe: Callable[..., Any]) -> StableDiffusionPipeline:
    """Stable Diffusion 2: predicts v, zero terminal SNR, trailing times."""
    return fresh_pipe("sd2_v")


@pytest.fixture(scope="session")
def tiny_sdxl(fresh_pipe: Callable[..., Any]) -> StableDiffusionXLPipeline:
    """SDXL: two text encoders, time ids, Euler."""
    return fresh_pipe("sdxl")


@pytest.fixture(scope="session")
def tiny_sd3(fresh_pipe: Callable[..., Any]) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 without its third text encoder."""
    return fresh_pipe("sd3")


@pytest.fixture(scope="session")
def tiny_flux(fresh_pipe: Callable[..., Any]) -> FluxPipeline:
    """Flux, told its guidance; times shifted by the number of tokens."""
    return fresh_pipe("flux")


@pytest.fixture(scope="session")
def tiny_unconditional(fresh_pipe: Callable[..., Any]) -> DDIMPipeline:
    """A U-Net on pixels that takes no prompts; its scheduler clips."""
    return fresh_pipe("unconditional")


@pytest.fixture(params=FAMILIES)
def tiny_pipe(request: pytest.FixtureRequest) -> Any:
    """Every family that takes prompts, in turn."""
    return request.getfixturevalue(f"tiny_{request.param}")
