"""ΔM and ΔD against torch's norms and cosines of whole matrices, and against peft's own DoRA layer."""

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from manifolds import LowRank
from peft_analysis.directions import direction_change, direction_correlation
from peft_analysis.errors import UpdateError
from peft_analysis.updates import Weights, WeightUpdate


def normal(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("along", ["output", "input"])
@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_against_whole_matrices(shape, along, form, device):
    m, n = shape
    W = normal(m, n, device=device)
    change = LowRank(normal(m, 2, seed=1, device=device), normal(2, n, seed=2, device=device) / 3)
    found = direction_change(W, change if form == "low rank" else change.dense(), along=along)
    dim = 1 if along == "output" else 0
    tuned = W + change.dense()
    lengths = tuned.norm(dim=dim) - W.norm(dim=dim)
    turns = 1 - torch.nn.functional.cosine_similarity(tuned, W, dim=dim)
    torch.testing.assert_close(found.lengths, lengths, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.turns, turns, rtol=1e-6, atol=1e-12)
    assert found.magnitude == pytest.approx(float(lengths.abs().mean()))
    assert found.direction == pytest.approx(float(turns.mean()), abs=1e-12) and found.undefined == 0
    assert found.relative_magnitude == pytest.approx(float(lengths.abs().mean() / W.norm(dim=dim).mean()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("angle", [1e-6, 1e-3, 1.0, 3.0])
def test_a_turn_that_is_known_keeps_its_digits(angle, dtype, device):
    W = torch.tensor([[2.0, 0.0, 0.0]], dtype=dtype, device=device)
    wanted = torch.tensor([[math.cos(angle), math.sin(angle), 0.0]], dtype=torch.float64, device=device) * 5
    change = wanted - W.double()
    for form in (change, LowRank(torch.ones_like(change[:, :1]), change)):
        found = direction_change(W, form)
        assert found.direction == pytest.approx(
            2 * math.sin(angle / 2) ** 2, rel=1e-4 if angle < 1e-5 else 1e-9
        )
        assert found.magnitude == pytest.approx(3)


def test_a_vector_that_comes_or_goes_has_no_turn(device):
    W = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 0.0], [0.1, 0.7]], device=device)
    change = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 1.0], [-0.1, -0.7]], device=device)
    for form in (change, LowRank(change, torch.eye(2, device=device))):
        found = direction_change(W, form)
        assert found.undefined == 2 and found.turns.isnan().tolist() == [True, False, False, True]
        torch.testing.assert_close(
            found.lengths.cpu(), torch.tensor([5.0, 0.0, 2**0.5 - 1, -(0.5**0.5)]), rtol=1e-6, atol=1e-6
        )
        assert found.direction == pytest.approx((1 - 0.5**0.5) / 2, rel=1e-6)
    nothing = direction_change(torch.zeros(2, 2), torch.zeros(2, 2))
    assert nothing.magnitude == 0 and math.isnan(nothing.direction) and math.isnan(nothing.relative_magnitude)


def test_pure_scaling_turns_nothing(device):
    W = normal(20, 30, device=device)
    found = direction_change(W, 0.25 * W)
    assert found.direction < 1e-14
    assert found.magnitude == pytest.approx(0.25 * float(W.norm(dim=1).mean()))
    assert found.relative_magnitude == pytest.approx(0.25)


def test_the_rows_are_the_vectors_whose_lengths_dora_trains(device):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(12, 8, bias=False)).to(device).requires_grad_(False)
        W = model[0].weight.detach().clone()
        tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["0"], use_dora=True))
        layer = tuned.base_model.model[0]
        with torch.no_grad():
            layer.lora_B["default"].weight.copy_(normal(8, 2, device=device) / 3)
            magnitude = layer.lora_magnitude_vector["default"].weight
            magnitude.mul_(torch.linspace(0.5, 1.5, 8, device=device))
        merged = tuned.merge_and_unload()[0].weight.detach()
    found = direction_change(W, merged - W)
    torch.testing.assert_close(found.lengths, magnitude.detach() - W.norm(dim=1), rtol=1e-4, atol=1e-5)


def test_correlation_over_matrices_is_scipys(device):
    matrices = {f"w{i}": normal(8, 6, seed=i, device=device) for i in range(7)}
    values = {
        name: (0.1 + 0.1 * i) * normal(8, 6, seed=50 + i, device=device) for i, name in enumerate(matrices)
    }
    values["bias"] = normal(8, device=device)
    base = Weights(
        {name: (lambda value=value: value) for name, value in matrices.items()},
        shapes={name: value.shape for name, value in matrices.items()},
        dtypes={name: value.dtype for name, value in matrices.items()},
    )
    found = direction_correlation(WeightUpdate.from_tensors(values, base=base))
    result = scipy.stats.pearsonr(found.magnitudes, found.directions)
    assert found.correlation == pytest.approx(result.statistic)
    np.testing.assert_allclose((found.low, found.high), result.confidence_interval(), rtol=1e-9)
    assert found.names == tuple(matrices) and found.reliable == (found.low > 0 or found.high < 0)
    for count, reason in ((2, "too few"), (3, "no interval")):
        few = WeightUpdate.from_tensors({f"w{i}": values[f"w{i}"] for i in range(count)}, base=base)
        assert reason in direction_correlation(few).reason and not direction_correlation(few).reliable
    alike = WeightUpdate.from_tensors({name: 0.0 * matrices[name] for name in matrices}, base=base)
    assert "no spread" in direction_correlation(alike).reason
    with pytest.raises(UpdateError, match="no matrix"):
        direction_correlation(WeightUpdate.from_tensors({"bias": values["bias"]}, base=base))


def test_what_makes_no_sense_is_refused():
    W = normal(4, 3)
    for call, message in [
        (lambda: direction_change(W, W.mT), "shape"), (lambda: direction_change(W, W * torch.nan), "NaN"),
        (lambda: direction_change(W * torch.nan, W), "NaN"), (lambda: direction_change(W[0], W[0]), "matrix"),
        (lambda: direction_change(W, LowRank(W * torch.inf, W.mT @ W)), "NaN or infinity"),
    ]:  # fmt: skip
        with pytest.raises(UpdateError, match=message):
            call()
