"""The streamed pair, small: the checkpoints it writes, and that both ways find the same."""

import pytest
import torch

from experiments.benchmarks import streamed_checkpoints as benchmark
from peft_analysis.updates.weights import Weights


def test_both_ways_find_the_same(tmp_path):
    count = benchmark.write_pair(tmp_path / "base", tmp_path / "tuned", benchmark.SMALL)
    assert count == sum(torch.Size(shape).numel() for _, shape in benchmark.shapes(benchmark.SMALL))
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    weights = Weights.of(tmp_path / "tuned")
    assert weights.model is not None and weights.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    found = [
        benchmark.main(way, str(tmp_path / "base"), str(tmp_path / "tuned")) for way in ("streamed", "whole")
    ]
    assert found[0]["norm"] == pytest.approx(found[1]["norm"], rel=1e-5)
    assert found[0]["norm"] > 0 and found[0]["peak"] > 1e7
