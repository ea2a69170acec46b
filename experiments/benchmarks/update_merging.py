"""LoRAs merged and cut to their rank: ours against peft's "svd", and what its "linear" misses.

Both get the same two adapters and do the same work: the nearest matrix of rank r to the weighted sum, layer
by layer. peft multiplies the sum out and decomposes it; ours works in the factors. One layer alone as a
weight update; and the attention of one block of SDXL's middle, as sliders through `geoedit.algebra.compose`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

from experiments.benchmarks.timing import compare
from geoedit.algebra import compose
from geoedit.sliders.slider import ModuleChange, Slider
from manifolds import LowRank
from peft_analysis.merging import linear_merge_error, merge
from peft_analysis.updates import WeightUpdate


@dataclass(frozen=True)
class Settings:
    """The layer, the adapters' rank and α, the weights, the rounds of timing (of a block) and the seed."""

    size: int = 1280
    rank: int = 16
    alpha: int = 32
    weights: tuple[float, float] = (1.0, -0.7)
    rounds: int = 5
    block_rounds: int = 3
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Time the merge by both, and compare the merged matrices."""
    settings = settings or Settings()
    model, layers = adapted(settings)
    layer = layers["layer"]
    updates = [of_adapter(layer, name) for name in ("a", "b")]
    weights = list(settings.weights)
    merged = {"name": ""}

    def theirs() -> None:
        merged["name"] = f"merged {len(model.peft_config)}"
        model.add_weighted_adapter(["a", "b"], weights, merged["name"], combination_type="svd")

    def ours() -> LowRank:
        value = merge(updates, weights, method="svd")["weight"]
        if not isinstance(value, LowRank):
            raise TypeError("a merge of low ranks is a low rank")
        return value

    timing = compare(ours, theirs, rounds=settings.rounds)
    peers = layer.get_delta_weight(merged["name"]).detach()
    mine = ours().dense()
    exact = merge(updates, weights)["weight"]
    truth = exact.dense() if isinstance(exact, LowRank) else exact
    shape = f"{settings.size}×{settings.size}, r = {settings.rank}, float32"
    return [
        {
            "work": f"two adapters merged to rank {settings.rank}, {shape}",
            "peer": 'peft add_weighted_adapter, "svd"',
            "aim": 1000.0,
            **timing.row(),
            "relative_difference": float((mine - peers).norm() / peers.norm()),
            "error_of_ours": float((mine - truth).norm() / truth.norm()),
            "error_of_peers": float((peers - truth).norm() / truth.norm()),
            "error_of_pefts_linear": linear_merge_error(updates, weights)["weight"],
        },
        of_a_block(settings),
    ]


def of_a_block(settings: Settings) -> dict[str, Any]:
    """Time two sliders of all attention layers of one block: self-attention, and words 2,048 wide."""
    size = settings.size
    shapes = dict.fromkeys(("q", "k", "v", "out", "words_q", "words_out"), (size, size))
    shapes |= dict.fromkeys(("words_k", "words_v"), (size, size * 8 // 5))
    model, layers = adapted(settings, shapes)
    sliders = [
        Slider(name, {"unet": {at: ModuleChange(of_layer(layer, name)) for at, layer in layers.items()}})
        for name in ("a", "b")
    ]
    terms = [slider @ weight for slider, weight in zip(sliders, settings.weights, strict=True)]
    merged = {"name": ""}

    def theirs() -> None:
        merged["name"] = f"merged {len(model.peft_config)}"
        model.add_weighted_adapter(["a", "b"], list(settings.weights), merged["name"], combination_type="svd")

    timing = compare(lambda: compose(terms, method="truncate"), theirs, rounds=settings.block_rounds)
    ours = compose(terms, method="truncate").changes["unet"]
    apart = [
        float((ours[at].matrix.dense() - peers).norm() / peers.norm())
        for at, layer in layers.items()
        for peers in [layer.get_delta_weight(merged["name"]).detach()]
    ]
    return {
        "work": f"two sliders composed to rank {settings.rank}, {len(shapes)} layers of width {size}",
        "peer": 'peft add_weighted_adapter, "svd"',
        "aim": 1000.0,
        **timing.row(),
        "relative_difference": max(apart),
    }


def adapted(
    settings: Settings, shapes: dict[str, tuple[int, int]] | None = None
) -> tuple[Any, dict[str, Any]]:
    """A model of linear layers (one square one if not told) with two adapters, and the layers by name."""
    shapes = shapes or {"layer": (settings.size, settings.size)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        base = nn.ModuleDict(
            {at: nn.Linear(inputs, outputs, bias=False) for at, (outputs, inputs) in shapes.items()}
        )
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=list(shapes),
            init_lora_weights=False,
        )
        model = peft.get_peft_model(base, config, "a")
        model.add_adapter("b", config)
    return model, {at: model.get_submodule(f"base_model.model.{at}") for at in shapes}


def of_adapter(layer: Any, name: str) -> WeightUpdate:
    """One adapter as a weight update."""
    return WeightUpdate.from_tensors(
        {"weight": of_layer(layer, name)}, details={"scaling": layer.scaling[name]}
    )


def of_layer(layer: Any, name: str) -> LowRank:
    """What an adapter adds to its layer."""
    left, right = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
    return LowRank(left * layer.scaling[name], right)
