"""The benchmark of an SDXL-sized U-Net, at a small size on whatever device is there."""

import pytest
import torch
from diffusers import UNet2DConditionModel

from experiments.benchmarks import slider_gpu

SMALL = {
    **slider_gpu.SDXL,
    "sample_size": 8,
    "block_out_channels": (32, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 2),
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 64,
}


def test_rows_at_a_small_size(device: torch.device) -> None:
    settings = slider_gpu.Settings(config=SMALL, images=2, steps=5, rounds=1)
    bare, slid, training = slider_gpu.measured(settings, device, torch.float32)
    assert [row["rows"] for row in (bare, slid, training)] == [4, 4, 2]
    assert bare["images_per_second"] == pytest.approx(bare["rows_per_second"] / 10)
    assert bare["teraflops"] < slid["teraflops"] < 1.2 * bare["teraflops"]  # a slider's factors are thin
    assert training["teraflops"] > 0.5 * bare["teraflops"]  # half the rows, forwards and backwards
    for row in (bare, slid, training):
        seconds = row["milliseconds"] / 1e3
        assert row["teraflops_per_second"] == pytest.approx(row["teraflops"] / seconds)


def test_weights_are_finite_drawn_from_the_seed_and_as_many_as_published() -> None:
    settings = slider_gpu.Settings(config=SMALL)
    one, same = (slider_gpu.build(settings, torch.device("cpu"), torch.float32) for _ in range(2))
    for mine, other in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(mine, other)
    out = one(**slider_gpu.inputs(settings, 2, torch.device("cpu"), torch.float32))[0]
    assert out.shape == (2, 4, 8, 8)
    assert bool(out.isfinite().all())
    with torch.device("meta"):
        whole = UNet2DConditionModel(**slider_gpu.SDXL)
    assert sum(parameter.numel() for parameter in whole.parameters()) == 2_567_463_684


def test_without_cuda_the_row_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (row,) = slider_gpu.run()
    assert "no CUDA" in row["not_measured"]
