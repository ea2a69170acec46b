"""Sliders of random factors on tiny pipelines, and what they must do, by dense arithmetic."""

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from geoedit.sliders import ModuleChange, Slider
from manifolds import LowRank

CHANGED = (nn.Linear, nn.Conv2d)


def change_of(module: Any, rank: int, generator: torch.Generator, size: float) -> ModuleChange:
    weight = module.weight
    out, rest = weight.shape[0], weight[0].numel()
    if type(module).__name__ == "Conv1D":
        out, rest = rest, out
    rank = min(rank, out, rest)
    left = size * torch.randn(out, rank, generator=generator)
    right = size * torch.randn(rank, rest, generator=generator)
    return ModuleChange(LowRank(left, right), tuple(weight.shape[2:]))


def random_slider(
    pipe: Any,
    *components: str,
    among: Callable[[str], bool] = lambda path: True,
    ranks: tuple[int, ...] = (2,),
    seed: int = 0,
    size: float = 0.1,
    name: str = "moved",
) -> Slider:
    """A change of every linear layer and convolution of some components."""
    generator = torch.Generator().manual_seed(seed)
    changes: dict[str, Mapping[str, ModuleChange]] = {}
    for component in components:
        part = pipe if isinstance(pipe, nn.Module) else getattr(pipe, component)
        named = [
            (path, module)
            for path, module in part.named_modules()
            if (isinstance(module, CHANGED) or type(module).__name__ == "Conv1D") and among(path)
        ]
        changes[component] = {
            path: change_of(module, ranks[place % len(ranks)], generator, size)
            for place, (path, module) in enumerate(named)
        }
    return Slider(name, changes)


def denoiser_of(pipe: Any) -> str:
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def added(module: nn.Module, terms: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a module with dense differences (out, in · kernel) added to its weights."""
    changed = copy.deepcopy(module)
    with torch.no_grad():
        for path, difference in terms.items():
            part = changed.get_submodule(path)
            turned = difference.T if type(part).__name__ == "Conv1D" else difference
            part.weight += turned.to(part.weight).reshape(part.weight.shape)
    return changed


def dense(slider: Slider, component: str, factor: float) -> dict[str, Tensor]:
    return {
        path: factor * (change.matrix.left.double() @ change.matrix.right.double())
        for path, change in slider.changes[component].items()
    }


@contextmanager
def replaced(pipe: Any, component: str, module: nn.Module) -> Any:
    kept = getattr(pipe, component)
    setattr(pipe, component, module)
    try:
        yield
    finally:
        setattr(pipe, component, kept)


def draw(pipe: Any, seeds: tuple[int, ...] = (1, 2), **options: Any) -> Tensor:
    """Latents after a few steps, one noise a seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {"num_inference_steps": 2, "output_type": "latent", **options}
    return pipe(["a red bar"] * len(seeds), generator=generators, **given).images


def apart(first: Tensor, second: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((first - second).abs().max() / second.abs().max())
