"""Looking for intruder dimensions of a LoRA: ours with the base's decomposition kept, against peft's scan.

Run with ``python -m experiments.benchmarks.intruder_scan``. Both get the same linear layer and adapter. Peft
decomposes the base and the tuned matrix anew for every adapter, and a third matrix where it finds intruders.
Ours looks the base up by the hash of its bits, which is timed; decomposing it once is told apart.
"""

from __future__ import annotations

import json
import logging
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from experiments.benchmarks.timing import compare
from manifolds import LowRank
from peft_analysis.base_svd import SVDCache
from peft_analysis.intruders import intruders
from peft_analysis.mitigation import intruder_part

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """Size of the layer, rank of the adapter, spectral sizes of two updates over the base's, rounds."""

    size: int = 4096
    rank: int = 16
    weak: float = 0.002
    strong: float = 1.5
    rounds: int = 1
    seed: int = 0


def problem(settings: Settings, size: float) -> tuple[Any, Tensor, LowRank]:
    """A peft model of one linear layer with an adapter of a size; its weight; the adapter in factors."""
    from peft import LoraConfig, get_peft_model

    n, r = settings.size, settings.rank
    generator = torch.Generator().manual_seed(settings.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = nn.Sequential(nn.Linear(n, n, bias=False)).requires_grad_(False)
        weight = torch.randn(n, n, generator=generator) / n**0.5 / 2
        model[0].weight.copy_(weight)
        tuned: Any = get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules=["0"]))
    B, A = torch.randn(n, r, generator=generator) / n**0.5, torch.randn(r, n, generator=generator) / n**0.5
    layer = tuned.base_model.model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.copy_(size * B)
        layer.lora_A["default"].weight.copy_(A)
    return tuned, layer.get_base_layer().weight.detach(), LowRank(size * B, A)


def run(settings: Settings | None = None) -> list[dict[str, Any]]:
    """Time both on an adapter without intruders, which is only scanned, and on one that is mitigated."""
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    settings = settings or Settings()
    torch.set_num_threads(1)
    cache = SVDCache()
    rows = []
    for size, work in ((settings.weak, "scan"), (settings.strong, "scan and mitigation")):
        tuned, weight, update = problem(settings, size)
        start = time.perf_counter()
        cache(weight)
        first = time.perf_counter() - start
        lines: list[str] = []

        def theirs(tuned: Any = tuned, lines: list[str] = lines) -> None:
            lines.clear()
            if "intruder_reduced" in tuned.peft_config:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tuned.delete_adapter("intruder_reduced")
            reduce_intruder_dimension(tuned, logging_sink=lines.append)

        def ours(weight: Tensor = weight, update: LowRank = update, scan: bool = work == "scan") -> object:
            if scan:
                return intruders(weight, update, side="left", cache=cache)
            return update + intruder_part(weight, update, cache=cache) * (0.75 - 1)

        timing = compare(ours, theirs, rounds=settings.rounds)
        told = next((line for line in lines if "ntruders" in line), "")
        rows.append(
            {
                "work": f"intruders: {work}, {settings.size}², r = {settings.rank}, base kept",
                "peer": "peft",
                "aim": 100.0,
                **timing.row(),
                "ours_count": intruders(weight, update, cache=cache).count,
                "peer_count": 0 if "No intruders" in told else int(told.rsplit(" ", 1)[-1]),
                "base_decomposed_once_ms": round(first * 1e3, 3) if work == "scan" else None,
            }
        )
    return rows


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log.info(json.dumps(run(), indent=1))
