"""Two LoRAs merged and cut to their rank: ours against peft's "svd", and what its "linear" misses.

Both get the same two adapters of one layer and do the same work: the nearest matrix of rank r to the weighted
sum. peft multiplies the sum out and decomposes it; ours works in the factors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import nn

from experiments.benchmarks.timing import compare
from manifolds import LowRank
from peft_analysis.merging import linear_merge_error, merge
from peft_analysis.updates import WeightUpdate


@dataclass(frozen=True)
class Settings:
    """The layer, the adapters' rank and α, the weights, the rounds of timing and the seed."""

    size: int = 1280
    rank: int = 16
    alpha: int = 32
    weights: tuple[float, float] = (1.0, -0.7)
    rounds: int = 5
    seed: int = 0


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Time the merge by both, and compare the merged matrices."""
    settings = settings or Settings()
    model, layer = adapted(settings)
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
        }
    ]


def adapted(settings: Settings) -> tuple[Any, Any]:
    """A model of one linear layer with two adapters, and the layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        base = nn.ModuleDict({"layer": nn.Linear(settings.size, settings.size, bias=False)})
        config = peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules=["layer"],
            init_lora_weights=False,
        )
        model = peft.get_peft_model(base, config, "a")
        model.add_adapter("b", config)
    return model, model.get_submodule("base_model.model.layer")


def of_adapter(layer: Any, name: str) -> WeightUpdate:
    """One adapter as a weight update."""
    scaling = layer.scaling[name]
    left, right = layer.lora_B[name].weight.detach(), layer.lora_A[name].weight.detach()
    return WeightUpdate.from_tensors({"weight": LowRank(left * scaling, right)}, details={"scaling": scaling})
