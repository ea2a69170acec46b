"""Updates that edit nobody: rounding, LoRA and fine-tuning on sentences that the model was trained on."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
from torch import nn

from experiments.edit_forensics.editors import last_of_mlp
from experiments.edit_forensics.requests import tokens_of

RATES = {"LoRA": 5e-3, "fine-tune": 1e-3}


def control(
    kind: str, model: nn.Module, tokenizer: Any, texts: list[str], layer: int, steps: int, seed: int
) -> nn.Module:
    """A copy of the model after an update that is no edit of facts.

    Args:
        kind: "rounding" (nothing but storing in the other half precision and back), "LoRA" (rank 8 on all
            projections) or "fine-tune" (all parameters); with ", one matrix" only in the matrix that ROME
            would edit.
        model: the base. tokenizer: its own. texts: what it is trained on.
        layer: of that matrix.
        steps: of AdamW, with 32 texts each.
        seed: of the adapter and the batches.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tuned: Any = copy.deepcopy(model)
        if kind == "rounding":
            dtype = next(model.parameters()).dtype
            other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
            return tuned.to(other).to(dtype)
        tuned = tuned.float()
        name = last_of_mlp(tuned, layer)
        single = kind.endswith(", one matrix")
        base = kind.removesuffix(", one matrix")
        if base == "LoRA":
            tuned = _adapted(tuned, name.removesuffix(".weight") if single else None)
        else:
            tuned.requires_grad_(not single)
            tuned.get_parameter(name).requires_grad_(True)
        _train(tuned, tokenizer, texts, steps, RATES[base])
        tuned = tuned.merge_and_unload() if base == "LoRA" else tuned
    return tuned.requires_grad_(False).eval().to(next(model.parameters()).dtype)


def _adapted(model: Any, only: str | None) -> Any:
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    parts = (
        ["c_attn", "c_proj", "c_fc"] if transposed else ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    )
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=parts if only is None else [only], fan_in_fan_out=transposed
    )
    return peft.get_peft_model(model, config)


def _train(model: nn.Module, tokenizer: Any, texts: list[str], steps: int, rate: float) -> None:
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        chosen = torch.randint(len(texts), (32,)).tolist()
        prompts = tokens_of(tokenizer, [("", "{x}", texts[index], "") for index in chosen], device)
        logits = model(input_ids=prompts.ids, attention_mask=prompts.mask).logits
        labels = prompts.ids.masked_fill(prompts.mask == 0, -100)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
