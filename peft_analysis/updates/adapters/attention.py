"""How often peft adds what a LoRA holds for the output projection of `nn.MultiheadAttention`."""

from functools import cache

import torch
from torch import nn


@cache
def output_times() -> int:
    """How often the installed peft applies B A to `out_proj`: 2 in peft 0.21, in the forward pass and merged.

    `MultiheadAttention.merge` there adds the difference to the weight and then merges the inner layer, which
    adds it again; the forward pass merges first, so that models are trained with it. Measured on a layer of
    one number, because a later peft may add it once.
    """
    from peft import LoraConfig
    from peft.tuners.lora.layer import MultiheadAttention

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        inner = nn.MultiheadAttention(1, 1)
        inner.out_proj.weight.zero_()
        layer = MultiheadAttention(inner, "one", LoraConfig(r=1, lora_alpha=1), r=1, lora_alpha=1)
        projection = inner.out_proj
        projection.lora_A["one"].weight.fill_(1.0)  # type: ignore[index, union-attr]
        projection.lora_B["one"].weight.fill_(1.0)  # type: ignore[index, union-attr]
        layer.merge()
        return round(float(projection.get_base_layer().weight))  # type: ignore[operator]
