"""Models that accelerate has placed, part of them on disk: the same states, and the placement stays."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from torch import nn

from geoedit.activations import collect, run_with, statistics
from geoedit.site import Site

PROMPTS = ["the day after monday is", "may", "the month of may", "paris is old"]
SITES = [Site(0), Site(1, "attention_out", "all"), Site(2, "mlp_hidden"), Site(stream="embedding")]


def places(model: nn.Module, elsewhere: str) -> dict[str, str]:
    """The second block elsewhere, all other parts on the CPU."""
    inner, blocks = ("transformer", "h") if hasattr(model, "transformer") else ("model", "layers")
    parts = [name for name, _ in getattr(model, inner).named_children() if name != blocks]
    found = {f"{inner}.{name}": "cpu" for name in parts} | {"lm_head": "cpu"}
    return found | {f"{inner}.{blocks}.{k}": elsewhere if k == 1 else "cpu" for k in range(3)}


@pytest.mark.parametrize("elsewhere", ["disk", "cpu"])
def test_a_dispatched_model_gives_the_same(
    elsewhere: str, tiny_model, tiny_tokenizer, tmp_path: Path
) -> None:
    wanted = collect(tiny_model, tiny_tokenizer, PROMPTS, SITES)
    figures = statistics(tiny_model, tiny_tokenizer, PROMPTS, SITES, covariance=True)
    patch = {Site(1): torch.randn(len(PROMPTS), 32, generator=torch.Generator().manual_seed(0))}
    logits = run_with(tiny_model, tiny_tokenizer, PROMPTS, patch)
    model = dispatch_model(
        copy.deepcopy(tiny_model),
        device_map=places(tiny_model, elsewhere),
        main_device="cpu",
        offload_dir=tmp_path if elsewhere == "disk" else None,
        force_hooks=True,
    )
    devices = [parameter.device.type for parameter in model.parameters()]
    assert ("meta" in devices) == (elsewhere == "disk")
    for _ in range(2):
        found = collect(model, tiny_tokenizer, PROMPTS, SITES, batch_size=2)
        for site in SITES:
            torch.testing.assert_close(found[site], wanted[site], rtol=1e-5, atol=1e-6)
        assert [parameter.device.type for parameter in model.parameters()] == devices
    again = statistics(model, tiny_tokenizer, PROMPTS, SITES, covariance=True)
    torch.testing.assert_close(again.covariance(SITES[0]), figures.covariance(SITES[0]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(run_with(model, tiny_tokenizer, PROMPTS, patch), logits, rtol=1e-5, atol=1e-5)
