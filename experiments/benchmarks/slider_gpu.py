"""A U-Net of SDXL's size in bf16 on a GPU: images and operations a second, bare, under a slider, in training.

The weights are random: they cost as much to compute as trained ones. Without CUDA nothing is measured, and
the row says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.benchmarks.timing import measure
from geoedit.sliders.training.adapters import Adapters, row_scales
from geoedit.sliders.training.targets import target_paths

SDXL: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
"""The config that SDXL 1.0 was published with (Podell et al. 2023): 2.57 thousand million parameters."""


@dataclass(frozen=True)
class Settings:
    """The U-Net, what it is given, and how often.

    Attributes:
        config: of diffusers' `UNet2DConditionModel`.
        images: drawn together; each is two rows under guidance.
        steps: of a trajectory: an image is so many steps of two rows.
        tokens: of a prompt.
        train_rows: of a training step (each latent at two signs).
        rank: of the slider, on every attention.
        rounds: of timing, the median of which counts.
        seed: of weights and inputs.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: SDXL)
    images: int = 4
    steps: int = 30
    tokens: int = 77
    train_rows: int = 2
    rank: int = 4
    rounds: int = 7
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Measure on CUDA; elsewhere one row that says why there are no figures."""
    if not torch.cuda.is_available():
        return [{"work": "SDXL-sized U-Net in bf16", "not_measured": "torch finds no CUDA device"}]
    return measured(settings or Settings(), torch.device("cuda"), torch.bfloat16)


def measured(settings: Settings, device: torch.device, dtype: torch.dtype) -> list[dict[str, Any]]:
    """A row each for the bare U-Net, the U-Net under a slider, and a training step of the slider."""
    unet = build(settings, device, dtype)
    rows = 2 * settings.images
    given = inputs(settings, rows, device, dtype)
    with torch.no_grad():
        found = [_row("forward, bare", settings, rows, lambda: unet(**given))]
    generator = torch.Generator().manual_seed(settings.seed)
    targets = {"unet": target_paths(unet, "attn")}
    with Adapters({"unet": unet}, targets, rank=settings.rank, generator=generator) as adapters:
        with torch.no_grad():
            found.append(_row("forward, slider on every attention", settings, rows, lambda: unet(**given)))
        for row in found:
            row["images_per_second"] = row["rows_per_second"] / (2 * settings.steps)
        count = settings.train_rows
        few = inputs(settings, count, device, dtype)
        signs = torch.ones(count, device=device)
        signs[1::2] = -1

        def step() -> None:
            with row_scales(unet, signs):
                unet(**few)[0].float().square().mean().backward()
            for parameter in adapters.parameters():
                parameter.grad = None

        found.append(_row("training step, both signs in one pass", settings, count, step))
    return found


def build(settings: Settings, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The U-Net of random weights, made where it will be used."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: nn.Module = UNet2DConditionModel(**settings.config)
    unet.to(dtype).to_empty(device=device)
    generator = torch.Generator(device=device).manual_seed(settings.seed)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return unet.eval().requires_grad_(False)


def inputs(settings: Settings, rows: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Latents, times and words of so many rows, as the U-Net's forward takes them."""
    config = settings.config
    generator = torch.Generator(device=device).manual_seed(settings.seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    size = config["sample_size"]
    pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
    return {
        "sample": draw(rows, config["in_channels"], size, size),
        "timestep": torch.full((rows,), 500.0, device=device),
        "encoder_hidden_states": draw(rows, settings.tokens, config["cross_attention_dim"]),
        "added_cond_kwargs": {
            "text_embeds": draw(rows, pooled),
            "time_ids": torch.full((rows, 6), 8.0 * size, device=device, dtype=dtype),
        },
        "return_dict": False,
    }


def _row(work: str, settings: Settings, rows: int, call: Callable[[], object]) -> dict[str, Any]:
    """Seconds of one call, and what follows from them; operations are counted, two for a multiplied sum."""
    with FlopCounterMode(display=False) as counter:
        call()
    seconds = measure(call, rounds=settings.rounds)
    operations = counter.get_total_flops()
    return {
        "work": f"SDXL-sized U-Net, {work}",
        "rows": rows,
        "milliseconds": seconds * 1e3,
        "rows_per_second": rows / seconds,
        "teraflops": operations / 1e12,
        "teraflops_per_second": operations / seconds / 1e12,
    }
