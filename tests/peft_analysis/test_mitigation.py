"""Scaled intruders against the formula on dense float64 matrices, and against peft's own function."""

import warnings

import pytest
import torch
from torch import nn

from manifolds import LowRank
from peft_analysis.base_svd import SVDCache
from peft_analysis.errors import UpdateError
from peft_analysis.intruders import intruders
from peft_analysis.mitigation import intruder_part, mitigate
from peft_analysis.updates import Weights, WeightUpdate


def normal(*shape, seed=0, dtype=torch.float64, device="cpu"):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def mitigated(W, change, factor, side, epsilon=0.5, k=10):
    """The tuned matrix with its intruders scaled, by whole decompositions."""
    tuned = W + change
    U0, _, V0 = torch.linalg.svd(W, full_matrices=False)
    U, S, V = torch.linalg.svd(tuned, full_matrices=False)
    cosines = U.T @ U0 if side == "left" else V @ V0.T
    places = [j for j in range(min(k, len(S))) if cosines[j].abs().max() < epsilon]
    return tuned + (factor - 1) * sum(S[j] * U[:, [j]] @ V[[j]] for j in places), len(places)


class Layers(nn.Module):
    """One of each layout."""

    def __init__(self, dtype, device):
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.linear = nn.Linear(18, 26)
        self.turned = Conv1D(26, 18)
        self.convolution = nn.Conv2d(4, 20, 3)
        self.to(device, dtype).requires_grad_(False)
        for seed, parameter in enumerate(self.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=seed, device=device) / 5)


NAMES = ["linear.weight", "turned.weight", "convolution.weight"]


@pytest.mark.parametrize("factor", [0.0, 0.75, 1.0, -0.5, 2.0])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("form", ["low rank", "dense"])
def test_every_layout_follows_the_formula(factor, side, form, device):
    model = Layers(torch.float64, device)
    shapes = {name: model.get_parameter(name).flatten(1).shape for name in NAMES}
    values = {}
    for seed, (name, (m, n)) in enumerate(shapes.items()):
        change = LowRank(
            normal(m, 2, seed=seed, device=device), normal(2, n, seed=seed + 9, device=device) / 4
        )
        values[name] = (
            change if form == "low rank" else change.dense().reshape(model.get_parameter(name).shape)
        )
    values["linear.bias"] = normal(26, device=device)
    update = WeightUpdate.from_tensors(values, base=Weights.of_module(model))
    found = mitigate(update, factor, side=side, cache=SVDCache())
    assert list(found) == list(update) and found.base is update.base
    assert torch.equal(found["linear.bias"], values["linear.bias"])
    for name in NAMES:
        wanted, count = mitigated(update.base_matrix(name), dense(update.matrix(name)), factor, side)
        assert count in (1, 2)
        got = update.base_matrix(name) + dense(found.matrix(name))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
        assert found.dense(name).shape == model.get_parameter(name).shape
        assert isinstance(found[name], LowRank) == (form == "low rank")
        assert found.entries[name].details["mitigated"]["factor"] == factor


def dense(value):
    return value.dense() if isinstance(value, LowRank) else value


def test_without_intruders_nothing_changes(device):
    W = normal(12, 10, device=device)
    change = LowRank(1e-4 * normal(12, 1, seed=1, device=device), normal(1, 10, seed=2, device=device))
    base = Weights({"w": lambda: W}, shapes={"w": W.shape}, dtypes={"w": W.dtype})
    update = WeightUpdate.from_tensors({"w": change}, base=base)
    assert mitigate(update, 0.0)["w"] is change
    assert intruder_part(W, change).rank == 0 and intruder_part(W.mT, change.mT).shape == (10, 12)


@pytest.mark.parametrize("shape", [(250, 210), (210, 250)])
def test_a_large_matrix_loses_its_intruders(shape, device):
    m, n = shape
    W = normal(m, n, dtype=torch.float32, device=device) / 16
    change = LowRank(
        normal(m, 3, seed=1, device=device).float() / 8, normal(3, n, seed=2, device=device).float() / 4
    )
    part = intruder_part(W, change)
    assert intruders(W, change).count == part.rank == 3 and part.dtype == torch.float32
    assert intruders(W, change - part).count == 0
    wanted, _ = mitigated(W.double(), change.dense().double(), 0.0, "left")
    torch.testing.assert_close((W + change.dense() - part.dense()).double(), wanted, rtol=0, atol=1e-4)


def test_peft_finds_the_same_intruders_and_cuts_what_it_makes_of_them(device):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.Linear(30, 40, bias=False)).to(device).requires_grad_(False)
        model[0].weight.copy_(normal(40, 30, device=device) / 6)
        tuned = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["0"]))
        layer = tuned.base_model.model[0]
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(normal(3, 30, seed=1, device=device) / 5)
            layer.lora_B["default"].weight.copy_(normal(40, 3, seed=2, device=device) / 5)
        W = layer.get_base_layer().weight.detach()
        change = LowRank(2 * layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach())
        lines = []
        reduce_intruder_dimension(tuned, mitigation_lambda=0.3, logging_sink=lines.append)
    found = intruders(W, change)
    assert found.count > 0 and any(line.endswith(f"Intruders: {found.count}") for line in lines)
    exact = change + intruder_part(W, change) * (0.3 - 1)
    theirs = layer.get_delta_weight("intruder_reduced").detach()
    torch.testing.assert_close(exact.truncate(3).dense(), theirs, rtol=0, atol=2e-5)
    assert float((exact.dense() - theirs).norm() / exact.norm()) > 0.01  # what cutting the rank costs


def test_what_makes_no_sense_is_refused():
    W = normal(6, 5)
    base = Weights({"w": lambda: W}, shapes={"w": W.shape}, dtypes={"w": W.dtype})
    update = WeightUpdate.from_tensors({"w": normal(6, 5, seed=1)}, base=base)
    with pytest.raises(UpdateError, match="give it"):
        mitigate(WeightUpdate.from_tensors({"w": W}))
    with pytest.raises(UpdateError, match="factor is nan"):
        mitigate(update, float("nan"))
    with pytest.raises(UpdateError, match="epsilon"):
        mitigate(update, epsilon=2.0)
