"""k sliders at work: their factors side by side in one branch, against k separate adapters of peft.

Both move the same layers of the same U-Net by the same factors at the same scales; peft's way is what
`pipe.load_lora_weights` and `set_adapters` do. Each measurement is one pass of the denoiser.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.timing import compare, measure
from geoedit.sliders import ModuleChange, Slider
from geoedit.sliders.apply import together
from geoedit.sliders.files import save
from geoedit.testbeds.shapes.pipelines import new_autoencoder, new_pipeline
from manifolds import LowRank


@dataclass(frozen=True)
class Settings:
    """How many sliders, their rank, rows of a pass (samples and their guidance), rounds of timing, seed."""

    counts: tuple[int, ...] = (1, 3, 5)
    rank: int = 4
    rows: int = 8
    rounds: int = 7
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Time a pass of the shapes' U-Net with k sliders by both, and compare what comes out."""
    settings = settings or Settings()
    return [one_count(count, settings) for count in settings.counts]


@torch.no_grad()
def one_count(count: int, settings: Settings) -> dict[str, Any]:
    """One number of sliders by both, and the pass without any."""
    (ours_pipe, theirs_pipe), sliders = pipelines(settings), []
    for number in range(count):
        sliders.append(random_slider(ours_pipe.unet, settings.rank, number))
    scales = [1.0 - 0.5 * number / count for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        for number, slider in enumerate(sliders):
            path = Path(folder) / f"{number}.safetensors"
            save(slider, path)
            theirs_pipe.load_lora_weights(path, adapter_name=f"slider{number}")
    theirs_pipe.set_adapters([f"slider{number}" for number in range(count)], scales)
    plain = denoising(ours_pipe.unet, settings)
    bare = measure(plain, rounds=settings.rounds)
    theirs = denoising(theirs_pipe.unet, settings)
    with together(ours_pipe, [slider @ scale for slider, scale in zip(sliders, scales, strict=True)]):
        timing = compare(plain, theirs, rounds=settings.rounds)
        mine, peers = plain(), theirs()
    layers = len(sliders[0])
    return {
        "work": f"{count} sliders of rank {settings.rank} on {layers} layers, a pass of {settings.rows} rows",
        "peer": f"{count} adapters of peft",
        **timing.row(),
        "sliders": count,
        "without_any_ms": round(bare * 1e3, 4),
        "relative_difference": float((mine - peers).norm() / peers.norm()),
    }


def pipelines(settings: Settings) -> list[Any]:
    """The same pipeline twice: peft changes the modules of one."""
    found = []
    for _ in range(2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            found.append(new_pipeline("unet", new_autoencoder()))
        found[-1].unet.eval()
    return found


def random_slider(net: nn.Module, rank: int, seed: int) -> Slider:
    """Random factors on every linear layer of the attention blocks."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for path, layer in net.named_modules():
        if isinstance(layer, nn.Linear) and "attentions" in path:
            left = 0.05 * torch.randn(layer.out_features, rank, generator=generator)
            right = 0.05 * torch.randn(rank, layer.in_features, generator=generator)
            changes[path] = ModuleChange(LowRank(left, right))
    return Slider(f"slider {seed}", {"unet": changes})


def denoising(net: Any, settings: Settings) -> Callable[[], Tensor]:
    """One pass of a denoiser on fixed random input."""
    generator = torch.Generator().manual_seed(settings.seed)
    size, channels = net.config.sample_size, net.config.in_channels
    latents = torch.randn(settings.rows, channels, size, size, generator=generator)
    words = torch.randn(settings.rows, 20, net.config.cross_attention_dim, generator=generator)
    times = torch.full((settings.rows,), 500)

    @torch.no_grad()
    def work() -> Tensor:
        return net(latents, times, words, return_dict=False)[0]

    return work
